"""docs/architecture.md: a map of the packages from their imports, and walks through the code that are checked.

A walk is a list of hops, `module:function`. Each function must exist, and its code must name the next one.
"""

from __future__ import annotations

import ast
import itertools
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "nybble"

HEAD = """# Architecture

    recipe -> rows -> plan -> load (4-bit) -> attach adapters -> train -> evaluate -> report -> merge / export / ask

`pipeline.train()` tells this story from top to bottom; `training/loop.py` is the training step on one page. This page
is written by `make docs`: the table from the code's imports, and each walk from a list of functions of which every one
must name the next, or `make check` fails.

## The packages

Imports point down: a package imports only from rows below its own. Packages in one row do not import each other.

{table}

The C code of the CPU backends is in `csrc/`. Developers' programs (`tools/`), measurements (`bench/`) and tests are
outside the package; they may import anything.

## Three walks

{walks}"""


def ranks() -> list[list[str]]:
    """Names of packages and modules below `nybble`, in rows from the top to the bottom."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    return [[name.strip().removeprefix("nybble.") for name in layer.split("|")] for layer in layers]


def file_of(name: str) -> Path:
    """The file that holds the docstring of a package or module, by its dotted name below `nybble`."""
    place = PACKAGE.joinpath(*name.split("."))
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


def imports_of(name: str, rooms: list[str]) -> list[str]:
    """Which of `rooms` the package or module `name` imports from."""
    place = PACKAGE / name
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    seen = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("nybble"):
                parts = node.module.split(".")
                names = [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
                seen |= {part for part in names if part in rooms and part != name}
    return sorted(seen, key=rooms.index)


def table() -> str:
    """One row per package or module, from the top rank to the bottom."""
    rows = ["| package | what it does | imports from |", "|---|---|---|"]
    rooms = [name for rank in ranks() for name in rank]
    for rank in ranks():
        for name in rank:
            docstring = ast.get_docstring(ast.parse(file_of(name).read_text(encoding="utf-8"))) or ""
            sentence = docstring.partition("\n\n")[0].replace("\n", " ")
            rows.append(f"| `{name}` | {sentence} | {', '.join(imports_of(name, rooms))} |")
    return "\n".join(rows)


def function_named(name: str, file: Path) -> ast.AST:
    """The definition of `function` or `Class.method` in a file."""
    node: ast.AST = ast.parse(file.read_text(encoding="utf-8"))
    for part in name.split("."):
        found = [
            child
            for child in ast.walk(node)
            if isinstance(child, ast.FunctionDef | ast.ClassDef) and child.name == part
        ]
        if not found:
            raise LookupError(f"docs/architecture_page.py: {file.relative_to(ROOT)} has no {name}")
        node = found[0]
    return node


def modules_of(hops: list[tuple[str, str]]) -> list[str]:
    """The modules that a walk enters, in order; one that it stays in counts once."""
    modules = [hop.partition(":")[0] for hop, _ in hops]
    return [module for number, module in enumerate(modules) if number == 0 or modules[number - 1] != module]


def check_walk(title: str, hops: list[tuple[str, str]], limit: int) -> None:
    """Each function exists and names the next, and the walk enters at most `limit` modules without returning to one.

    Raises:
        LookupError: one of these does not hold.
    """
    entered = modules_of(hops)
    if len(entered) > limit:
        raise LookupError(f"docs/architecture_page.py: {title} enters {len(entered)} modules; the limit is {limit}")
    for module in entered:
        if entered.count(module) > 1:
            raise LookupError(f"docs/architecture_page.py: {title} comes back to {module}")
    for (here, _), (following, _) in itertools.pairwise(hops):
        module, _, function = here.partition(":")
        wanted = following.partition(":")[2].split(".")[-1]
        node = function_named(function, file_of(module))
        names = {child.attr for child in ast.walk(node) if isinstance(child, ast.Attribute)}
        names |= {child.id for child in ast.walk(node) if isinstance(child, ast.Name)}
        if wanted not in names:
            raise LookupError(f"docs/architecture_page.py: {here} does not name {wanted}")
    module, _, function = hops[-1][0].partition(":")
    function_named(function, file_of(module))


def walk(title: str, hops: list[tuple[str, str]], limit: int) -> str:
    """A walk as text."""
    check_walk(title, hops, limit)
    lines = [f"### {title}", "", f"{len(modules_of(hops))} modules.", ""]
    for number, (hop, text) in enumerate(hops, start=1):
        module, _, function = hop.partition(":")
        file = file_of(module).relative_to(PACKAGE).as_posix()
        lines.append(f"{number}. [`{function}`](../src/nybble/{file}) in `{file}` {text}")
    return "\n".join(lines) + "\n"


# (title, hops as (module:function, what it does), largest number of modules)
WALKS: list[tuple[str, list[tuple[str, str]], int]] = [
    (
        "From a recipe to `optimizer.step()`",
        [
            ("cli.train:train", "reads the recipe and the options."),
            ("pipeline:train", "tells the run: prepare, load, evaluate, train, evaluate, save."),
            ("pipeline:train_on_rows", "hands the model, the rows and the plan to the training."),
            ("training.build:train_model", "puts the parts together and ends with what was measured."),
            ("training.loop:train", "is the loop: micro-batches, clipping, guard, update, logging, saving."),
            ("training.loop:update", "calls `optimizer.step()`."),
        ],
        8,
    ),
    (
        "From a packed weight to a matrix product",
        [
            ("nn.lora_projection:project", "multiplies by several linears that share their input."),
            ("nn.lora_projection:product", "is one linear with its adapter."),
            ("nn.lora_projection:_times_transposed", "multiplies by the decoded weight; torch's own product follows."),
            ("nn.lora_projection:Projection.weights", "asks the layer for its weight as numbers."),
            ("nn.linear4bit:Linear4bit.decoded", "decodes into memory that all layers reuse."),
            ("kernels.ops4bit.ops:dequantize", "passes the whole packed weight to the chosen backend."),
            ("kernels.ops4bit.cpu:dequantize", "is such a backend; `csrc/ops4bit.c` has the loop that it calls."),
        ],
        6,
    ),
    (
        "From a memory budget to the number of recomputed layers",
        [
            ("planning.planner:make_plan", "takes the recipe with its budget and the device."),
            ("planning.planner:_search", "makes the forecast and has it searched."),
            ("planning.search:choose", "decides whether the embedding table goes to the host."),
            ("planning.search:_fastest", "tries splits of the batch."),
            ("planning.search:_at", "asks for the levels that fit at one split."),
            ("planning.phases:Forecast.level_for", "finds the first level whose step stays within the budget."),
            ("planning.extrapolate:StepAtLevels.steady", "extends traces of few layers to all of them."),
            ("planning.extrapolate:StepAtLevels._steady", "chooses what to trace."),
            ("planning.extrapolate:StepAtLevels._trace", "keeps traces, so that each is made once."),
            ("planning.extrapolate:TracedModel.trace", "builds the model with few layers, without data."),
            ("planning.traced_step:run_steps", "runs the real training step on it while every allocation is counted."),
        ],
        8,
    ),
]


def architecture_page() -> str:
    """The whole page."""
    return HEAD.format(table=table(), walks="\n".join(walk(*arguments) for arguments in WALKS))
