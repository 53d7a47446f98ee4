"""Which of a model's blocks Nybble computes, decided by numbers on a small model of the same class and config.

1. The small model runs as transformers wrote it, row by row; what its modules are called with is noted.
2. Each forward that a kind of block offers for a module is called with that. It is taken if results and gradients are
   those of the class's own forward, for every module of the class.
3. All of them together, over two rows in one sequence, must give the loss and the gradients of each row alone: with
   layers recomputed and without, and with MLPs in tiles. A layer that lets rows see each other fails here.

What fails leaves transformers' own code in its place, and a reason for people. Decisions are kept for the process.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nybble.guard import brief
from nybble.models.blocks.attention import NotRowsError, attending, offer_our_function, over_rows
from nybble.models.blocks.head import Logits, body_of, logits_to_try, use_next_token
from nybble.models.blocks.kinds import KINDS, Forward, Kind, use_forward
from nybble.models.blocks.mlp import ANYWHERE, Surroundings, in_surroundings
from nybble.models.skeleton import recomputable_layers, recompute_by, set_recomputed
from nybble.models.small import small_models
from nybble.nn.recompute import recomputed

_ROWS = (19, 9)  # tokens; longer than `small.WINDOW`
_LOSS, _GRADIENT = 2e-5, 2e-4  # relative differences that rounding in float32 may make
_DROPPED = "attention has dropout, which torch computes row by row: contexts with a common beginning are not shared"
_DROPOUT = re.compile(r"dropout|drop_?(p|rate)|pdrop")  # in names of figures


@dataclass(frozen=True)
class Choice:
    """What Nybble computes modules of one class by."""

    kind: Kind
    index: int  # which of the forwards that the kind offers


@dataclass(frozen=True)
class Decision:
    """What Nybble computes in models of one class and config."""

    flattened: bool
    blocks: Mapping[type, Choice] = field(default_factory=dict)
    around_mlp: Surroundings = ANYWHERE
    logits: Logits | None = None  # None: its own code makes them
    trees: bool = True  # whether rows may be trees of contexts
    reasons: tuple[str, ...] = ()  # what stays transformers' own and why, for people

    def put_in(self, model: Any) -> dict[str, int]:
        """Put the blocks into `model`; how many of each kind."""
        counts: dict[str, int] = {}
        for module in list(model.modules()):
            choice = self.blocks.get(type(module))
            if choice is None and self.flattened and type(module) in attending:
                counts["attention"] = counts.get("attention", 0) + 1
            if choice is None or (choice.kind.needs_rows and not self.flattened):
                continue
            offered = choice.kind.forwards(module)
            if not offered:
                continue
            use_forward(module, in_surroundings(offered[choice.index], self.around_mlp))
            counts[choice.kind.name] = counts.get(choice.kind.name, 0) + 1
        if self.flattened:
            use_next_token(model, self.logits)
            if self.logits is not None:
                counts["loss"] = 1
        return counts


_decided: dict[tuple[type, str], Decision] = {}


def decide(kind: type, config: Any) -> Decision:
    """The decision for models of class `kind` with `config`."""
    offer_our_function()
    key = (kind, json.dumps(config.to_dict(), sort_keys=True, default=str))
    if key not in _decided:
        # Also within a context for another device, as where a model without weights is built.
        with (
            torch.device("cpu"),
            torch.autocast("cpu", enabled=False),
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
            _decided[key] = _decide(kind, config)
    return _decided[key]


def _decide(kind: type, config: Any) -> Decision:
    why_not = "no small model of this config can be built"
    for small in small_models(kind, config):
        try:
            return _proven(small)
        except Exception as error:  # noqa: BLE001 - what transformers itself cannot run at this size, for any reason
            why_not = f"a small model of this config does not run ({type(error).__name__}: {brief(error)})"
    return Decision(False, reasons=(f"{why_not}, so nothing is proven",))


def _proven(small: Any) -> Decision:
    """The best decision that holds for `small`."""
    rows = _rows(small)
    dropping, has_dropout = _silence(small.eval())
    blocks = _equal_blocks(small, _calls(small, rows[0]), dropping)
    own = (*([_DROPPED] if has_dropout else []), *_unequal(small, blocks))
    wanted = _one_by_one(small, rows)
    logits = next((made for made in logits_to_try(small.config) if _makes_logits(small, made, rows[0])), None)
    why_not = "rows in one sequence do not give what each gives alone"
    best = Decision(True, blocks, _surroundings(small, blocks, rows[0]), logits, not has_dropout, own)
    for decision in _candidates(best):
        try:
            if _is_equal(small, decision, rows, wanted):
                return decision
        except Exception as error:  # noqa: BLE001 - whatever its modules do with what they never saw
            why_not = (
                str(error) if isinstance(error, NotRowsError) else f"{type(error).__name__} over rows: {error}"[:200]
            )
    return Decision(False, blocks, reasons=(why_not, *own))


def _candidates(best: Decision) -> Iterator[Decision]:
    """`best` and what is less of it, to be tried in turn."""
    for left_out in ((), ("attention",), ("mlp",), tuple(kind.name for kind in KINDS)):
        blocks = {owner: choice for owner, choice in best.blocks.items() if choice.kind.name not in left_out}
        if left_out and len(blocks) == len(best.blocks):
            continue
        reasons = (*best.reasons, *(f"{name}: ours is not equal within this model" for name in left_out))
        for around in dict.fromkeys((best.around_mlp, ANYWHERE)):
            yield replace(best, blocks=blocks, around_mlp=around, reasons=reasons)
    if best.logits is not None:
        yield replace(best, blocks={}, logits=None)


def _rows(small: Any) -> list[Tensor]:
    """Token ids of some rows, `(1, n)` each, all different, so that each has its own row of embeddings."""
    n_tokens = small.get_input_embeddings().weight.shape[0]
    ids = torch.arange(1, 1 + sum(_ROWS)) % n_tokens
    return [part[None] for part in ids.split(list(_ROWS))]


def _silence(small: Any) -> tuple[set[type], bool]:
    """Switch off all dropout; the classes of modules that had some, and whether attention itself had."""
    found: set[type] = set()
    in_attention = False
    for owner in small.modules():
        drops = {name: part.p for name, part in owner.named_children() if isinstance(part, nn.Dropout)}
        drops |= {name: p for name, p in vars(owner).items() if isinstance(p, float) and _DROPOUT.search(name)}
        if isinstance(owner, nn.Dropout) or not any(drops.values()):
            continue
        found.add(type(owner))
        in_attention |= any(p and "att" in name for name, p in drops.items())
        for name in drops:
            if isinstance(part := getattr(owner, name), nn.Dropout):
                part.p = 0.0
            else:
                setattr(owner, name, 0.0)
    return found, in_attention


Call = tuple[tuple[Any, ...], dict[str, Any]]  # arguments, and those by name
Calls = dict[nn.Module, Call]


def _calls(small: Any, ids: Tensor) -> Calls:
    """What each module that a kind offers forwards for is called with first, in the pass of one row."""
    calls: Calls = {}

    def note(module: nn.Module, arguments: tuple[Any, ...], settings: dict[str, Any]) -> None:
        calls.setdefault(module, (arguments, settings))

    modules = [m for m in small.modules() if any(kind.forwards(m) for kind in KINDS)]
    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]
    try:
        with torch.no_grad():
            small(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _equal_blocks(small: Any, calls: Calls, left_out: set[type]) -> dict[type, Choice]:
    """For each class of modules the first forward that gives the numbers of the class's own on all of them."""
    by_class: dict[type, list[nn.Module]] = {}
    for module in calls:
        if type(module) not in left_out:
            by_class.setdefault(type(module), []).append(module)
    found: dict[type, Choice] = {}
    for owner, modules in by_class.items():
        for kind in KINDS:
            for index in range(min(len(kind.forwards(module)) for module in modules)):
                forwards = [kind.forwards(module)[index] for module in modules]
                if all(_is_equal_block(small, *pair, calls[pair[0]]) for pair in zip(modules, forwards, strict=True)):
                    found.setdefault(owner, Choice(kind, index))
                    break
    return found


