"""kill -9 at random moments of a batch: is each item there once, and every file as it should be?

    python -P -m attnctl.apps.bench.batch_kill --kills 50 --items 40

A process that has loaded tiny-sd3 forks one that runs the batch, and kills it after a random time,
uniform over what is left to do. Only kills that hit a running batch count; a run that had ended
before is not one of them. After each kill whatever has a final name must be whole, and whatever is
noted must be there, equal to the file of a run that nothing interrupted. After a few kills in one
folder the batch may end; then each item must be noted once, all files equal, nothing left over.
Anything else is an error that ends the bench. Needs a system that can fork.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from attnctl.errors import AttnctlError
from attnctl.processors.headhunter.crew import Crew

from ..batch.command import Order, draw_batch
from ..batch.items import items_of
from ..batch.readers import Raw
from ..models import load
from .batch_folder import different, noted, results

__all__ = ["Broken", "Kill", "Runs", "campaign", "check_end", "check_killed"]

PER_FOLDER = 5
"""Kills in one folder, so that runs that go on are killed too."""


class Broken(AttnctlError):
    """A batch that was killed has lost, doubled or spoilt something."""


@dataclass(frozen=True)
class Kill:
    """What a kill found.

    Args:
        noted: items in the manifest.
        unnoted: whole pictures that had their name and were not noted yet.
        parts: unfinished files under names of their own.
    """

    noted: int
    unnoted: int
    parts: int


@dataclass(frozen=True)
class Runs:
    """One batch that is run again and again.

    Args:
        pipe: loaded pipeline, which the forked processes share.
        items: how many pictures.
        batch: drawn at once.
        steps: of each picture.
    """

    pipe: Any
    items: int
    batch: int
    steps: int

    def start(self, folder: Path) -> int:
        """Run the batch in a child; return its process id."""
        folder.mkdir(exist_ok=True)
        process = os.fork()
        if process:
            return process
        code = 1
        try:
            torch.set_num_threads(1)  # those of the parent's pool are not here
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115
            job = {"prompt": "a red circle", "seed": f"0-{self.items - 1}", "steps": self.steps}
            jobs = [Raw("here", {**job, "control": ["softpag:heads=L0-1,scale=2"]})]
            order = Order(Path("jobs.txt"), folder, batch=self.batch)
            draw_batch(self.pipe, items_of(jobs, {}, {}), order, Crew(), lambda _: None)
            code = 0
        finally:
            os._exit(code)

    def finish(self, folder: Path) -> float:
        """Run the batch to its end; return the seconds."""
        begin = time.perf_counter()
        if os.waitpid(self.start(folder), 0)[1]:
            raise Broken(f"a batch that nothing interrupted failed in {folder}")
        return time.perf_counter() - begin

    def kill(self, folder: Path, after: float) -> bool:
        """Run the batch, kill it after some seconds; return whether it was still running."""
        process = self.start(folder)
        time.sleep(after)
        os.kill(process, signal.SIGKILL)
        return os.WIFSIGNALED(os.waitpid(process, 0)[1])


def campaign(
    runs: Runs,
    kills: int,
    root: Path,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> list[Kill]:
    """Kill a batch so many times and check everything.

    Args:
        runs: the batch.
        kills: of a running batch.
        root: a folder for the output folders.
        seed: of the moments.
        say: is told of every folder.

    Raises:
        Broken: if something was lost, doubled or spoilt.
    """
    drawing, idle = (runs.finish(root / "whole") for _ in range(2))  # the second draws nothing
    dice = random.Random(seed)
    whole, found = results(root / "whole"), list[Kill]()

    def moment(left: int) -> float:
        return dice.uniform(0, idle + (drawing - idle) * left / runs.items)

    number = 0
    while len(found) < kills:
        folder = root / f"folder-{number}"
        most = min(PER_FOLDER, kills - len(found))
        found += _killed(runs, folder, whole, most, moment)
        runs.finish(folder)
        check_end(folder, whole, runs.items)
        say(f"{len(found)} of {kills} kills, batches of {runs.batch}: all as it should be")
        number += 1
    return found


def _killed(
    runs: Runs,
    folder: Path,
    whole: dict[str, bytes],
    most: int,
    moment: Callable[[int], float],
) -> list[Kill]:
    """Kill runs in one folder until they have been killed so often, or all is done."""
    struck: list[Kill] = []
    left = runs.items
    while len(struck) < most and left:
        alive = runs.kill(folder, moment(left))
        found = check_killed(folder, whole)
        left = runs.items - found.noted
        if alive:
            struck.append(found)
    return struck


def check_killed(folder: Path, whole: dict[str, bytes]) -> Kill:
    """Return what a kill left.

    Args:
        folder: where the batch was killed.
        whole: the files of a run that nothing interrupted.

    Raises:
        Broken: if a file that has its final name is not whole, or a noted one not there.
    """
    names, files = noted(folder), results(folder)
    for name, data in files.items():
        if not name.startswith("contact"):
            _require(data == whole[name], f"{name} has its name and is not whole")
        with Image.open(folder / name) as image:
            image.load()
    _require(set(names) <= set(files), "a file that is noted is not there")
    page = folder / "report.html"
    if page.exists():
        _require(page.read_text().endswith("</html>\n"), "the report is not whole")
    pictures = [name for name in files if not name.startswith("contact")]
    return Kill(len(names), len(pictures) - len(names), len(list(folder.glob(".*.part"))))


def check_end(folder: Path, whole: dict[str, bytes], items: int) -> None:
    """Check a folder whose batch has ended.

    Raises:
        Broken: if an item is not noted once, a file differs, or an unfinished one is left.
    """
    names = noted(folder)
    _require(len(names) == len(set(names)) == items, f"{len(names)} lines for {items} items")
    _require(not different(results(folder), whole), "a file differs from the uninterrupted run's")
    _require(not list(folder.glob(".*.part")), "an unfinished file is left")


def _require(fine: bool, otherwise: str) -> None:
    if not fine:
        raise Broken(otherwise)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="of a running batch")
    parser.add_argument("--items", type=int, default=40)
    parser.add_argument("--batch", type=int, action="append", help="drawn at once; several times")
    parser.add_argument("--steps", type=int, default=1, help="of a picture")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, help="JSON file with every kill")
    given = parser.parse_args(arguments)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the children are forked
    data: dict[str, Any] = {"items": given.items, "steps": given.steps, "seed": given.seed}
    pipe = load("tiny-sd3", device="cpu")
    for batch in given.batch or [1]:
        with tempfile.TemporaryDirectory() as root:
            runs = Runs(pipe, given.items, batch, given.steps)
            kills = campaign(runs, given.kills, Path(root), given.seed + batch)
        data[f"batch {batch}"] = [asdict(kill) for kill in kills]
        counts = sorted(kill.noted for kill in kills)
        print(f"batches of {batch}: {len(kills)} kills of a running batch, after {counts} items")
        print(f"  with an unfinished file: {sum(kill.parts > 0 for kill in kills)}")
        print(f"  with a whole file not noted yet: {sum(kill.unnoted > 0 for kill in kills)}")
        if given.out:  # after every size: the next takes minutes
            given.out.write_text(json.dumps(data) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
