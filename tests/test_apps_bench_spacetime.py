"""The bench of SpaceTime's lambda: what is chosen is never worse by the score that chooses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from attnctl.apps.bench import spacetime_weights
from attnctl.apps.bench.effect import Scores


def test_the_best_of_several_arms() -> None:
    each = [Scores(*(np.array([i, 10.0 + i, 20.0 + i]) * f for f in (1, 2, 3))) for i in range(3)]
    best = spacetime_weights.best_of(each, np.array([2, 0, 1]))
    assert best.exact.tolist() == [2, 10, 21] and best.saturation.tolist() == [6, 30, 63]


def test_a_small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spacetime_weights, "LINES", ((0.7, 0.0), (0.2, 0.6)))
    out = tmp_path / "found.json"
    words = ["--n", "2", "--steps", "2", "--batch", "2", "--device", "cpu", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["spacetime_weights", *words])
    spacetime_weights.main()
    arms = json.loads(out.read_text())["arms"]
    assert list(arms) == [
        "stock", "spacetime(lam=0.7)", "spacetime(lam=0.2, slope=0.6)",
        "the line of the best score", "a line at random", "the noise of the best score",
    ]  # fmt: skip
    value = {name: arm["log_prob"]["value"] for name, arm in arms.items()}
    lines = [value["spacetime(lam=0.7)"], value["spacetime(lam=0.2, slope=0.6)"]]
    assert value["the line of the best score"] >= max(lines) - 1e-6
    assert value["the noise of the best score"] >= lines[0] and lines[0] != lines[1]
