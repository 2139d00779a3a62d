"""The benches of the head search, small."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attnctl.apps.bench import heads_speed, heads_table
from attnctl.apps.bench.statistics import ratio_interval


def test_rows_tell_means_and_shares_of_greedy() -> None:
    noise = np.linspace(-1, 1, 40)
    found = {
        "greedy 0": 1 + noise, "greedy 1": 3 + noise, "halving 0": 1.9 + noise,
        "random 0": noise, "layer 0": noise, "layer 1": 0.5 + noise, "all": noise - 1,
    }  # fmt: skip
    rows = {row["kind"]: row for row in heads_table.rows(found)}
    assert list(rows) == ["greedy", "halving", "random", "all", "best layer (1)"]
    assert rows["greedy"]["gain"][0] == pytest.approx(2) and rows["greedy"]["each"] == [1, 3]
    part, least, most = rows["halving"]["of greedy"]
    assert part == pytest.approx(0.95) and 0.9 < least < part < most < 1
    value, low, high = rows["halving"]["less 95 % of greedy"]
    # each picture's own part of the noise that is left, a twentieth
    assert value == pytest.approx(0, abs=1e-6) and 0.005 < high - low < 0.03


def test_the_interval_of_a_ratio_is_that_of_pairs() -> None:
    source = np.random.default_rng(8)
    whole = 2 + source.normal(size=900)
    exact = ratio_interval(0.9 * whole, whole)
    assert (exact.low, exact.value, exact.high) == pytest.approx((0.9, 0.9, 0.9))
    part = 0.9 * whole + 0.3 * source.normal(size=900)
    found = ratio_interval(part, whole)
    rest = part - found.value * whole  # the delta method's error
    half = 1.96 * rest.std() / 30 / whole.mean()
    assert found.value == pytest.approx(part.mean() / whole.mean())
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)


@pytest.fixture
def two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(heads_table.CALL, "num_inference_steps", 2)
    monkeypatch.setattr(heads_table, "STRENGTHS", (0.5, 1.0))


def test_the_sweep_tells_the_gain_by_strength(
    two_steps: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--sweep", "--n", "3", "--batch", "8", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["heads_table", *words])
    heads_table.main()
    data: dict[str, Any] = json.loads((tmp_path / "heads-sweep.json").read_text())
    first, last = data["sweep"]
    assert data["n"] == 3 and (first["u"], last["u"]) == (0.5, 1.0)
    assert first["gain"] == first["over the last"] and last["gain"][0] > first["gain"][0] > 0
    assert last["gain"][0] - first["gain"][0] == pytest.approx(last["over the last"][0], abs=2e-5)


def test_every_block_has_pictures_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads_table, "Trials", lambda *args: args)
    seen = []
    for block in (0, 5):
        given = argparse.Namespace(n=20, block=block, batch=4)
        _, _, _, prompts, seeds, *_ = heads_table.trials(None, "redness", 3.0, 1.0, given)
        seen.append((prompts, set(seeds)))
    (first, here), (other, there) = seen
    assert len(here) == len(there) == 20 and not here & there and first != other
    assert min(here) == 50_000


def test_a_table_holds_every_set(
    two_steps: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One cheap strategy at a tenth of the paper's steps."""
    monkeypatch.setattr(heads_table, "RANDOM", 1)
    monkeypatch.setattr(heads_table, "trained_prompts", lambda n, *a, **k: ["a red circle"] * 2)
    words = ["--strategies", "halving", "--only", "redness:3", "--n", "2", "--top-k", "1"]
    known = tmp_path / "greedy.json"
    known.write_text(json.dumps({"redness:3": {"sets": {"greedy 0": "L6H4"}}}))
    words += ["--searches", "1", "--beside", str(known)]
    more = ["--rounds", "1", "--batch", "32", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["heads_table", *words, *more])
    heads_table.main()
    data = json.loads((tmp_path / "heads-redness-3.json").read_text())["redness:3"]
    assert len(data["sets"]) == 1 + 1 + heads_table.RANDOM + 8 + 1
    assert data["sets"]["greedy 0"] == "L6H4" and "greedy 0" not in data["forwards"]
    assert len(data["sets"]["halving 0"].split()) == 1 and data["forwards"]["halving 0"] > 0
    kinds = [row["kind"] for row in data["rows"]]
    assert kinds[:4] == ["halving", "greedy", "random", "all"]
    assert kinds[4].startswith("best layer")


def test_speed_is_measured_for_every_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "speed.json"
    words = ["--batches", "1,2", "--candidates", "2", "--steps", "1", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["heads_speed", *words, "--out", str(out)])
    heads_speed.main()
    data = json.loads(out.read_text())
    assert [row["batch"] for row in data["rows"]] == [1, 2] and data["size"] == "tiny"
    assert all(
        len(row["each"]) == 1 and row["median"] == row["each"][0] > 0 for row in data["rows"]
    )
