"""The experts of mixtures in transformers' models: which are packed, and where a checkpoint keeps their weights.

A family is recognised by what its module is: one that transformers marks with `use_experts_implementation`, whose
flags say how the stacks are laid out (Llama 4's, which has the same stacks, is known by name). Any other module that
holds stacks of matrices stays in 16 bits, and is named.

A checkpoint may hold a stack whole, or one tensor for each expert and part under names of the family; transformers'
own table of conversions says which. Its entries for packed experts are replaced here by one that packs a tensor as it
arrives, so that the stack never exists in 16 bits, or that gathers the weights of a folder that is in 4 bits already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import Concatenate, ConversionOps, MergeModulelist, WeightConverter

from nybble.errors import ModelError
from nybble.nn import Experts4bit, Stack
from nybble.quant import SUFFIXES, PackedWeight, from_bnb

DOWN = "down_proj"
_LIKE_A_FLAGGED_ONE = {"Llama4TextExperts"}  # transposed, gate and up one behind the other, rows sorted by expert
Packer = Callable[[Tensor], PackedWeight]


def stacks_of(module: nn.Module) -> dict[str, Stack] | None:
    """The projections of a module of experts whose layout is known; else None."""
    known_by_name = type(module).__name__ in _LIKE_A_FLAGGED_ONE
    if not known_by_name and not hasattr(module, "is_concatenated"):  # set by `use_experts_implementation`
        return None
    has_gate = known_by_name or bool(module.has_gate)
    first = "gate_up_proj" if has_gate else "up_proj"
    ends = [module._parameters.get(name) for name in (first, DOWN)]
    if getattr(module, "has_post_expert_norm", False) or any(end is None or end.ndim != 3 for end in ends):
        return None
    (n, up_rows, up_columns), (n_down, rows, columns) = (_laid_out(module, end) for end in ends if end is not None)
    if n != n_down or up_rows != (2 if has_gate else 1) * columns:
        return None
    halves = has_gate and (known_by_name or bool(module.is_concatenated))
    parts = ("gate_proj", "up_proj") if halves else (first,)
    return {first: Stack(n, up_rows, up_columns, parts), DOWN: Stack(n, rows, columns, (DOWN,))}


def inputs_first(module: nn.Module) -> bool:
    """Whether the stacks of a module of experts have inputs before outputs."""
    return bool(getattr(module, "is_transposed", type(module).__name__ in _LIKE_A_FLAGGED_ONE))


def _laid_out(module: nn.Module, stack: Tensor) -> tuple[int, int, int]:
    """Experts, rows and columns of the weights."""
    n, rows, columns = stack.shape
    return (n, columns, rows) if inputs_first(module) else (n, rows, columns)


def experts_to_pack(model: Any, skip_modules: Iterable[str]) -> tuple[list[str], list[str]]:
    """Names of the modules of experts in a bare model that are packed, and of those that are left as they are.

    Left are `skip_modules` and stacks whose layout is not known.
    """
    from transformers.quantizers.quantizers_utils import should_convert_module

    holders = [name for name, module in model.named_modules() if _holds_stacks(module)]
    skip = list(skip_modules)
    packed = [
        name
        for name in holders
        if should_convert_module(name, skip) and stacks_of(model.get_submodule(name)) is not None
    ]
    return packed, [name for name in holders if name not in set(packed)]


def _holds_stacks(module: nn.Module) -> bool:
    """Whether a module has matrices for several experts in one tensor; kernels of convolutions have the same shape."""
    is_ours_or_convolution = isinstance(module, Experts4bit | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return not is_ours_or_convolution and any(
        parameter.ndim == 3 and min(parameter.shape) > 1 for parameter in module.parameters(recurse=False)
    )


def swap_experts(model: nn.Module, names: Iterable[str], dtype: torch.dtype) -> None:
    """Put empty `Experts4bit` that compute in `dtype` in the place of the named modules."""
    for name in names:
        module = model.get_submodule(name)
        stacks = stacks_of(module)
        if stacks is None:
            raise ValueError(f"{name} is no module of experts whose layout is known")
        model.set_submodule(name, Experts4bit(module, stacks, inputs_first(module), dtype))


def packed_experts(model: nn.Module) -> dict[str, Experts4bit]:
    """The modules of packed experts in `model`, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Experts4bit)}


