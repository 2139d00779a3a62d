"""From jobs to items: one picture or video each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from attnctl.errors import AttnctlError, OptionError

from ..control_syntax import parse_control
from ..generate import Settings
from .fields import values_of
from .grid import Grid, combinations, grid_of, size
from .limits import ITEMS
from .readers import JobError, Raw
from .seeds import total

__all__ = ["Item", "items_of"]


@dataclass(frozen=True)
class Item:
    """One picture or video to be made.

    Args:
        where: the place of its job in the file.
        prompt: what to draw.
        controls: the stack in its text form, outermost first.
        settings: how to draw.
        name: beginning of the file's name; None for one made from the prompt.
    """

    where: str
    prompt: str
    controls: tuple[str, ...]
    settings: Settings
    name: str | None = None


def items_of(
    jobs: Iterable[Raw], defaults: Mapping[str, Any], grid: Mapping[str, Any]
) -> list[Item]:
    """Return the items of jobs in order; everything that needs no model is checked.

    Args:
        jobs: as read from the file.
        defaults: options of jobs that do not give them.
        grid: lists of values by option, for every job.

    Raises:
        JobError: if a job cannot be done; the message names its place.
    """
    checked = [_checked(job, defaults, grid) for job in jobs]
    count = sum(size(axes) * total(options["seed"]) for _, options, axes in checked)
    if count > ITEMS:
        raise JobError(f"the jobs ask for {count} pictures; at most {ITEMS} in one batch")
    sound: set[str] = set()
    return [item for job in checked for item in _expanded(*job, sound)]


def _checked(
    job: Raw, defaults: Mapping[str, Any], grid: Mapping[str, Any]
) -> tuple[str, dict[str, Any], Grid]:
    try:
        options = {"seed": (range(1),), **values_of(defaults), **values_of(job.options)}
        axes = grid_of({**grid, **job.grid})
        if "prompt" not in options and "prompt" not in axes:
            raise OptionError("there is no prompt")
    except AttnctlError as error:
        raise JobError(f"{job.where}: {error}") from error
    return job.where, options, axes


def _expanded(where: str, options: dict[str, Any], grid: Grid, sound: set[str]) -> Iterator[Item]:
    try:
        for made in combinations(options, grid):
            controls = made.pop("control", ())
            for text in {*controls} - sound:
                parse_control(text)
                sound.add(text)
            prompt, name, seeds = made.pop("prompt"), made.pop("name", None), made.pop("seed")
            for seed in (seed for part in seeds for seed in part):
                yield Item(where, prompt, controls, Settings(seed=seed, **made), name)
    except AttnctlError as error:
        raise JobError(f"{where}: {error}") from error
