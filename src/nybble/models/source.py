"""From what the user names to a local folder that is known to hold a causal language model in safetensors.

Everything that can be wrong with a folder is found here, before memory is spent: no such folder, no config, not a
causal model, a pickle, a shard that is missing or cut short, a 4-bit format that is not ours.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nybble.errors import CannotRunError, ModelError
from nybble.recipe import ModelSection

_WEIGHTS = "*.safetensors"
_SAMPLE = 4096  # bytes of each tensor that enter a fingerprint
_FILES = ("*.json", _WEIGHTS, "*.jinja", "*.model", "*.txt", "README.md")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class ModelSource:
    """A checked model folder."""

    name: str  # what the user gave; what an adapter names as its base
    folder: Path
    config: Any  # transformers' PretrainedConfig
    quantization: dict[str, Any] | None  # the folder's own quantization_config

    @property
    def is_4bit(self) -> bool:
        """Stored in bitsandbytes' 4-bit layout."""
        return bool(self.quantization and self.quantization.get("load_in_4bit"))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over name, type, shape and a sample of every tensor, however they are spread over files.

        A few KiB of a tensor tell two models apart without reading gigabytes.
        """
        parts = []
        for shard in sorted(self.folder.glob(_WEIGHTS)):
            with shard.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
                for name, facts in header.items():
                    if name == "__metadata__":
                        continue
                    first, last = facts["data_offsets"]
                    file.seek(8 + length + first + (last - first) // 2)
                    sample = file.read(min(_SAMPLE, last - first - (last - first) // 2))
                    parts.append((name, facts["dtype"], facts["shape"], hashlib.sha256(sample).hexdigest()))
        return hashlib.sha256(json.dumps(sorted(parts)).encode()).hexdigest()


def find_model(section: ModelSection) -> ModelSource:
    """Locate and check the model that `section` names; a hub id is downloaded (safetensors only).

    Raises:
        ModelError: it is missing, damaged, or no causal language model.
        CannotRunError: a hub id cannot be fetched.
    """
    name = section.model_name_or_path
    if not name:
        raise ModelError("no model given; set --model_name_or_path to a folder or a hub id")
    folder = find_folder(name, section.model_revision)
    config = read_config(folder, section.trust_remote_code)
    _check_shards(folder)
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None and not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    if quantization and not quantization.get("load_in_4bit"):
        method = quantization.get("quant_method")
        raise ModelError(f"{folder}: stored as {method!r}; give the 16-bit model, or one in bitsandbytes' 4 bits")
    # A local folder is named by its full path: an adapter must find its base from any working directory.
    return ModelSource(str(folder.resolve()) if Path(name).is_dir() else name, folder, config, quantization)


def find_folder(name: str, revision: str | None = None, with_weights: bool = True) -> Path:
    """The local folder for a path or a hub id; of a hub id, the weights are fetched only where they are wanted.

    Raises:
        ModelError: a path that does not exist, or a hub id that does not.
        CannotRunError: the hub cannot be reached.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"{name} is a file; give the folder that holds config.json")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelError(f"model folder {name!r} does not exist")
    return _download(name, revision, [file for file in _FILES if with_weights or file != _WEIGHTS])


def _download(name: str, revision: str | None, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except HFValidationError as error:
        raise ModelError(f"{name!r} is neither a folder here nor a hub id") from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"{name!r}: no folder here, and no such model on the hub (or it is private)") from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise CannotRunError(
            f"{name!r} is no folder here, and the hub cannot be reached; give a local folder, or connect"
        ) from error


def read_config(folder: Path, trust_remote_code: bool) -> Any:
    """transformers' config of a folder.

    Raises:
        ModelError: there is none, or it is not that of a causal language model.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds no config.json; it is not a model folder")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise ModelError(f"{folder}/config.json cannot be used: {_first_line(error)}") from error
    remote = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not remote:
        raise ModelError(f"{folder} is a {config.model_type!r} model; Nybble trains causal language models")
    return config


def _check_shards(folder: Path) -> None:
    from safetensors import SafetensorError, safe_open

    shards = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            needed = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (json.JSONDecodeError, KeyError, AttributeError, UnicodeDecodeError) as error:
            raise ModelError(f"{index}: not a safetensors index; download the model again") from error
        missing = sorted(needed - {shard.name for shard in shards})
        if missing:
            raise ModelError(f"{folder}: {len(missing)} of {len(needed)} shards are missing, e.g. {missing[0]}")
    if not shards:
        if any(path for pattern in _PICKLES for path in folder.glob(pattern)):
            raise ModelError(f"{folder} holds weights only as pickle, which can run code; convert it to safetensors")
        raise ModelError(f"{folder} holds no .safetensors file")
    for shard in shards:
        try:
            with safe_open(shard, framework="pt"):
                pass
        except SafetensorError as error:
            raise ModelError(f"{shard}: damaged or cut short ({_first_line(error)}); download it again") from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(". ")
