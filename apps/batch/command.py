"""The work of `attnctl batch`: check everything, load, draw what is missing, report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attnctl.errors import OptionError
from attnctl.processors.headhunter.crew import Crew

from ..generate import makes_videos
from ..models import load, local_device, local_folder, model_name
from ..quiet import hush, notes
from ..videos import need_video
from .grid import grid_words
from .items import Item, items_of
from .manifest import read_states
from .output import output_errors
from .plan import Planned, planned
from .readers import read_jobs
from .report import write_report
from .runner import Runner

__all__ = ["Order", "Outcome", "batch", "draw_batch"]

Say = Callable[[str], None]


@dataclass(frozen=True)
class Order:
    """What the command line asks for.

    Args:
        jobs: file of jobs.
        out: output folder; made if its parent exists.
        model: name, folder or hub id.
        defaults: options of jobs that do not give them.
        grid: `KEY=VALUE,VALUE` texts.
        batch: items drawn at once, at most.
        retry_failed: draw again what failed before.
        device: where.
        dtype: number type.
    """

    jobs: Path
    out: Path
    model: str = "tiny-sd3"
    defaults: Mapping[str, Any] = field(default_factory=dict)
    grid: Sequence[str] = ()
    batch: int = 1
    retry_failed: bool = False
    device: str = "auto"
    dtype: str = "auto"


@dataclass(frozen=True)
class Outcome:
    """How a batch stands when this process has done its share.

    Args:
        items: in all.
        before: of them, those that needed no more work.
        drawn: attempted by this process in this run.
        done: with a result, by any process.
        failed: without.
        report: the page; None while other processes are at work.
    """

    items: int
    before: int
    drawn: int
    done: int
    failed: int
    report: Path | None

    def __str__(self) -> str:
        left = self.items - self.done - self.failed
        still = f", {left} still to be drawn by other processes" if left else ""
        there = f" ({self.before} were there before)" if self.before else ""
        return f"{self.items} items: {self.done} done, {self.failed} failed{still}{there}"


def batch(order: Order, say: Say, tell: Say = print) -> bool:
    """Run a batch and return whether nothing has failed.

    Args:
        order: what to draw.
        say: is given notes for the user.
        tell: is given the outcome.

    Raises:
        AttnctlError: if the jobs cannot be done, or the output folder not be written.
    """
    crew = Crew.launched()
    items = _checked(order)
    hush(say if crew.leads else _silent)
    pipe = load(order.model, local_device(order.device), order.dtype)
    with notes(say if crew.leads else _silent):
        outcome = draw_batch(pipe, items, order, crew, say)
    if crew.leads:
        tell(str(outcome))
    if outcome.report is not None:
        tell(f"wrote {outcome.report}")
    return not outcome.failed


def _silent(_: str) -> None:
    """Say nothing: the leading process has said it."""


def _checked(order: Order) -> list[Item]:
    """Return the items; whatever needs no model is refused here, before anything is written."""
    if order.batch < 1:
        raise OptionError(f"batch={order.batch} must be at least 1")
    items = items_of(read_jobs(order.jobs), order.defaults, grid_words(order.grid))
    local_folder(order.model)
    with output_errors(order.out):
        order.out.mkdir(exist_ok=True)
    return items


def draw_batch(pipe: Any, items: Sequence[Item], order: Order, crew: Crew, say: Say) -> Outcome:
    """Draw items with a loaded pipeline; the process that ends last writes the report.

    Raises:
        AttnctlError: if the model cannot do an item, or the output folder not be written.
    """
    if makes_videos(pipe):
        need_video()
    plan = planned(pipe, items)
    if len(plan) < len(items) and crew.leads:
        say(f"{len(items) - len(plan)} items ask for what another one does; drawn once")
    pipe.set_progress_bar_config(disable=True)
    runner = Runner(order.out, order.batch, crew, order.retry_failed, say)
    before = len(runner.settled(plan))
    drawn = runner.run(pipe, plan)
    return _outcome(model_name(pipe), plan, order.out, before, drawn)


def _outcome(
    model: str, plan: Sequence[Planned], folder: Path, before: int, drawn: int
) -> Outcome:
    states = read_states(folder)
    lines = [states[one.key]["state"] for one in plan if one.key in states]
    report = write_report(folder, model, plan, states) if len(lines) == len(plan) else None
    return Outcome(len(plan), before, drawn, lines.count("done"), lines.count("failed"), report)