def _is_equal_block(small: Any, module: nn.Module, forward: Forward, call: Call) -> bool:
    try:
        wanted = _derived(type(module).forward, module, call)
        with over_rows(small, (_ROWS[0],)):
            found = _derived(forward, module, call)
        aside = _derived(forward, module, call)  # as in padded batches and in generation
    except Exception:  # noqa: BLE001 - arguments that this forward does not take: it is not for this module
        return False
    return all(len(wanted) == len(side) and all(map(_are_near, wanted, side)) for side in (found, aside))


def _derived(forward: Forward, module: nn.Module, call: Call) -> list[Tensor]:
    """The result of a module, and its gradients with respect to what it is called with."""
    inputs: list[Tensor] = []

    def fresh(value: Any, is_first: bool = False) -> Any:
        # Hidden states have three dimensions, those of heads four; so have masks, which do not come first.
        if (
            isinstance(value, Tensor)
            and value.is_floating_point()
            and (value.ndim == 3 or (is_first and value.ndim > 1))
        ):
            inputs.append(value.detach().clone().requires_grad_())
            return inputs[-1] * 1  # not a leaf, which nothing may overwrite
        return value

    arguments = [fresh(value, place == 0) for place, value in enumerate(call[0])]
    settings = {name: fresh(value) for name, value in call[1].items()}
    result = forward(module, *arguments, **settings)
    result = result[0] if isinstance(result, tuple) else result
    weights = torch.sin(torch.arange(result.numel(), dtype=torch.float32) ** 1.5).view(result.shape)
    gradients = torch.autograd.grad((result * weights).sum(), inputs, allow_unused=True)
    return [result.detach(), *(g for g in gradients if g is not None)]


