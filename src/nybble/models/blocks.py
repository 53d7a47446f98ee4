"""Our blocks in transformers' models: attention over flattened rows, the gated MLP, norms, the loss without logits.

Modules keep their place, names and weights; only the `forward` of the instances of this one model is another, and each
falls back to its class's own where ours does not apply (generation with a cache, trained weights, several adapters).
Families are listed that the tests hold against PEFT on plain torch; any other model trains as transformers wrote it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from nybble.models.skeleton import base_of, decoder_layers
from nybble.nn.attention import Span, attend_cached, attend_rows
from nybble.nn.gated_mlp import GatedMlp
from nybble.nn.lora_projection import Projection, project, projection_of
from nybble.nn.loss import Head, TokenRows, next_token_loss, token_losses
from nybble.nn.norm import rms_norm


@dataclass(frozen=True)
class Family:
    """The differences between a family's blocks and those of Llama."""

    unit_offset: bool = False  # norms multiply by 1 + weight, in float32
    norm_behind_mlp: bool = False
    window_of_config: bool = False  # every layer has the config's window; else each layer knows its own


FAMILIES = {
    "llama": Family(),
    "mistral": Family(window_of_config=True),
    "qwen2": Family(),
    "qwen3": Family(),
    "gemma2": Family(unit_offset=True, norm_behind_mlp=True),
    "gemma3_text": Family(unit_offset=True, norm_behind_mlp=True),
    "phi3": Family(window_of_config=True),
}
_TILE_ROWS = 1024  # of an MLP in tiles, at least: a product with as many rows is as fast as a larger one
_TILES = 8  # at most
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True)
class SwapReport:
    """The parts of a model that run through our blocks."""

    flattened: bool  # rows follow each other in one sequence; else they are padded
    blocks: dict[str, int] = field(default_factory=dict)  # kind -> how many
    reason: str | None = None  # why not all of it does, for people


@dataclass
class NextTokenOutput(ModelOutput):  # the kind of result that PEFT and trainers pass on
    """The result of a model with our blocks for a flattened batch."""

    loss: Tensor | None = None  # float32 scalar
    token_losses: Tensor | None = None  # (n,) float32, one for each learned token; in evaluation only


def swap_blocks(model: Any) -> SwapReport:
    """Put our blocks into a causal language model that transformers built; `blocks_of` returns the report later."""
    model.nybble_blocks = _swap(model)
    return blocks_of(model)


def blocks_of(model: Any) -> SwapReport:
    """The report of `swap_blocks` for `model`, which may be bare or have adapters."""
    base = base_of(model)
    return getattr(base, "nybble_blocks", SwapReport(False))


def _swap(model: Any) -> SwapReport:
    config = model.config
    family = FAMILIES.get(config.model_type)
    if family is None:
        known = ", ".join(FAMILIES)
        return SwapReport(False, reason=f"{config.model_type} trains on transformers' own path (ours: {known})")
    if config._attn_implementation != "sdpa":
        return SwapReport(False, reason=f"attn_implementation {config._attn_implementation}: rows are padded")
    if getattr(config, "attention_dropout", 0.0) or getattr(config, "use_bidirectional_attention", False):
        return SwapReport(False, reason="attention with dropout or in both directions: rows are padded")
    counts = {"attention": 0, "mlp": 0, "norm": 0, "loss": 1}
    activation = _ACTIVATIONS.get(str(getattr(config, "hidden_activation", None) or config.hidden_act))
    layer: Any
    for layer in decoder_layers(model):
        _set(layer.self_attn, partial(_attention, family))
        counts["attention"] += 1
        if activation:
            _set(layer.mlp, partial(_mlp, family, activation))
            counts["mlp"] += 1
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            _set(module, partial(_norm, family))
            counts["norm"] += 1
    _set(model, _next_token)
    if type(model.lm_head) is nn.Linear:
        _set(model.lm_head, _head)
    reason = None if activation else f"activation {config.hidden_act}: the MLP runs on transformers' own path"
    return SwapReport(True, counts, reason)


def _set(module: nn.Module, forward: Callable[..., Any]) -> None:
    module.forward = MethodType(forward, module)


def _attention(
    family: Family,
    module: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    *others: Any,
    **settings: Any,
) -> tuple[Tensor, Tensor | None]:
    lengths = settings.pop("lengths", None)
    parents = settings.pop("parents", ())
    heads, kv_heads = module.config.num_attention_heads, module.config.num_key_value_heads
    if lengths is None and not others and _is_step(module, hidden_states, settings):
        q, k, v = _queries_keys_values(module, hidden_states[:, 0], heads, kv_heads)
        cos, sin = (part[:, 0].expand(len(q), -1) for part in position_embeddings)
        remember = partial(settings["past_key_values"].update, layer_idx=module.layer_idx)
        return module.o_proj(attend_cached(q, k, v, (cos, sin), module.scaling, remember))[:, None], None
    if lengths is None:
        return type(module).forward(module, hidden_states, position_embeddings, *others, **settings)  # type: ignore[no-any-return]
    q, k, v = _queries_keys_values(module, hidden_states[0], heads, kv_heads)
    holder = module.config if family.window_of_config else module
    span = Span(
        module.scaling,
        getattr(holder, "sliding_window", None),
        getattr(module, "attn_logit_softcapping", None) or 0.0,
    )
    cos, sin = (part[0] for part in position_embeddings)
    out = attend_rows(q, k, v, (cos, sin), lengths, span, parents)
    return module.o_proj(out)[None], None


