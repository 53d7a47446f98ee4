"""The forward of a causal language model over flattened rows: the next token's loss, without logits where possible."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from nybble.kernels import send
from nybble.models.blocks.attention import over_rows
from nybble.models.blocks.kinds import use_forward
from nybble.nn.lora_projection import Projection, project
from nybble.nn.loss import Head, TokenRows, next_token_loss, token_losses

# Names in configs for what the logits are multiplied with, and divided by.
_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier", "logits_scaling")
_DIVISORS = ("logits_scaling",)


class Logits(NamedTuple):
    """What a model makes of the product of the last hidden states and its head."""

    factor: str = ""  # name in the config of what they are multiplied with; empty: nothing
    divisor: str = ""  # or divided by
    is_capped: bool = False  # by the config's final soft cap

    def scale(self, config: Any) -> float:
        """The number that the product is multiplied with."""
        if self.factor:
            return float(getattr(config, self.factor))
        return 1 / float(getattr(config, self.divisor)) if self.divisor else _muted(config)

    def softcap(self, config: Any) -> float:
        """The cap on the logits; 0: none."""
        return float(getattr(config, "final_logit_softcapping", None) or 0.0) if self.is_capped else 0.0


def _muted(config: Any) -> float:
    """MiniCPM divides the last hidden states by how much wider it is than the model its rates were found on."""
    base = getattr(config, "dim_model_base", None)
    return base / config.hidden_size if base else 1.0


def logits_to_try(config: Any) -> list[Logits]:
    """What the logits of a model with this config may be."""
    has_cap = bool(getattr(config, "final_logit_softcapping", None))
    factors = [name for name in _FACTORS if getattr(config, name, None)]
    divisors = [name for name in _DIVISORS if getattr(config, name, None)]
    scaled = [*((name, "") for name in factors), *(("", name) for name in divisors), ("", "")]
    return [Logits(*names, is_capped) for is_capped in ((True, False) if has_cap else (False,)) for names in scaled]


@dataclass
class NextTokenOutput(ModelOutput):  # the kind of result that PEFT and trainers pass on
    """The result of a model with our blocks for a flattened batch."""

    loss: Tensor | None = None  # float32 scalar
    token_losses: Tensor | None = None  # (n,) float32, one for each learned token; in evaluation, or if asked for


def use_next_token(model: Any, logits: Logits | None) -> None:
    """Let `model` take flattened batches; `logits` None: its own code makes the logits of the learned rows."""
    forward = partial(_next_token, logits)
    forward.__signature__ = _signature(type(model).forward)  # type: ignore[attr-defined]
    use_forward(model, forward)
    head = model.get_output_embeddings()
    if logits is not None and type(head) is nn.Linear:
        use_forward(head, _head)


def _signature(own: Callable[..., Any]) -> inspect.Signature:
    """That of a model's own forward with our arguments: generation asks it whether to hand on positions, for one."""
    theirs = list(inspect.signature(own).parameters.values())
    open_end = [theirs.pop()] if theirs[-1].kind is inspect.Parameter.VAR_KEYWORD else []
    names = {parameter.name for parameter in theirs}
    ours = [
        p for p in inspect.signature(_next_token).parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    added = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in ours[2:] if p.name not in names]
    return inspect.Signature([*theirs, *added, *open_end])


def _next_token(
    made: Logits | None,
    model: Any,
    input_ids: Tensor | None = None,
    labels: Tensor | None = None,
    lengths: tuple[int, ...] | None = None,
    parents: tuple[int, ...] = (),
    learned: Tensor | None = None,
    targets: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    each_token: bool = False,
    **settings: Any,
) -> Any:
    """The model's forward; for a flattened batch (`nybble.data.FlatBatch`) the loss, without logits if it can be.

    `each_token`: the losses of the learned tokens have a graph, so that each may be given a gradient of its own.
    """
    if lengths is None or input_ids is None or learned is None or targets is None:
        known = {"num_items_in_batch": num_items_in_batch} if num_items_in_batch is not None else {}
        return type(model).forward(model, input_ids=input_ids, labels=labels, **known, **settings)
    inputs = {"input_ids": input_ids, **{name: value for name, value in settings.items() if value is not None}}
    inputs["use_cache"] = False
    n_items = num_items_in_batch if num_items_in_batch is not None else max(1, len(targets))
    if made is None:
        with over_rows(model, lengths, parents):
            losses = _losses_of_logits(_own_logits(model, inputs, learned), targets, 0.0)
        return _output(losses, n_items, each_token)
    with over_rows(model, lengths, parents):
        hidden = body_of(model)(**inputs).last_hidden_state[0]
    head, scale, softcap = model.get_output_embeddings(), made.scale(model.config), made.softcap(model.config)
    # The backward of indexing sorts first; that of index_select adds each row where it belongs. Only the branches of a
    # tree begin behind the same token, whose gradients are added in one order by sorting on a GPU, by adding on a CPU.
    sorts = bool(parents) and hidden.device.type != "cpu"
    chosen = hidden[learned] if sorts else hidden.index_select(0, learned)
    chosen = chosen if scale == 1 else chosen * scale
    if not has_fused_head(model):
        return _output(_losses_of_logits(head(chosen), targets, softcap), n_items, each_token)
    if torch.is_grad_enabled() and not each_token:
        loss = partial(next_token_loss, targets=targets, n_items=n_items)
        return NextTokenOutput(loss=head(chosen, loss, softcap))
    losses = head(chosen, partial(token_losses, targets=targets), softcap)
    return _output(losses, n_items, each_token)


