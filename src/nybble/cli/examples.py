"""Examples at the end of each verb's help: lines that can be typed as they are once RUN is a folder of yours."""

from __future__ import annotations

_EXAMPLES = {
    "demo": ("nybble demo", "nybble demo --no-compare"),
    "train": (
        "nybble train llama2-7b-guanaco",
        "nybble train my.yaml --lr 1e-4 --max_steps 200",
        "nybble train my.yaml --resume",
    ),
    "plan": (
        "nybble plan my.yaml",
        "nybble plan --model llama-2-7b --memory 16",
        "nybble plan my.yaml --device-profile mi300x",
    ),
    "data": ("nybble data my.yaml --show 3", "nybble data my.yaml --html rows.html"),
    "compare": (
        "nybble compare my.yaml --methods qlora,lora",
        "nybble compare a.yaml b.yaml --seeds 3",
    ),
    "probe": ("nybble probe my.yaml",),
    "ask": (
        'nybble ask RUN "What is a nybble?"',
        "nybble ask RUN --file questions.txt --json",
        'nybble ask RUN "Tell a story." --temperature 0.8',
    ),
    "chat": ("nybble chat RUN", "nybble chat RUN --temperature 0.7 --top_p 0.9"),
    "export": (
        "nybble export RUN --gguf model.gguf",
        "nybble export RUN --ollama my-model",
    ),
    "merge": ("nybble merge RUN --out merged",),
    "quantize": ("nybble quantize MODEL --out model-4bit",),
    "doctor": ("nybble doctor", "nybble doctor --quick"),
    "report": ("nybble report RUN",),
    "resume-check": ("nybble resume-check RUN --steps 6",),
    "import": ("nybble import axolotl.yaml --output my.yaml",),
    "recipes": ("nybble recipes",),
    "settings": ("nybble settings", "nybble settings optim lr_scheduler_type"),
}


def examples(verb: str) -> str:
    """The end of the help of `verb`; the mark keeps its lines from being filled."""
    return "\n".join(("\b", "Examples:", *(f"  {line}" for line in _EXAMPLES[verb])))
