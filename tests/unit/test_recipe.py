"""Recipes: what may be written, how it is understood, and what a wrong one is told."""

from __future__ import annotations

import dataclasses
import re
import tomllib
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic.fields import FieldInfo

from nybble import bundled
from nybble.errors import InputError, RecipeError
from nybble.recipe import DataSet, Recipe, Setting, all_settings, json_schema, load_recipe, path_of, save_recipe
from nybble.recipe.other_tools import ANSWERS
from nybble.recipe.schema import COLUMN_ROLES
from nybble.recipe.setting import Bytes, NumberedGpu, Steps, StepsOrEpochs, StepsOrNone

SETTINGS = all_settings()
SECTIONS = sorted({item.section for item in SETTINGS if item.section})
NOT_ALONE = ("push_to_hub", "fsdp_cpu_offload", "fsdp_shards", "layers_pattern")  # settings that need another
ALIASES = [(item, alias) for item in SETTINGS for alias in item.aliases if item.name not in NOT_ALONE]
NEED_ADAPTERS = {"adapter_name_or_path", "new_tokens"}
MODULES = st.text("abc_.019", min_size=1)  # names of modules
RECIPES = sorted((Path(__file__).parents[2] / "src/nybble/bundled/recipes").glob("*.yaml"))
LIMITS = ("ge", "gt", "le", "lt")


def field_of(item: Setting) -> FieldInfo:
    holder = type(Recipe.model_fields[item.section].default) if item.section else Recipe
    return holder.model_fields[item.name]


def limits_of(item: Setting) -> dict[str, float]:
    return {k: getattr(m, k) for m in field_of(item).metadata for k in LIMITS if getattr(m, k, None) is not None}


def value_of(recipe: Recipe, item: Setting) -> Any:
    return getattr(getattr(recipe, item.section) if item.section else recipe, item.name)


def other_value(item: Setting) -> Any:
    """An allowed value that is not the default."""
    kind = field_of(item).annotation
    if item.is_size:
        return "123456789B"
    if get_origin(kind) is Union and get_origin(get_args(kind)[0]) is Literal:
        return next(choice for choice in get_args(get_args(kind)[0]) if choice != item.default)
    if get_origin(kind) is Literal:
        return next(choice for choice in get_args(kind) if choice != item.default)
    if kind == bool | None:
        return True
    if kind in (Steps, StepsOrEpochs, StepsOrNone):
        return 7
    if kind is bool or isinstance(item.default, bool):
        return not item.default
    if kind is int or kind == int | None:
        return 7 + (item.default or 8)
    if kind in (float, float | None) or isinstance(item.default, float):
        return 0.125
    if item.is_mapping:
        return {"one": 7, ".*two": 8}
    if item.name == "columns":
        return ["question=one", "answer=two"]
    if get_origin(kind) is tuple:
        return ["one", "two"] if item.values == "NAMES" else [0, 2]
    return "other"


def written(tmp_path: Path, content: str | dict[str, Any]) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return file


def refusal(path: Any = None, overrides: dict[str, Any] | None = None) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert isinstance(caught.value, InputError)
    assert caught.value.exit_code == 2
    return message


def test_defaults_are_the_schemas() -> None:
    recipe = load_recipe()
    assert recipe == Recipe()
    assert [value_of(recipe, item) for item in SETTINGS] == [item.default for item in SETTINGS]
    assert (recipe.method, recipe.lora.r, recipe.quantization.bnb_4bit_quant_type) == ("qlora", 16, "nf4")
    assert recipe.data.loss_on == "answers"


def test_defaults_pass_their_own_validation() -> None:
    assert Recipe.model_validate(Recipe().model_dump()) == Recipe()


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_recipe().training.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize("content", ["", "# nothing\n", "{}\n", "training:\nlora: {}\n"])
def test_an_empty_file_is_the_defaults(tmp_path: Path, content: str) -> None:
    assert load_recipe(written(tmp_path, content)) == Recipe()


