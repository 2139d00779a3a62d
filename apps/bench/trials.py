"""The arms of an effect bench, and running one: same cases, same noise, its control or none."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

import attnctl
from attnctl.apps.chosen import Chosen

from . import placebo_latent, placebo_steering  # noqa: F401  (register their placebos)
from .cache import Cache
from .placebo import placebos
from .tasks import Task

__all__ = ["Outcome", "Trial", "parts", "run_trial", "trials"]

Role = Literal["stock", "control", "against", "placebo"]


@dataclass(frozen=True)
class Trial:
    """One arm.

    Args:
        name: what tables call it; unique.
        role: what it is there for.
        chosen: its control; None for stock.
    """

    name: str
    role: Role
    chosen: Chosen | None = None


@dataclass(frozen=True)
class Outcome:
    """What came out of one arm.

    Args:
        trial: the arm.
        outputs: [n, ...].
        scores: float64 [n] by figure.
        seconds: how long it ran.
        cached: whether the outputs were taken from the cache.
        report: what the control touched; None for stock.
    """

    trial: Trial
    outputs: np.ndarray
    scores: dict[str, np.ndarray]
    seconds: float
    cached: bool = False
    report: attnctl.Report | None = None


def trials(
    task: Task,
    control: Chosen,
    against: Sequence[Chosen],
    seed: int,
    placebo: bool,
    say: Callable[[str], None],
) -> list[Trial]:
    """Return the arms: stock, the control, its rivals, its placebos.

    Args:
        task: the task.
        control: the control that is judged.
        against: other controls.
        seed: of placebos that draw at random.
        placebo: whether to have placebos.
        say: is given notes for the user.
    """
    found = [Trial("stock", "stock"), Trial(control.control.name, "control", control)]
    found += [Trial(one.control.name, "against", one) for one in against]
    made = placebos(control.control, attnctl.sites(task.model), seed, say) if placebo else {}
    found += [Trial(f"placebo: {name}", "placebo", Chosen(one)) for name, one in made.items()]
    return list(_named_apart(found))


def _named_apart(found: Sequence[Trial]) -> Iterator[Trial]:
    """Yield the trials; of equal names the second is called "name #2"."""
    seen: dict[str, int] = {}
    for trial in found:
        number = seen[trial.name] = seen.get(trial.name, 0) + 1
        name = trial.name if number == 1 else f"{trial.name} #{number}"
        yield Trial(name, trial.role, trial.chosen)


def run_trial(task: Task, trial: Trial, cache: Cache | None = None) -> Outcome:
    """Run one arm.

    Args:
        task: the task.
        trial: the arm.
        cache: where the outputs are looked for first and kept, for stock.
    """
    begun = time.perf_counter()
    kept = cache.load() if cache else None
    report = None
    if kept is not None:
        outputs = kept
    elif trial.chosen is None:
        outputs = _outputs(task, trial.name)
        if cache:
            cache.save(outputs)
    else:
        with attnctl.patch(task.model, trial.chosen.control) as handle:
            outputs = _outputs(task, trial.name)
            report = handle.report()
    scores = task.score(outputs)
    seconds = time.perf_counter() - begun
    return Outcome(trial, outputs, scores, seconds, kept is not None, report)


def _outputs(task: Task, label: str) -> np.ndarray:
    n = len(task.prompts)
    found: list[Any] = []
    with tqdm(total=n, desc=label, leave=False, disable=None) as bar:
        for start, stop in parts(n, task.batch):
            found.append(task.run(start, stop))
            bar.update(stop - start)
    return np.concatenate(found)


def parts(n: int, batch: int) -> list[tuple[int, int]]:
    """Return (start, stop) of nearly equal parts of n cases, never one case by itself.

    A case by itself has no neighbour, so that a placebo which takes the neighbour's term would
    be no placebo. Only to avoid that can a part exceed `batch`, by one.
    """
    count = -(-n // batch)
    while count > 1 and n // count < 2:
        count -= 1
    edges = [round(n * i / count) for i in range(count + 1)]
    return list(itertools.pairwise(edges))