def _is_step(module: Any, hidden_states: Tensor, settings: dict[str, Any]) -> bool:
    """True in generation without padding: each row has one token, which attends to all cached ones."""
    return (
        not torch.is_grad_enabled()
        and hidden_states.shape[1] == 1
        and settings.get("attention_mask") is None
        and settings.get("past_key_values") is not None
        and not getattr(module, "attn_logit_softcapping", None)
    )


def _queries_keys_values(module: Any, x: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, `(T, heads, width)` each, in one pass over x if all three are plain."""
    width = module.head_dim
    if hasattr(module, "qkv_proj"):
        parts = module.qkv_proj(x).split([heads * width, kv_heads * width, kv_heads * width], dim=-1)
        q, k, v = (part.contiguous() for part in parts)
    else:
        layers = (module.q_proj, module.k_proj, module.v_proj)
        projections = [projection_of(layer) for layer in layers]
        plain = [p for p in projections if p is not None]
        if len(plain) == 3 and len({p.dtype for p in plain}) == 1:
            q, k, v = project(x, plain)
        else:
            q, k, v = (layer(x) for layer in layers)
    q, k, v = q.view(-1, heads, width), k.view(-1, kv_heads, width), v.view(-1, kv_heads, width)
    return (module.q_norm(q), module.k_norm(k), v) if hasattr(module, "q_norm") else (q, k, v)


def _mlp(family: Family, activation: str, module: Any, x: Tensor) -> Tensor:
    inputs = (module.gate_up_proj,) if hasattr(module, "gate_up_proj") else (module.gate_proj, module.up_proj)
    projections = [projection_of(layer) for layer in (*inputs, module.down_proj)]
    plain = [p for p in projections if p is not None and not p.has_trained_bias]
    if len(plain) < len(projections) or len({p.dtype for p in plain}) != 1:
        return type(module).forward(module, x)  # type: ignore[no-any-return]
    tile = max(_TILE_ROWS, -(-x.numel() // (x.shape[-1] * _TILES))) if getattr(module, "nybble_tiles", False) else 0
    # x was made by the norm before, and nothing else refers to it.
    return GatedMlp(tuple(plain[:-1]), plain[-1], activation, family.norm_behind_mlp, tile, takes_x=True)(x)


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
        _set(wrapper, _embeddings_with_rows)
    elif getattr(wrapper.token_adapter.base_layer.forward, "__func__", None) is _head:
        _set(wrapper, _head_with_rows)


def use_whole_head(wrapper: Any) -> bool:
    """Let PEFT's wrapper of a head that is trained whole compute the loss without logits; whether it is one."""
    if getattr(wrapper.original_module.forward, "__func__", None) is not _head:
        return False
    _set(wrapper, _whole_head)
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
        known = (active[0], torch.tensor(adapter.token_indices[active[0]], device=values.device))
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


def _norm(family: Family, module: Any, x: Tensor) -> Tensor:
    if module.weight.requires_grad and torch.is_grad_enabled():
        return type(module).forward(module, x)  # type: ignore[no-any-return]
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    return rms_norm(x, module.weight, eps, family.unit_offset)


def _next_token(
    model: Any,
    input_ids: Tensor | None = None,
    labels: Tensor | None = None,
    lengths: tuple[int, ...] | None = None,
    parents: tuple[int, ...] = (),
    learned: Tensor | None = None,
    targets: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    **settings: Any,
) -> Any:
    """The model's forward; for a flattened batch (`nybble.data.FlatBatch`) the loss without logits."""
    if lengths is None or input_ids is None or learned is None or targets is None:
        known = {"num_items_in_batch": num_items_in_batch} if num_items_in_batch is not None else {}
        return type(model).forward(model, input_ids=input_ids, labels=labels, **known, **settings)
    given = {name: value for name, value in settings.items() if value is not None}
    # transformers takes a mask of four dimensions as complete and builds none of T x T; attention uses `lengths`.
    mask = torch.zeros((1, 1, 1, 1), dtype=torch.bool, device=input_ids.device)
    inner = {**given, "attention_mask": mask, "use_cache": False, "lengths": lengths, "parents": parents}
    hidden = model.model(input_ids=input_ids, **inner).last_hidden_state[0]
    softcap = getattr(model.config, "final_logit_softcapping", None) or 0.0
    n_items = num_items_in_batch if num_items_in_batch is not None else max(1, len(targets))
    # The branches of a tree begin behind the same token: its gradients are added in one order, which on a CPU the
    # backward of indexing does not keep.
    repeats = bool(parents) and hidden.device.type == "cpu"
    chosen = hidden.index_select(0, learned) if repeats else hidden[learned]
    if not has_fused_head(model):
        losses = _losses_of_logits(model.lm_head(chosen), targets, softcap)
        return NextTokenOutput(loss=losses.sum() / n_items, token_losses=losses.detach())
    if torch.is_grad_enabled():
        loss = partial(next_token_loss, targets=targets, n_items=n_items)
        return NextTokenOutput(loss=model.lm_head(chosen, loss, softcap))
    losses = model.lm_head(chosen, partial(token_losses, targets=targets), softcap)
    return NextTokenOutput(loss=losses.sum() / n_items, token_losses=losses)


def has_fused_head(model: Any) -> bool:
    """True if the loss computes its gradient in the head's forward pass: the head has no adapter and is not trained."""
    head = getattr(model, "lm_head", None)
    return getattr(getattr(head, "forward", None), "__func__", None) in (_head, _head_with_rows, _whole_head)


def _losses_of_logits(logits: Tensor, targets: Tensor, softcap: float) -> Tensor:
    """-log p(target) of each row, `(n,) float32`, through autograd."""
    wide = logits.float()
    capped = softcap * torch.tanh(wide / softcap) if softcap else wide
    return nn.functional.cross_entropy(capped, targets, reduction="none")
