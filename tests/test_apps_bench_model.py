"""`attnctl bench model`: arms, figures, wrong orders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from attnctl.apps.cli import run

SMALL = ["--model", "wan-1.3b", "--frames", "5", "--height", "128", "--width", "128"]
QUICK = [*SMALL, "--layers", "1", "--rounds", "1", "--device", "cpu"]


def test_a_step_of_each_arm_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sparse = "radial:start=0,dense_layers=0,block=32"
    base = tmp_path / "step"
    order = ["bench", "model", *QUICK, "--out", str(base), "--control", sparse]
    assert run(order) == 0
    shown = capsys.readouterr().out
    data = json.loads(base.with_suffix(".json").read_text())
    rows = {row["arm"]: row for row in data["rows"]}
    assert list(rows) == ["stock", sparse] and all(arm in shown for arm in rows)
    assert rows["stock"]["speedup"] == 1.0
    for row in rows.values():
        assert row["ms"] == row["ms_layer"] > 0 and row["first_s"] > 0
        assert row["speedup"] == pytest.approx(rows["stock"]["ms"] / row["ms"])
    assert run(order) == 2  # the file is there
    assert "would be replaced" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "wan-15b", "--control", "radial"], "expected one of wan-14b"),
        (["--frames", "6", "--control", "radial"], "a multiple of 4, plus 1"),
        (["--height", "100", "--control", "radial"], "multiples of 16"),
        (["--layers", "0", "--control", "radial"], "--layers 0"),
        (["--rounds", "0", "--control", "radial"], "--rounds 0"),
        (["--control", "radials"], "radials"),
    ],
)
def test_wrong_orders_are_told_at_once(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", "model", *words, "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err
