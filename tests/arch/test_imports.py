"""What importing costs: nothing heavy, and nothing of the process is changed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import nybble

HEAVY = ("torch", "transformers", "peft", "datasets", "bitsandbytes", "triton", "accelerate", "matplotlib", "pyarrow")
LIGHT_MODULES = (
    "nybble",
    "nybble.errors",
    "nybble.units",
    "nybble.run.directory",
    "nybble.run.processes",
    "nybble.storage.cache",
    "nybble.storage.checkpoints",
    "nybble.recipe",
    "nybble.reporting",
    "nybble.comparison",
    "nybble.cli.main",
    "nybble.diagnostics",
)
PROBE = """
import importlib, json, os, sys
before = dict(os.environ)
importlib.import_module(sys.argv[1])
print(json.dumps({"modules": sorted(sys.modules), "environment_kept": before == dict(os.environ)}))
"""


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that finds this very nybble; of this process' variables, which imports may have set, it
    gets only those that it needs."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH") if name in os.environ}
    environment = {**kept, "PYTHONPATH": str(Path(nybble.__file__).parents[1])}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_importing_loads_nothing_heavy_and_leaves_the_environment_alone(module: str) -> None:
    done = run_python("-c", PROBE, module)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert module in seen["modules"]
    assert [name for name in HEAVY if name in seen["modules"]] == []
    assert seen["environment_kept"]


def test_every_setting_answers_odd_values_in_one_line_before_anything_heavy_is_loaded() -> None:
    done = run_python(str(Path(__file__).parents[2] / "tools" / "settings_matrix.py"), "--json")
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert [name for name in HEAVY if name in seen["modules"]] == []
    refused = [case for case in seen["found"] if case["message"] is not None]
    assert len(refused) > len(seen["found"]) / 2
    assert [case for case in refused if "\n" in case["message"] or len(case["message"]) > 1000] == []
    assert [case for case in seen["found"] if case["seconds"] > 1] == []
    odd = {"nan", "[[1]]", "{a: nan}", "object"}  # no setting is one of these
    taken = [case for case in seen["found"] if case["message"] is None]
    assert [case for case in taken if case["way"] == "recipe" and case["oddity"] in odd] == []
    assert [case for case in refused if case["setting"].rpartition(".")[2] not in case["message"]] == []


def test_nybble_alone_loads_none_of_its_parts() -> None:
    seen = json.loads(run_python("-c", PROBE, "nybble").stdout)["modules"]
    assert [name for name in seen if name.startswith("nybble.")] == []


def test_all_is_sorted_and_complete() -> None:
    assert list(nybble.__all__) == sorted(set(nybble.__all__))
    assert set(nybble.__all__) <= set(dir(nybble))
    seen = Path(nybble.__file__).with_suffix(".pyi").read_text(encoding="utf-8")
    assert sorted(re.findall(r" as (\w+)$", seen, re.M)) == nybble.__all__
    assert {"Recipe", "NybbleError", "train", "ask", "quantize", "demo", "report"} <= set(nybble.__all__)


@pytest.mark.parametrize("name", nybble.__all__)
def test_every_public_name_can_be_imported(name: str) -> None:
    assert getattr(nybble, name) is not None


def test_no_public_name_is_hidden_by_a_module_of_the_same_name() -> None:
    modules = {path.stem for path in Path(nybble.__file__).parent.iterdir()}
    assert sorted(modules & set(nybble.__all__)) == []


USERS_SCRIPT = """import nybble
record = nybble.train("recipe.yaml", {"learning_rate": 1e-4}, on_existing="resume")
loss: float | None = record.eval_loss
answers = nybble.ask("runs/latest", "What is 2 + 2?")
nybble.trian("recipe.yaml")
nybble.train("recipe.yaml", on_existing="delete")
nybble.merge(1.5, "merged")
record.eval_los
"""


def test_type_checkers_see_the_functions_as_they_are(tmp_path: Path) -> None:
    script = tmp_path / "users_script.py"
    script.write_text(USERS_SCRIPT, encoding="utf-8")
    root = Path(__file__).resolve().parents[2]
    words = ("mypy", "--config-file", str(root / "pyproject.toml"), "--cache-dir", str(root / ".mypy_cache"))
    done = subprocess.run(
        [sys.executable, "-m", *words, str(script)],
        cwd=root,
        env={**os.environ, "MYPYPATH": "src"},
        capture_output=True,
        text=True,
        check=False,
    )
    faults = [line for line in done.stdout.splitlines() if "error:" in line]
    assert [int(fault.split(":")[1]) for fault in faults] == [5, 6, 7, 8], done.stdout
    assert 'Module has no attribute "trian"' in faults[0]


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'nybble' has no attribute 'nonsense'"):
        _ = nybble.nonsense


def test_the_version_is_the_packages() -> None:
    project = Path(__file__).resolve().parents[2] / "pyproject.toml"
    assert tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"] == nybble.__version__


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["settings"]])
def test_help_answers_on_stdout(arguments: list[str]) -> None:
    done = run_python("-m", "nybble", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout) > 200


def test_an_unknown_verb_is_the_users_fault_in_one_line() -> None:
    done = run_python("-m", "nybble", "tarin")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("nybble: ")
    assert done.stderr.count("\n") == 1
