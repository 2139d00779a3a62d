"""What the effect bench asks of a task: cases to run, outputs to judge, pictures to show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
from PIL.Image import Image

from attnctl.errors import AttnctlError

__all__ = ["Figure", "Request", "Shown", "Task", "TaskError", "chosen_kind"]


class TaskError(AttnctlError):
    """A model has no task, or the task cannot be run as asked."""


@dataclass(frozen=True)
class Figure:
    """One number per case.

    Args:
        key: its name in files.
        title: its name in tables.
        unit: printed after the title.
        factor: what the number is multiplied by for tables.
        digits: decimals in tables.
    """

    key: str
    title: str
    unit: str = ""
    factor: float = 1.0
    digits: int = 2

    @property
    def head(self) -> str:
        """Title and unit."""
        return f"{self.title}, {self.unit}" if self.unit else self.title


@dataclass(frozen=True)
class Request:
    """What the bench is asked for; None leaves a choice to the task.

    Args:
        model: what the user called the model.
        folder: where it lies.
        n: cases.
        seed: of the cases and of their noise.
        repeats: cases per prompt, each from its own noise.
        batch: cases per call of the model.
        prompts: kind of prompts, one of the task's.
        objects: objects per prompt.
        steps: denoising steps.
        guidance_scale: classifier-free guidance.
        device: where to run.
        dtype: number type.
    """

    model: str
    folder: Path
    n: int
    seed: int = 0
    repeats: int = 1
    batch: int | None = None
    prompts: str | None = None
    objects: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    device: str = "auto"
    dtype: str = "auto"


def chosen_kind(request: Request, kinds: Sequence[str]) -> str:
    """Return the kind of prompts that is asked for; the first of `kinds` if none is.

    Raises:
        TaskError: if there is none of this name.
    """
    kind = request.prompts or kinds[0]
    if kind not in kinds:
        raise TaskError(f"--prompts {kind}: this task's are {', '.join(kinds)}")
    return kind


class Shown(NamedTuple):
    """One output as the montage shows it: a picture, and a text under it (may be empty)."""

    image: Image
    text: str = ""


class Task(Protocol):
    """A model with what it is asked to do, and the judge of how it did.

    A task is one file of this package with a function ``open_task(request) -> Task``.
    """

    name: ClassVar[str]
    """Such as "pictures"."""
    unit: ClassVar[str]
    """What one good output is called in sentences, in the plural: "exact pictures"."""
    figures: Sequence[Figure]
    """What `score` returns; the first is the metric, 0 or 1 per case."""
    model: Any
    """What controls are patched into."""
    prompts: Sequence[str]
    """n texts that say what the cases ask for."""
    batch: int
    """Cases per call."""
    settings: Mapping[str, Any]
    """JSON values: together with the model's files they decide the stock outputs."""

    def describe(self) -> str:
        """Return the settings in one line of words."""
        ...

    def run(self, start: int, stop: int) -> np.ndarray:
        """Return the outputs of the cases start to stop, as an array without objects.

        Row i depends on case i alone, so that every arm gets the same noise.
        """
        ...

    def score(self, outputs: np.ndarray) -> dict[str, np.ndarray]:
        """Return float64 [n] per figure, by key."""
        ...

    def show(self, case: int, output: np.ndarray) -> Shown:
        """Return a case's output for the montage."""
        ...
