"""What a training is told (`Run`) and plans (`Plan`), and what a model provides (`Recipe`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from attnctl.assets import locate
from attnctl.assets.train.settings import changed


@dataclass(frozen=True)
class Run:
    """Options of one training run.

    Attributes:
        seed: of the weights, the data and the noise.
        out: folder for the results; models trained there before are found and used.
        smoke: two steps of tiny batches on the CPU, to see that everything runs.
        minutes: wall-clock limit; the learning-rate schedule is fitted into it. None: no limit.
        prompts: prompts per line of the card's figures.
        settings: changes to the recipe's plan and tunables, each as ``"NAME=VALUE"``.
        probe: seconds between two quick measurements during the training. None: no such ones.
    """

    seed: int = 0
    out: Path = Path("out")
    smoke: bool = False
    minutes: float | None = None
    prompts: int = 500
    settings: tuple[str, ...] = ()
    probe: float | None = None

    @cached_property
    def device(self) -> torch.device:
        """The GPU if there is one, except in a smoke run."""
        return torch.device("cuda" if torch.cuda.is_available() and not self.smoke else "cpu")

    @cached_property
    def source(self) -> torch.Generator:
        """The run's random numbers, on its device."""
        return torch.Generator(self.device).manual_seed(self.seed)

    def find(self, *entries: str) -> Path:
        """First of the entries that exists, in ``out`` or among the shipped assets.

        Raises:
            FileNotFoundError: none does; the message names them.
        """
        own = (self.out / entry for entry in entries if (self.out / entry).exists())
        shipped = (found for entry in entries if (found := locate(entry)))
        for one in (*own, *shipped):
            return one
        wanted = " or ".join(entries)
        raise FileNotFoundError(f"train {wanted} first: not in {self.out} and not shipped")


@dataclass(frozen=True)
class Plan:
    """Length and pace of a training.

    Attributes:
        steps: number of updates, if the time limit does not come first.
        batch: samples per update.
        lr: learning rate of AdamW after ``warmup`` steps.
        fall: share of the training, at its end, in which the rate falls to 0 by a cosine.
        decay: weight decay.
        average: decay of the running average of the weights, which is what is kept.
        clip: greatest norm of the gradient.
    """

    steps: int
    batch: int
    lr: float
    warmup: int = 200
    fall: float = 1.0
    decay: float = 0.01
    average: float = 0.999
    clip: float = 1.0

    def short(self) -> Plan:
        """The same plan for a smoke run: two steps of two samples."""
        return replace(self, steps=2, batch=2, warmup=1)


class Recipe(ABC):
    """One model: its weights, its data, its loss, and how it is saved and measured.

    Attributes:
        name: on the command line.
        plan: length and pace.
        tune: whatever else one may want to vary, as a frozen dataclass; None if there is nothing.
        settings: what `Run.settings` changed of both, by name.
        model: the module whose weights are trained.
        done: share of the training that is done, 0 to 1; the loop keeps it up to date.
    """

    done = 0.0
    name: str
    plan: Plan
    tune: Any = None
    settings: dict[str, Any]
    model: Any

    def __init__(self, run: Run) -> None:
        """Take the run's settings over into ``plan`` and ``tune``.

        Raises:
            ValueError: a setting that is unknown or of the wrong kind.
        """
        self.run = run
        parts = [self.plan] if self.tune is None else [self.plan, self.tune]
        parts, self.settings = changed(parts, run.settings)
        self.plan = parts[0]
        self.tune = parts[1] if len(parts) > 1 else None

    def prepare(self) -> None:  # noqa: B027 (most models need nothing)
        """Make the training data that is made once; called before the clock starts."""

    def compile(self) -> None:  # noqa: B027
        """Compile what pays; called once on a GPU."""

    @abstractmethod
    def batch(self, size: int) -> Sequence[torch.Tensor]:
        """Fresh training samples on the run's device, for long stretches of the same shapes."""

    @abstractmethod
    def loss(self, batch: Sequence[torch.Tensor]) -> torch.Tensor:
        """Scalar to be lowered; without any transfer between CPU and GPU."""

    def probe(self) -> dict[str, float]:
        """Quick figures of the averaged weights, which are in the model while this is called.

        Called every `Run.probe` seconds without gradients, in evaluation mode and uncompiled;
        its time is not counted. It must leave ``run.source`` and the weights as they are.
        """
        return {}

    @abstractmethod
    def write(self) -> Path:
        """Save the model in ``run.out`` in its host library's layout; return the place."""

    @abstractmethod
    def figures(self, place: Path) -> dict[str, Any]:
        """Measure the saved, rounded weights."""

    def card(self, place: Path, figures: dict[str, Any]) -> None:  # noqa: B027
        """Write the model's README.md; models that ship inside another have none."""
