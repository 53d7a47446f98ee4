"""Write the derived pages of docs: architecture, settings, recipe schema, doctor, errors. `--check` only compares."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import yaml
from architecture_page import architecture_page

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `tools`, which is not installed

from nybble.diagnostics import driver, wheels
from nybble.diagnostics.checks import CHECKS
from nybble.kernels.dispatch import TABLE
from nybble.recipe import all_settings, json_schema
from tools.families.page import page

GUIDE = Path(__file__).parent / "guide"
ROOT = GUIDE.parents[1]
HEAD = """# Settings

Every setting of a recipe. In a YAML file, settings may be written flat or in their section. On the command line each
setting is a flag (`--learning_rate 2e-4`), with dashes or underscores; `nybble train --help` lists them. With
`recipe.schema.json` an editor completes them.

Settings marked with `=` are neutral: they do not change what is learned, or they name something that counts by its
content. `--resume` accepts another value for them. A SIZE is written as `8GiB`, `7.5GB` or a number of bytes.
`make docs` writes this page from the schema.

Names of transformers, TRL and PEFT mean here what they mean there. A name of theirs that is not on this page is
answered in one line with what does the same, or why nothing is needed. A whole recipe is converted by

    nybble import axolotl.yaml --output recipe.yaml

which reads YAML of TRL (`SFTConfig`, `ModelConfig` and `ScriptArguments`), Axolotl and LLaMA-Factory, writes out the
defaults of that tool where they differ, and names each setting that means something else or nothing here.
"""
DOCTOR = """# The doctor

    nybble doctor [--quick] [--json] [--device auto|cpu|cuda|hip]

The doctor looks for the known failures of drivers, wheels and environment variables. Then it computes: every operator
on every backend, the blocks of a training step, and twenty steps of training, each compared with float64 on the CPU.
All of it runs in a separate process with time limits, so a hang or a fault of the GPU ends as a row of the table. For
each failure it prints what you would have met, why, one command, and the thread where it is known from. On two cores of
an AMD EPYC without a GPU it takes 13 s (2026-11-23, with other programs running). Exit code 0: everything passed; 3:
something did not.

`--json` prints `device`, `torch`, `machine`, `versions`, `environment` (variables that were changed before torch was
imported), `checks` (`name`, `ok`, `path`, `max_error`, `tolerance`, `seconds`, `symptom`, `cause`, `fix`, `thread`,
`figures`), `not_run` (check -> why), `paths` (operator -> `path` and `skipped`: faster backend -> why) and `rates`
(bytes and floating-point operations a second). From Python: `nybble.doctor()`.

## Backends

Each operator has several backends, fastest first, and training uses the first that passed on this machine. The first
`nybble train` on a machine runs these checks (a few seconds) and stores the result in the cache folder, under a
fingerprint of device, driver, libraries and this package's code, so another driver is checked again. The first lines of
`train` and `run.json` (`paths`, `notes`) say which backend runs and why a faster one does not.
`--path dequantize_4bit=torch` (may be repeated; `paths` in a recipe) selects a backend regardless of the checks.

{backends}

`rows` are the operators between the products of a step (norms, gates, dropout, rotary positions, the loss of a row),
`attend` is attention over rows that follow each other in one sequence, and `sdpa` is the fastest kind of attention that
torch itself may use. If both libraries for `gemm` are right, the clearly faster one is used.

## What is computed

Errors are in units of the result's type at its largest value, except for 4-bit encode (share of a scale), speed of
decoding (times as long as a copy of as many bytes) and 20 steps (share of the first loss).
`python -m bench.quality.doctor_tolerances` prints the errors over 20 seeds. On two cores of an AMD EPYC (2026-11-23),
no mean plus six standard deviations reaches its tolerance ([results](../../bench/results)).

{checks}

A check is one entry in `nybble/diagnostics/checks.py`: name, what computes, tolerance, symptom, command, and the
operator whose backend it decides.

## What is looked for

These checks work even if torch does not; most concern AMD. {n_symptoms} in all.

{symptoms}

## What it cannot detect

A result that is right once does not exclude races. Rates are measured with whatever else is running. Nothing of this
was run on AMD and NVIDIA cards yet: the known failures are tested on simulated machines, and the kernels by Triton's
interpreter, by reading what they compile to, and for the decoder by executing that code
([kernel code](../evidence/kernel-code.md)).
"""

ERRORS = """# Errors

A wrong input ends with one line on stderr, which says what was seen, what is allowed and what to do, and with an exit
code: 2 if the input is wrong, 3 if it does not fit or something is missing here, 1 for a fault of ours (`--debug` shows
where). No files are left behind. The tests run each of these {n_cases} lines, in a folder of files that are each wrong
in one way (`tests/e2e/spoiled.py`). `…` stands for what differs between machines or comes from a library.

{tables}
## What is not trusted

- **Weights** are safetensors; a pickle is refused whatever its name.
- **Code** that a model brings along runs only if you set `trust_remote_code`; a run or an adapter cannot set it for
  you.
- **Adapters**: links that lead out of the folder are refused. Names are never matched as patterns, ranks are never
  believed, and modules are never imported.
- **Configs**: their numbers are compared with the files before anything is built.
- **Chat templates** get half a second and a gigabyte of memory for each row (in the main thread; memory on Linux).
- **Secrets**: tokens of the hub, passwords in addresses, and values of variables called `..TOKEN`, `..SECRET`,
  `..PASSWORD`, `..API_KEY` or `..ACCESS_KEY` are never written to a file or a message.

`make fuzz` feeds every reader of foreign files with inputs that are nearly right. Of 1,010,650 inputs, 759,822 were
refused, each with a documented error on one line; none took longer than 0.7 s, or memory out of proportion to its file
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
    backends = ["| operator | CPU | NVIDIA | AMD |\n|---|---|---|---|"]
    for name, operator in TABLE.items():
        kinds = (operator.backends.get(kind, ()) for kind in ("cpu", "cuda", "hip"))
        names = [", ".join(dict.fromkeys(backend.name for backend in kind)) for kind in kinds]
        backends.append(f"| `{name}` | {' | '.join(names)} |")
    checks = ["| check | decides | allowed | if it fails |\n|---|---|---|---|"]
    for check in CHECKS:
        allowed = "measured only" if check.tolerance is None else f"{check.tolerance:g}"
        decides = f"`{check.operator}`" if check.operator else ""
        checks.append(f"| {check.name} | {decides} | {allowed} | {check.symptom} |")
    known = (*driver.SYMPTOMS, *wheels.SYMPTOMS)
    symptoms = ["| | what you meet | known from |\n|---|---|---|"]
    symptoms += [f"| {s.name} | {s.symptom} | {s.thread} |" for s in known]
    tables = {"backends": backends, "checks": checks, "symptoms": symptoms}
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
        GUIDE.parent / "architecture.md": architecture_page(),
        GUIDE / "settings.md": settings_page(),
        GUIDE / "doctor.md": doctor_page(),
        GUIDE / "errors.md": errors_page(),
        GUIDE.parent / "evidence" / "families.md": page(
            sorted((ROOT / "bench" / "results").glob("families-*.json"))[-1]
        ),
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
