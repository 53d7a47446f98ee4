"""What gets an adapter, and of which rank and scale: PEFT's own rules, applied to names alone.

PEFT matches `target_modules` and its companions while it changes a model. A plan and a calibration need the answer
before that, and a name that matches nothing is refused here instead of being passed over. A stack of experts is named
like a linear: by itself (`experts.down_proj`), by the experts (`experts`), or by all of its parts (`gate_proj` and
`up_proj`); PEFT has a setting of its own for it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from nybble.errors import RecipeError
from nybble.models.experts import expert_stacks
from nybble.models.skeleton import base_of, decoder_layers, embeddings_and_head, is_conv1d, linears, routers
from nybble.nn import Experts4bit, Linear4bit, Stack
from nybble.recipe import LoraSection, is_name


@dataclass(frozen=True)
class AdapterSize:
    """The rank of one adapter, and what PEFT multiplies its output by."""

    r: int
    scaling: float


def lora_config(model: nn.Module, lora: LoraSection) -> Any:
    """PEFT's config of the adapters that `lora` asks for on `model`, which has none yet.

    Raises:
        RecipeError: a name, a number of a layer or a pattern matches nothing.
    """
    found = _matched(model, lora)
    config = _config(model, lora, _plain(lora.rank_pattern, found), _plain(lora.alpha_pattern, found))
    names = linears(model)
    config.target_parameters = [name for name in found if name not in set(names)] or None
    if config.target_parameters and not isinstance(config.target_modules, str):
        config.target_modules = {end for end in config.target_modules if any(_ends(name, end) for name in names)}
    elif config.target_parameters and not {*found} & {*names}:
        config.target_modules = set()
    return config


def adapted_linears(model: nn.Module, lora: LoraSection) -> dict[str, AdapterSize]:
    """The linear layers and stacks of experts of `model`, which has no adapters yet, that get an adapter.

    Raises:
        RecipeError: as `lora_config`.
    """
    sizes = {}
    for name in _matched(model, lora):
        r = lora.rank_pattern.get(_key(lora.rank_pattern, name), lora.r)
        alpha = lora.alpha_pattern.get(_key(lora.alpha_pattern, name), lora.lora_alpha)
        sizes[name] = AdapterSize(r, alpha / (r**0.5 if lora.use_rslora else r))
    return sizes


def saved_modules(model: Any, lora: LoraSection) -> list[str]:
    """The modules of `model`, which has no adapters yet, that `modules_to_save` trains whole.

    Raises:
        RecipeError: a name matches nothing, what is packed in 4 bits, or one of two modules that share a weight.
    """
    found: list[str] = []
    for end in lora.modules_to_save:
        names = [name for name, _ in model.named_modules() if name.endswith(end)]  # as PEFT matches them
        if not names:
            raise RecipeError(f"lora.modules_to_save: {end!r} matches no module{_such_as(linears(model))}")
        for name in names:
            if any(isinstance(module, Linear4bit | Experts4bit) for module in model.get_submodule(name).modules()):
                raise RecipeError(
                    f"lora.modules_to_save: {name} is packed in 4 bits; keep it out of that with skip_modules, or give "
                    "it an adapter"
                )
        found += names
    ends = embeddings_and_head(model)
    weights = [model.get_submodule(name).weight for name in ends if name]
    if {*ends} & {*found} and len(weights) == 2 and weights[0] is weights[1]:
        raise RecipeError(
            f"lora.modules_to_save: {' and '.join(ends)} share one weight in this model, and would be two afterwards; "
            "learn rows with new_tokens, or give lm_head an adapter"
        )
    return found


def token_indices(model: Any, ids: Sequence[int]) -> dict[str, list[int]]:
    """PEFT's `trainable_token_indices` for the rows `ids` of the embeddings, and of a head that is not tied to them.

    Raises:
        RecipeError: the head has a bias or is missing, so PEFT cannot learn single rows of it.
    """
    names = embeddings_and_head(model)
    first, last = model.get_input_embeddings(), model.get_output_embeddings()
    if not all(names) or getattr(last, "bias", None) is not None:
        raise RecipeError("lora.new_tokens: this model's head has a bias or is missing; single rows cannot be learned")
    is_tied = first.weight is last.weight
    return {name: list(ids) for name in (names[:1] if is_tied else names)}


def same_in_every_layer(model: nn.Module, lora: LoraSection) -> tuple[LoraSection, bool]:
    """Settings that give every decoder layer the largest adapters that any of them has, and whether all have those.

    A plan traces a few layers for many, so it needs layers that are alike.
    """
    names = {id(module): name for name, module in model.named_modules()}
    inside = [f"{names[id(layer)]}." for layer in decoder_layers(model)]
    largest: dict[str, int] = {}
    counted: dict[str, list[int]] = {}
    whole: dict[str, None] = {}
    for name, size in adapted_linears(model, lora).items():
        prefix = next((prefix for prefix in inside if name.startswith(prefix)), "")
        end = name.removeprefix(prefix)
        largest[end] = max(size.r, largest.get(end, 0))
        if prefix:
            counted.setdefault(end, []).append(size.r)
    for name in saved_modules(model, lora):
        prefix = next((prefix for prefix in inside if name.startswith(prefix)), "")
        whole.setdefault(name.removeprefix(prefix))
        if prefix:
            counted.setdefault(name.removeprefix(prefix), []).append(0)
    are_alike = all(len(ranks) == len(inside) and len(set(ranks)) == 1 for ranks in counted.values())
    changes = {
        "target_modules": tuple(largest),
        "rank_pattern": {end: r for end, r in largest.items() if r != lora.r},
        "alpha_pattern": {},
        "exclude_modules": (),
        "layers_to_transform": (),
        "layers_pattern": (),
        "modules_to_save": tuple(whole),
    }
    return lora.model_copy(update=changes), are_alike


def _config(model: nn.Module, lora: LoraSection, ranks: Mapping[str, int], alphas: Mapping[str, float]) -> Any:
    from peft import LoraConfig

    targets: str | list[str] = _listed(lora.target_modules)
    if targets == "all-linear":  # to PEFT these would be routers and experts too
        targets = _all_linear(model)
        if lora.layers_to_transform:  # PEFT counts layers only where it has the ends of names
            targets = sorted({name.rpartition(".")[2] for name in targets})
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        # PEFT's field is an int; a fractional alpha is legal in its arithmetic and in the file.
        lora_alpha=_whole(lora.lora_alpha),
        lora_dropout=lora.lora_dropout,
        target_modules=targets,
        exclude_modules=_listed(lora.exclude_modules) or None,
        layers_to_transform=list(lora.layers_to_transform) or None,
        layers_pattern=list(lora.layers_pattern) or None,
        rank_pattern=dict(ranks),
        alpha_pattern={key: _whole(alpha) for key, alpha in alphas.items()},
        modules_to_save=list(lora.modules_to_save) or None,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        fan_in_fan_out=any(is_conv1d(module) for module in model.modules()),
    )


def _all_linear(model: nn.Module) -> list[str]:
    """The linears that `all-linear` adapts: all but the head, those that choose experts, and what PEFT refuses."""
    names = linears(model)
    left = {*routers(model), *_refused(model, names), _head(model)}
    return [name for name in names if name not in left]


def _refused(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Those of `names` that PEFT takes no adapter on, and why: Mamba's kernels read weights and pass adapters by."""
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    check, config = LoraModel._check_target_module_compatiblity, LoraConfig()
    names, found = list(names), dict[str, str]()
    for end in {name.rpartition(".")[2] for name in names}:
        try:
            check(None, config, base_of(model), end)
        except ValueError as error:
            reason = str(error).partition(" Incompatible modules")[0].rstrip(".")
            found |= {name: reason for name in names if name.rpartition(".")[2] == end}
    return found