def test_flat_sectioned_and_dotted_files_mean_the_same(tmp_path: Path) -> None:
    flat = load_recipe(written(tmp_path, "learning_rate: 0.5\nr: 3\nmethod: lora\n"))
    sections = load_recipe(written(tmp_path, "training: {learning_rate: 0.5}\nlora: {r: 3}\nmethod: lora\n"))
    dotted = load_recipe(written(tmp_path, "training.learning_rate: 0.5\nlora.r: 3\nmethod: lora\n"))
    assert flat == sections == dotted
    assert (flat.training.learning_rate, flat.lora.r, flat.method) == (0.5, 3, "lora")


@pytest.mark.parametrize("item", [s for s in SETTINGS if s.name not in NOT_ALONE], ids=lambda s: s.path)
def test_every_setting_is_set_by_name_by_path_and_in_its_section(tmp_path: Path, item: Setting) -> None:
    value = other_value(item)
    by_name = load_recipe(None, {item.name: value})
    assert by_name != Recipe()
    meant = 123456789 if item.is_size else tuple(value) if isinstance(value, list) else value
    assert value_of(by_name, item) == meant
    assert load_recipe(None, {item.path: value}) == by_name
    nested = {item.section: {item.name: value}} if item.section else {item.name: value}
    assert load_recipe(written(tmp_path, nested)) == by_name


@pytest.mark.parametrize(("item", "alias"), ALIASES, ids=lambda x: x if isinstance(x, str) else "")
def test_every_alias_means_its_setting(tmp_path: Path, item: Setting, alias: str) -> None:
    value = other_value(item)
    wanted = load_recipe(None, {item.path: value})
    assert load_recipe(None, {alias: value}) == wanted
    assert load_recipe(None, {f"{item.section}.{alias}" if item.section else alias: value}) == wanted
    assert load_recipe(written(tmp_path, {alias: value})) == wanted


def test_the_names_of_other_tools_are_understood() -> None:
    foreign = """model_name base_model finetuning_type use_bnb_nested_quant double_quantization block_size lora_r
        lora_rank lora_target_modules lora_target dataset train_file text_column max_seq_length cutoff_len sequence_len
        val_set_size max_samples num_epochs micro_batch_size batch_size lr lr_scheduler optimizer grad_accum"""
    assert set(foreign.split()) <= {alias for _, alias in ALIASES}


def test_names_and_aliases_are_unique() -> None:
    spellings = [spelling for item in SETTINGS for spelling in (item.name, *item.aliases)]
    assert sorted(spellings) == sorted(set(spellings))
    assert len({item.path for item in SETTINGS}) == len(SETTINGS)
    # `model: folder` and `data: rows.jsonl` are short for a setting of that very section; no other name may clash.
    clashes = {(item.section, alias) for item, alias in ALIASES if alias in SECTIONS}
    assert all(section == alias for section, alias in clashes)
    assert not {item.name for item in SETTINGS} & set(SECTIONS)


@pytest.mark.parametrize(
    "flag", ["learning-rate", "--learning-rate", "--learning_rate", "training.learning-rate", "lr"]
)
def test_dashes_and_underscores_are_one(flag: str) -> None:
    assert load_recipe(None, {flag: "0.5"}).training.learning_rate == 0.5


def test_override_beats_file_beats_default(tmp_path: Path) -> None:
    file = written(tmp_path, "training: {learning_rate: 0.5, max_steps: 9}\n")
    recipe = load_recipe(file, {"lr": "0.25"})
    assert (recipe.training.learning_rate, recipe.training.max_steps, recipe.training.seed) == (0.25, 9, 42)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("learning_rate", "2e-4", 2e-4),
        ("learning_rate", "probe", "probe"),
        ("use_dora", "true", True),
        ("max_train_rows", "null", None),
        ("max_steps", "-1", -1),
        ("bnb_4bit_blocksize", "128", 128),
        ("target_modules", "q_proj, v_proj", ("q_proj", "v_proj")),
        ("target_modules", "[q_proj, v_proj]", ("q_proj", "v_proj")),
        ("target_modules", "all", "all-linear"),
        ("target_modules", "q_proj", "q_proj"),
        ("skip_modules", "[a, b]", ("a", "b")),
        ("report_to", "[tensorboard, wandb]", "tensorboard,wandb"),
        ("output_dir", "runs/ü x", "runs/ü x"),
    ],
)
def test_text_from_the_command_line_becomes_the_value(name: str, text: str, value: Any) -> None:
    item = next(item for item in SETTINGS if item.name == name)
    assert value_of(load_recipe(None, {name: text}), item) == value


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("learning_rat", "learning_rate"),
        ("Learning_Rate", "learning_rate"),
        ("lora_alpa", "lora_alpha"),
        ("training.learing_rate", "learning_rate"),
        ("lora.learning_rate", "learning_rate"),
        ("--num-train-epoch", "num_train_epochs"),
    ],
)
def test_a_misspelt_setting_is_asked_back(wrong: str, meant: str) -> None:
    message = refusal(None, {wrong: 1})
    assert repr(wrong) in message
    assert f"did you mean {meant!r}?" in message