def expert_stacks(model: nn.Module) -> dict[str, Stack]:
    """The stacks of experts in `model`, bare, packed or not, whose layout is known; by their names in the model."""
    found: dict[str, Stack] = {}
    for name, module in model.named_modules():
        stacks = module.stacks if isinstance(module, Experts4bit) else stacks_of(module)
        found |= {f"{name}.{projection}": stack for projection, stack in (stacks or {}).items()}
    return found


def unpacked_experts(model: nn.Module) -> list[str]:
    """A note for people if experts of `model` are in 16 bits: how many of its weights, and which."""
    holders = {name: module for name, module in model.named_modules() if _holds_stacks(module)}
    if not holders:
        return []
    n = sum(p.numel() for module in holders.values() for p in module.parameters(recurse=False) if p.ndim == 3)
    name, module = next(iter(holders.items()))
    more = f" and {len(holders) - 1} more" if len(holders) > 1 else ""
    return [f"{n:,} weights of experts stay in 16 bits: {name} ({type(module).__name__}){more}"]


def weights_of(stack: Stack, expert: Tensor, transposed: bool) -> Iterator[Tensor]:
    """The weights that one expert's part of a stack, laid out as in transformers, is packed as."""
    rows = expert.t() if transposed else expert
    n_rows = stack.part_shape[0]
    for part in range(len(stack.parts)):
        yield rows[part * n_rows : (part + 1) * n_rows].contiguous()


def pack_stack(experts: Experts4bit, projection: str, whole: Tensor, pack: Packer) -> nn.Parameter:
    """Pack a stack that is laid out as in transformers, expert by expert; returns its codes.

    Raises:
        ValueError: the shape is another one, or the weights are not finite.
    """
    stack = experts.stacks[projection]
    matrix = (stack.out_features, stack.in_features)
    wanted = (stack.n_experts, *(reversed(matrix) if experts.inputs_first else matrix))
    if tuple(whole.shape) != wanted and tuple(whole.mT.shape) == wanted:
        whole = whole.mT  # some checkpoints of Qwen3-VL hold inputs first; transformers turns what fits in no other way
    if tuple(whole.shape) != wanted:
        raise ValueError(f"shape {tuple(whole.shape)} does not fit the experts' {wanted}")
    for expert in range(stack.n_experts):
        for part, weight in enumerate(weights_of(stack, whole[expert], experts.inputs_first)):
            experts.set_packed(projection, expert, part, pack(weight))
    return experts._parameters[projection]  # type: ignore[return-value]


class ExpertsConverter(WeightConverter):
    """An entry of transformers' table of conversions that fills one stack of `Experts4bit`, tensor by tensor."""

    __slots__ = ()

    def convert(
        self,
        layer_name: str,
        model: Any = None,
        config: Any = None,
        hf_quantizer: Any = None,
        loading_info: Any = None,
    ) -> dict[str, nn.Parameter]:
        """The codes of the stack `layer_name`, whose tensors were collected in the order of the experts.

        Raises:
            ModelError: a tensor is missing or damaged.
        """
        module, _, projection = layer_name.rpartition(".")
        experts = model.get_submodule(module)
        if not isinstance(experts, Experts4bit):  # some are left in 16 bits: the family's own operations follow
            return super().convert(layer_name, model, config, hf_quantizer, loading_info)  # type: ignore[no-any-return]
        stack, gather = experts.stacks[projection], self.operations[0]
        collected = {pattern: list(tensors) for pattern, tensors in self.collected_tensors.items()}
        self.collected_tensors.clear()
        sources = [pattern for pattern in self.source_patterns if pattern.endswith(".weight")]
        for part, source in enumerate(sources):
            companions = {s: collected[f"{source}.{s}"] for s in SUFFIXES if f"{source}.{s}" in collected}
            for name, tensors in {"": collected.get(source, []), **companions}.items():
                if len(tensors) != stack.n_experts:
                    raise ModelError(
                        f"{module}: the checkpoint has {len(tensors)} experts' {name or stack.parts[part]}, and "
                        f"config.json says {stack.n_experts}; download it again"
                    )
            for expert in range(stack.n_experts):
                # Each is taken out of its list, so that it is freed before the next one is read.
                weight = _read(collected[source], expert)
                found = {suffix: _read(tensors, expert) for suffix, tensors in companions.items()}
                name = f"{module}.{expert}.{stack.parts[part]}"
                experts.set_packed(projection, expert, part, gather(name, weight, found, stack.part_shape))
        experts._is_hf_initialized = True  # type: ignore[assignment]
        return {layer_name: experts._parameters[projection]}  # type: ignore[dict-item]


