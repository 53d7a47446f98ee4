"""Write the derived pages of docs/guide: settings, the recipe schema, the doctor, errors. `--check` only compares."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import yaml

from nybble.diagnostics import driver, wheels
from nybble.diagnostics.checks import CHECKS
from nybble.kernels import LADDERS
from nybble.recipe import all_settings, json_schema

GUIDE = Path(__file__).parent / "guide"
ROOT = GUIDE.parents[1]
HEAD = """# Settings

Every setting of a recipe. In a YAML file, settings may be written flat or in their section. On the command line each
setting is a flag (`--learning_rate 2e-4`), with dashes or underscores; `nybble train --help` lists them. With
`recipe.schema.json` an editor completes them.

Settings marked with `=` are neutral: they do not change what is learned, or they name something that counts by its
content. `--resume` accepts another value for them. A SIZE is written as `8GiB`, `7.5GB` or a number of bytes.
`make docs` writes this page from the schema.
"""
DOCTOR = """# The doctor

    nybble doctor [--quick] [--json] [--device auto|cpu|cuda|hip]

It looks for the known failures of drivers, wheels and variables, then computes: every operator by every path, the
blocks of a training step, and twenty steps of training, each against float64 on the CPU. All of it runs in a process
of its own with time limits, so that a hang or a fault of the GPU ends as a row of the table. A failure says what you
would have met, why, one command, and the thread it is known from. On two cores of an AMD EPYC without a GPU it takes
13 s (2026-11-23, with other work beside it). Exit code 0: everything passed; 3: something did not.

`--json` prints `device`, `torch`, `machine`, `versions`, `environment` (variables that were changed before torch was
imported), `checks` (`name`, `ok`, `path`, `max_error`, `tolerance`, `seconds`, `symptom`, `cause`, `fix`, `thread`,
`figures`), `not_run` (check -> why), `paths` (operator -> `path` and `skipped`: faster path -> why) and `rates`
(bytes and floating-point operations a second). From Python: `nybble.doctor()`.

## The ladder

Each operator has a ladder of paths, fastest first, and training stands on the first that passed here. The first
`nybble train` on a machine runs those checks (a few seconds) and keeps the result below the cache folder, under a
fingerprint of device, driver, libraries and this package's code: another driver is looked at anew. The first lines of
`train` and `run.json` (`paths`, `notes`) say which path runs and why a faster one does not.
`--path dequantize_4bit=torch` (may be repeated; `paths` in a recipe) takes a path whatever was found.

{ladders}

`rows` is what lies between the products of a step (norms, gates, dropout, rotary positions, the loss of a row),
`attend` the attention of rows that lie behind each other, `sdpa` the fastest kind of attention that torch itself may
take where it is asked. Of two right libraries for `gemm` the clearly faster is taken.

## What is computed

Errors are in units of the result's type at its largest value, but for 4-bit encode (share of a scale), speed of
decoding (times as long as a copy of as many bytes) and 20 steps (share of the first loss).
`python -m bench.quality.doctor_tolerances` prints what they come to over 20 seeds; on two cores of an AMD EPYC
(2026-11-23) no mean plus six standard deviations reaches its tolerance ([results](../../bench/results)).

{checks}

A check is one entry in `nybble/diagnostics/checks.py`: name, what computes, tolerance, symptom, command, and the
operator whose ladder it decides.

## What is looked for

These need no torch that works; most are AMD's. {n_symptoms} in all.

{symptoms}

## What it cannot see

That a result is right once does not show races. Rates are measured while whatever else runs, runs. On AMD and NVIDIA
cards nothing of this has been run yet: the known failures are tested on made-up machines, the kernels by Triton's
interpreter, by reading what they compile to, and the decoder by executing that code
([kernel-code.md](../evidence/kernel-code.md)).
"""

ERRORS = """# Errors

What a wrong input ends in: one line on stderr, which says what was seen, what is allowed and what to do, and an exit
code: 2 the input is wrong, 3 it does not fit or something is missing here, 1 a fault of ours (`--debug` shows where).
Nothing is left behind. Each of these {n_cases} lines is run by the tests, in a folder of files that are each wrong in
one way (`tests/e2e/spoiled.py`); `…` stands for what differs between machines or is said by a library.

{tables}
## What is not trusted