def test_a_name_like_no_other_is_sent_to_the_list() -> None:
    assert "nybble settings" in refusal(None, {"xyzzy": 1})


@pytest.mark.parametrize(
    ("foreign", "ours"),
    [
        ("load_in_4bit", "method: qlora"),
        ("load_in_8bit", "method: lora"),
        ("quantization_bit", "method: qlora"),
        ("adapter", "method: qlora"),
        ("bf16", "bnb_4bit_compute_dtype: bfloat16"),
        ("fp16", "bnb_4bit_compute_dtype: float16"),
        ("training.bf16", "bnb_4bit_compute_dtype: bfloat16"),
        ("train_on_inputs", "loss_on"),
    ],
)
def test_other_tools_settings_get_a_hint(foreign: str, ours: str) -> None:
    message = refusal(None, {foreign: True})
    assert repr(foreign) in message
    assert ours in message


@pytest.mark.parametrize("item", SETTINGS, ids=lambda s: s.path)
def test_a_wrong_type_is_named_in_one_line(item: Setting) -> None:
    message = refusal(None, {item.path: {"a\nmapping": [1]}})
    assert message.startswith(f"{item.path}: got ")
    assert item.meaning in message


@pytest.mark.parametrize(
    ("item", "limit"),
    [(s, k) for s in SETTINGS for k in limits_of(s)],
    ids=lambda x: x if isinstance(x, str) else x.path,
)
def test_a_value_beyond_its_limit_is_named_in_one_line(item: Setting, limit: str) -> None:
    beyond = limits_of(item)[limit] + {"ge": -1, "gt": 0, "le": 1, "lt": 0}[limit]
    message = refusal(None, {item.path: beyond})
    assert message.startswith(f"{item.path}: got {beyond!r}; input should be ")


def test_limits_themselves_are_allowed() -> None:
    for item in SETTINGS:
        for limit, value in limits_of(item).items():
            if limit in ("ge", "le"):
                assert value_of(load_recipe(None, {"distributed": "fsdp", item.path: value}), item) == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 0),
        ("r", 0),
        ("max_length", 7),
        ("eval_fraction", 1),
        ("lora_dropout", 1),
        ("max_steps", -2),
        ("max_steps", 0),
    ]
    + [("seed", 2**32), ("data_seed", 2**32), ("eval_seed", 2**32), ("max_steps", 10**12), ("max_length", 10**12)]
    + [("per_device_train_batch_size", 10**12), ("dataset_num_proc", 10**6), ("num_train_epochs", "1.0e+30")]
    + [("packing", 10**9), ("n_samples", 10**9), ("max_seconds", "1.0e+30"), ("max_steps", "true")]
    + [(name, ".nan") for name in ("learning_rate", "weight_decay", "lora_dropout")],
)
def test_what_cannot_be_meant_is_refused(name: str, value: float | str) -> None:
    got = yaml.safe_load(str(value))
    assert f"{name}: got {got}" in refusal(None, {name: value})


