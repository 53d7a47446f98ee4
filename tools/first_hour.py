"""A stranger's first hour: the commands of docs/guide/first-hour.md, run one after the other, with what they showed.

    python -m tools.first_hour

Everything is offline, on the bundled model and rows, in a new folder; a few minutes on two cores.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import nybble

PAGE = Path(__file__).parents[1] / "docs" / "guide" / "first-hour.md"
_WIDTH = 100  # columns


@dataclass(frozen=True)
class Command:
    """One command, and how much of what it shows is kept."""

    words: str
    first: int = 40  # lines
    last: int = 0
    code: int = 0
    typed: str = ""  # on its stdin
    stopped_at: str = ""  # Ctrl+C is pressed when this is shown


STORY: tuple[str | Command, ...] = (
    "## Is this machine all right?",
    "The doctor computes every operator on your device and compares it with float64. `--quick` leaves the training "
    "out.",
    Command("nybble doctor --quick", first=12, last=3),
    "## A whole fine-tuning",
    "The demo needs no download. Its base knows facts about invented people and cannot answer questions; afterwards it "
    "can, through weights of 4 bits. Without `--no-compare` it also compares three methods.",
    Command("nybble demo --no-compare", first=24, last=24),
    "Everything is in `runs/demo`: the recipe, the adapter, every logged step, and `report.html`, which you can open "
    "in a browser.",
    Command("ls runs/demo"),
    "## Your own rows",
    "Look at the rows before you train on them: what is learned is in double brackets here, and green on a terminal. "
    "The recipe of the demo serves as an example; give your file as `--dataset_name`.",
    Command("nybble data runs/demo/recipe.yaml --show 1", first=8, last=6),
    "## Does it fit, and how long does it take?",
    "A plan reads no weights. `--device-profile` plans for a card that you do not have.",
    Command("nybble plan --model llama-2-7b --max_length 1024 --device-profile rx7900xtx --max_steps 300", first=30),
    "## Training, stopping, going on",
    "A recipe is a YAML file, and every setting of it is a flag as well. Press Ctrl+C whenever you like: the run saves "
    "and stops.",
    Command(
        "nybble train runs/demo/recipe.yaml --output_dir runs/mine --num_train_epochs 3 --logging_steps 5",
        first=2,
        last=6,
        code=4,
        stopped_at="step 20/",
    ),
    "The same command with `--resume` goes on where it stopped, with the same bits as if nothing had happened.",
    Command(
        "nybble train runs/demo/recipe.yaml --output_dir runs/mine --num_train_epochs 3 --logging_steps 50 --resume",
        first=2,
        last=14,
    ),
    "## Asking it",
    "`ask` shows base and tuned model side by side; `chat` keeps a conversation, and `/help` lists its commands.",
    Command('nybble ask runs/mine "What belongs to Felol?"'),
    Command(
        "nybble chat runs/mine --max_new_tokens 24", typed="What belongs to Felol?\n/base\nWhat belongs to Felol?\n"
    ),
    "## Taking it with you",
    "`merge` writes a whole model and has stock transformers confirm it in a fresh process; `export` writes GGUF for "
    "llama.cpp and Ollama, and reads it back.",
    Command("nybble merge runs/mine --out merged"),
    Command("nybble export merged --gguf mine.gguf"),
    "## When something is wrong",
    "Every error is one line: what was seen, what is allowed, what to do. [All of them](errors.md).",
    Command("nybble train runs/demo/recipe.yaml --learning_rat 3", code=2),
    Command("nybble train runs/demo/recipe.yaml --output_dir runs/mine", code=2),
    Command("nybble settings lr", first=6),
)


def show(command: Command, folder: Path, names: dict[str, str]) -> str:
    """Run a command in `folder`; it and what it showed, as a terminal would, with long parts left out."""
    program = Path(sys.executable).with_name("nybble")
    words = [str(program) if word == "nybble" else word for word in shlex.split(command.words)]
    environment = {**os.environ, "COLUMNS": str(_WIDTH), "HF_HUB_OFFLINE": "1", "NYBBLE_CACHE": str(folder / ".cache")}
    with subprocess.Popen(
        words,
        cwd=folder,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(command.typed)
        process.stdin.close()
        lines = []
        for line in process.stdout:
            lines.append(line.rstrip())
            if command.stopped_at and command.stopped_at in line:
                process.send_signal(signal.SIGINT)
    if process.returncode != command.code:
        raise SystemExit(
            f"{command.words}: exit code {process.returncode} instead of {command.code}\n" + "\n".join(lines)
        )
    for path, name in names.items():
        lines = [line.replace(path, name) for line in lines]
    if len(lines) > command.first + command.last:
        lines = [*lines[: command.first], "..", *(lines[-command.last :] if command.last else [])]
    shown = "\n".join(f"    {line}".rstrip() for line in lines)
    code = f"\n    (exit code {command.code})" if command.code else ""
    return re.sub(r"\n{3,}", "\n\n", f"    $ {command.words}\n{shown}{code}".rstrip())


def main() -> int:
    """Run the story and write the page."""
    from nybble.hardware import detect_device

    began, parts = time.monotonic(), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        names = {f"{folder}/": "", str(Path(nybble.__file__).parent): ".."}
        for part in STORY:
            if isinstance(part, Command):
                print(part.words, flush=True)
                parts.append(show(part, folder, names))
            else:
                parts.append(part)
    minutes = (time.monotonic() - began) / 60
    where = f"{detect_device('cpu').name} without a GPU"
    head = f"""# The first hour

What a new user types and sees, from the installation on ([AMD](install-amd.md), [NVIDIA](install-nvidia.md),
[CPU](install-cpu.md)). `python -m tools.first_hour` runs these commands and writes this page: {where},
{datetime.now(UTC):%Y-%m-%d}, {minutes:.0f} minutes in all with other programs running. Where it says `..`, lines are
left out. On a terminal a bar stands in place of the lines about steps.
"""
    PAGE.write_text("\n\n".join([head.rstrip(), *parts]) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
