"""Going on from an adapter: a training that starts with the weights of a finished one instead of fresh ones.

The adapter says its own shape: rank, scale, layers and kind are taken over from it. A recipe that names another one of
these itself is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from nybble.errors import ModelError, RecipeError
from nybble.guard import as_path
from nybble.models.adapter_files import ROWS_OF_TOKENS, WEIGHTS, AdapterFiles, read_adapter
from nybble.models.adapters import put_weights_back
from nybble.models.artifact import Artifact, check_original, find_artifact
from nybble.models.source import ModelSource
from nybble.models.tokenizer import find_tokenizer
from nybble.recipe import LoraSection, ModelSection, Recipe
from nybble.run.directory import RunDirectory

_FACTORS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")  # what the tensors of a linear are named


def adapter_folder(name: str) -> Path:
    """The folder of the adapter that `adapter_name_or_path` names: itself, or that of a run.

    Raises:
        ModelError: there is none.
    """
    folder = as_path(name, ModelError)
    folder = RunDirectory(folder).adapter if (folder / "run.json").is_file() else folder
    if not (folder / "adapter_config.json").is_file():
        raise ModelError(f"adapter_name_or_path: {name} holds no adapter; give the folder of an adapter, or of a run")
    return folder


def adapter_weights(name: str) -> Path:
    """The file of its weights."""
    return adapter_folder(name) / WEIGHTS


def take_over_adapter(recipe: Recipe) -> Recipe:
    """The recipe with the shape of the adapter that it continues from, and with its base if none is named.

    Raises:
        RecipeError: the recipe itself says that the adapter has another shape.
        ModelError: the adapter cannot be read, or holds more than can be learned on.
    """
    name = recipe.lora.adapter_name_or_path
    if not name:
        return recipe
    folder = adapter_folder(name)
    files = read_adapter(folder)
    own = _shape(files)
    conflicts = [
        f"{setting} {_said(value)}, and the recipe says {_said(getattr(recipe.lora, setting))}"
        for setting, value in own.items()
        if setting in recipe.lora.model_fields_set and not _agree(setting, recipe.lora, value, files)
    ]
    if recipe.lora.init_lora_weights != "default":
        conflicts.append(f"weights already, and the recipe says init_lora_weights {recipe.lora.init_lora_weights}")
    if conflicts:
        raise RecipeError(f"adapter_name_or_path: {folder} has {'; '.join(conflicts)}; remove that from the recipe")
    dropout = (files.settings.model_extra or {}).get("lora_dropout")
    if "lora_dropout" not in recipe.lora.model_fields_set and isinstance(dropout, int | float) and 0 <= dropout < 1:
        own["lora_dropout"] = dropout
    lora = LoraSection.model_validate({**recipe.lora.model_dump(), **own})
    model = recipe.model
    if not model.model_name_or_path:
        model = _artifact(folder, recipe).base
    return recipe.model_copy(update={"lora": lora, "model": model})


def check_adapter_base(recipe: Recipe, source: ModelSource) -> list[str]:
    """Check that the adapter that training continues from was trained on `source`; notes on that.

    Raises:
        ModelError: it was trained on another model.
    """
    if not recipe.lora.adapter_name_or_path:
        return []
    tuned = _artifact(adapter_folder(recipe.lora.adapter_name_or_path), recipe)
    named = read_adapter(tuned.folder).settings.base_model_name_or_path
    is_own_base = named is not None and Path(named).is_dir() and Path(named).resolve() == source.folder.resolve()
    if tuned.is_repaired and not is_own_base:
        raise ModelError(
            f"{tuned.folder} was started by {tuned.init} and only fits the base of its own run; set "
            f"--model_name_or_path to {named}, or merge it first (nybble merge) and train on the merged model"
        )
    if not is_own_base:
        check_original(tuned, source)
    notes = [f"continuing from the adapter {tuned.folder}; figures before the training are those of base and adapter"]
    if tuned.fingerprint is None:
        notes.append("the adapter does not say which weights it was trained on: only its shapes are checked")
    return notes


def start_from(model: Any, name: str) -> None:
    """Set the adapters of `model`, which were attached to its shape, to those that `adapter_name_or_path` names.

    Raises:
        ModelError: they are not those of the model.
    """
    file = adapter_weights(name)
    rows = set(map(tuple, read_adapter(file.parent).token_rows().values()))
    here = model.peft_config["default"].trainable_token_indices or {}
    if not rows <= {tuple(ids) for ids in here.values()}:
        raise ModelError(
            f"{file.parent}: its new tokens have other numbers with the tokenizer of this base; give the base that it "
            "was trained on"
        )
    try:
        put_weights_back(model, load_file(file))
    except ModelError as error:
        raise ModelError(
            f"{file.parent}: adapter does not fit this base: it has other layers or sizes; give the base that it was "
            "trained on"
        ) from error


def _artifact(folder: Path, recipe: Recipe) -> Artifact:
    model = recipe.model.model_name_or_path
    return find_artifact(str(folder), {"model_name_or_path": model} if model else None)


def _shape(files: AdapterFiles) -> dict[str, Any]:
    """The settings of the recipe by which `attach` makes the adapter's shape."""
    settings, ranks = files.settings, files.ranks()
    further = {name: value for name, value in (settings.model_extra or {}).items() if value}
    tokens, whole = files.token_rows(), files.whole()
    known = {name for names in whole.values() for name in names}
    more = [name for name in files.tensors if not name.endswith((*_FACTORS, ROWS_OF_TOKENS)) and name not in known]
    held = {
        "lora_bias": settings.lora_bias,
        f"bias: {settings.bias}": settings.bias != "none",
        "fan_in_fan_out": settings.fan_in_fan_out,
        "modules_to_save and no weights of them": not all(whole.values()),
        "rows of different tokens in embeddings and head": len({tuple(ids) for ids in tokens.values()}) > 1,
        **dict.fromkeys(settings.unknown, True),
        **({more[0]: True} if more else {}),
    }
    wrong = [name for name, is_held in held.items() if is_held]
    if wrong:
        raise ModelError(
            f"{files.folder}: training does not continue from an adapter with {wrong[0][:200]}; merge it first (nybble "
            "merge), and train on the merged model"
        )
    targets = further.get("target_modules")
    limits = ("exclude_modules", "layers_to_transform", "layers_pattern")
    are_names = isinstance(targets, list) and all(isinstance(target, str) for target in targets)
    if not are_names or any(name in further for name in limits) or not _name_all(targets, ranks):
        targets = list(ranks)
    return {
        "r": settings.r,
        "lora_alpha": settings.lora_alpha,
        "use_rslora": settings.use_rslora,
        "use_dora": settings.use_dora,
        "target_modules": tuple(sorted(targets or ())),
        "modules_to_save": tuple(whole),
        "new_tokens": _texts(files.folder, next(iter(tokens.values()), [])),
        "rank_pattern": {module: rank for module, rank in ranks.items() if rank != settings.r},
        "alpha_pattern": {m: alpha for m, alpha in files.alphas().items() if alpha != settings.lora_alpha},
        "exclude_modules": (),
        "layers_to_transform": (),
        "layers_pattern": (),
    }


