"""Finding the model that the user names: a local folder that holds a causal language model in safetensors.

Everything that can be wrong with a folder is reported here, before any memory is used: no such folder, no config, not a
causal model, a pickle, a shard that is missing or cut short, a 4-bit format that is not bitsandbytes'.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nybble.errors import CannotRunError, ModelError
from nybble.guard import as_path, library_faults, shown
from nybble.models.folder_checks import check_fits, read_header, read_numbers, weight_files
from nybble.models.text_part import is_multimodal, owner_of, place_of, text_config, text_section
from nybble.recipe import ModelSection

_WEIGHTS = "*.safetensors"
_SAMPLE = 4096  # bytes of each tensor that enter a fingerprint
_ADVICE = "give a causal language model, or a multimodal one that contains one"
_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "README.md")


@dataclass(frozen=True)
class ModelSource:
    """A model folder that has been checked."""

    name: str  # as the user named it; what an adapter names as its base
    folder: Path
    config: Any  # transformers' PretrainedConfig
    quantization: dict[str, Any] | None  # the folder's own quantization_config

    @cached_property
    def text_config(self) -> Any:
        """The config of the language model alone; `config` itself where the model is nothing else."""
        return text_config(self.config)

    @property
    def is_multimodal(self) -> bool:
        """True if the folder holds towers beside the language model that is loaded."""
        return is_multimodal(self.config)

    @property
    def is_4bit(self) -> bool:
        """True if the model is stored in bitsandbytes' 4-bit layout."""
        return bool(self.quantization and self.quantization.get("load_in_4bit"))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over name, type, shape and a sample of every tensor, whatever files they are in.

        A few KiB of each tensor distinguish two models without reading gigabytes.
        """
        parts = []
        for shard in sorted(self.folder.glob(_WEIGHTS)):
            tensors, begin = read_header(shard)
            with shard.open("rb") as file:
                for name, tensor in tensors.items():
                    file.seek(begin + tensor.first + tensor.n_bytes // 2)
                    sample = file.read(min(_SAMPLE, tensor.n_bytes - tensor.n_bytes // 2))
                    parts.append((name, tensor.dtype, tensor.shape, hashlib.sha256(sample).hexdigest()))
        return hashlib.sha256(json.dumps(sorted(parts)).encode()).hexdigest()


def find_model(section: ModelSection) -> ModelSource:
    """Locate and check the model that `section` names; a hub id is downloaded (safetensors only).

    Raises:
        ModelError: it is missing, damaged, or not a causal language model.
        CannotRunError: a hub id cannot be fetched.
    """
    name = section.model_name_or_path
    if not name:
        raise ModelError("no model is given; set --model_name_or_path to a folder or a hub id")
    folder = find_folder(name, section.model_revision, with_code=section.trust_remote_code)
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder} contains an adapter without its base model; give the folder of the base model, and this one as "
            "--adapter_name_or_path to train it further"
        )
    if (folder / "run.json").is_file():
        raise ModelError(
            f"{folder} is a run and no model; give the folder of its base model, and this one as "
            "--adapter_name_or_path to train its adapter further"
        )
    config = read_config(folder, section.trust_remote_code)
    if (folder / "generation_config.json").is_file():
        read_numbers(folder / "generation_config.json")
    tensors = [tensor for file in weight_files(folder) for tensor in read_header(file)[0].values()]
    if not section.trust_remote_code:
        check_fits(folder, config, tensors)
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None and not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    if quantization and not quantization.get("load_in_4bit"):
        method = quantization.get("quant_method")
        raise ModelError(f"{folder}: stored as {method!r}; give the 16-bit model, or one in bitsandbytes' 4-bit format")
    # A local model is named by its full path: an adapter must find its base from any working directory.
    return ModelSource(str(Path(name).resolve()) if Path(name).exists() else name, folder, config, quantization)


def find_folder(name: str, revision: str | None = None, *, with_weights: bool = True, with_code: bool = False) -> Path:
    """The local folder for a path, a GGUF file or a hub id; weights and code of a hub id are fetched only if asked for.

    Raises:
        ModelError: a path that does not exist, or a hub id that does not.
        CannotRunError: the hub cannot be reached.
    """
    path = as_path(name, ModelError)
    if path.is_dir():
        return path
    if path.is_file():
        from nybble.models.gguf_base import folder_of_gguf  # builds models, of configs that are checked here

        return folder_of_gguf(path)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelError(f"model folder {name!r} does not exist; give a folder that exists, or a hub id")
    return _download(name, revision, [*_FILES, *([_WEIGHTS] * with_weights), *(["*.py"] * with_code)])


def _download(name: str, revision: str | None, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except HFValidationError as error:
        raise ModelError(f"{name!r} is neither a folder on this machine nor a hub id") from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"{name!r} is neither a folder on this machine nor a hub id that you can access") from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise CannotRunError(
            f"{name!r} is not a folder on this machine, and the hub cannot be reached; give a local folder, or connect "
            "to the network"
        ) from error


def read_config(folder: Path, trust_remote_code: bool) -> Any:
    """transformers' config of a folder.

    Raises:
        ModelError: there is none, or it is not the config of a causal language model.
    """
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto as auto

    file = folder / "config.json"
    if (folder / "model_index.json").is_file():
        raise ModelError(f"{folder} is a pipeline of diffusers, which makes images; {_ADVICE}")
    if not file.is_file():
        raise ModelError(f"{folder} contains no config.json, so it is not a model folder; give one that contains it")
    content = read_numbers(file)
    if content.get("transformers_weights"):
        raise ModelError(
            f"{file}: transformers_weights names a file; only model.safetensors is allowed; rename that file"
        )
    kind, has_code = content.get("model_type"), bool(content.get("auto_map"))
    tables = (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    )
    if has_code and not any(kind in table for table in tables if isinstance(kind, str)) and not trust_remote_code:
        raise ModelError(
            f"{folder}: a {shown(kind)} model runs Python code of its own (auto_map); read that code, then set "
            "--trust_remote_code, or give a model that transformers knows"
        )
    with library_faults(f"{file} cannot be used", ModelError, "give the folder of a causal language model"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if not (trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})):
        _check_generates(folder, config)
    return config


def _check_generates(folder: Path, config: Any) -> None:
    """Check that transformers has a causal language model for `config`, alone or in a multimodal model.

    Raises:
        ModelError: it has none; the message names what the model is.
        CannotRunError: a package that the multimodal class needs is missing.
    """
    if other := _other_kind(config):
        raise ModelError(f"{folder} is {other} of type {config.model_type!r}; {_ADVICE}")
    if is_multimodal(config):
        try:
            place_of(config)
        except ModelError as error:
            raise ModelError(f"{folder}: {error}") from error


def _other_kind(config: Any) -> str | None:
    """What a model is that is no causal language model and contains none, in words; None where it may be."""
    from transformers.models.auto import modeling_auto as auto

    kind = config.model_type
    masked = kind in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if is_multimodal(config):
        if config.is_encoder_decoder or text_section(config).is_encoder_decoder:
            return "a multimodal encoder-decoder"
        return "a diffusion model" if "Diffusion" in str(owner_of(config)) else None
    if kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        looks_ahead = not (getattr(config, "is_decoder", False) or getattr(config, "causal", False))
        is_encoder = masked and looks_ahead and not config.is_encoder_decoder
        return (
            "an encoder, which sees the tokens that it should predict (is_decoder is not true)," if is_encoder else None
        )
    if config.is_encoder_decoder:
        return "an encoder-decoder"
    if kind in auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return "a multimodal model without a text model of its own,"
    return "an encoder" if masked else "a model"