def test_some_settings_need_another() -> None:
    assert "hub_model_id" in refusal(None, {"push_to_hub": True})
    assert load_recipe(None, {"push_to_hub": True, "hub_model_id": "me/it"}).training.push_to_hub
    assert "distributed: fsdp" in refusal(None, {"fsdp_cpu_offload": True})
    assert load_recipe(None, {"fsdp_cpu_offload": True, "distributed": "fsdp"}).training.fsdp_cpu_offload
    assert "distributed: fsdp" in refusal(None, {"fsdp_shards": 2})
    assert load_recipe(None, {"fsdp_shards": 2, "distributed": "fsdp"}).training.fsdp_shards == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("optimisation:\n  lr: 1\n", "unknown section 'optimisation'; allowed: data, evaluation, lora"),
        ("- a\n- b\n", "holds a list; a recipe is settings"),
        ("just words\n", "holds a str; a recipe is settings"),
        ("a: b: c\n", "not YAML"),
        ("training:\n\tlr: 1\n", "not YAML"),
        ("x: !!python/object/apply:os.getcwd []\n", "not YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path: Path, content: str, said: str) -> None:
    file = written(tmp_path, content)
    message = refusal(file)
    assert message.startswith(f"{file}: ")
    assert said in message


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_bytes(b"run_name: \xff\n")
    assert refusal(file).startswith(f"{file}: not YAML")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert f"'{tmp_path / 'none.yaml'}' does not exist" in refusal(tmp_path / "none.yaml")
    assert "does not exist" in refusal(tmp_path)


def values(kind: Any, limits: dict[str, float]) -> st.SearchStrategy[Any]:
    """Allowed values of a setting's type."""
    if kind == Bytes:
        return st.integers(10**6, 10**15)
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    if get_origin(kind) in (Union, types.UnionType):
        return st.one_of([values(one, limits) for one in get_args(kind)])
    if kind is NumberedGpu:
        return st.builds("{}:{}".format, st.sampled_from(["cuda", "hip"]), st.integers(0, 999))
    if get_origin(kind) is Annotated:
        own = getattr(get_args(kind)[1], "metadata", ())
        return values(get_args(kind)[0], {k: getattr(m, k) for m in own for k in LIMITS if hasattr(m, k)})
    if get_origin(kind) is tuple:
        return st.lists(values(get_args(kind)[0], {}), max_size=3)
    if get_origin(kind) is dict:
        return st.dictionaries(MODULES, values(get_args(kind)[1], {}), max_size=3)
    if kind is DataSet:
        taken = st.one_of(
            st.just({}), st.builds(dict, rows=st.integers(1, 9)), st.builds(dict, weight=st.floats(0.1, 9))
        )
        return st.builds(lambda path, taken: {"path": path, **taken}, MODULES, taken)
    if kind is float:
        low, high = limits.get("ge", limits.get("gt", -1e300)), limits.get("le", limits.get("lt", 1e300))
        return st.floats(low, high, exclude_min="gt" in limits, exclude_max="lt" in limits, allow_nan=False)
    whole = st.integers(int(limits.get("ge", 0)), int(limits.get("le", 10**12)))
    return {int: whole, bool: st.booleans(), str: st.text(), type(None): st.none()}[kind]


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    chosen = draw(st.sets(st.sampled_from(SETTINGS), max_size=12).map(lambda s: sorted(s, key=lambda item: item.path)))
    given_values = {
        item.path: draw(values(field_of(item).annotation, {"ge": 10**6} if item.is_size else limits_of(item)))
        for item in chosen
    }
    given_values |= {
        item.path: draw(MODULES | st.lists(MODULES, max_size=3))
        for item in chosen
        if item.name in ("target_modules", "exclude_modules")
    }
    roles = st.lists(st.sampled_from(COLUMN_ROLES), max_size=3, unique=True)
    named = roles.flatmap(
        lambda some: st.tuples(*[MODULES.map(lambda name, role=role: f"{role}={name}") for role in some])
    )
    given_values |= {item.path: draw(named) for item in chosen if item.name == "columns"}
    names = st.lists(MODULES.filter(bool), max_size=3, unique=True)
    given_values |= {item.path: draw(names) for item in chosen if item.name in ("modules_to_save", "new_tokens")}
    content: dict[str, Any] = {"training": {"hub_model_id": "me/" + draw(st.text())}}
    for path, value in given_values.items():
        section, _, name = path.rpartition(".")
        if name != "hub_model_id":
            (content.setdefault(section, {}) if section else content)[name] = value
    if "init_lora_weights" in content.get("lora", {}):  # starts plain LoRA on a 4-bit base
        content["method"] = "qlora"
        content["lora"].pop("use_dora", None)
    if content["training"].get("loraplus_lr_ratio") or content.get("lora", {}).keys() & NEED_ADAPTERS:
        content["method"] = "qlora"
    if content.get("lora", {}).get("new_tokens"):
        content["lora"].pop("adapter_name_or_path", None)
    if content["training"].get("train_batch_size"):  # the accumulation follows from it
        content["training"].pop("gradient_accumulation_steps", None)
    if content["training"].get("fsdp_cpu_offload") or content["training"].get("fsdp_shards"):
        content["training"]["distributed"] = "fsdp"
    content.get("lora", {}).pop("layers_pattern", None)
    if content.get("preferences", {}).get("objective", "sft") != "sft":  # it compares whole answers
        content["data"] = {k: v for k, v in content.get("data", {}).items() if k not in ("loss_on", "overlong")}
        content["preferences"].pop("precompute_ref_log_probs", None)
        if content["training"].get("learning_rate") == "probe":
            del content["training"]["learning_rate"]
    if content.get("preferences", {}).get("label_smoothing"):
        content["preferences"].pop("loss_type", None)
    if isinstance(content.get("data", {}).get("dataset_name"), list):  # several sets have their own rows and splits
        content["data"] = {
            k: v for k, v in content["data"].items() if k not in ("max_train_rows", "eval_dataset_split")
        }
        content["data"]["dataset_name"] = content["data"]["dataset_name"] or "none"
    return Recipe.model_validate(content)


@settings(max_examples=150, deadline=None)
@given(recipe=recipes())
def test_a_saved_recipe_loads_as_itself(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / "saved.yaml"
    file.write_text(save_recipe(recipe), encoding="utf-8")
    assert load_recipe(file) == recipe


def test_a_saved_recipe_keeps_the_next_line_character(tmp_path: Path) -> None:
    recipe = Recipe.model_validate({"training": {"run_name": "a\x85b"}})
    assert load_recipe(written(tmp_path, save_recipe(recipe))) == recipe


def test_one_setting_under_two_names_is_refused(tmp_path: Path) -> None:
    assert "same setting" in refusal(written(tmp_path, "lr: 1.0e-3\nlearning_rate: 2.0e-3\n"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("r: 8\nseed: 1\nr: 16\n", "'r' is given in line 1 and again in line 3"),
        ("lora: {r: 64}\ntraining:\n  seed: 1\nlora:\n  r: 8\n", "'lora' is given in line 1 and again in line 4"),
        ("training:\n  seed: 1\n  lr: 1\n  seed: 1\n", "'seed' is given in line 2 and again in line 4"),
        ("lora: {r: 8, r: 8}\n", "'r' is given twice in line 1"),
        ("rank_pattern:\n  up_proj: 1\n  down_proj: 2\n  up_proj: 3\n", "'up_proj' is given in line 2 and again in"),
        ("dataset_name:\n- {path: a, weight: 1}\n- path: b\n  path: c\n", "'path' is given in line 3 and again in"),
        ("'r': 8\nr: 16\n", "'r' is given in line 1 and again in line 2"),
    ],
)
def test_what_is_given_twice_is_refused_with_both_lines(tmp_path: Path, content: str, said: str) -> None:
    file = written(tmp_path, content)
    message = refusal(file)
    assert message.startswith(f"{file}: {said}")
    assert message.endswith("; keep one of them")


def test_a_value_and_overrides_that_say_a_thing_twice_are_refused() -> None:
    assert refusal(None, {"rank_pattern": "{a: 1, a: 2}"}) == (
        "lora.rank_pattern: 'a' is given twice in line 1; keep one of them"
    )
    assert refusal(None, {"lr": 1e-3, "learning_rate": 2e-3}) == (
        "'lr' and 'learning_rate' are the same setting; keep one"
    )


def test_a_name_may_stand_in_several_mappings(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, "rank_pattern: {a: 1}\nalpha_pattern: {a: 2}\n"))
    assert (recipe.lora.rank_pattern, recipe.lora.alpha_pattern) == ({"a": 1}, {"a": 2})


def test_a_saved_recipe_holds_every_setting() -> None:
    saved = yaml.safe_load(save_recipe(Recipe()))
    assert {item.name for item in SETTINGS} == {"method"} | {name for s in SECTIONS for name in saved[s]}


def test_the_json_schema_holds_every_setting() -> None:
    schema = json_schema()
    for item in SETTINGS:
        properties = schema["properties"]
        if item.section:
            reference = properties[item.section]["anyOf"][0]
            name = (reference.get("$ref") or reference["allOf"][0]["$ref"]).rpartition("/")[2]
            properties = schema["$defs"][name]["properties"]
        assert properties[item.name]["description"] == item.meaning
    assert all(d.get("additionalProperties") is False for d in schema["$defs"].values())


def fits(value: Any, schema: dict[str, Any], whole: dict[str, Any]) -> bool:
    """Whether an editor with this JSON schema accepts a value; by the words of JSON Schema that ours has."""
    kinds = {"string": str, "boolean": bool, "integer": int, "number": int | float, "null": type(None)}
    kinds |= {"array": list, "object": dict}
    if "$ref" in schema:
        return fits(value, whole["$defs"][schema["$ref"].rpartition("/")[2]], whole)
    if any(not fits(value, part, whole) for part in schema.get("allOf", ())):
        return False
    if "anyOf" in schema:
        return any(fits(value, one, whole) for one in schema["anyOf"])
    kind = schema.get("type")
    if kind and (not isinstance(value, kinds[kind]) or (isinstance(value, bool) and kind != "boolean")):
        return False
    if value not in schema.get("enum", [value]) or value != schema.get("const", value):
        return False
    if kind in ("integer", "number") and not (
        schema.get("minimum", value) <= value <= schema.get("maximum", value)
        and schema.get("exclusiveMinimum", value - 1) < value < schema.get("exclusiveMaximum", value + 1)
    ):
        return False
    if isinstance(value, str):
        return re.search(schema.get("pattern", ""), value) is not None
    if isinstance(value, list):
        return all(fits(one, schema.get("items", {}), whole) for one in value)
    if isinstance(value, dict):
        known, rest = schema.get("properties", {}), schema.get("additionalProperties", {})
        inner = [(one, known.get(name, rest)) for name, one in value.items()]
        return all(part is not False and fits(one, part if part is not True else {}, whole) for one, part in inner)
    return True


@pytest.mark.parametrize("item", SETTINGS, ids=lambda item: item.path)
def test_editors_accept_a_setting_in_every_spelling(item: Setting) -> None:
    schema, value = json_schema(), other_value(item)
    for name in (item.name, item.path, *item.aliases):
        assert fits({name: value}, schema, schema), name
    for name in (item.name, *item.aliases):
        content = {item.section: {name: value}} if item.section else {name: value}
        assert fits(content, schema, schema), name


@pytest.mark.parametrize(
    "content",
    [
        "learning_rate: 1e-3",
        "lr: 2e-4\nlora_r: 8\nbatch_size: 2\nmodel: a/b\ndata: rows.jsonl",
        "model: {model: a/b}\ntraining:\nlora: {target_modules: 'q_proj,v_proj', lora_alpha: 1e1}",
        "training.seed: 3\nlean: true\nsave_strategy: no\ngrad_spike: 1e2\npacking: '40'",
        "layers_to_transform: 0,2\nreport_to: [tensorboard, wandb]\nblocksize: '64'\nskip_modules: a,b",
    ],
)
def test_editors_accept_what_is_read(tmp_path: Path, content: str) -> None:
    load_recipe(written(tmp_path, content))
    schema = json_schema()
    assert fits(yaml.safe_load(content), schema, schema)


@pytest.mark.parametrize(
    "content", ["lerning_rate: 1", "lr: fast", "r: 0", "method: lorra", "lora: {rr: 1}", "seed: []"]
)
def test_editors_mark_what_is_refused(tmp_path: Path, content: str) -> None:
    refusal(written(tmp_path, content))
    schema = json_schema()
    assert not fits(yaml.safe_load(content), schema, schema)


def test_every_setting_has_a_meaning() -> None:
    assert [item.path for item in SETTINGS if not item.meaning] == []


def test_recipes_that_come_with_it_are_taken_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(bundled.recipes()) == [file.stem for file in RECIPES] != []
    for file in RECIPES:
        assert load_recipe(file.stem) == load_recipe(file)
    assert "does not exist; give a YAML file, a name that `nybble recipes` lists" in refusal("llama2-7b-guanacos")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    assert "bundled/recipes/*" in project["tool"]["setuptools"]["package-data"]["nybble"]  # the wheel has them
    monkeypatch.chdir(tmp_path)
    (tmp_path / RECIPES[0].stem).write_text("seed: 7\n")  # a file of one's own goes first
    assert load_recipe(RECIPES[0].stem) == load_recipe(None, {"seed": 7})


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.name)
def test_every_recipe_of_the_project_loads(file: Path) -> None:
    recipe = load_recipe(file)
    assert recipe.model.model_name_or_path
    assert recipe.data.dataset_name


