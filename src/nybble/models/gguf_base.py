"""A GGUF file as a base: it becomes a model folder in the cache, once, which everything else reads like any other.

Tensors are decoded and written a few at a time, so memory never holds the model; what the file has in blocks becomes
bfloat16, which training computes in. Names and arrangements of tensors are those that exports write, taken back
(`gguf_families`, `gguf_layout`). The config comes from transformers' reader, or is made of the file's settings where
that does not know the family; a config by which an export would write other settings than the file's is refused, so
no setting is silently lost. Tokenizer and chat template come from transformers' reader.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nybble.errors import CannotRunError, ModelError
from nybble.guard import brief, library_faults, shown
from nybble.models.gguf_families import FAMILIES, changes_of, head_dim, restored
from nybble.models.gguf_layout import add_settings, name_map, place_of, rotary_factors, text_name
from nybble.models.packed_cache import PackedCache
from nybble.models.skeleton import model_without_weights
from nybble.recipe import QuantizationSection
from nybble.storage.atomic import write_text
from nybble.storage.cache import Cache, digest
from nybble.storage.shards import plan_shards

_VERSION = 1  # part of every key; raise it when what is written changes
_SHARD_BYTES = 256 << 20  # memory holds one shard
_MAGIC = b"GGUF"
_STOPS = ("eos_token_id", "eot_token_id", "eom_token_id")
_ROTARY = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
# Settings that say nothing about what is computed, or say it again.
_HARMLESS = (".rope.scaling.finetuned", ".use_parallel_residual", ".file_type", ".tokenizer_pre", ".vocab_size")
# Llama 3's checkpoints differ in one of these numbers only, and a GGUF holds what comes of them.
_LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3_CONTEXT = 8192
# What the config of a family calls a setting of a GGUF; the first that the family has counts.
_NAMES = {
    "context_length": ("max_position_embeddings",),
    "embedding_length": ("hidden_size",),
    "block_count": ("num_hidden_layers",),
    "feed_forward_length": ("intermediate_size", "ffn_hidden_size"),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads", "num_kv_heads"),
    "attention.key_length": ("head_dim",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    "attention.clamp_kqv": ("clip_qkv",),
    "attention.scale": ("attention_multiplier",),
    "attention.sliding_window": ("sliding_window",),
    "embedding_scale": ("embedding_multiplier",),
    "residual_scale": ("residual_multiplier",),
    "logit_scale": ("logits_scaling", "logit_scale"),
    "vocab_size": ("vocab_size",),
}


def folder_of_gguf(file: Path) -> Path:
    """The model folder that stands for a GGUF file, from the cache or made now.

    Raises:
        ModelError: the file is damaged, of a family or type that cannot be read, or has settings that would be lost.
        CannotRunError: the package gguf is missing, or there is no room in the cache.
    """
    with file.open("rb") as stream:
        if stream.read(4) != _MAGIC:
            raise ModelError(f"{file} is a file, and no GGUF; give a model folder, a hub id or a .gguf file")
    try:
        import gguf
    except ImportError as error:
        raise CannotRunError("reading a GGUF needs the package gguf; run pip install 'nybble[gguf]'") from error
    limit = QuantizationSection().cache_limit
    key = digest(_VERSION, PackedCache(limit).content(file))
    cache = Cache("packed", limit)
    if (found := cache.find(key)) is None:
        with library_faults(f"{file} cannot be read as GGUF", ModelError, "download it again"):
            opened = _Opened(gguf, file)
        size = 2 * sum(math.prod(tensor.shape.tolist()) for tensor in opened.tensors.values())
        if why_not := cache.store(key, size, opened.write):
            raise CannotRunError(f"{file}: decoded it {why_not}; make room, or set NYBBLE_CACHE to another disk")
        found = cache.path(key)
    return found


class _Opened:
    """A GGUF file whose family, settings and tensors have been checked."""

    def __init__(self, gguf: Any, file: Path) -> None:
        self.gguf, self.file = gguf, file
        reader = gguf.GGUFReader(file)
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.fields = {name: field.contents() for name, field in reader.fields.items() if name.count(".")}
        self.architecture = str(self.fields.get("general.architecture"))
        if int(self.fields.get("split.count", 1)) > 1:
            raise ModelError(f"{file} is one part of several; join them with llama-gguf-split --merge")
        kinds = [kind for kind, family in FAMILIES.items() if family.architecture == self.architecture]
        if not kinds:
            known = sorted({family.architecture for family in FAMILIES.values()})
            raise ModelError(
                f"{file}: architecture {shown(self.architecture)} is not supported; allowed: {', '.join(known)}"
            )
        self._check_types()
        self.config = self._matching(kinds)
        self.family = FAMILIES[self.config.model_type]
        self.places = self._places()

    def _check_types(self) -> None:
        """Raise ModelError if a tensor has a type that the package cannot decode."""
        for kind in {tensor.tensor_type for tensor in self.tensors.values()}:
            size = self.gguf.GGML_QUANT_SIZES[kind][1]
            try:
                self.gguf.dequantize(torch.zeros(1, size, dtype=torch.uint8).numpy(), kind)
            except NotImplementedError as error:
                raise ModelError(
                    f"{self.file}: tensors of type {kind.name} cannot be decoded (package gguf); give a file of F16, "
                    "Q8_0 or K-quants"
                ) from error

    def _matching(self, kinds: list[str]) -> Any:
        """The config of one of `kinds` with which an export would write the file's settings.

        Raises:
            ModelError: there is none; the message names the first setting that differs.
        """
        reasons = []
        for config in self._candidates(kinds):
            try:
                self._complete(config)
                reason = self._difference(config)
            except Exception as error:  # noqa: BLE001 - numbers of the file of which transformers makes no model
                reason = f"its settings make no {config.model_type!r} ({brief(error)})"
            if reason is None:
                return config
            reasons.append(reason)
        raise ModelError(
            f"{self.file}: {(reasons or ['no config can be made of its settings'])[0]}; give the model in safetensors"
        )

    def _candidates(self, kinds: list[str]) -> Iterator[Any]:
        from transformers import AutoConfig
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        try:
            read = AutoConfig.from_pretrained(self.file.parent, gguf_file=self.file.name)
        except Exception:  # noqa: BLE001 - it does not know the family, which is tried below
            read = None
        if read is not None and read.model_type in FAMILIES:
            yield read
        yield from (self._made(CONFIG_MAPPING[kind]) for kind in kinds if kind in CONFIG_MAPPING)

    def _made(self, cls: Any) -> Any:
        """A config of the class `cls`, of the settings that all families call alike."""
        known = cls().to_dict()
        settings: dict[str, Any] = {}
        for name, own in _NAMES.items():
            value = self.fields.get(f"{self.architecture}.{name}")
            if value is not None and (found := next((one for one in own if one in known), None)):
                settings[found] = value
        return cls(**settings)

    def _complete(self, config: Any) -> None:
        """Set what the file tells otherwise than by settings."""
        config.vocab_size = int(self.tensors["token_embd.weight"].shape[1])
        config.tie_word_embeddings = "output.weight" not in self.tensors
        config.dtype = torch.bfloat16
        vars(config).pop("_name_or_path", None)
        for name, own in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
            setattr(config, f"{name}_token_id", self.fields.get(f"tokenizer.ggml.{own}_token_id"))
        config.architectures = [type(model_without_weights(config)).__name__]
        self._complete_rotation(config)
        if "query_pre_attn_scalar" in vars(config):  # llama.cpp tells Gemma's 27B, of another scale, by its layers
            is_largest = config.num_hidden_layers in (46, 62)
            width = config.hidden_size // config.num_attention_heads
            config.query_pre_attn_scalar = width if is_largest else head_dim(config)

    def _complete_rotation(self, config: Any) -> None:
        """Set the waves of the rotary embedding: of full attention, of windows, and Llama 3's."""
        theta = self.fields.get(f"{self.architecture}.rope.freq_base")
        local = self.fields.get(f"{self.architecture}.rope.freq_base_swa")
        rope = copy.deepcopy(type(config)().rope_parameters)
        if isinstance(rope.get("full_attention"), dict):
            rope["full_attention"]["rope_theta"] = theta or rope["full_attention"]["rope_theta"]
            rope["sliding_attention"]["rope_theta"] = local or rope["sliding_attention"]["rope_theta"]
            config.rope_parameters = rope
        elif theta is not None:
            config.rope_parameters = {**(config.rope_parameters or {"rope_type": "default"}), "rope_theta": theta}
        stored = self._stored_factors()
        if "rope_freqs.weight" in stored and not FAMILIES[config.model_type].rotations:
            rope = {**(config.rope_parameters or {}), **_LLAMA3, "factor": float(stored["rope_freqs.weight"].max())}
            config.rope_parameters = rope | {"original_max_position_embeddings": _LLAMA3_CONTEXT}

    def _stored_factors(self) -> dict[str, Tensor]:
        return {name: self._decoded(name).float() for name in _ROTARY if name in self.tensors}

    def _difference(self, config: Any) -> str | None:
        """Which setting an export of `config` would write otherwise, in words."""
        family = FAMILIES[config.model_type]
        if family.refusal is not None and (reason := family.refusal(config)):
            return f"it would be {reason}"
        writer = self.gguf.GGUFWriter(None, family.architecture)
        add_settings(self.gguf, writer, family, config)
        written = writer.kv_data[0]
        for name, value in written.items():
            ours = getattr(value.value, "value", value.value)
            if name in self.fields and not _equal(ours, self.fields[name]):
                return (
                    f"{name} is {shown(self.fields[name])}, which a model of type {config.model_type!r} does not have"
                )
        more = [name for name in self.fields if name.startswith(f"{family.architecture}.") and name not in written]
        if more := [name for name in more if not name.endswith(_HARMLESS)]:
            return f"{more[0]} is {shown(self.fields[more[0]])}, which no {config.model_type!r} of transformers has"
        ours, stored = rotary_factors(config), self._stored_factors()
        for name in {*ours, *stored}:
            if (
                name not in ours
                or name not in stored
                or not torch.allclose(torch.from_numpy(ours[name]), stored[name], rtol=1e-4)
            ):
                return f"{name} holds other factors of rotation than a {config.model_type!r} of transformers has"
        return None

    def _places(self) -> dict[str, str]:
        """The tensors of the folder and their places in the file.

        Raises:
            ModelError: the file lacks a tensor, or has one that the model has no place for.
        """
        model = model_without_weights(self.config)
        table = name_map(self.gguf, self.family, self.config)
        tied = self.config.tie_word_embeddings or self.family.tied
        names = [name for name in model.state_dict() if not (tied and name.startswith("lm_head."))]
        places = {name: place_of(table, text_name(name)) for name in names}
        missing = [name for name in names if places[name] not in self.tensors]
        if missing:
            raise ModelError(f"{self.file}: {len(missing)} tensors are missing, e.g. {missing[0]}; download it again")
        more = sorted(self.tensors.keys() - set(places.values()) - set(_ROTARY))
        if more:
            raise ModelError(
                f"{self.file}: a {self.config.model_type} has no place for {len(more)} tensors, e.g. {more[0]}; give "
                "the model in safetensors"
            )
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        for name in names:
            held = tuple(reversed(self.tensors[str(places[name])].shape.tolist()))
            if math.prod(held) != math.prod(shapes[name]):
                raise ModelError(f"{self.file}: {name} has the shape {held}, expected was {shapes[name]}")
        return {name: str(place) for name, place in places.items()}

    def _decoded(self, place: str) -> Tensor:
        tensor = self.tensors[place]
        kinds = self.gguf.GGMLQuantizationType
        weight = torch.from_numpy(self.gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        kept = {kinds.F32: torch.float32, kinds.F16: torch.float16}.get(tensor.tensor_type, torch.bfloat16)
        return weight.to(kept)

    def _read(self, name: str) -> Tensor:
        """A tensor as a checkpoint has it."""
        decoded = self._decoded(self.places[name])
        changes = changes_of(self.family, text_name(name), self.config)
        return restored(decoded.float(), changes).to(decoded.dtype).contiguous()

    def write(self, folder: Path) -> None:
        """Write config, tokenizer and weights into `folder`.

        Raises:
            ModelError: transformers cannot read the tokenizer.
        """
        from safetensors.torch import save_file

        self._write_tokenizer(folder)
        self.config.save_pretrained(folder)
        stops = [self.fields.get(f"tokenizer.ggml.{name}") for name in _STOPS]
        generation = {"eos_token_id": sorted({int(one) for one in stops if one is not None})}
        if generation["eos_token_id"]:
            write_text(folder / "generation_config.json", json.dumps(generation))
        sizes = {name: 2 * math.prod(self.tensors[place].shape.tolist()) for name, place in self.places.items()}
        shards = plan_shards("model", sizes, _SHARD_BYTES)
        for shard, names in shards.files.items():
            save_file({name: self._read(name) for name in names}, folder / shard, metadata={"format": "pt"})
        shards.write_index(folder)

    def _write_tokenizer(self, folder: Path) -> None:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        where: dict[str, Any] = {"pretrained_model_name_or_path": self.file.parent, "gguf_file": self.file.name}
        faults = []
        for cls in (AutoTokenizer, PreTrainedTokenizerFast):
            try:
                cls.from_pretrained(**where).save_pretrained(folder)
                return self._drop_added_tokens(folder / "tokenizer.json")
            except Exception as error:  # noqa: BLE001 - a library's reader of a foreign file
                faults.append(brief(error))
        raise ModelError(
            f"{self.file}: transformers cannot read its tokenizer ({faults[0]}); give the model in safetensors"
        )

    def _drop_added_tokens(self, file: Path) -> None:
        """Take out tokens that the reader adds, for which the model has no embeddings: `<|endoftext|>` of GPT-2."""
        content = json.loads(file.read_text(encoding="utf-8"))
        n_tokens = self.config.vocab_size
        kept = [token for token in content["added_tokens"] if token["id"] < n_tokens]
        if len(kept) < len(content["added_tokens"]):
            content["added_tokens"] = kept
            file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _equal(ours: Any, stored: Any) -> bool:
    """Whether two settings say the same; a list of equal numbers is that number."""
    if isinstance(ours, list) or isinstance(stored, list):
        a = ours if isinstance(ours, list) else [ours] * len(stored)
        b = stored if isinstance(stored, list) else [stored] * len(a)
        return len(a) == len(b) and all(_equal(*pair) for pair in zip(a, b, strict=True))
    if isinstance(ours, float) or isinstance(stored, float):
        return math.isclose(ours, stored, rel_tol=1e-5)
    return bool(ours == stored)