def _read(tensors: list[Any], place: int) -> Tensor:
    """A tensor that transformers collected: one, a function that reads it, or its future."""
    waiting, tensors[place] = tensors[place], None
    if isinstance(waiting, Tensor):
        return waiting
    return waiting() if callable(waiting) else waiting.result()  # type: ignore[no-any-return]


class GatherExpert(ConversionOps):
    """Packs one weight of an expert, or takes it as it is where it has companions."""

    def __init__(self, pack: Packer, fault: Callable[[str, ValueError], ModelError], hf_quantizer: Any) -> None:
        self._pack, self._fault = pack, fault
        if hf_quantizer is not None:  # transformers then leaves the float32 scales as they are
            self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: Any) -> GatherExpert:
        return self  # transformers copies an entry for every stack

    def __call__(
        self, name: str, weight: Tensor, companions: dict[str, Tensor], shape: tuple[int, int]
    ) -> PackedWeight:
        """The packed weight.

        Raises:
            ModelError: it is damaged or of another shape.
        """
        try:
            return from_bnb(weight, companions, shape) if companions else self._pack(weight)
        except ValueError as error:
            raise self._fault(name, error) from error

    def convert(self, input_dict: dict[str, Any], **_: Any) -> dict[str, Any]:
        """The tensors as they are: `ExpertsConverter` packs, and these belong to experts that stay in 16 bits."""
        return input_dict


def conversions_for_experts(
    conversions: Sequence[Any], model: Any, gather: GatherExpert, pre_quantized: bool
) -> list[Any]:
    """transformers' conversions with those of packed experts in the place of the family's own.

    Each module of packed experts learns the names that its weights have on disk.
    """
    made: dict[tuple[str, ...], ExpertsConverter] = {}
    replaced: set[int] = set()
    for name, experts in packed_experts(model).items():
        for projection, stack in experts.stacks.items():
            family = next((c for c in conversions if _is_of_parts(c, f"{name}.{projection}", stack)), None)
            if family is not None:
                sources = [_plain(source) for source in family._original_source_patterns]
                target = _plain(family._original_target_patterns[0])
                names = tuple(source.rpartition("*.")[2].removesuffix(".weight") for source in sources)
                experts.rename_parts(projection, names)
                replaced.add(id(family))
            elif pre_quantized:  # under the names that `Experts4bit` has where a family has none
                tail = name.rpartition(".")[2]
                sources = [f"{tail}.*.{part}.weight" for part in stack.parts]
                target = f"{tail}.{projection}"
            else:
                continue
            if tuple(sources) not in made:
                packed = [f"{source}.{suffix}" for source in sources for suffix in SUFFIXES] if pre_quantized else []
                others = list(family.operations) if family is not None else []
                converter = ExpertsConverter([*packed, *sources], [target], [gather, *others])
                if family is not None:
                    converter.scope_prefix, converter.base_model_prefix = family.scope_prefix, family.base_model_prefix
                made[tuple(sources)] = converter
    return [*made.values(), *(c for c in conversions if id(c) not in replaced)]


def _plain(pattern: str) -> str:
    """A pattern of transformers' table without the marks of a regular expression."""
    return pattern.replace("\\", "")


def _is_of_parts(conversion: Any, parameter: str, stack: Stack) -> bool:
    """Whether a conversion makes the stack `parameter` of one tensor for each expert and part."""
    if not isinstance(conversion, WeightConverter) or len(conversion._original_target_patterns) != 1:
        return False
    target, sources = _plain(conversion._original_target_patterns[0]), conversion._original_source_patterns
    makes_it = parameter == target or parameter.endswith(target if target.startswith(".") else f".{target}")
    of_parts = len(sources) == len(stack.parts) and all("*." in source for source in sources)
    merges = [op for op in conversion.operations if isinstance(op, MergeModulelist) and op.dim == 0]
    joins = [op for op in conversion.operations if isinstance(op, Concatenate) and op.dim == 1]
    return makes_it and of_parts and len(merges) == 1 and len(merges) + len(joins) == len(conversion.operations)
