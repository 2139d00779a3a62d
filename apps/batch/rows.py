"""Draw one batch of planned items, and say of each how it was made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL.Image import Image

from ..generate import batch_arguments, controlled, draw_rows
from ..models import first_line
from ..record import record
from ..videos import FPS
from .plan import Planned

__all__ = ["Drawn", "draw_chunk"]

_REASON = 500


@dataclass(frozen=True)
class Drawn:
    """One item after the attempt.

    Args:
        plan: the item.
        frames: one picture, or those of a video; empty if it failed.
        metadata: how it was made.
        reason: why it failed; None if it did not.
    """

    plan: Planned
    frames: tuple[Image, ...] = ()
    metadata: dict[str, Any] | None = None
    reason: str | None = None


def draw_chunk(pipe: Any, chunk: Sequence[Planned]) -> list[Drawn]:
    """Draw items that can be drawn together; if that fails, each by itself.

    So one bad item takes no other with it, and a batch that is too large for the memory is
    drawn after all. What fails alone comes back with its reason.
    """
    try:
        return _together(pipe, chunk)
    except Exception as error:  # whatever a model may raise: the others must go on
        reason = f"{type(error).__name__}: {first_line(error)}"[:_REASON]
    if len(chunk) == 1:
        return [Drawn(chunk[0], reason=reason)]
    return [drawn for one in chunk for drawn in draw_chunk(pipe, [one])]


def _together(pipe: Any, chunk: Sequence[Planned]) -> list[Drawn]:
    chosen = chunk[0].chosen
    name = "controlled" if chosen else "stock"
    seeds = [one.item.settings.seed for one in chunk]
    inputs = [_row(one) for one in chunk]
    with controlled(pipe, chosen) as handle:
        rows = draw_rows(pipe, batch_arguments(chunk[0].arguments, inputs), seeds, name)
        report = handle.report() if handle else None
    drawn = []
    for i, (one, row) in enumerate(zip(chunk, rows, strict=True)):
        video = not isinstance(row, Image)
        frames = tuple(row) if video else (row,)
        data = record(pipe, one.arguments, seeds[i], chosen, {name: frames[0]}, report)
        if video:
            data |= {"frames": len(frames), "fps": one.item.settings.fps or FPS}
        data |= {"key": one.key, "model_files": one.model_files}
        if len(chunk) > 1:
            data["batch"] = {"row": i, "rows": inputs}
        drawn.append(Drawn(one, frames, data))
    return drawn


def _row(one: Planned) -> dict[str, Any]:
    """Return what distinguishes a row of a batch: rounding depends on what is drawn beside."""
    return {
        "prompt": one.item.prompt,
        "negative_prompt": one.arguments.get("negative_prompt"),
        "seed": one.item.settings.seed,
    }