@pytest.mark.parametrize("text", ["2024", "2024-05-01", "on", "a: b", "runs/a #2"])
def test_text_settings_take_text_as_it_is(text: str) -> None:
    assert load_recipe(None, {"output_dir": text}).training.output_dir == text


@pytest.mark.parametrize("text", ["2024-13-45", "!!int x"])
def test_yaml_that_cannot_be_built_is_refused_as_yaml(tmp_path: Path, text: str) -> None:
    assert "not YAML" in refusal(written(tmp_path, f"run_name: {text}\n"))


@pytest.mark.parametrize("name", ["r", "max_steps", "seed", "learning_rate", "cache_limit", "memory_budget"])
def test_true_is_no_number(name: str) -> None:
    assert name in refusal(None, {name: "true"})


@pytest.mark.parametrize("name", ["num_train_epochs", "learning_rate", "lora_alpha"])
def test_infinity_is_refused(name: str) -> None:
    assert name in refusal(None, {name: ".inf"})


def test_skip_modules_takes_names_with_commas() -> None:
    assert load_recipe(None, {"skip_modules": "lm_head"}).quantization.skip_modules == ("lm_head",)


def fields_of_other_tools() -> list[str]:
    """Every name in the configurations of the installed transformers, TRL and PEFT."""
    from peft import LoraConfig
    from transformers import TrainingArguments
    from trl import ModelConfig, ScriptArguments, SFTConfig

    kinds = (TrainingArguments, SFTConfig, ModelConfig, ScriptArguments, LoraConfig)
    return sorted({field.name for kind in kinds for field in dataclasses.fields(kind)})


