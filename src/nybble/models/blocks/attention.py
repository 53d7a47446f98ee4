"""Attention over flattened rows: Llama's block as a whole, all others through transformers' attention interface.

Any model whose attention modules go through the interface runs over flattened rows there: projections, norms of queries
and keys, rotary positions and widths stay the module's own; windows, caps on scores, scaling and sinks come with the
call. While the model's forward runs, its config names our function, so that transformers builds no mask; outside of it
the config says what it said, and everything is as transformers has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nybble.kernels import attend
from nybble.nn.attention import Span, attend_cached, attend_rows
from nybble.nn.lora_projection import project, projection_of
from nybble.nn.rows import Rows, computing, current_rows

NAME = "nybble"  # of our function in transformers' attention interface


attending: set[type] = set()  # classes whose modules have called our function in this process


class NotRowsError(NotImplementedError):
    """An attention module asks for what our attention over rows does not compute."""


def over_rows(model: Any, lengths: tuple[int, ...], parents: tuple[int, ...] = ()) -> AbstractContextManager[None]:
    """A context in which the layers of `model` compute one sequence of rows, also when they are recomputed later."""
    return computing(Rows(lengths, parents, partial(_through_our_function, model.config)))


def offer_our_function() -> None:
    """Let models name our attention; none does unless it is within `over_rows`."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attend)


@contextmanager
def _through_our_function(config: Any) -> Iterator[None]:
    configs = [config, *(part for name in config.sub_configs if (part := getattr(config, name, None)) is not None)]
    before = [part._attn_implementation for part in configs]
    config._attn_implementation = NAME  # of its parts, too
    try:
        yield
    finally:
        for part, name in zip(configs, before, strict=True):
            part._attn_implementation = name


def _attend(
    module: Any,
    query: Tensor,  # (1, heads, T, width)
    key: Tensor,  # (1, kv_heads, T, width)
    value: Tensor,  # (1, kv_heads, T, any width)
    attention_mask: Tensor | None = None,  # none is built over rows
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_others: Any,
) -> tuple[Tensor, None]:
    """What transformers' attention functions compute, over the current rows: `(1, T, heads, width of value)`."""
    rows = current_rows()
    if rows is None or len(query) != 1 or query.shape[2] != key.shape[2]:
        raise NotRowsError("queries and keys are not those of the same flattened rows")
    if position_bias is not None:
        raise NotRowsError("attention with a bias for positions")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise NotRowsError("attention in both directions")
    # Of one type, as torch's attention makes them under autocast: norms in float32 give float32.
    q, k, v = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))
    attending.add(type(module))
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    width = max(q.shape[-1], v.shape[-1])
    q, k, v = (functional.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in (q, k, v))
    if dropout and (softcap or s_aux is not None or rows.parents):
        raise NotRowsError("attention with dropout and trees, sinks or a cap on scores")
    if dropout:
        out = _with_dropout((q, k, v), rows, Span(scale, sliding_window), dropout)
    else:
        out = attend(q, k, v, rows.lengths, scale, sliding_window, softcap or 0.0, rows.parents, s_aux)
    return out[None, ..., : value.shape[-1]], None


def _with_dropout(qkv: tuple[Tensor, ...], rows: Rows, span: Span, p: float) -> Tensor:
    """Attention whose shares are dropped with probability `p`, by torch's own code, row by row."""
    pieces = []
    for parts in zip(*(x.split(list(rows.lengths)) for x in qkv), strict=True):
        query, key, value = (part.transpose(0, 1)[None] for part in parts)
        n = len(parts[0])
        seen = None
        if span.window is not None and span.window < n:
            seen = torch.ones(n, n, dtype=torch.bool, device=query.device).tril_().triu_(1 - span.window)
        settings = {"dropout_p": p, "scale": span.scale, "enable_gqa": key.shape[1] != query.shape[1]}
        out = functional.scaled_dot_product_attention(query, key, value, seen, is_causal=seen is None, **settings)
        pieces.append(out[0].transpose(0, 1))
    return torch.cat(pieces)


def attention_forwards(module: nn.Module) -> Sequence[Callable[..., Any]]:
    """Forwards for an attention block with one pass for queries, keys and values and rotary positions by halves."""
    parts = ("q_proj", "k_proj", "v_proj", "o_proj") if hasattr(module, "q_proj") else ("qkv_proj", "o_proj")
    figures = ("config", "head_dim", "scaling", "layer_idx")
    if not all(isinstance(getattr(module, part, None), nn.Module) for part in parts):
        return ()
    if not all(getattr(module, name, None) is not None for name in figures):
        return ()
    return [partial(_attention, "module"), partial(_attention, "config")]


def _attention(
    window_of: str,  # which of module and config knows the window
    module: Any,
    hidden_states: Tensor,
    *others: Any,  # position embeddings and a mask, where they do not come by name
    **settings: Any,
) -> tuple[Tensor, Tensor | None]:
    rows = current_rows()
    if rows is None and not _is_step(module, hidden_states, others, settings):
        return type(module).forward(module, hidden_states, *others, **settings)  # type: ignore[no-any-return]
    heads, kv_heads = module.config.num_attention_heads, module.config.num_key_value_heads
    positions = settings["position_embeddings"] if "position_embeddings" in settings else others[0]
    if rows is None:
        q, k, v = _queries_keys_values(module, hidden_states[:, 0], heads, kv_heads)
        cos, sin = (part[:, 0].expand(len(q), -1) for part in positions)
        remember = partial(settings["past_key_values"].update, layer_idx=module.layer_idx)
        return module.o_proj(attend_cached(q, k, v, (cos, sin), module.scaling, remember))[:, None], None
    q, k, v = _queries_keys_values(module, hidden_states[0], heads, kv_heads)
    span = Span(
        module.scaling,
        getattr(module.config if window_of == "config" else module, "sliding_window", None),
        getattr(module, "attn_logit_softcapping", None) or 0.0,
    )
    cos, sin = (part[0] for part in positions)
    out = attend_rows(q, k, v, (cos, sin), rows.lengths, span, rows.parents)
    return module.o_proj(out)[None], None


def _is_step(module: Any, hidden_states: Tensor, others: tuple[Any, ...], settings: dict[str, Any]) -> bool:
    """True in generation without padding: each row has one token, which attends to all cached ones."""
    return (
        not torch.is_grad_enabled()
        and not others[1:]
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
    if not hasattr(module, "q_norm"):
        return q, k, v
    # Under autocast a norm that is trained, in float32, gives float32.
    return module.q_norm(q).to(v.dtype), module.k_norm(k).to(v.dtype), v
