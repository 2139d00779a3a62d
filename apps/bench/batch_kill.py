"""kill -9 at random moments of a batch: is each item there once, and every file as it should be?

    python -P -m attnctl.apps.bench.batch_kill --kills 50 --items 40

A process of its own loads tiny-sd3 and runs the batch, and is killed after a random time, uniform
over what is left to do. Only kills that hit a running batch count; a run that had ended before is
not one of them. After each kill whatever has a final name must be whole, and whatever is
noted must be there, equal to the file of a run that nothing interrupted. After a few kills in one
folder the batch may end; then each item must be noted once, all files equal, nothing left over.
Anything else is an error that ends the bench. Needs a system that can fork (not Windows).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
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
from .nursery import nursery

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
    """One batch that is run again and again, each time by a new process.

    Args:
        model: name of a shipped model.
        items: how many pictures.
        batch: drawn at once.
        steps: of each picture.
        patience: seconds after which a process that does not end counts as stuck.
    """

    model: str
    items: int
    batch: int
    steps: int
    patience: float = 600.0

    def start(self, folder: Path) -> BaseProcess:
        """Start a process and return it when its model is there and the batch begins.

        Raises:
            Broken: if it does not get that far.
        """
        folder.mkdir(exist_ok=True)
        ready, told = nursery().Pipe(duplex=False)
        process = nursery().Process(target=_draw, args=(self, folder, told))
        process.start()
        told.close()  # so that the other end is told of a child that dies
        try:
            _require(ready.poll(self.patience), f"no batch began in {self.patience:.0f} s")
            ready.recv()
        except (EOFError, Broken) as error:
            _end(process)
            raise Broken(f"a batch did not begin in {folder}: {error}") from None
        return process

    def finish(self, folder: Path) -> float:
        """Run the batch to its end; return the seconds.

        Raises:
            Broken: if it fails, or is stuck.
        """
        process = self.start(folder)
        begin = time.perf_counter()
        process.join(self.patience)
        code, took = process.exitcode, time.perf_counter() - begin
        _end(process)
        _require(code is not None, f"a batch was stuck for {took:.0f} s in {folder}")
        _require(code == 0, f"a batch that nothing interrupted failed in {folder}")
        return took

    def kill(self, folder: Path, after: float) -> bool:
        """Run the batch, kill it after some seconds; return whether it was still running."""
        process = self.start(folder)
        time.sleep(after)
        return _end(process) == -signal.SIGKILL


def _end(process: BaseProcess) -> int | None:
    """Kill a process that still runs; return its exit code."""
    process.kill()
    process.join()
    return process.exitcode


def _draw(runs: Runs, folder: Path, ready: Connection) -> None:
    """Run the batch; this is the child's whole life."""
    torch.set_num_threads(1)  # small pictures: more threads only wait for each other
    with contextlib.redirect_stderr(io.StringIO()):  # the progress bars
        pipe = load(runs.model, device="cpu")
        job = {"prompt": "a red circle", "seed": f"0-{runs.items - 1}", "steps": runs.steps}
        jobs = [Raw("here", {**job, "control": ["softpag:heads=L0-1,scale=2"]})]
        order = Order(Path("jobs.txt"), folder, batch=runs.batch)
        ready.send(None)
        draw_batch(pipe, items_of(jobs, {}, {}), order, Crew(), lambda _: None)


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
    data: dict[str, Any] = {"items": given.items, "steps": given.steps, "seed": given.seed}
    for batch in given.batch or [1]:
        with tempfile.TemporaryDirectory() as root:
            runs = Runs("tiny-sd3", given.items, batch, given.steps)
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