def test_every_setting_of_transformers_trl_and_peft_is_honoured_or_answered() -> None:
    names = fields_of_other_tools()
    assert len(names) > 180
    told = {}
    for name in names:
        try:
            path_of(name)
        except RecipeError as error:
            told[name] = str(error).partition("; ")[2]
    assert len(names) - len(told) > 60
    vague = [name for name, answer in told.items() if not re.match(r"(use|remove it:|train|log in) ", answer)]
    assert vague == [], "these names have no answer in recipe/other_tools.py"


@pytest.mark.parametrize("name", sorted(ANSWERS))
def test_an_answer_names_settings_that_exist(name: str) -> None:
    """What it says to use is a setting with such a value, or a flag."""
    answer = ANSWERS[name]
    assert len(answer) < 130
    assert "\n" not in answer
    known = {item.name: item for item in SETTINGS}
    named = r"\b(?:use|and|or) (\w+_\w+|method|device|lean|loss_on|packing)(?:: (\w+))?"
    for setting, value in re.findall(named, answer):
        assert setting in known, answer
        if value and not known[setting].is_mapping:
            load_recipe(None, {setting: value})


def test_a_mapping_is_read_as_a_file_with_it_is(tmp_path: Path) -> None:
    content = {"training": {"lr": "1e-3"}, "lora": {"r": 8}, "seed": 3}
    assert load_recipe(content) == load_recipe(written(tmp_path, content))
    assert load_recipe(content, {"seed": 4}).training.seed == 4
    assert "unknown section 'lorra'" in refusal({"lorra": {"r": 8}})
    assert "'lr' and 'learning_rate' are the same setting" in refusal({"lr": 1, "learning_rate": 2})
    assert "give a YAML file, a mapping of settings, or a Recipe" in refusal(["lr"])
