"""kill -9 at random moments of a batch: nothing lost, nothing doubled, every file as it should be.

A few moments here; `python -P -m attnctl.apps.bench.batch_kill --kills 50` is the long version.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from attnctl.apps.bench import batch_kill
from attnctl.apps.bench.batch_folder import noted, results

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.mark.parametrize("batch", [1, 4])
def test_killed_batches_go_on(batch: int, tmp_path: Path) -> None:
    runs = batch_kill.Runs("tiny-sd3", 5, batch, 1)
    found = batch_kill.campaign(runs, 2, tmp_path, seed=batch)
    assert len(found) == 2
    assert len(results(tmp_path / "whole")) == len(noted(tmp_path / "whole")) + 1 == 6


@pytest.mark.parametrize(
    ("model", "patience", "told"),
    [("no-such-model", 60.0, "did not begin"), ("tiny-sd3", 0.01, "no batch began in 0 s")],
)
def test_a_process_that_fails_or_is_stuck_ends_the_bench(
    model: str, patience: float, told: str, tmp_path: Path
) -> None:
    runs = batch_kill.Runs(model, 2, 1, 1, patience)
    with pytest.raises(batch_kill.Broken, match=told):
        runs.finish(tmp_path / "whole")


def test_a_batch_that_fails_ends_the_bench(tmp_path: Path) -> None:
    runs = batch_kill.Runs("tiny-sd3", 2, 1, steps=0)
    with pytest.raises(batch_kill.Broken, match="failed"):
        runs.finish(tmp_path / "none")


# -- the bench itself: a batch that loses, doubles or spoils something must not pass -----------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lines = []
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
        lines.append(json.dumps({"key": name, "state": "done", "file": name}) + "\n")
    (tmp_path / "manifest.jsonl").write_text("".join(lines))
    return tmp_path


def test_a_sound_folder_passes(folder: Path) -> None:
    (folder / ".c.png.1.part").touch()
    whole = {**results(folder), "c.png": b""}
    assert batch_kill.check_killed(folder, whole) == batch_kill.Kill(2, 0, 1)
    (folder / ".c.png.1.part").unlink()
    batch_kill.check_end(folder, results(folder), 2)


def test_a_spoilt_file_is_seen(folder: Path) -> None:
    whole = results(folder)
    (folder / "a.png").write_bytes(whole["a.png"][:-1])
    with pytest.raises(batch_kill.Broken, match=r"a\.png has its name and is not whole"):
        batch_kill.check_killed(folder, whole)
    with pytest.raises(batch_kill.Broken, match="differs"):
        batch_kill.check_end(folder, whole, 2)


def test_a_lost_file_is_seen(folder: Path) -> None:
    whole = results(folder)
    (folder / "b.png").unlink()
    with pytest.raises(batch_kill.Broken, match="not there"):
        batch_kill.check_killed(folder, whole)


def test_a_doubled_or_a_missing_item_is_seen(folder: Path) -> None:
    whole = results(folder)
    with pytest.raises(batch_kill.Broken, match="2 lines for 3 items"):
        batch_kill.check_end(folder, whole, 3)
    manifest = folder / "manifest.jsonl"
    manifest.write_text(manifest.read_text() * 2)
    with pytest.raises(batch_kill.Broken, match="4 lines for 2 items"):
        batch_kill.check_end(folder, whole, 2)


def test_what_is_left_over_is_seen(folder: Path) -> None:
    (folder / ".a.png.1.part").touch()
    with pytest.raises(batch_kill.Broken, match="left"):
        batch_kill.check_end(folder, results(folder), 2)


def test_half_a_report_is_seen(folder: Path) -> None:
    (folder / "report.html").write_text("<!DOCTYPE html>")
    with pytest.raises(batch_kill.Broken, match="report"):
        batch_kill.check_killed(folder, results(folder))
