"""The text model of a multimodal checkpoint, built alone: a causal model whose parts have the wrapper's names.

A multimodal class of transformers (`Gemma3ForConditionalGeneration`, ...) holds a decoder, a head, and towers for
images or sound. Training on text needs decoder and head only. They are built as the causal class that transformers has
for the text config or, where it has none, as a plain decoder with a head; then they are moved to the places that they
have in the wrapper, such as `model.language_model`. So the names in checkpoints, adapters and merged models are the
wrapper's own: stock readers of the whole model take them, and no name is translated.

`check_equal` runs the wrapper's own forward over the same modules: what trains here is what the whole model computes on
text.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nybble.errors import CannotRunError, ModelError
from nybble.guard import brief

_PROOF_TOKENS = 12
_CLOSE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}  # share of the largest logit
_FAULTS = (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError, NotImplementedError)


@dataclass(frozen=True)
class TextPlace:
    """Where a multimodal class holds its text model."""

    owner: type[Any]  # the multimodal class
    decoder_class: type[Any]
    decoder: str  # the name of the decoder in the owner
    head: str
    head_is_inside: bool  # with the decoder in a causal model of its own, whose config says whether it is tied


def is_multimodal(config: Any) -> bool:
    """Whether `config` is that of a class of transformers that holds a text model of another kind."""
    return bool(config.get_text_config(decoder=True).model_type != config.model_type) and owner_of(config) is not None


def text_section(config: Any) -> Any:
    """The section of `config` that describes its text model, not a copy; `config` itself if it has no other."""
    return config.get_text_config(decoder=True) if is_multimodal(config) else config


def text_config(config: Any) -> Any:
    """The config of the text model alone; `config` itself where there is nothing else.

    Raises:
        ModelError, CannotRunError: as `text_class`.
    """
    if not is_multimodal(config):
        return config
    text = copy.deepcopy(config.get_text_config(decoder=True))
    if not place_of(config).head_is_inside:
        text.tie_word_embeddings = bool(getattr(config, "tie_word_embeddings", False))
    return text


def text_class(config: Any) -> type[Any]:
    """The class of the text model of `config`, whose instances are built of `text_config(config)`.

    Raises:
        ModelError: the multimodal class has no decoder with a head.
        CannotRunError: a package that it needs is missing.
    """
    place = place_of(config)
    key = (place.owner, type(config.get_text_config(decoder=True)))
    if key not in _classes:
        _classes[key] = _make_class(config, place)
    return _classes[key]


def place_of(config: Any) -> TextPlace:
    """Where the multimodal model of `config` holds its text model.

    Raises:
        ModelError, CannotRunError: as `text_class`.
    """
    key = (type(config), type(config.get_text_config(decoder=True)))
    if key not in _places:
        _places[key] = _find_place(config)
    return _places[key]


def owner_of(config: Any) -> type[Any] | None:
    """The class of transformers that answers with text to images, sound and text; None where there is none."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    tables = (
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    )
    names = [table[config.model_type] for table in tables if config.model_type in table]
    classes = [getattr(transformers, name, None) for name in names]
    return next((cls for cls in classes if getattr(cls, "config_class", None) is type(config)), None)


def check_equal(model: Any, config: Any) -> float:
    """Check that the text model `model`, loaded, computes what the multimodal model of `config` computes on text.

    The multimodal class is built without memory, and runs with the decoder and the head of `model`.

    Returns:
        What the logits of the multimodal class must be multiplied by to be those of its text model: 1, except where
        transformers leaves the text model's own scale of logits out (Cohere).

    Raises:
        ModelError: it does not, or the multimodal model cannot run on text alone.
    """
    place = place_of(config)
    whole = _without_weights(place.owner, config, model.config._attn_implementation)
    whole.set_submodule(place.decoder, model.get_submodule(place.decoder))
    whole.set_submodule(place.head, model.get_submodule(place.head))
    for module in whole.modules():  # the towers': a model is where its first tensor is
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if tensor.is_meta:
                empty = torch.empty(0, dtype=tensor.dtype, device=model.device)
                setattr(module, name, nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty)
    ids = torch.tensor([_plain_tokens(config)], device=model.device)
    was_training = model.training
    model.eval()
    whole.eval()
    try:
        with torch.no_grad():
            asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
            theirs, ours = whole(**asked).logits.float(), model(**asked).logits.float()
    except _FAULTS as error:
        raise ModelError(
            f"{config.model_type} ({place.owner.__name__}) does not run on text alone ({brief(error)}), so it cannot "
            "be trained on rows of text; give a causal language model"
        ) from error
    finally:
        model.train(was_training)
    scale = _logit_scale(model.config)
    close = _CLOSE.get(model.dtype, _CLOSE[torch.float32]) * float(ours.abs().max())
    factor = next((f for f in (1.0, scale) if float((ours - f * theirs).abs().max()) <= close), None)
    if factor is None:
        raise ModelError(
            f"{config.model_type} ({place.owner.__name__}) treats text in another way than its text model does alone "
            f"(logits differ by up to {float((ours - theirs).abs().max()):.1e}), so it cannot be trained on rows of "
            "text; give a causal language model"
        )
    return factor


