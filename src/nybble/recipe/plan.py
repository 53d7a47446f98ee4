"""The plan: what the run will do, settled before any weight is read. Made by `nybble.planning`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """Sizes of the run that follow from recipe and rows."""

    rows: int
    rows_per_step: int
    optimizer_steps: int
    gradient_checkpointing: str  # auto, never or always
    # Measured phases are written beside these in run.json; a phase without a prediction holds None.
    predicted_bytes: dict[str, int | None]