def _surroundings(small: Any, blocks: Mapping[type, Choice], ids: Tensor) -> Surroundings:
    """What other modules do with what goes into MLPs and comes out; the same memory is the same tensor."""
    mlps = [m for m in small.modules() if type(m) in blocks and blocks[type(m)].kind.name == "mlp"]
    takers: dict[int, list[nn.Module]] = {}
    ends: dict[nn.Module, tuple[int, int]] = {}
    kept: list[Any] = []  # so that no memory is used twice

    def note_inputs(module: nn.Module, arguments: tuple[Any, ...], settings: dict[str, Any]) -> None:
        for value in filter(_is_real, (*arguments, *settings.values())):
            takers.setdefault(value.data_ptr(), []).append(module)
            kept.append(value)

    def note_ends(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        ends[module] = (arguments[0].data_ptr(), output.data_ptr())
        kept.append(output)

    handles = [m.register_forward_pre_hook(note_inputs, with_kwargs=True) for m in small.modules()]
    handles += [m.register_forward_hook(note_ends) for m in mlps]
    try:
        with torch.no_grad():
            small(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    shares_input = keeps_output = False
    for module, (first, last) in ends.items():
        within = set(module.modules())
        strangers = {
            m
            for m in small.modules()
            if m not in within and module not in set(m.modules()) and not isinstance(m, nn.Dropout | nn.Identity)
        }
        shares_input |= not strangers.isdisjoint(takers.get(first, ()))
        keeps_output |= not strangers.isdisjoint(takers.get(last, ()))
    return Surroundings(keeps_output, shares_input)


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _are_near(wanted: Tensor, found: Tensor) -> bool:
    return wanted.shape == found.shape and bool((wanted - found).norm() <= _GRADIENT * wanted.norm())


def _unequal(small: Any, blocks: Mapping[type, Choice]) -> Iterator[str]:
    """For people: what stays as transformers has it, of what looks like one of our kinds."""
    names = {"mlp": ("mlp", "ffn", "feedforward"), "norm": ("rmsnorm",)}
    taken = {owner.__name__ for owner in blocks}
    for kind, parts in names.items():
        for owner in sorted({type(module).__name__ for module in small.modules()}):
            if owner.lower().endswith(parts) and owner not in taken:
                yield f"{kind} {owner} runs in transformers' own code"


def _makes_logits(small: Any, made: Logits, ids: Tensor) -> bool:
    head = small.get_output_embeddings()
    with torch.no_grad():
        wanted = small(input_ids=ids, use_cache=False).logits
        try:
            hidden = body_of(small)(input_ids=ids, use_cache=False)[0] * made.scale(small.config)
            cap = made.softcap(small.config)
            found = cap * torch.tanh(head(hidden) / cap) if cap else head(hidden)
        except Exception:  # noqa: BLE001 - a head that takes something else
            return False
    return _are_near(wanted, found)


def _one_by_one(small: Any, rows: Sequence[Tensor]) -> tuple[float, Tensor]:
    """The summed loss and the gradient of the embeddings, of each row alone, by transformers' own code."""
    table = small.get_input_embeddings().weight.requires_grad_()
    total = torch.zeros(())
    for ids in rows:
        logits = small(input_ids=ids, use_cache=False).logits[0, :-1]
        total = total + cross_entropy(logits.float(), ids[0, 1:], reduction="sum")
    (gradient,) = torch.autograd.grad(total, table)
    table.requires_grad_(False)
    return total.item(), gradient


def _is_equal(small: Any, decision: Decision, rows: Sequence[Tensor], wanted: tuple[float, Tensor]) -> bool:
    """Whether `decision` gives what each row alone gives; recomputed and in tiles too."""
    model = copy.deepcopy(small)
    decision.put_in(model)
    layers = recomputable_layers(model)
    recompute_by(layers, recomputed)
    for is_lean in (False, True):
        model.train(is_lean)
        set_recomputed(layers, len(layers) if is_lean else 0)
        for module in model.modules():
            module.nybble_tiles = 4 if is_lean else 0
        table = model.get_input_embeddings().weight.requires_grad_()
        loss = model(**_batch(rows), num_items_in_batch=1).loss
        (gradient,) = torch.autograd.grad(loss, table)
        if not abs(loss.item() - wanted[0]) <= _LOSS * abs(wanted[0]) or not _are_near(wanted[1], gradient):
            return False
    return True


def _batch(rows: Sequence[Tensor]) -> dict[str, Any]:
    """The rows as one flattened batch; see `nybble.data.FlatBatch`."""
    ids, places = torch.cat(list(rows), 1), torch.arange(sum(_ROWS))
    is_last = torch.isin(places, torch.tensor(_ROWS).cumsum(0) - 1)
    learned = places[~is_last]
    positions = torch.cat([torch.arange(n) for n in _ROWS])[None]
    return {
        "input_ids": ids,
        "position_ids": positions,
        "lengths": _ROWS,
        "learned": learned,
        "targets": ids[0, learned + 1],
    }