def _logit_scale(text: Any) -> float:
    """What a text model multiplies its logits by, by the names that transformers' families have for it."""
    times = [getattr(text, name, None) or 1.0 for name in ("logit_scale", "output_multiplier")]
    return float(times[0] * times[1] / (getattr(text, "logits_scaling", None) or 1.0))


def _plain_tokens(config: Any) -> list[int]:
    """Tokens that stand for text: none that the config names, which may stand for an image."""
    text = config.get_text_config(decoder=True)
    named = {v for c in (config, text) for k, v in vars(c).items() if "token" in k and isinstance(v, int)}
    found = [token for token in range(3, text.vocab_size) if token not in named]
    return found[:: max(1, len(found) // _PROOF_TOKENS)][:_PROOF_TOKENS]


_places: dict[tuple[type[Any], type[Any]], TextPlace] = {}
_classes: dict[tuple[type[Any], type[Any]], type[Any]] = {}


def _find_place(config: Any) -> TextPlace:
    from transformers import PreTrainedModel

    owner = owner_of(config)
    kind = config.get_text_config(decoder=True).model_type
    if owner is None:
        raise ModelError(f"transformers has no class that generates text with a {config.model_type!r} model")
    whole = _without_weights(owner, config)
    names = {id(module): name for name, module in whole.named_modules()}
    models = [m for m in whole.modules() if isinstance(m, PreTrainedModel) and m is not whole]
    inner: Any = next((m for m in models if m.config.model_type == kind), None)
    head = whole.get_output_embeddings() or (inner and inner.get_output_embeddings())
    decoder = None if inner is None else _decoder_in(inner)
    if decoder is None or head is None:
        raise ModelError(
            f"a {config.model_type!r} model ({owner.__name__}) has no text model with a head; give a causal language "
            "model, or a multimodal one that answers in text"
        )
    inside = any(module is head for module in inner.modules())
    return TextPlace(owner, type(decoder), names[id(decoder)], names[id(head)], inside)


def _decoder_in(model: Any) -> Any:
    """The bare decoder of a text model, which may be `model` itself."""
    from transformers import PreTrainedModel

    if model.get_output_embeddings() is None:
        return model
    return next((m for m in model.modules() if isinstance(m, PreTrainedModel) and m is not model), None)


def _without_weights(cls: type[Any], config: Any, attention: str | None = None) -> Any:
    """An instance on the meta device; it uses `attention` where all its parts can."""
    own = copy.deepcopy(config)
    if attention is not None:
        own._attn_implementation = attention
    try:
        with torch.device("meta"):
            return cls(own)
    except ValueError:
        if attention is None:
            raise
        return _without_weights(cls, config)
    except ImportError as error:
        raise CannotRunError(f"a {config.model_type!r} model cannot be built here: {brief(error)}") from error


class _Level(nn.Module):
    """A module of the wrapper that lies above the decoder: it passes on calls, and what it is asked for."""

    def forward(self, *args: Any, **settings: Any) -> Any:
        (child,) = self.children()
        return child(*args, **settings)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            for child in self.children():
                if hasattr(child, name):
                    return getattr(child, name)
            raise


class _InPlace:
    """Puts the parts of a causal class where the multimodal class has them."""

    nybble_places: ClassVar[Mapping[str, str]]  # own name of a part -> its place
    nybble_decoder: ClassVar[str]

    def post_init(self) -> None:
        """Move the parts, before transformers notes the names of tied weights."""
        model: Any = self
        for own, place in self.nybble_places.items():
            part = dict(model.named_children())[own]
            delattr(model, own)
            *levels, last = place.split(".")
            holder = model
            for level in levels:
                if level not in dict(holder.named_children()):
                    setattr(holder, level, _Level())
                holder = dict(holder.named_children())[level]
            setattr(holder, last, part)
        super().post_init()  # type: ignore[misc]

    def get_decoder(self) -> Any:
        """The decoder itself."""
        return self.get_submodule(self.nybble_decoder)  # type: ignore[attr-defined]

    def get_input_embeddings(self) -> Any:
        """The embeddings of the decoder."""
        return self.get_decoder().get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Give the decoder other embeddings."""
        self.get_decoder().set_input_embeddings(value)

    def get_output_embeddings(self) -> Any:
        """The head."""
        return self.get_submodule(self.nybble_places["lm_head"])  # type: ignore[attr-defined]

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Put another head in its place."""
        self.set_submodule(self.nybble_places["lm_head"], value)  # type: ignore[attr-defined]


class _WithHead:
    """A decoder with a head, for text models that transformers has no causal class for."""

    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}
    base_model_prefix = "model"
    nybble_decoder_class: ClassVar[type[Any]]
    config: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.model = self.nybble_decoder_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[attr-defined]

    def forward(
        self, input_ids: Tensor | None = None, labels: Tensor | None = None, logits_to_keep: int = 0, **settings: Any
    ) -> Any:
        """Logits `(batch, time, vocabulary)` of the last `logits_to_keep` positions, or of all, and the loss."""
        from transformers.modeling_outputs import CausalLMOutputWithPast

        items = settings.pop("num_items_in_batch", None)
        found = self.model(input_ids=input_ids, **settings)
        logits = self.lm_head(found.last_hidden_state[:, -logits_to_keep if logits_to_keep else 0 :])
        logits = logits * _logit_scale(self.config)
        if cap := getattr(self.config, "final_logit_softcapping", None):
            logits = cap * torch.tanh(logits / cap)
        loss = None
        if labels is not None:
            further = {} if items is None else {"num_items_in_batch": items}
            loss = self.loss_function(logits, labels, self.config.vocab_size, **further)  # type: ignore[attr-defined]
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=found.past_key_values)


