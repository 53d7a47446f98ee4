"""`nybble quantize`."""

from __future__ import annotations

from typing import Annotated

import typer


def quantize(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="folder or hub id of a 16-bit model")],
    out: Annotated[str, typer.Option("--out", help="new folder for the 4-bit checkpoint")],
    as_json: Annotated[bool, typer.Option("--json", help="print what was done as JSON")] = False,
) -> None:
    """Write a 4-bit checkpoint that bitsandbytes, transformers and vLLM read."""
    from nybble.cli.flags import print_json, quiet_libraries, read_flags

    overrides = read_flags(list(context.args))
    quiet_libraries()
    from nybble.cli.progress import Live
    from nybble.models.four_bit_folder import quantize as write_checkpoint
    from nybble.units import format_bytes

    live = Live()
    try:
        done = write_checkpoint(model, out, overrides, observer=live)
    finally:
        live.close()
    if as_json:
        print_json(done)
        return
    print(
        f"{done['out']}: {done['n_packed']} linears in {done['bits_per_weight']:.3f} bits a weight, "
        f"{format_bytes(done['file_bytes'])} on disk; left in 16 bits: {', '.join(done['left_in_16bit']) or 'none'}"
    )
