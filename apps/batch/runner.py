"""The loop: draw what is missing, write it, note it down, in this order.

A kill between writing and noting leaves a whole file that is not noted; it is drawn again, the
same, and replaced. So at every moment each noted result lies whole under its name.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from attnctl.processors.headhunter.crew import Crew

from ..files import clear_parts
from ..videos import sidecar
from .manifest import Manifest, read_states, settled
from .output import output_errors
from .plan import Planned, chunks
from .rows import Drawn, draw_chunk
from .writer import write_result

__all__ = ["Runner"]


@dataclass(frozen=True)
class Runner:
    """How a plan is carried out.

    Args:
        folder: the output folder.
        batch: items drawn at once, at most.
        crew: which of the processes this is. Every process takes its own batches of the plan,
            by number, so that none has to ask another.
        retry_failed: draw again what failed before.
        say: is given notes for the user.
    """

    folder: Path
    batch: int
    crew: Crew
    retry_failed: bool
    say: Callable[[str], None]

    def run(self, pipe: Any, plan: Sequence[Planned]) -> int:
        """Draw this process's share of what is missing; return how many that were.

        Raises:
            OutputError: if a result cannot be written; what is done stays done.
        """
        manifest = Manifest(self.folder, self.crew.rank)
        try:
            return self._run(manifest, pipe, plan)
        finally:
            manifest.close()

    def _run(self, manifest: Manifest, pipe: Any, plan: Sequence[Planned]) -> int:
        done = self.settled(plan)
        mine = chunks(plan, self.batch)[self.crew.rank :: self.crew.size]
        left = [chunk for chunk in mine if any(one.key not in done for one in chunk)]
        todo = sum(one.key not in done for chunk in left for one in chunk)
        with self._bar(todo) as bar:
            for chunk in left:
                self._chunk(manifest, pipe, chunk, done, bar)
        return todo

    def settled(self, plan: Sequence[Planned]) -> set[str]:
        """Return the keys of the plan that need no more work."""
        states = read_states(self.folder)
        if self.retry_failed:
            states = {key: line for key, line in states.items() if line["state"] == "done"}
        return settled(states, self.folder, (one.key for one in plan))

    def _bar(self, todo: int) -> Any:
        among = f" ({self.crew.rank + 1} of {self.crew.size})" if self.crew.size > 1 else ""
        slow = 0.5 if sys.stderr.isatty() else 30.0  # seconds: a log need not be filled
        return tqdm(
            total=todo,
            desc=f"batch{among}",
            unit="item",
            mininterval=slow,
            disable=not (todo and self.crew.leads),
        )

    def _chunk(
        self, manifest: Manifest, pipe: Any, chunk: list[Planned], done: set[str], bar: Any
    ) -> None:
        start = time.perf_counter()
        outcomes = draw_chunk(pipe, chunk)
        seconds = (time.perf_counter() - start) / len(chunk)
        for drawn in outcomes:
            if drawn.plan.key not in done:
                manifest.add(self._line(drawn, seconds))
                bar.update()

    def _line(self, drawn: Drawn, seconds: float) -> dict[str, Any]:
        """Write a result, if there is one, and return the manifest's line about the item."""
        plan = drawn.plan
        line = {
            "key": plan.key,
            "state": "failed" if drawn.reason else "done",
            "where": plan.item.where,
            "seconds": round(seconds, 3),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        if drawn.reason is not None:
            with tqdm.external_write_mode(file=sys.stderr):  # not into the bar's line
                self.say(f"{plan.item.where}, seed {plan.item.settings.seed}: {drawn.reason}")
            return {**line, "reason": drawn.reason}
        path = self.folder / plan.file
        with output_errors(self.folder):
            for each in {path, sidecar(path)}:
                clear_parts(each)
        return {**line, "file": plan.file, "bytes": write_result(self.folder, drawn)}
