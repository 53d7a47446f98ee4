"""`nybble export`."""

from __future__ import annotations

from typing import Annotated

import typer


def export(
    context: typer.Context,
    run: Annotated[str, typer.Argument(help="folder of a run, an adapter or a merged model")],
    gguf: Annotated[str | None, typer.Option("--gguf", help="file for llama.cpp")] = None,
    gguf_type: Annotated[
        str, typer.Option("--gguf_type", "--gguf-type", help="f16, bf16, q8_0, or adapter: that alone, for --lora")
    ] = "f16",
    ollama: Annotated[str | None, typer.Option("--ollama", help="new folder with GGUF file and Modelfile")] = None,
    hub: Annotated[str | None, typer.Option("--hub", help="repository, made private if it is new")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print what was measured as JSON")] = False,
) -> None:
    """Export to llama.cpp, Ollama or the hub; files are read back and compared, exit code 1 where they differ."""
    from nybble.cli.flags import print_json, quiet_libraries, read_flags

    overrides = read_flags(list(context.args))
    quiet_libraries()
    from nybble import exporting
    from nybble.cli.progress import Live
    from nybble.units import format_bytes, format_number

    live = Live()
    try:
        done = exporting.export(
            run,
            overrides,
            gguf=gguf,
            gguf_type=gguf_type,
            ollama=ollama,
            hub=hub,
            observer=live,
        )
    finally:
        live.close()
    if as_json:
        print_json(done)
    else:
        for name in ("gguf", "adapter_gguf", "ollama", "hub"):
            if name in done:
                print(f"{name}: {done[name]}" + (f", {format_bytes(done['file_bytes'])}" if name != "hub" else ""))
        if "mean_kl" in done:
            state = "verified" if done["verified"] else f"NOT VERIFIED: {'; '.join(done['faults'])}"
            print(
                f"read back by stock transformers: mean KL {format_number(done['mean_kl'], 6)}, largest difference of "
                f"logits {format_number(done['max_logit_difference'])}, token ids equal in "
                f"{done['texts'] - len(done['texts_with_other_ids'])} of {done['texts']} texts; {state}"
            )
    if not done["verified"]:
        raise typer.Exit(1)
