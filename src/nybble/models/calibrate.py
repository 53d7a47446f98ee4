"""Calibration: linears are packed again to fit their inputs, one decoder layer in 16 bits at a time.

The model is already packed. For each decoder layer in turn its 16-bit weights are read from the checkpoint again, the
user's rows are sent through it to gather second moments of every linear's inputs, each linear is packed with error
feedback (and its adapter started from what was lost, if that is asked for), and the rows go on through the layer as it
will be used. So every layer is fitted to the inputs that the packed layers before it really make. Beside the packed
model, memory holds one layer in 16 bits, its moments, and the rows' hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nybble.errors import ModelError, RecipeError
from nybble.kernels import dequantize, dispatcher, quantize
from nybble.models.checkpoint_names import names_in_checkpoint
from nybble.models.experts import packed_experts
from nybble.models.skeleton import decoder_layers, model_without_weights
from nybble.models.source import ModelSource
from nybble.models.targets import AdapterSize, adapted_linears
from nybble.nn import Linear4bit
from nybble.quant import PackedWeight, damp, encode_calibrated, low_rank
from nybble.recipe import LoraSection, QuantizationSection

Starts = dict[str, tuple[Tensor, Tensor]]  # linear -> LoRA's A (r, in) and B (out, r)
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
    if job.needs_moments:
        if not rows:
            raise RecipeError("calibration needs rows: set dataset_name, or encoder: search")
        stream = _Stream(model, layers, rows)
        done.n_rows, done.n_tokens = len(rows), sum(len(row) for row in rows)
    originals = _Originals(source)
    names = {id(module): name for name, module in model.named_modules()}
    for index, layer in enumerate(layers):
        progress(index, len(layers))
        _pack_layer(layer, names[id(layer)], originals, job, stream, done)
    progress(len(layers), len(layers))
    inside = tuple(f"{names[id(layer)]}." for layer in layers)
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
    for name, linear in plain.items():
        module, full_name = packed[name], f"{prefix}.{name}"
        adapter = job.repaired.get(full_name)
        made, start = _fit(weights.pop(name).float(), moments.get(name), job, adapter.r if adapter else None)
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


def _as_linear(module: Linear4bit, weight: Tensor) -> nn.Linear:
    """An ordinary linear that computes what `module` would with the 16-bit weight."""
    linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.to(module.compute_dtype), requires_grad=False)
    linear.bias = module.bias
    return linear


def _fit(
    weight: Tensor, moments: Tensor | None, job: _Job, r: int | None
) -> tuple[PackedWeight, tuple[Tensor, Tensor] | None]:
    """The packed weight, and with a rank the factors of an adapter that compensates for its loss."""
    section, init = job.quantization, job.lora.init_lora_weights

    def pack(wanted: Tensor) -> PackedWeight:
        form = (section.bnb_4bit_quant_type, section.bnb_4bit_blocksize, section.bnb_4bit_use_double_quant)
        if section.encoder == "calibrated" and moments is not None:
            return encode_calibrated(
                wanted, moments, *form, section.signed_scales, dispatcher.code("quantize_4bit", wanted.device)
            )
        return quantize(wanted, *form, "absmax" if section.encoder == "absmax" else "search", section.signed_scales)

    if r is None:
        return pack(weight), None
    if init == "pissa":
        a, b = low_rank(weight, None, r)
        return pack(weight - b @ a), (a, b)
    damped = damp(moments) if init == "qera" and moments is not None else None
    held = torch.zeros_like(weight)
    for _ in range(ALTERNATIONS):
        made = pack(weight - held)
        a, b = low_rank(weight - dequantize(made, torch.float32), damped, r)
        held = b @ a
    return made, (a, b)


class _Stream:
    """The hidden states of the rows on their way through the decoder layers."""

    def __init__(self, model: Any, layers: Sequence[nn.Module], rows: Sequence[Sequence[int]]) -> None:
        self._calls: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {id(layer): [] for layer in layers}
        self._states: list[Tensor] = []

        def record(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # What a layer receives besides hidden states depends only on positions, so it serves later passes too.
            if layer is layers[0]:
                self._states.append(args[0] if args else kwargs["hidden_states"])
            others = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            self._calls[id(layer)].append((args[1:], others))

        hooks = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
        device = next(model.parameters()).device
        try:
            for row in rows:
                model(input_ids=torch.tensor([list(row)], device=device), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()

    def gather(self, layer: nn.Module, linears: dict[str, nn.Linear]) -> dict[str, Tensor]:
        """Second moments of the inputs of the current layer's `linears`, `(in, in) float32` each."""
        sums: dict[str, Tensor] = {}
        shared: dict[int, str] = {}  # q, k and v receive the same tensor: one product serves all three

        def hook_for(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def add(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                first = shared.setdefault(id(inputs[0]), name)
                kept.append(inputs[0])  # an id is unique only while its tensor lives
                if first != name:
                    sums[name] = sums[first]
                    return
                x = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
                if name not in sums:
                    sums[name] = x.new_zeros(x.shape[1], x.shape[1])
                sums[name].addmm_(x.t(), x)

            return add

        kept: list[Tensor] = []
        hooks = [linear.register_forward_pre_hook(hook_for(name)) for name, linear in linears.items()]
        tokens = 0
        for index, state in enumerate(self._states):
            self._run(layer, index)
            tokens += state.shape[1]
            kept.clear()
            shared.clear()
        for hook in hooks:
            hook.remove()
        for total in {id(total): total for total in sums.values()}.values():
            total /= tokens
        return sums

    def advance(self, layer: nn.Module) -> None:
        """Send every row through the finished layer."""
        self._states = [self._run(layer, index) for index in range(len(self._states))]
        self._calls.pop(id(layer))

    def _run(self, layer: nn.Module, index: int) -> Tensor:
        args, kwargs = self._calls[id(layer)][index]
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
