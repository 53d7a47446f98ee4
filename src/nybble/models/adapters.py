"""Putting LoRA adapters on a model and taking them off to disk, with PEFT's config and PEFT's files.

PEFT sees a `Linear4bit` as the `nn.Linear` it is and puts its own LoRA layer around it, so every PEFT method works;
the folder that is saved loads in stock PEFT over the same base in 16 or 4 bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nybble.errors import ModelError
from nybble.guard import brief
from nybble.models.adapter_files import CONFIG, read_adapter
from nybble.models.blocks import blocks_of, use_token_rows, use_whole_head
from nybble.models.peft_names import config_text, targets_as_told
from nybble.models.sharding import full_tensors, shard_like
from nybble.models.skeleton import embeddings_and_head
from nybble.models.targets import lora_config, token_indices
from nybble.models.vocabulary import NewTokens, grow_vocabulary, make_room
from nybble.nn import Experts4bit, Linear4bit
from nybble.recipe import LoraSection
from nybble.storage.atomic import write_text


def attach(
    model: nn.Module,
    lora: LoraSection,
    base_name: str,
    starts: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    tokens: NewTokens | None = None,
) -> Any:
    """`model` with fresh adapters, everything else frozen; adapters are float32.

    Args:
        model: the base.
        lora: the adapters' settings.
        base_name: what the saved adapter names as its base.
        starts: for some linears, A `(r, in)` and B `(out, r)` to start from; the others start as PEFT starts them.
        tokens: tokens whose rows of embeddings and head are learned too; the model grows where it lacks them.

    Raises:
        RecipeError: a name, a number of a layer or a pattern matches nothing.
    """
    from peft import get_peft_model

    from nybble.models.lora_linear import use_our_layer

    config = lora_config(model, lora)
    if tokens is not None and tokens.ids:
        make_room(model, tokens)
        config.trainable_token_indices = token_indices(model, tokens.ids)
    use_our_layer(config)
    with targets_as_told(model):
        adapted = _with_token_rows(get_peft_model(model, config))
    _as_masters(adapted)
    adapted.peft_config["default"].base_model_name_or_path = base_name
    with torch.no_grad():
        for name, (a, b) in (starts or {}).items():
            layer = adapted.base_model.model.get_submodule(name)
            layer.lora_A["default"].weight.copy_(a)
            layer.lora_B["default"].weight.copy_(b)
    return _unmergeable(adapted)


def load_adapter(model: nn.Module, folder: Path) -> Any:
    """`model` with the adapter saved in `folder`, frozen.

    Raises:
        ModelError: the folder holds no adapter, or one of another base.
    """
    from peft import PeftModel

    from nybble.models.lora_linear import use_our_experts

    files = read_adapter(folder)
    grow_vocabulary(model, files.n_embeddings(embeddings_and_head(model)[0]))
    config = files.to_peft(model)
    use_our_experts(config)
    with _fitting(folder), targets_as_told(model):
        return _unmergeable(_with_token_rows(PeftModel.from_pretrained(model, folder, config=config)))


def add_adapter(adapted: Any, folder: Path, name: str) -> None:
    """Add the adapter saved in `folder` to those of `adapted`, under `name`.

    Raises:
        ModelError: as `load_adapter`.
    """
    from nybble.models.lora_linear import use_our_experts

    files, base = read_adapter(folder), adapted.get_base_model()
    size = base.config.get_text_config().vocab_size
    if files.n_embeddings(embeddings_and_head(base)[0]) > size:
        raise ModelError(f"{folder}: has rows for tokens beyond the {size:,} of the first adapter; ask it separately")
    config = files.to_peft(base)
    use_our_experts(config)
    with _fitting(folder), targets_as_told(base):
        adapted.add_adapter(name, config)
        adapted.load_adapter(folder, name)


def _as_masters(adapted: Any) -> None:
    """Let modules that are trained whole have float32 weights, and give on what the frozen ones gave."""
    from peft.utils import ModulesToSaveWrapper

    for wrapper in adapted.modules():
        if not isinstance(wrapper, ModulesToSaveWrapper):
            continue
        dtype = next(wrapper.original_module.parameters()).dtype
        wrapper.modules_to_save.float()
        if not use_whole_head(wrapper):
            wrapper.modules_to_save["default"].register_forward_hook(lambda _m, _x, y, dtype=dtype: y.to(dtype))


def _with_token_rows(adapted: Any) -> Any:
    """The same model, whose learned rows of tokens run through our blocks if the rest does."""
    if blocks_of(adapted).flattened:
        for module in adapted.modules():
            if hasattr(module, "token_adapter"):
                use_token_rows(module)
    return adapted


@contextmanager
def _fitting(folder: Path) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, OSError) as error:
        raise ModelError(
            f"{folder}: adapter does not fit this base: {brief(error)}; give the base that it was trained on"
        ) from error


def _unmergeable(adapted: Any) -> Any:
    """The same model; where its base is packed, PEFT's own merging is refused with what to do instead.

    PEFT would add to packed bytes; over bitsandbytes it decodes, adds and rounds to 4 bits, which loses small adapters.
    """
    if any(isinstance(module, Linear4bit | Experts4bit) for module in adapted.modules()):

        def refuse(*_args: Any, **_options: Any) -> None:
            raise ModelError(
                "an adapter cannot be merged into packed 4-bit weights without losing it; use `nybble merge RUN --out "
                "DIR` (nybble.merge), which writes a whole model"
            )

        adapted.base_model.merge_and_unload = adapted.base_model.merge_adapter = refuse
    return adapted


def save_adapter(model: Any, folder: Path, trained: dict[str, Tensor] | None = None) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`; embeddings are not copied in.

    Of a model in shards, `trained` is what `trained_parameters` gave.
    """
    model.save_pretrained(folder, save_embedding_layers=False, state_dict=trained)
    write_text(folder / CONFIG, config_text(model))


def trained_parameters(model: Any) -> dict[str, Tensor]:
    """The trained parameters of `model`, as full tensors by name; all processes must call this together."""
    return {name: full_tensors(p.detach()) for name, p in model.named_parameters() if p.requires_grad}


def trained_weights(model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The trained weights of `model` by their names on disk, and the text of the files that belong to them.

    Adapters have the names that PEFT gives them on disk, with its `adapter_config.json`; a model without adapters those
    of its own parameters.
    """
    from peft import PeftModel

    weights = {name: full_tensors(p.detach()) for name, p in _by_file_name(model).items()}
    if not isinstance(model, PeftModel):
        return weights, {}
    return weights, {CONFIG: config_text(model)}


def put_weights_back(model: Any, weights: Mapping[str, Tensor]) -> None:
    """Set the trained weights of `model` to what `trained_weights` returned.

    Raises:
        ModelError: the weights are not those that are trained in this model.
    """
    here = _by_file_name(model)
    if {name: tensor.shape for name, tensor in here.items()} != {name: t.shape for name, t in weights.items()}:
        raise ModelError("the checkpoint's weights are not those that are trained now; start over with --overwrite")
    with torch.no_grad():
        for name, tensor in weights.items():
            here[name].copy_(shard_like(tensor, here[name]))


def _by_file_name(model: Any) -> dict[str, Tensor]:
    """The trained parameters by their names on disk."""
    from peft import PeftModel, get_peft_model_state_dict

    trained: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not isinstance(model, PeftModel):
        return trained
    return dict(get_peft_model_state_dict(model, state_dict=trained, save_embedding_layers=False))