def _texts(folder: Path, ids: list[int]) -> tuple[str, ...]:
    """The tokens numbered `ids`, by the tokenizer beside the adapter."""
    if not ids:
        return ()
    tokenizer, _ = find_tokenizer(ModelSection(tokenizer_name_or_path=str(folder)))
    texts = tokenizer.convert_ids_to_tokens(ids)
    if None in texts:
        raise ModelError(
            f"{folder}: its tokenizer has no token {ids[texts.index(None)]}; give the one it was saved with"
        )
    return tuple(texts)


def _name_all(targets: Any, ranks: Mapping[str, int]) -> bool:
    """Whether each adapted module has one of these names, and each of the names is that of a module."""
    ends = {next((t for t in targets if m == t or m.endswith(f".{t}")), None) for m in ranks}
    return ends == set(targets)


def _agree(setting: str, lora: LoraSection, value: Any, files: AdapterFiles) -> bool:
    """Whether what the recipe says is what the adapter has, as far as that can be told without the model."""
    said = getattr(lora, setting)
    if setting == "target_modules":
        # `all-linear` and expressions need the model; the adapter's tensors are compared when they are loaded.
        return isinstance(said, str) or set(said) == set(value) or _name_all(said, files.ranks())
    if setting == "modules_to_save":
        return set(said) == set(value)
    if setting in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        return True  # the adapter has what they left
    if setting in ("rank_pattern", "alpha_pattern"):
        return not said or _matching(said, files, setting)
    return bool(said == value)


def _matching(said: Mapping[str, float], files: AdapterFiles, setting: str) -> bool:
    from peft.utils.other import get_pattern_key

    found: Mapping[str, float] = files.ranks() if setting == "rank_pattern" else files.alphas()
    default = files.settings.r if setting == "rank_pattern" else files.settings.lora_alpha
    return all(said.get(get_pattern_key(list(said), module), default) == has for module, has in found.items())


def _said(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