Weights are safetensors; a pickle is refused whatever its name. Python code that a model brings along is run only where
`trust_remote_code` is said, and a run or adapter cannot say it for you. Links that lead out of an adapter's folder are
refused. Names in an adapter are never matched as patterns, its ranks never believed, its modules never imported. A
config's numbers are held against the files before anything is built. A chat template gets half a second and a gigabyte
of memory for a row (in the main thread; memory on Linux). Tokens of the hub, passwords in addresses and values of
variables called `..TOKEN`, `..SECRET`, `..PASSWORD`, `..API_KEY` or `..ACCESS_KEY` are written to no file and no
message.

`make fuzz` feeds every reader of foreign files with what is nearly right. Of 1,010,650 inputs 759,822 were refused,
each with a documented error on one line; none took longer than 0.7 s, or memory out of proportion to its file
([results](../../bench/results/fuzz-epyc-2core-2026-11-23.json), 2026-11-23, Python 3.11).
"""
GROUPS = {"recipe": "Recipes and flags", "model": "Models", "rows": "Rows and templates", "runs": "Runs and adapters"}


def errors_page() -> str:
    """docs/guide/errors.md."""
    file = ROOT / "tests" / "e2e" / "errors.yaml"
    found = yaml.safe_load(file.read_text(encoding="utf-8"))
    tables = []
    for group, cases in found.items():
        tables += [f"## {GROUPS[group]}\n", "| nybble | exit | message |\n|---|---|---|"]
        for command, (code, message) in cases.items():
            shown = message.replace("|", "\\|").replace("<", "&lt;")
            tables.append(f"| `{command}` | {code} | {shown} |")
        tables.append("")
    return ERRORS.format(n_cases=sum(map(len, found.values())), tables="\n".join(tables))


def doctor_page() -> str:
    """docs/guide/doctor.md."""
    ladders = ["| operator | CPU | NVIDIA | AMD |\n|---|---|---|---|"]
    for operator, kinds in LADDERS.items():
        ladders.append(f"| `{operator}` | {' | '.join(', '.join(kinds.get(k, ())) for k in ('cpu', 'cuda', 'hip'))} |")
    checks = ["| check | decides | allowed | if it fails |\n|---|---|---|---|"]
    for check in CHECKS:
        allowed = "measured only" if check.tolerance is None else f"{check.tolerance:g}"
        operator = f"`{check.operator}`" if check.operator else ""
        checks.append(f"| {check.name} | {operator} | {allowed} | {check.symptom} |")
    known = (*driver.SYMPTOMS, *wheels.SYMPTOMS)
    symptoms = ["| | what you meet | known from |\n|---|---|---|"]
    symptoms += [f"| {s.name} | {s.symptom} | {s.thread} |" for s in known]
    tables = {"ladders": ladders, "checks": checks, "symptoms": symptoms}
    return DOCTOR.format(n_symptoms=len(known), **{name: "\n".join(lines) for name, lines in tables.items()})


def settings_page() -> str:
    """docs/guide/settings.md."""
    lines, section = [HEAD], None
    for item in all_settings():
        if item.section != section:
            section = item.section
            lines.append(f"\n## {section or 'method'}\n")
            lines.append("| setting | values | default | meaning | other names |\n|---|---|---|---|---|")
        values = f"`{item.values}`".replace("|", "\\|")
        aliases = ", ".join(f"`{alias}`" for alias in item.aliases)
        mark = " =" if item.is_neutral else ""
        lines.append(f"| `{item.name}`{mark} | {values} | {item.default_text} | {item.meaning} | {aliases} |")
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


def main() -> int:
    """Write or, with --check, compare; 1 if a file is out of date."""
    wanted = {
        GUIDE / "settings.md": settings_page(),
        GUIDE / "doctor.md": doctor_page(),
        GUIDE / "errors.md": errors_page(),
        GUIDE / "recipe.schema.json": json.dumps(json_schema(), indent=1) + "\n",
    }
    stale = [path for path, text in wanted.items() if not path.is_file() or path.read_text() != text]
    if "--check" in sys.argv:
        for path in stale:
            sys.stderr.write(f"{path.name} is out of date: run make docs\n")
        return bool(stale)
    for path in stale:
        path.write_text(wanted[path])
    return 0


if __name__ == "__main__":
    sys.exit(main())
