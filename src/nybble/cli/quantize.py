"""`nybble quantize`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from nybble.cli.options import takes_settings
from nybble.cli.process import import_libraries
from nybble.cli.terminal import print_json
from nybble.recipe import load_recipe


@takes_settings(("model", "quantization", "data"))
def quantize(
    overrides: dict[str, Any],
    model: Annotated[str, typer.Argument(help="Folder or hub id of a 16-bit model.")],
    out: Annotated[str, typer.Option("--out", metavar="FOLDER", help="New folder for the 4-bit checkpoint.")],
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", metavar="FILE", help="A recipe, as recipe.yaml of a run, whose settings are taken."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print sizes and counts on stdout as JSON.")] = False,
) -> None:
    """Write a 4-bit checkpoint for other programs.

    bitsandbytes, transformers and vLLM read it.
    """
    load_recipe(recipe, {**overrides, "model_name_or_path": model})  # a wrong setting is refused at once
    import_libraries()
    from nybble.models.four_bit_folder import quantize as write_checkpoint
    from nybble.units import format_bytes

    done = write_checkpoint(model, out, overrides, recipe=recipe)
    if as_json:
        print_json(done)
        return
    print(
        f"{done['out']}: {done['n_packed']} matrices in {done['bits_per_weight']:.3f} bits per weight, "
        f"{format_bytes(done['file_bytes'])} on disk; left in 16 bits: {', '.join(done['left_in_16bit']) or 'none'}"
    )