def _matched_stacks(model: nn.Module, lora: LoraSection, config: Any) -> list[str]:
    """The names of the stacks of experts that get an adapter; `config` is PEFT's for the linears."""
    from peft.tuners.tuners_utils import check_target_module_exists

    stacks = expert_stacks(model)
    asked = copy.copy(config)
    asked.target_modules = _listed(lora.target_modules)
    if asked.target_modules == "all-linear":
        asked.target_modules = sorted({name.rpartition(".")[2] for name in stacks})
    left_out = copy.copy(asked)
    left_out.exclude_modules, left_out.target_modules = None, _listed(lora.exclude_modules) or []
    found = []
    for name, stack in stacks.items():
        owner = name.rpartition(".")[0]
        parts = [
            next((part for part in names if check_target_module_exists(asked, f"{owner}.{part}")), "")
            for names in _part_names(stack)
        ]
        if any(lora.exclude_modules and check_target_module_exists(left_out, key) for key in (name, owner)):
            continue
        if all(parts) or any(check_target_module_exists(asked, key) for key in (name, owner)):
            found.append(name)
        elif any(parts) and not any(_ends(linear, max(parts)) for linear in linears(model)):
            both = " and ".join(names[-1] for names in _part_names(stack))
            raise RecipeError(f"lora.target_modules: {both} of the experts are one stack; name both, or neither")
    unknown = {"use_dora": lora.use_dora, "lora_dropout": lora.lora_dropout}
    for setting, value in unknown.items():
        if found and value:
            raise RecipeError(
                f"lora.{setting}: PEFT's adapters on experts do not know it; remove it, or leave the experts out with "
                "exclude_modules: experts"
            )
    return found


