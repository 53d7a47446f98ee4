"""Calibration: linears are packed again to fit their inputs, one decoder layer in 16 bits at a time.

The model is already packed. For each decoder layer in turn its 16-bit weights are read from the checkpoint again, the
user's rows are sent through it to gather second moments of every linear's inputs, each linear is packed with error
feedback (and its adapter started from what was lost, if that is asked for), and the rows go on through the layer as it
will be used. So every layer is fitted to the inputs that the packed layers before it really make. Beside the packed
model, memory holds one layer in 16 bits, its moments, and the rows' hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nybble.errors import ModelError, RecipeError
from nybble.kernels import dequantize, dispatcher, quantize
from nybble.models.blocks import blocks_of, body_of, over_rows
from nybble.models.checkpoint_names import names_in_checkpoint
from nybble.models.experts import packed_experts
from nybble.models.skeleton import decoder_layers, model_without_weights
from nybble.models.source import ModelSource
from nybble.models.targets import AdapterSize, adapted_linears
from nybble.nn import Linear4bit
from nybble.quant import Factors, PackedWeight, encode_calibrated, factorise, low_rank
from nybble.recipe import LoraSection, QuantizationSection

Starts = dict[str, tuple[Tensor, Tensor]]  # linear -> LoRA's A (r, in) and B (out, r)
_BATCH_TOKENS = 2048  # of rows that go through a layer together; a longer row goes alone
_MOMENT_COLUMNS = 256  # of moments that one product computes
ALTERNATIONS = 3  # of packing what the adapter does not hold and fitting the adapter to what packing lost


@dataclass
class Calibration:
    """The result of a calibration."""

    starts: Starts = field(default_factory=dict)
    n_rows: int = 0
    n_tokens: int = 0
    left: list[str] = field(default_factory=list)  # outside the layers, without a 16-bit original, or experts


def needs_calibration(quantization: QuantizationSection, lora: LoraSection) -> bool:
    """True if packing is not finished when the model is loaded."""
    return quantization.encoder == "calibrated" or lora.init_lora_weights != "default"


@torch.no_grad()
def calibrate(
    model: Any,
    source: ModelSource,
    rows: Sequence[Sequence[int]],
    quantization: QuantizationSection,
    lora: LoraSection,
    progress: Callable[[int, int], None],
) -> Calibration:
    """Pack the linears of `model`, which `load_model` has packed, again and in place.

    Args:
        model: the packed model, in evaluation mode.
        source: its 16-bit checkpoint.
        rows: token ids to calibrate on.
        quantization: encoder and format.
        lora: the adapters that will be attached, and how they are initialised.
        progress: called with the number of finished layers and of all layers.

    Raises:
        RecipeError: there are no rows to calibrate on, or the checkpoint is in 4 bits itself.
        ModelError: the model has no list of decoder layers.
    """
    if source.is_4bit:
        raise RecipeError(f"{source.name} is stored in 4 bits: calibration needs the 16-bit weights; give those")
    layers = decoder_layers(model)
    if not layers:
        count = model.config.get_text_config().num_hidden_layers
        raise ModelError(
            f"{type(model).__name__} has no list of {count} decoder layers to calibrate; use encoder: search"
        )
    job = _Job(quantization, lora, adapted_linears(model, lora) if lora.init_lora_weights != "default" else {})
    done = Calibration()
    stream = None
    names = {id(module): name for name, module in model.named_modules()}
    named = {names[id(layer)]: layer for layer in layers}
    if job.needs_moments:
        if not rows:
            raise RecipeError("calibration needs rows: set dataset_name, or encoder: search")
        stream = _Stream(model, named, rows)
        done.n_rows, done.n_tokens = len(rows), sum(len(row) for row in rows)
    originals = _Originals(source)
    for index, (name, layer) in enumerate(named.items()):
        progress(index, len(layers))
        _pack_layer(layer, name, originals, job, stream, done)
    progress(len(layers), len(layers))
    inside = tuple(f"{name}." for name in named)
    done.left += [n for n, m in model.named_modules() if isinstance(m, Linear4bit) and not n.startswith(inside)]
    done.left += packed_experts(model)
    return done


@dataclass(frozen=True)
class _Job:
    quantization: QuantizationSection
    lora: LoraSection
    repaired: dict[str, AdapterSize]  # the linears whose adapters are started

    @property
    def needs_moments(self) -> bool:
        return self.quantization.encoder == "calibrated" or self.lora.init_lora_weights == "qera"


def _pack_layer(
    layer: nn.Module, prefix: str, originals: _Originals, job: _Job, stream: _Stream | None, done: Calibration
) -> None:
    packed = {name: module for name, module in layer.named_modules() if isinstance(module, Linear4bit)}
    weights: dict[str, Tensor] = {}  # as they are stored
    plain: dict[str, nn.Linear] = {}
    for name, module in packed.items():
        weight = originals.read(f"{prefix}.{name}", module)
        if weight is None:
            done.left.append(f"{prefix}.{name}")
            continue
        weights[name] = weight.to(module.weight.device)
        plain[name] = _as_linear(module, weights[name])
        layer.set_submodule(name, plain[name])
    moments = stream.gather(layer, plain) if stream else {}
    factors = _Factorised()
    for name, linear in plain.items():
        module, full_name = packed[name], f"{prefix}.{name}"
        adapter = job.repaired.get(full_name)
        known = factors.of(moments.get(name))
        made, start = _fit(weights.pop(name).float(), known, job, adapter.r if adapter else None)
        module.set_packed(replace(made, dtype=module.source_dtype))
        linear.weight.data = module.dequantize()
        if start is not None and adapter is not None:
            a, b = start
            root = adapter.scaling**0.5
            done.starts[full_name] = (a / root, b / root)
            linear.weight.data += (b @ a).to(linear.weight.dtype)
    if stream:
        stream.advance(layer)
    for name, module in packed.items():
        layer.set_submodule(name, module)


class _Factorised:
    """Keeps the factors of the latest moments: linears that share their inputs follow each other."""

    def __init__(self) -> None:
        self._moments: Tensor | None = None
        self._factors: Factors | None = None

    def of(self, moments: Tensor | None) -> Factors | None:
        """The factors of `moments`; None if these cannot be used."""
        if moments is not self._moments:
            self._factors = None  # makes room for the next
            self._factors = None if moments is None else factorise(moments)
            self._moments = moments
        return self._factors


def _as_linear(module: Linear4bit, weight: Tensor) -> nn.Linear:
    """An ordinary linear that computes what `module` would with the 16-bit weight."""
    linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.to(module.compute_dtype), requires_grad=False)
    linear.bias = module.bias
    return linear


def _fit(
    weight: Tensor, factors: Factors | None, job: _Job, r: int | None
) -> tuple[PackedWeight, tuple[Tensor, Tensor] | None]:
    """The packed weight, and with a rank the factors of an adapter that compensates for its loss."""
    section, init = job.quantization, job.lora.init_lora_weights

    def pack(wanted: Tensor) -> PackedWeight:
        form = (section.bnb_4bit_quant_type, section.bnb_4bit_blocksize, section.bnb_4bit_use_double_quant)
        if section.encoder == "calibrated":
            return encode_calibrated(
                wanted, factors, *form, section.signed_scales, dispatcher.code("quantize_4bit", wanted.device)
            )
        return quantize(wanted, *form, "absmax" if section.encoder == "absmax" else "search", section.signed_scales)

    if r is None:
        return pack(weight), None
    if init == "pissa":
        a, b = low_rank(weight, None, r)
        return pack(weight - b @ a), (a, b)
    damped = factors.damped if init == "qera" and factors is not None else None
    held = torch.zeros_like(weight)
    for _ in range(ALTERNATIONS):
        made = pack(weight - held)
        a, b = low_rank(weight - dequantize(made, torch.float32), damped, r)
        held = b @ a
    return made, (a, b)


@dataclass(frozen=True)
class _Batch:
    """Rows that go through a layer together."""

    rows: tuple[list[int], ...]
    around: Callable[[], AbstractContextManager[None]]  # within which the layers compute them

    @property
    def n_tokens(self) -> int:
        return sum(map(len, self.rows))

    def inputs(self, device: torch.device) -> dict[str, Any]:
        ids = torch.cat([torch.tensor(row) for row in self.rows])[None]
        positions = torch.cat([torch.arange(len(row)) for row in self.rows])[None]
        return {"input_ids": ids.to(device), "position_ids": positions.to(device), "use_cache": False}


def _batches(model: Any, rows: Sequence[Sequence[int]]) -> list[_Batch]:
    """The rows one after another in sequences of some thousand tokens, or each alone where the model needs padding."""
    if not blocks_of(model).flattened:
        return [_Batch((list(row),), nullcontext) for row in rows]
    packs: list[list[list[int]]] = []
    for row in rows:
        if not packs or sum(map(len, packs[-1])) + len(row) > _BATCH_TOKENS:
            packs.append([])
        packs[-1].append(list(row))
    return [_Batch(tuple(pack), partial(over_rows, model, tuple(map(len, pack)))) for pack in packs]


class _Recorder(nn.Module):
    """Stands for a layer while a model hands its layers their arguments; it passes the hidden states on unchanged."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._layer = (layer,)  # not as a submodule
        self._extra: tuple[Any, ...] | None = None  # what the layer returns besides the hidden states, if it is a tuple
        self._is_known = False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"][0], name)  # some models ask a layer for its kind of attention

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The hidden states, in the form in which the layer returns them; the first call learns that form."""
        if not self._is_known:
            result = self._layer[0](*args, **kwargs)
            self._is_known, self._extra = True, result[1:] if isinstance(result, tuple) else None
            return result
        self.calls.append((args, kwargs))
        state = args[0] if args else kwargs["hidden_states"]
        return state if self._extra is None else (state, *self._extra)


class _Stream:
    """The hidden states of the rows on their way through the decoder layers."""

    def __init__(self, model: Any, layers: dict[str, nn.Module], rows: Sequence[Sequence[int]]) -> None:
        self._batches = _batches(model, rows)
        recorders = {name: _Recorder(layer) for name, layer in layers.items()}
        device = next(model.parameters()).device
        body = body_of(model)
        for name, recorder in recorders.items():
            model.set_submodule(name, recorder)
        try:
            for batch in (*_batches(model, [rows[0][:2]]), *self._batches):
                with batch.around():
                    body(**batch.inputs(device))
        finally:
            for name, layer in layers.items():
                model.set_submodule(name, layer)
        first = next(iter(recorders.values())).calls
        self._states: list[Tensor] = [args[0] if args else kwargs["hidden_states"] for args, kwargs in first]
        # What a layer receives besides hidden states depends only on positions, so it serves later passes too.
        self._calls = {
            id(layer): [
                (args[1:], {key: value for key, value in kwargs.items() if key != "hidden_states"})
                for args, kwargs in recorders[name].calls
            ]
            for name, layer in layers.items()
        }

    def gather(self, layer: nn.Module, linears: dict[str, nn.Linear]) -> dict[str, Tensor]:
        """Second moments of the inputs of the current layer's `linears`, `(in, in) float32` each.

        Linears that receive the same tensors, as q, k and v do, share one.
        """
        sums: dict[str, Tensor] = {}
        shared: dict[int, str] = {}  # one product serves all who receive a tensor

        def hook_for(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def add(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                x = inputs[0]
                original = shared.setdefault(x.data_ptr(), name)
                kept.append(x)  # its address is its own only while it lives
                if original != name:
                    sums[name] = sums[original]
                    return
                x = x.reshape(-1, x.shape[-1]).float()
                if name not in sums:
                    sums[name] = x.new_zeros(x.shape[1], x.shape[1])
                for first in range(0, x.shape[1], _MOMENT_COLUMNS):  # what is below the diagonal is the same again
                    part = slice(first, first + _MOMENT_COLUMNS)
                    sums[name][part, first:].addmm_(x[:, part].t(), x[:, first:])

            return add

        kept: list[Tensor] = []
        hooks = [linear.register_forward_pre_hook(hook_for(name)) for name, linear in linears.items()]
        for index in range(len(self._batches)):
            self._run(layer, index)
            kept.clear()
            shared.clear()
        for hook in hooks:
            hook.remove()
        tokens = sum(batch.n_tokens for batch in self._batches)
        for total in {id(total): total for total in sums.values()}.values():
            total.copy_(total.triu() + total.triu(1).t()).div_(tokens)
        return sums

    def advance(self, layer: nn.Module) -> None:
        """Send every row through the finished layer."""
        self._states = [self._run(layer, index) for index in range(len(self._states))]
        self._calls.pop(id(layer))

    def _run(self, layer: nn.Module, index: int) -> Tensor:
        args, kwargs = self._calls[id(layer)][index]
        with self._batches[index].around():
            result = layer(self._states[index], *args, **kwargs)
        state: Tensor = result[0] if isinstance(result, tuple) else result
        return state


class _Originals:
    """16-bit weights by the names of their modules, read one at a time."""

    def __init__(self, source: ModelSource) -> None:
        from safetensors import safe_open

        self._files: dict[str, Path] = {}
        for shard in sorted(source.folder.glob("*.safetensors")):
            with safe_open(shard, framework="pt") as file:
                self._files |= dict.fromkeys(file.keys(), shard)
        self._names = names_in_checkpoint(model_without_weights(source.config), self._files)

    def read(self, name: str, module: Linear4bit) -> Tensor | None:
        """The weight of `module`, `(out, in)`, or None where the checkpoint has no tensor of that name and shape."""
        from safetensors import safe_open

        key = self._names.get(f"{name}.weight")
        if key is None:
            return None
        with safe_open(self._files[key], framework="pt") as file:
            stored: Tensor = file.get_tensor(key)
        weight = stored.t().contiguous() if module.stored_transposed else stored
        return weight if tuple(weight.shape) == (module.out_features, module.in_features) else None
