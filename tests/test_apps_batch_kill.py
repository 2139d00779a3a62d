"""kill -9 at random moments of a batch: nothing lost, nothing doubled, every file as it should be.

A few moments here; `ATTNCTL_KILLS=50 ATTNCTL_ITEMS=40` for the long version.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from attnctl.apps.batch.command import Order, draw_batch
from attnctl.apps.batch.items import items_of
from attnctl.apps.batch.readers import Raw
from attnctl.apps.models import load
from attnctl.processors.headhunter.crew import Crew

KILLS = int(os.environ.get("ATTNCTL_KILLS", "4"))
ITEMS = int(os.environ.get("ATTNCTL_ITEMS", "5"))
PER_FOLDER = 2
"""Kills in one folder, so that runs that go on are killed too."""

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def start(pipe: Any, folder: Path, batch: int) -> int:
    """Run the batch in a child that shares the loaded model; return its process id."""
    folder.mkdir(exist_ok=True)
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        options = {"steps": 1, "control": ["softpag:heads=L0-1,scale=2"]}
        jobs = [Raw("here", {"prompt": "a red circle", "seed": f"0-{ITEMS - 1}", **options})]
        order = Order(Path("jobs.txt"), folder, batch=batch)
        draw_batch(pipe, items_of(jobs, {}, {}), order, Crew(), lambda _: None)
        code = 0
    finally:
        os._exit(code)


def noted(folder: Path) -> list[str]:
    path = folder / "manifest.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line)["file"] for line in lines]


def results(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.glob("*.png")}


@pytest.mark.parametrize("batch", [1, 4])
def test_killed_batches_go_on(batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    pipe = load("tiny-sd3", device="cpu")
    begin = time.perf_counter()
    assert os.waitpid(start(pipe, tmp_path / "whole", batch), 0)[1] == 0
    span = time.perf_counter() - begin
    whole = results(tmp_path / "whole")
    assert len(whole) == ITEMS + -(-ITEMS // 36)
    dice, found = random.Random(batch), []
    for number in range(0, KILLS // 2, PER_FOLDER):
        folder = tmp_path / str(number)
        for _ in range(PER_FOLDER):
            left = 1 - len(noted(folder)) / ITEMS
            found.append(killed(pipe, folder, batch, dice.uniform(0, span * left), whole))
        assert os.waitpid(start(pipe, folder, batch), 0)[1] == 0
        assert sorted(noted(folder)) == sorted(set(noted(folder)))
        assert len(noted(folder)) == ITEMS
        assert results(folder) == whole
        assert not list(folder.glob(".*.part"))
    hit = sorted(done for done in found if done is not None)
    print(f"batch {batch}: {len(hit)} of {len(found)} runs killed, after {hit} of {ITEMS} items")
    assert any(0 < done < ITEMS for done in hit) or KILLS < 10


def killed(
    pipe: Any, folder: Path, batch: int, after: float, whole: dict[str, bytes]
) -> int | None:
    """Kill a run, check what it left, return how many items were noted; None if it had ended."""
    process = start(pipe, folder, batch)
    time.sleep(after)
    os.kill(process, signal.SIGKILL)
    struck = os.WIFSIGNALED(os.waitpid(process, 0)[1])
    for name in noted(folder):
        assert (folder / name).read_bytes() == whole[name]
    for path in folder.glob("*.png"):  # whatever has a final name is whole
        if not path.name.startswith("contact"):
            assert path.read_bytes() == whole[path.name]
        with Image.open(path) as image:
            image.load()
    return len(noted(folder)) if struck else None
