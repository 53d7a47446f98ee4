"""`nybble export`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from nybble.cli.options import takes_settings
from nybble.cli.process import import_libraries
from nybble.cli.terminal import print_json


@takes_settings(("model", "data", "evaluation"))
def export(
    overrides: dict[str, Any],
    run: Annotated[str, typer.Argument(help="Folder of a run, an adapter or a merged model.")],
    gguf: Annotated[str | None, typer.Option("--gguf", metavar="FILE", help="New GGUF file for llama.cpp.")] = None,
    gguf_type: Annotated[
        str,
        typer.Option(
            "--gguf_type",
            metavar="f16|bf16|q8_0|adapter",
            help="Type of the weights in the GGUF file; adapter writes the adapter alone, for llama.cpp's --lora.",
        ),
    ] = "f16",
    quantize: Annotated[
        str | None,
        typer.Option(
            "--quantize",
            metavar="Q4_K_M,..",
            help="Mix of types for --gguf instead of --gguf_type: Q3_K_S to Q6_K, Q8_0; several with commas.",
        ),
    ] = None,
    ollama: Annotated[
        str | None, typer.Option("--ollama", metavar="FOLDER", help="New folder for a GGUF file and a Modelfile.")
    ] = None,
    hub: Annotated[
        str | None,
        typer.Option("--hub", metavar="NAME", help="Hub repository to upload to; a new one is created as private."),
    ] = None,
    check: Annotated[
        str | None,
        typer.Option(
            "--check",
            metavar="llama.cpp|URL",
            help="Have llama.cpp compute the GGUF file as well, or ask an OpenAI-compatible server for its answers.",
        ),
    ] = None,
    server_model: Annotated[
        str | None,
        typer.Option("--server_model", metavar="NAME", help="Name of the model on that server, if it has several."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the measurements on stdout as JSON.")] = False,
) -> None:
    """Export to llama.cpp, Ollama or the hub.

    Files are read back by stock transformers and compared; the exit code is 1 if they differ. Settings tell where the
    base and the rows are now.
    """
    import_libraries()
    from nybble import exporting
    from nybble.units import format_bytes, format_number

    done = exporting.export(
        run,
        overrides,
        gguf=gguf,
        gguf_type=gguf_type,
        quantize=quantize,
        ollama=ollama,
        hub=hub,
        check=check,
        server_model=server_model,
    )
    if as_json:
        print_json(done)
    else:
        for one in done.get("files", ()):
            state = "verified" if one["verified"] else f"NOT VERIFIED: {'; '.join(one['faults'])}"
            plain = one["without_importance"]
            beside = f" (without importance matrix {format_number(plain['mean_kl'], 6)})" if plain else ""
            print(
                f"{one['gguf']}: {format_bytes(one['file_bytes'])}; on {one['rows']} rows mean KL "
                f"{format_number(one['held_out']['mean_kl'], 6)}{beside}, loss "
                f"{format_number(one['held_out']['loss'])}; {state}"
            )
            if "llama_cpp" in one:
                beside = one["llama_cpp"]
                print(
                    f"  in llama.cpp mean KL {format_number(beside['mean_kl'], 6)}, loss "
                    f"{format_number(beside['loss'])}, {beside['greedy_equal']} of {beside['n_prompts']} answers equal"
                    f", {beside['stopped']} stop (as it was trained: {beside['stopped_reference']})"
                )
        if "check" in done:
            print(_of_server(done["check"], format_number))
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


def _of_server(found: dict[str, Any], number: Any) -> str:
    beside = ""
    if "difference_to_base" in found:
        beside = f" (to the base {number(found['difference_to_base'])})"
    state = "it answers as the tuned model" if found["verified"] else f"NOT VERIFIED: {'; '.join(found['faults'])}"
    return (
        f"{found['server']}, model {found['model']}: log-probabilities of first tokens differ by "
        f"{number(found['difference'])} on average{beside}, {found['equal_answers']} of {found['n_prompts']} answers "
        f"equal; {state}"
    )