def _output(losses: Tensor, n_items: Tensor | int, each_token: bool) -> NextTokenOutput:
    if each_token:
        return NextTokenOutput(token_losses=losses)
    return NextTokenOutput(loss=losses.sum() / n_items, token_losses=losses.detach())


def body_of(model: Any) -> Any:
    """The part of a causal language model that makes the last hidden states."""
    return getattr(model, "model", model) if model.base_model is model else model.base_model


def _own_logits(model: Any, inputs: dict[str, Any], learned: Tensor) -> Tensor:
    """Logits of the learned rows by the model's own code, `(n, vocabulary)`."""
    if "logits_to_keep" in inspect.signature(type(model).forward).parameters:
        return type(model).forward(model, **inputs, logits_to_keep=learned).logits[0]  # type: ignore[no-any-return]
    return type(model).forward(model, **inputs).logits[0, learned]  # type: ignore[no-any-return]


def has_fused_head(model: Any) -> bool:
    """True if the loss computes its gradient in the head's forward pass: the head has no adapter and is not trained."""
    head = model.get_output_embeddings()
    return getattr(getattr(head, "forward", None), "__func__", None) in (_head, _head_with_rows, _whole_head)


def _losses_of_logits(logits: Tensor, targets: Tensor, softcap: float) -> Tensor:
    """-log p(target) of each row, `(n,) float32`, through autograd."""
    wide = logits.float()
    capped = softcap * torch.tanh(wide / softcap) if softcap else wide
    return nn.functional.cross_entropy(capped, targets, reduction="none")


def _head(module: nn.Linear, x: Tensor, loss: Callable[..., Tensor] | None = None, softcap: float = 0.0) -> Tensor:
    """Logits of `x`, or its loss, computed within the module's call, since weights in shards are whole only then."""
    if loss is not None:
        return loss(x, head=Head(module.weight, module.bias, softcap))
    if torch.is_grad_enabled():
        return type(module).forward(module, x)
    return project(x, (Projection(module, module.weight.dtype),))[0]


def use_token_rows(wrapper: Any) -> None:
    """Let PEFT's wrapper of embeddings or head use learned rows (`trainable_token_indices`) without copying the table.

    `wrapper` is a `TrainableTokensWrapper` in a model that runs through our blocks.
    """
    if isinstance(wrapper.token_adapter.base_layer, nn.Embedding):
        use_forward(wrapper, _embeddings_with_rows)
    elif getattr(wrapper.token_adapter.base_layer.forward, "__func__", None) is _head:
        use_forward(wrapper, _head_with_rows)


def use_whole_head(wrapper: Any) -> bool:
    """Let PEFT's wrapper of a head that is trained whole compute the loss without logits; whether it is one."""
    if getattr(wrapper.original_module.forward, "__func__", None) is not _head:
        return False
    use_forward(wrapper, _whole_head)
    return True


def _whole_head(wrapper: Any, x: Tensor, *loss: Any) -> Tensor:
    active = wrapper.active_adapters
    is_trained = not wrapper.disable_adapters and len(active) == 1 and active[0] in wrapper.modules_to_save
    return (wrapper.modules_to_save[active[0]] if is_trained else wrapper.original_module)(x, *loss)  # type: ignore[no-any-return]


def _token_rows(wrapper: Any) -> TokenRows | None:
    """The rows that apply now; None where PEFT's own forward must decide."""
    adapter = wrapper.token_adapter
    active = adapter.active_adapters
    is_off = wrapper.disable_adapters or adapter.disable_adapters or adapter.merged
    if is_off or len(active) != 1 or active[0] not in adapter.token_indices:
        return None
    values = adapter.trainable_tokens_delta[active[0]]
    known = vars(wrapper).get("nybble_numbers")
    if known is None or known[0] != active[0] or known[1].device != values.device:
        known = (active[0], send(torch.tensor(adapter.token_indices[active[0]], device="cpu"), values.device))
        wrapper.nybble_numbers = known
    return TokenRows(known[1], values)


def _embeddings_with_rows(wrapper: Any, ids: Tensor) -> Tensor:
    rows = _token_rows(wrapper)
    if rows is None:
        return type(wrapper).forward(wrapper, ids)  # type: ignore[no-any-return]
    table = wrapper.token_adapter.base_layer
    hidden = table(ids)
    hits = ids.unsqueeze(-1) == rows.numbers
    learned = nn.functional.embedding(hits.int().argmax(dim=-1), rows.values).to(hidden.dtype)
    scale = getattr(table, "embed_scale", None)  # Gemma's embeddings are scaled
    learned = learned if scale is None else learned * scale.to(hidden.dtype)
    return torch.where(hits.any(dim=-1, keepdim=True), learned, hidden)


def _head_with_rows(wrapper: Any, x: Tensor, loss: Callable[..., Tensor] | None = None, softcap: float = 0.0) -> Tensor:
    rows, head = _token_rows(wrapper), wrapper.token_adapter.base_layer
    if rows is None:
        settings = () if loss is None else (loss, softcap)
        return type(wrapper).forward(wrapper, x, *settings)  # type: ignore[no-any-return]
    if loss is not None:
        return loss(x, head=Head(head.weight, head.bias, softcap, rows))
    logits = head(x)
    learned = nn.functional.linear(x, rows.values.to(x.dtype)).to(logits.dtype)
    return logits.index_copy(-1, rows.numbers, learned)  # type: ignore[no-any-return]
