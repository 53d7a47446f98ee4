"""`nybble demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from nybble.bundled import recipe_path
from nybble.cli.options import takes_settings
from nybble.cli.process import import_libraries
from nybble.cli.terminal import print_json
from nybble.recipe import load_recipe

_EPOCHS_COMPARED = 3  # half of the demo's own: enough to tell the methods apart, in half the time
_WITHOUT_COMPARISON = "a small model is packed to 4 bits, trained and asked: about a minute on two idle cores"
_WHAT_COMES = (
    f"{_WITHOUT_COMPARISON}, and another for QLoRA, LoRA and full training side by side, of half as many passes over "
    "the rows, each in a fresh process"
)


@takes_settings(without=("output_dir",))
def demo(
    overrides: dict[str, Any],
    output_dir: Annotated[
        str,
        typer.Option("--output_dir", metavar="FOLDER", help="Folder of the run; an earlier demo in it is replaced."),
    ] = "runs/demo",
    with_comparison: Annotated[
        bool, typer.Option("--compare/--no-compare", help="End with a comparison of QLoRA, LoRA and full training.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results on stdout as JSON.")] = False,
) -> None:
    """Show everything in a few minutes, offline.

    The demo quantizes a small model, trains it, evaluates it, lets it answer, writes the report and compares methods.
    """
    load_recipe(recipe_path(), overrides)  # a wrong setting is refused at once
    import_libraries()
    from nybble import pipeline
    from nybble.comparison import compare
    from nybble.run.progress import watching

    with watching("auto") as watch:
        watch.note(_WHAT_COMES if with_comparison else _WITHOUT_COMPARISON)
    record = pipeline.demo(output_dir, overrides)
    run_dir = Path(record.run_dir)
    found = None
    if with_comparison:
        is_own = {"num_train_epochs", "max_steps"} & overrides.keys()
        shorter = {} if is_own else {"num_train_epochs": _EPOCHS_COMPARED}
        found = compare([run_dir / "recipe.yaml"], shorter, out=run_dir / "comparison")
    if as_json:
        print_json(_figures(record.to_json()) | ({"comparison": found.to_json()} if found else {}))
        return
    from nybble.cli.ask import print_samples
    from nybble.cli.compare import print_comparison
    from nybble.cli.train import print_outcome
    from nybble.run.directory import read_lines

    shown = [s for s in read_lines(run_dir / "samples.jsonl") if s.get("step") is None]
    print_samples(shown)
    print_outcome(record.run_dir)
    if found:
        print_comparison(found)


def _figures(record: dict[str, Any]) -> dict[str, Any]:
    base, tuned = record["evaluation_base"], record["evaluation_tuned"]
    names = ("trainable_parameters", "total_parameters", "peak_bytes", "tokens_per_second", "seconds", "run_dir")
    return {
        "exact_match_base": base["exact_match"],
        "exact_match_tuned": tuned["exact_match"],
        "eval_loss_base": base["loss"],
        "eval_loss_tuned": tuned["loss"],
        **{name: record[name] for name in names},
    }