def _make_class(config: Any, place: TextPlace) -> type[Any]:
    """The causal class with its parts in their places, known to transformers with the conversions of the wrapper."""
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping, register_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    causal = _causal_class(config, place)
    places = {"model": place.decoder, "lm_head": place.head}
    name = f"{place.owner.__name__.replace('ForConditionalGeneration', '')}TextForCausalLM"
    tied = {_moved(key, places): _moved(value, places) for key, value in (causal._tied_weights_keys or {}).items()}
    members: dict[str, Any] = {
        "nybble_places": places,
        "nybble_decoder": place.decoder,
        "_tied_weights_keys": tied,
        # Everything else belongs to the towers.
        "_keys_to_ignore_on_load_unexpected": [rf"^(?!{re.escape(place.decoder)}\.|{re.escape(place.head)}\.)"],
        "__module__": place.decoder_class.__module__,  # where transformers looks what the family supports
    }
    for part, where in places.items():
        if where.partition(".")[0] != part:
            members[part] = _at(where)
    cls = type(name, (_InPlace, causal), members)
    whole: PreTrainedModel = _without_weights(place.owner, config)
    decoder = whole.get_submodule(place.decoder)
    whole.set_submodule(place.decoder, nn.Identity())
    # transformers finds the conversions of the decoder again, where it is in the text model.
    found_again = [_patterns(c) for c in get_model_conversion_mapping(decoder, add_legacy=False)]
    conversions = get_model_conversion_mapping(whole, add_legacy=False)
    kept = [
        conversion
        for conversion in conversions
        if _patterns(conversion) not in found_again
        # Names of a causal model in the wrapper may say more than its decoder can be found by.
        or (place.head_is_inside and not isinstance(conversion, WeightConverter))
    ]
    register_checkpoint_conversion_mapping(name, kept, overwrite=True)
    return cls


def _patterns(conversion: Any) -> tuple[list[str], list[str]]:
    return conversion.source_patterns, conversion.target_patterns


def _at(where: str) -> property:
    """The part of an instance that is at `where`."""

    def find(model: Any) -> Any:
        return model.get_submodule(where)

    return property(find)


def _moved(name: str, places: Mapping[str, str]) -> str:
    first, dot, rest = name.partition(".")
    return f"{places.get(first, first)}{dot}{rest}"


def _causal_class(config: Any, place: TextPlace) -> type[Any]:
    """transformers' causal class of the text model, if it holds the same decoder as the multimodal class; else ours."""
    import transformers
    from transformers import GenerationMixin, PreTrainedModel
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    text = config.get_text_config(decoder=True)
    for kind in (text.model_type, config.model_type):
        cls: Any = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind, ""), None)
        if getattr(cls, "config_class", None) is type(text):
            built = _without_weights(cls, text)
            parts = dict(built.named_children())
            if type(parts.get("model")) is place.decoder_class and "lm_head" in parts:
                return cls  # type: ignore[no-any-return]
    family = next(c for c in place.decoder_class.__mro__[1:] if issubclass(c, PreTrainedModel))
    members = {
        "nybble_decoder_class": place.decoder_class,
        "config_class": type(text),
        "__module__": place.decoder_class.__module__,
    }
    return type("TextForCausalLM", (_WithHead, family, GenerationMixin), members)
