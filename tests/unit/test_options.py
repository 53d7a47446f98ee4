"""Settings as options of a verb: how they are typed, what the help says, and that neither needs torch."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer

import nybble
from nybble import bundled
from nybble.cli.main import app
from nybble.cli.main import run as run_nybble
from nybble.cli.options import RecipeFile, SettingsCommand, takes_settings
from nybble.cli.train import print_outcome
from nybble.errors import RecipeError
from nybble.recipe import SECTIONS, all_settings, load_recipe

SETTINGS = all_settings()
Parse = Callable[..., dict[str, Any]]


@pytest.fixture
def parse() -> Parse:
    """A verb with settings and options of its own: what it is given."""
    given: dict[str, Any] = {}
    app = typer.Typer(add_completion=False)

    @takes_settings()
    def verb(
        overrides: dict[str, Any],
        recipe: RecipeFile = None,
        as_json: Annotated[bool, typer.Option("--json")] = False,
        max_kl: Annotated[float, typer.Option("--max_kl")] = 0.5,
    ) -> None:
        given.update(overrides, recipe=recipe, json=as_json, max_kl=max_kl)

    app.command(cls=SettingsCommand)(verb)

    def call(*words: str) -> dict[str, Any]:
        given.clear()
        app(list(words), standalone_mode=False)
        return {name: value for name, value in given.items() if value not in (None, False, 0.5)}

    return call


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["r.yaml", "--learning_rate", "2e-4"], {"recipe": "r.yaml", "learning_rate": "2e-4"}),
        (["--learning-rate=2e-4", "r.yaml"], {"recipe": "r.yaml", "learning_rate": "2e-4"}),
        (["--lr", "2e-4"], {"learning_rate": "2e-4"}),
        (["--training.learning-rate", "1"], {"learning_rate": "1"}),
        (["--training.lr=1"], {"learning_rate": "1"}),
        (["--lr", "1", "--lr", "2"], {"learning_rate": "2"}),
        (["--seed", "-1"], {"seed": "-1"}),
        (["--seed=-1"], {"seed": "-1"}),
        (["--use_dora", "true"], {"use_dora": "true"}),
        (["--use_dora", "--json"], {"use_dora": "true", "json": True}),
        (["--no-cache", "--packing"], {"cache": "false", "packing": "true"}),
        (["--packing", "4096"], {"packing": "4096"}),
        (["--run_name="], {"run_name": ""}),
        (["--run_name=--x"], {"run_name": "--x"}),
        (["--run_name", "a b=c"], {"run_name": "a b=c"}),
        (["--set", "lr=1", "--set", "lora.r=4", "--lr", "2"], {"learning_rate": "2", "r": "4"}),
        (["--set=training.seed=3"], {"seed": "3"}),
        (["--path", "a=b", "--path", "c=d"], {"paths": "a=b,c=d"}),
        (["--max-kl", "0.1", "--max_steps", "2"], {"max_kl": 0.1, "max_steps": "2"}),
        (["--max_kl=0.1", "--method=lora"], {"max_kl": 0.1, "method": "lora"}),
    ],
)
def test_settings_are_options_in_every_spelling(parse: Parse, words: list[str], expected: dict[str, Any]) -> None:
    assert parse(*words) == expected


@pytest.mark.parametrize("item", SETTINGS, ids=lambda item: item.path)
def test_every_setting_and_every_other_name_is_an_option(parse: Parse, item: Any) -> None:
    for spelling in (item.name, item.path, *item.aliases):
        assert parse(f"--{spelling}", "1") == {item.name: "1"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lerning_rate", "1"], "unknown setting 'lerning_rate'; did you mean 'learning_rate'?"),
        (["--jsn"], "did you mean 'json'?"),
        (["--load_in_4bit"], "use method: qlora"),
        (["--set", "lr"], "write --set name=value"),
        (["--set", "lerning_rate=1"], "did you mean 'learning_rate'?"),
        (["--qqq", "1"], "`nybble settings` lists all settings"),
    ],
)
def test_a_wrong_option_is_refused_with_a_suggestion(parse: Parse, words: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        parse(*words)


def test_an_option_beats_set_and_set_beats_the_file(parse: Parse, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("learning_rate: 0.5\nr: 3\nseed: 1\n")
    given = parse(str(file), "--learning-rate", "0.125", "--set", "learning-rate=0.25", "--set", "lora.r=4")
    recipe = load_recipe(given.pop("recipe"), given)
    assert (recipe.training.learning_rate, recipe.lora.r, recipe.training.seed) == (0.125, 4, 1)


def help_of(verb: str, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert run_nybble([*verb.split(), "--help"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_the_help_of_train_lists_every_setting_in_its_section(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = help_of("train", columns, monkeypatch, capsys)
    prose = [line for line in text.splitlines() if not line.startswith("  --")]  # names and values are not cut
    assert max(map(len, prose)) <= max(columns, 50)  # the formatter's smallest width
    letters = "".join(text.split())  # lines may break at a hyphen
    found = -1
    for item in SETTINGS:
        described = f"--{item.name} {item.values} {item.meaning} Default: {item.default_text}."
        at = letters.index("".join(described.split()))
        assert at > found, item.path
        found = at
    headings = [line for line in text.splitlines() if line.endswith(" settings:")]
    assert headings == [f"{section.capitalize()} settings:" for section in SECTIONS if section]


def test_verbs_list_the_settings_that_they_take(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for verb in ("plan", "probe", "compare", "demo"):
        assert "Training settings:" in help_of(verb, 80, monkeypatch, capsys)
    for verb in ("data", "quantize", "merge", "export", "ask", "chat"):
        text = help_of(verb, 80, monkeypatch, capsys)
        assert "Model settings:" in text
        assert "Training settings:" not in text
    for verb in ("doctor", "report", "resume-check", "import", "settings"):
        assert "settings:" not in help_of(verb, 80, monkeypatch, capsys)


COMMANDS = typer.main.get_command(app).commands


@pytest.mark.parametrize("columns", [40, 60, 80])
def test_the_list_of_verbs_is_not_cut(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verbs = help_of(" ", columns, monkeypatch, capsys).partition("Commands:\n")[2]
    listed = " ".join(verbs.split())
    for name, command in COMMANDS.items():
        assert f"{name} {command.help.partition('.')[0]}." in listed
    if columns == 80:
        assert all(line.endswith(".") for line in verbs.splitlines())


@pytest.mark.parametrize("verb", COMMANDS)
def test_the_help_of_every_verb_ends_with_examples_that_its_parser_takes(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = help_of(verb, 60, monkeypatch, capsys)
    examples = text.partition("Examples:\n")[2].splitlines()
    assert examples
    for line in examples:
        assert len(line) <= 60
        name, chosen, *words = shlex.split(line)
        assert (name, chosen) == ("nybble", verb)
        COMMANDS[verb].make_context(verb, list(words))


def test_settings_are_described_by_name_with_all_values_that_libraries_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_nybble(["settings", "lr", "optim", "lr_scheduler_type", "report_to"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "learning_rate NUMBER|probe Peak learning rate" in text
    assert "Other names: lr." in text
    examples = {"optim": "paged_adamw_8bit", "lr_scheduler_type": "cosine_with_min_lr", "report_to": "wandb"}
    for item, value in examples.items():
        allowed = text.partition(f" {item} TEXT ")[2].partition("Allowed: ")[2].partition(".")[0].split(", ")
        assert value in allowed, item
    assert run_nybble(["settings", "lerning_rate"]) == 2
    assert run_nybble(["settings", "lr", "--json"]) == 2


def test_every_help_text_is_a_sentence() -> None:
    for item in SETTINGS:
        assert item.meaning[0].isupper(), item.path
        assert item.meaning.endswith("."), item.path
        assert item.default_text, item.path


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["train", "--help"], 0),
        (["train", "--lerning_rate", "1"], 2),
        (["train", "--r", "0"], 2),
        (["plan", "--model", "lama-2-7b"], 2),
        (["plan", "--model", "llama-2-7b", "--link-rate", "5GB"], 2),
    ],
)
def test_help_and_a_wrong_option_are_answered_without_torch(words: list[str], code: int) -> None:
    script = (
        "import sys; from nybble.cli.main import run; code = run(sys.argv[1:]); "
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), sorted(sys.modules); sys.exit(code)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(nybble.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", script, *words], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    assert (len(done.stdout) > 5000) == (code == 0)


def test_the_library_takes_one_word_for_an_existing_run() -> None:
    with pytest.raises(RecipeError, match="got 'replace'; allowed: refuse, overwrite, resume, resume_if_any"):
        nybble.train(load_recipe(), on_existing="replace")


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_nybble(["--version"]) == 0
    assert capsys.readouterr().out == f"nybble {nybble.__version__}\n"


@pytest.mark.parametrize("run_dir", ["runs/with a space", "runs/$(date)", "runs/it's", "runs/plain"])
def test_the_command_that_asks_a_run_can_be_pasted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], run_dir: str
) -> None:
    names = ("evaluation_base", "evaluation_tuned", "tokens_per_second", "peak_bytes", "seconds")
    monkeypatch.setattr("nybble.run.directory.read_record", lambda _: dict.fromkeys(names))
    print_outcome(run_dir)
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert shlex.split(last.removeprefix("ask it: ")) == ["nybble", "ask", run_dir, "..."]


def test_the_recipes_that_come_with_it_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_nybble(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(bundled.recipes())
    assert all(len(line.split()) > 2 for line in lines)
