"""An adapter's two files, read as data: nothing in them is imported or trusted unchecked.

PEFT would take names of modules as regular expressions, ranks as sizes to allocate and a Megatron section as a module
to import. So its config is rebuilt here from the tensors themselves, and PEFT is given that one. The keys of
`alpha_pattern` alone must be matched, and for experts those of `rank_pattern`; they are taken only where matching them
cannot take long.

An adapter on a stack of experts (PEFT's `target_parameters`) is known here by the name of the stack. PEFT stores it by
the experts' name: of two stacks the second under `experts`, the first under `experts.base_layer`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator
from torch import nn

from nybble.errors import ModelError
from nybble.guard import check_links, read_object, shown
from nybble.models.experts import expert_stacks
from nybble.models.folder_checks import StoredTensor, read_header
from nybble.nn import Stack
from nybble.recipe import check_pattern, first_fault

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_ADVICE = "give the adapter folder as PEFT saved it"
_A, _B = ("lora_A.weight", "lora_embedding_A"), ("lora_B.weight", "lora_embedding_B")
# Settings beyond those in `Settings` that change nothing once an adapter is trained.
_OF_TRAINING = {
    *("task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "target_modules", "exclude_modules"),
    *("lora_dropout", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "megatron_core"),
    "target_parameters",  # the tensors say what is adapted
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config"),
}
_Name = Annotated[str, StringConstraints(pattern=r"^[\w.]{1,200}$")]  # a pattern is refused: PEFT would match it as one
_Index = Annotated[int, Field(ge=0, lt=1 << 24)]  # of a token
ROWS_OF_TOKENS = ".token_adapter.trainable_tokens_delta"
_STACKS = ("gate_up_proj", "up_proj", "down_proj")  # of experts, in the order in which PEFT wraps them
# What a regular expression may be made of, so that matching a name with it takes no longer than reading the name often.
_PATTERN = re.compile(r"[\w.^$|()\[\]*+?\\-]{1,200}")
_MOST_REPETITIONS = 3


class Settings(BaseModel):
    """The settings in adapter_config.json that decide what the adapter computes."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, frozen=True)

    peft_type: str
    base_model_name_or_path: str | None = None
    r: int = Field(ge=1, le=1 << 16)
    lora_alpha: float
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    lora_bias: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: list[_Name] | None = None
    trainable_token_indices: list[_Index] | dict[_Name, list[_Index]] | None = None
    ensure_weight_tying: bool = False
    alpha_pattern: dict[str, float] | None = None

    @field_validator("alpha_pattern")
    @classmethod
    def _patterns(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for pattern in value or ():
            _check_quick(pattern)
        return value

    @property
    def unknown(self) -> list[str]:
        """Names of further settings that change what is computed."""
        return [name for name, value in (self.model_extra or {}).items() if value and name not in _OF_TRAINING]


def _check_quick(pattern: str) -> None:
    """Raise ValueError for a regular expression that could take long to match."""
    repeats_a_group = re.search(r"\)[*+?]", pattern) is not None
    is_short = _PATTERN.fullmatch(pattern) and len(re.findall(r"[*+?]", pattern)) <= _MOST_REPETITIONS
    if repeats_a_group or not is_short:
        raise ValueError(f"matching {shown(pattern)} could take long; replace it by the names of the layers")
    check_pattern(pattern)


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter folder that has been checked."""

    folder: Path
    settings: Settings
    tensors: Mapping[str, StoredTensor]  # names without the prefix that every adapter has; of experts, by their stack
    stored: Mapping[str, str]  # the name in the file, without the prefix, of each of them
    stacks: frozenset[str]  # the adapted modules that are stacks of experts

    def ranks(self) -> dict[str, int]:
        """The rank of each adapted module, by its tensors; of a stack, that of one expert.

        Raises:
            ModelError: two factors do not belong together.
        """
        found = {}
        for name, tensor in self.tensors.items():
            kind = next((i for i, end in enumerate(_A) if name.endswith(f".{end}")), None)
            if kind is None:
                continue
            module = name.removesuffix(f".{_A[kind]}")
            other = self.tensors.get(f"{module}.{_B[kind]}")
            if other is None or len(tensor.shape) < 2 or len(other.shape) < 2 or tensor.shape[0] != other.shape[1]:
                raise ModelError(
                    f"{self.folder}: {shown(module)} lacks a factor, or has two that do not fit; {_ADVICE}"
                )
            found[module] = self._rank_of_stack(module, tensor) if module in self.stacks else tensor.shape[0]
        if not found:
            raise ModelError(f"{self.folder}/{WEIGHTS} holds no LoRA factors; {_ADVICE}")
        return found

    def _rank_of_stack(self, module: str, a: StoredTensor) -> int:
        """The rank of one expert's factors, of which `a` holds those of all."""
        from peft.utils.other import get_pattern_key

        patterns = (self.settings.model_extra or {}).get("rank_pattern") or {}
        try:
            for pattern in patterns:
                _check_quick(pattern)
            rank = patterns.get(get_pattern_key(list(patterns), module), self.settings.r)
        except (ValueError, TypeError, AttributeError) as error:
            raise ModelError(f"{self.folder}/{CONFIG}: rank_pattern: {error}; {_ADVICE}") from error
        if type(rank) is not int or rank < 1 or a.shape[0] % rank:
            raise ModelError(
                f"{self.folder}: the rank of {shown(module)} is {shown(rank)}, which does not divide its {a.shape[0]} "
                f"rows; {_ADVICE}"
            )
        return rank

    def token_rows(self) -> dict[str, list[int]]:
        """The tokens whose rows the adapter holds, by module: the embeddings, and a head that is not tied to them.

        Raises:
            ModelError: rows and tokens are not as many.
        """
        indices = self.settings.trainable_token_indices
        found = {}
        for name, tensor in self.tensors.items():
            if name.endswith(ROWS_OF_TOKENS):
                module = name.removesuffix(ROWS_OF_TOKENS)
                named = indices if isinstance(indices, dict) else {module: indices or []}
                tokens = next((t for key, t in named.items() if module == key or module.endswith(f".{key}")), [])
                if not tokens or len(tokens) != tensor.shape[0]:
                    raise ModelError(
                        f"{self.folder}: {shown(module)} has {tensor.shape[0]} rows for {len(tokens)} tokens; {_ADVICE}"
                    )
                found[module] = tokens
        return found

    def whole(self) -> dict[str, list[str]]:
        """The tensors of the modules that the adapter holds whole, by their name in `modules_to_save`."""
        ends = self.settings.modules_to_save or []
        return {end: [name for name in self.tensors if f".{end}." in f".{name}"] for end in ends}

    def n_embeddings(self, embeddings: str) -> int:
        """The rows that the module named `embeddings` must have for this adapter; 0 if it does not matter."""
        saved = self.tensors.get(f"{embeddings}.weight")
        tokens = [max(tokens) + 1 for tokens in self.token_rows().values()]
        return max([0, *tokens, *([saved.shape[0]] if saved is not None else [])])

    def alphas(self) -> dict[str, float]:
        """`lora_alpha` of each adapted module."""
        from peft.utils.other import get_pattern_key

        settings = self.settings
        patterns = settings.alpha_pattern or {}
        return {m: patterns.get(get_pattern_key(list(patterns), m), settings.lora_alpha) for m in self.ranks()}

    def scalings(self) -> dict[str, float]:
        """What the product of the factors of each adapted module is multiplied by."""
        root = 0.5 if self.settings.use_rslora else 1
        alphas = self.alphas()
        return {module: alphas[module] / rank**root for module, rank in self.ranks().items()}

    def to_peft(self, model: nn.Module) -> Any:
        """PEFT's config for putting the adapter on `model`.

        Raises:
            ModelError: `model` lacks a module, or has one of another size.
        """
        from peft import LoraConfig

        settings, ranks = self.settings, self.ranks()
        if settings.unknown:
            raise ModelError(
                f"{self.folder}/{CONFIG}: {', '.join(settings.unknown)[:200]} is not known; LoRA, rsLoRA and DoRA are"
            )
        modules, stacks = dict(model.named_modules()), expert_stacks(model)
        for module, rank in ranks.items():
            self._check_size(module, stacks.get(module) if module in self.stacks else modules.get(module), rank)
        return LoraConfig(
            task_type="CAUSAL_LM",
            inference_mode=True,
            target_modules=[module for module in ranks if module not in self.stacks],
            target_parameters=sorted(self.stacks) or None,
            rank_pattern={module: rank for module, rank in ranks.items() if rank != settings.r},
            alpha_pattern={m: alpha for m, alpha in self.alphas().items() if alpha != settings.lora_alpha},
            **settings.model_dump(
                exclude={"peft_type", "alpha_pattern", *(settings.model_extra or {})}, exclude_none=True
            ),
        )

    def _check_size(self, module: str, layer: nn.Module | Stack | None, rank: int) -> None:
        a, b = (self.tensors.get(f"{module}.{ends[0]}") for ends in (_A, _B))
        sizes = (getattr(layer, "out_features", None), getattr(layer, "in_features", None))
        if isinstance(layer, Stack) and a is not None and b is not None:
            if a.shape[0] != rank * layer.n_experts:
                raise ModelError(
                    f"{self.folder}: adapter does not fit this base: it has {a.shape[0] // rank} experts in "
                    f"{shown(module)}, and this base {layer.n_experts}; give the base that it was trained on"
                )
            sizes = sizes[::-1] if (b.shape[0], a.shape[1]) == sizes[::-1] else sizes  # Llama 4: A on the outputs
        if layer is None or (
            a is not None and b is not None and None not in sizes and (b.shape[0], a.shape[1]) != sizes
        ):
            has = "which this base does not have" if layer is None else f"which is {sizes[0]} x {sizes[1]} in this base"
            raise ModelError(
                f"{self.folder}: adapter does not fit this base: it changes {shown(module)}, {has}; give the base that "
                "it was trained on"
            )


def read_adapter(folder: Path) -> AdapterFiles:
    """The adapter in `folder`, checked; no tensor is read.

    Raises:
        ModelError: there is none, it is damaged or a pickle, of another kind than LoRA, or holds a link elsewhere.
    """
    settings = read_settings(folder)
    if settings.peft_type != "LORA":
        raise ModelError(f"{folder}: a {shown(settings.peft_type)} adapter; LoRA, rsLoRA and DoRA are read")
    file = folder / WEIGHTS
    if not file.is_file():
        pickles = sorted(path.name for ending in ("bin", "pt", "pth", "ckpt") for path in folder.glob(f"*.{ending}"))
        if pickles:
            raise ModelError(f"{folder}: {pickles[0]} is a pickle, which can run code; convert it to {WEIGHTS}")
        raise ModelError(f"{folder} holds no {WEIGHTS}; {_ADVICE}")
    headers = {name.removeprefix(PREFIX): tensor for name, tensor in read_header(file)[0].items()}
    targets = (settings.model_extra or {}).get("target_parameters") or []
    names = {name: _by_stack(name, targets) for name in headers}
    stacks = {own.rpartition(".lora_")[0] for name, own in names.items() if name != own}
    tensors = {names[name]: tensor for name, tensor in headers.items()}
    return AdapterFiles(folder, settings, tensors, {own: name for name, own in names.items()}, frozenset(stacks))


def _by_stack(name: str, targets: Any) -> str:
    """The name of a factor by the stack of experts that it belongs to; the same name for any other tensor."""
    wrapped, dot, factor = name.rpartition(".lora_")
    if not dot or not isinstance(targets, list):
        return name
    module = re.sub(r"(\.base_layer)+$", "", wrapped)
    depth = wrapped.count(".base_layer")
    # A bare name stands for every module with such a parameter; of those only experts have stacks.
    named = [t if "." in t or not module.endswith("experts") else f"experts.{t}" for t in targets if isinstance(t, str)]
    adapted = [stack for stack in _STACKS if any("." in t and f".{module}.{stack}".endswith(f".{t}") for t in named)]
    place = len(adapted) - 1 - depth
    return f"{module}.{adapted[place]}.lora_{factor}" if 0 <= place < len(adapted) else name


def read_settings(folder: Path) -> Settings:
    """The settings in the folder's adapter_config.json.

    Raises:
        ModelError: there is none, or it is damaged.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise ModelError(f"{folder} holds no adapter ({CONFIG}); {_ADVICE}")
    check_links(folder, ModelError)
    try:
        return Settings.model_validate(read_object(file, ModelError, _ADVICE))
    except ValidationError as error:
        raise ModelError(f"{file}: {first_fault(error)}; {_ADVICE}") from error