def _matched(model: nn.Module, lora: LoraSection) -> list[str]:
    """The names of the linear layers and stacks of experts that PEFT would put an adapter on."""
    from peft.tuners.tuners_utils import check_target_module_exists

    names = linears(model)
    known = [*names, *_names_of_stacks(model)]
    _check_names("target_modules", lora.target_modules, known)
    _check_names("exclude_modules", lora.exclude_modules, known)
    n_layers = len(decoder_layers(model))
    beyond = [number for number in lora.layers_to_transform if number >= n_layers]
    if beyond:
        raise RecipeError(
            f"lora.layers_to_transform: got {beyond[0]}; allowed: 0 to {n_layers - 1}, the decoder layers of this model"
        )
    whole = saved_modules(model, lora)
    config = _config(model, lora, {}, {})
    found = [name for name in names if check_target_module_exists(config, name)]
    for name, reason in _refused(model, found).items():
        raise RecipeError(f"lora.target_modules: {name} cannot have an adapter: {reason}; leave it out")
    found += _matched_stacks(model, lora, config)
    if not found:
        raise RecipeError(
            "lora: target_modules, exclude_modules and layers_to_transform together leave no linear layer; change one"
        )
    if lora.new_tokens and {*embeddings_and_head(model)} & {*whole}:
        raise RecipeError("lora.new_tokens: modules_to_save trains embeddings or head whole; keep one of both")
    if lora.new_tokens and _head(model) in found:
        raise RecipeError(
            f"lora.target_modules: {_head(model)} cannot have an adapter while new_tokens learns rows of it; leave it "
            "out"
        )
    for setting in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(lora, setting):
            if not any(_key((pattern,), name) == pattern for name in found):
                raise RecipeError(
                    f"lora.{setting}: {pattern!r} matches none of the adapted layers{_such_as(found)}; correct it, or "
                    "remove it"
                )
    return found


def _names_of_stacks(model: nn.Module) -> list[str]:
    """The names by which stacks of experts can be named."""
    stacks = expert_stacks(model)
    owners = {name.rpartition(".")[0]: None for name in stacks}
    parts = [
        f"{name.rpartition('.')[0]}.{part}"
        for name, stack in stacks.items()
        for names in _part_names(stack)
        for part in names
    ]
    return [*stacks, *owners, *parts]


def _part_names(stack: Stack) -> list[tuple[str, ...]]:
    """The names of each part of a stack: that of the family's checkpoints, and that of most families."""
    usual = ("gate_proj", "up_proj") if len(stack.parts) > 1 else stack.parts
    return [(own, common) if own != common else (own,) for own, common in zip(stack.parts, usual, strict=True)]


def _head(model: nn.Module) -> str | None:
    """The name of the output head, which all-linear leaves out."""
    base = base_of(model)
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    return next((name for name, module in model.named_modules() if module is head), None)


def _listed(names: str | tuple[str, ...]) -> Any:
    """Names as PEFT takes them: a list; a regular expression and all-linear as they are."""
    return names if isinstance(names, str) and (names == "all-linear" or not is_name(names)) else _names(names)


def _names(names: str | tuple[str, ...]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _check_names(setting: str, wanted: str | tuple[str, ...], known: list[str]) -> None:
    if wanted == "all-linear":
        return
    listed = _listed(wanted)
    if isinstance(listed, str):
        if not any(re.fullmatch(listed, name) for name in known):
            raise RecipeError(
                f"lora.{setting}: {listed!r} matches no linear layer{_such_as(known)}; a regular expression must "
                "match the whole name"
            )
        return
    for end in listed:
        if not any(_ends(name, end) for name in known):
            ends = ", ".join(sorted({name.rpartition(".")[2] for name in known}))
            raise RecipeError(f"lora.{setting}: {end!r} matches no linear layer; this model has {ends}")


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _such_as(names: Iterable[str]) -> str:
    return f", such as {next(iter(names), 'none')}"


def _key(patterns: Iterable[str], name: str) -> str:
    """The first pattern that matches a name as PEFT matches it, or the name itself."""
    from peft.utils.other import get_pattern_key

    return str(get_pattern_key(list(patterns), name))


def _plain(patterns: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The same patterns; where one is a regular expression, the names that they match.

    A saved adapter is read by others, and a reader should not have to run a stranger's regular expressions.
    """
    if all(is_name(pattern) for pattern in patterns):
        return dict(patterns)
    keys = {name: _key(patterns, name) for name in names}
    return {name: patterns[key] for name, key in keys.items() if key in patterns}


def _whole(alpha: float) -> float:
    return int(alpha) if float(alpha).is_integer() else alpha
