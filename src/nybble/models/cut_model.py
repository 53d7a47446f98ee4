"""A model with some of its decoder layers, as a plan traces it: of any family, whatever its config says of layers.

The whole model is built, on the meta device; then the other layers are replaced by modules that pass hidden states on.
So layers keep their places and everything that the model's code looks up by them.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn


class SkippedLayer(nn.Module):
    """Stands for a decoder layer and returns its input, in the form in which the layer before returned its output."""

    def __init__(self, layer: nn.Module, forms: list[Any]) -> None:
        super().__init__()
        # The model's code reads of a layer what kind of attention it has, and the like.
        self.__dict__.update({name: value for name, value in vars(layer).items() if not name.startswith("_")})
        self._forms = forms

    def forward(self, *arguments: Any, **settings: Any) -> Any:
        """The first argument, as a tensor or as the first of a tuple."""
        hidden = arguments[0] if arguments else settings["hidden_states"]
        others = self._forms[-1] if self._forms else None
        return hidden if others is None else (hidden, *others)


def with_layers(model: Any, layers: Sequence[nn.Module], kept: Collection[int]) -> Any:
    """A copy of a bare `model` on the meta device, in which only those of its decoder `layers` numbered in `kept` work.

    The first layer must be kept: the others follow it in the form of their results.
    """
    forms: list[Any] = []
    names = {id(module): name for name, module in model.named_modules()}
    replaced = {id(layer): SkippedLayer(layer, forms) for n, layer in enumerate(layers) if n not in kept}
    cut = copy.deepcopy(model, dict(replaced))
    for number in kept if replaced else ():
        layer = cut.get_submodule(names[id(layers[number])])
        layer.register_forward_hook(lambda _layer, _x, result: _remember(forms, result))
    return cut


def _remember(forms: list[Any], result: Any) -> None:
    forms[:] = [tuple(result[1:]) if isinstance(result, tuple) else None]


def kinds_of_layers(layers: Sequence[nn.Module]) -> tuple[int, ...]:
    """A number for each of `layers`: the same for layers that take the same memory and do the same work.

    Layers are alike if their modules, the shapes of their tensors, and what their modules are told by flags and words
    are the same; numbers do not count, since the layer's own is among them, nor does how wide a window is.
    """
    seen: dict[Any, int] = {}
    return tuple(seen.setdefault(_signature(layer), len(seen)) for layer in layers)


def _signature(layer: nn.Module) -> Any:
    return tuple(
        (
            name,
            type(module),
            tuple((key, tuple(t.shape), t.dtype) for key, t in _tensors(module)),
            tuple(sorted((key, _word(value)) for key, value in vars(module).items() if not key.startswith("_"))),
        )
        for name, module in layer.named_modules()
    )


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def _word(value: Any) -> str:
    return str(value) if isinstance(value, bool | str) else "None" if value is None else ""
