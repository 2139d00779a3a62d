"""The table of steering controls: its arms, its figures, its shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import attnctl
from attnctl.apps.bench import steering_table
from attnctl.apps.bench.tasks import Request, find_task, open_task
from attnctl.assets.world import heldout_prompts
from attnctl.errors import OptionError

PAIR = ("a red circle and a blue square", "a green ring and a red cross")


@pytest.fixture(scope="module")
def task() -> Any:
    kind, folder = find_task("tiny-sd")
    return open_task(kind, Request("tiny-sd", folder, n=2, steps=1, device="cpu"))


def test_arms_in_text_form(task: Any) -> None:
    both = steering_table.controls_of(task.model, "regulation:strength=0.5 + a-star:scale=2")
    assert [c.name for c in both] == ["regulation", "a-star"]
    (changed,) = steering_table.controls_of(task.model, "preset a-star:retain=0")
    preset = attnctl.AStar.for_model(task.model)
    assert (changed.retain, changed.scale) == (0, preset.scale)  # type: ignore[attr-defined]
    assert preset.retain != 0
    with pytest.raises(OptionError, match="there is no placebo 'odd'"):
        steering_table.controls_of(task.model, "placebo odd: a-star")
    with pytest.raises(OptionError, match="is not one of"):
        steering_table.controls_of(task.model, "placebo everywhere: a-star")


@pytest.mark.parametrize("arm", [*steering_table.ARMS, *steering_table.CROSS])
def test_every_arm_can_be_made(task: Any, arm: str) -> None:
    assert arm.format(sites="L1-2") in steering_table.arms_of(task.model)
    assert steering_table.controls_of(task.model, arm.format(sites="L1-2"))


def test_present_and_unmixed(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnctl.assets.world.palette import pair_index

    shown = [{("red", "circle"), ("red", "square")}, {("green", "ring"), ("red", "cross")}]
    logits = torch.full((2, 48), -1.0)
    for row, pairs in zip(logits, shown, strict=True):
        row[[pair_index(*pair) for pair in pairs]] = 1.0

    class Verdict:
        presence = logits

    monkeypatch.setattr(steering_table, "detector", lambda device: lambda pictures: Verdict)
    found = steering_table.seen(torch.zeros(2, 3, 8, 8), PAIR)
    assert found["present"].tolist() == [0, 1] and found["unmixed"].tolist() == [0, 1]


def test_a_row_is_paired_with_stock() -> None:
    stock = {key: np.array([0.0, 1.0, 1.0]) for key in steering_table.FIGURES}
    mine = {key: np.array([1.0, 1.0, 0.0]) for key in steering_table.FIGURES}
    mine["log_prob"] = stock["log_prob"] + 2
    row = steering_table._row("arm", mine, stock)
    assert (row["won"], row["lost"], row["p"]) == (1, 1, 1.0)
    assert row["gains"]["exact"]["value"] == 0 and row["gains"]["log_prob"]["low"] == 2


def test_shards_of_the_command_are_joined(tmp_path: Path) -> None:
    arms = ["regulation:strength=0.5", "spacetime:lam=0.3"]
    size = ["--n", "2", "--steps", "1", "--device", "cpu", *(f"--arm={arm}" for arm in arms)]
    files = [tmp_path / f"{i}.json" for i in (1, 2)]
    for i, file in enumerate(files, 1):
        steering_table.main([*size, "--shard", f"{i}/2", "--out", str(file)])
    steering_table.main(["--join", *map(str, files), "--out", str(tmp_path / "all.json")])
    rows = json.loads((tmp_path / "all.json").read_text())["rows"]
    assert [row["arm"] for row in rows] == ["stock", *arms]
    assert rows[1]["controls"] == ["regulation:strength=0.5"]
    assert rows[1]["figures"]["log_prob"] != rows[0]["figures"]["log_prob"]
    other = json.loads(files[1].read_text())
    assert other["prompts"] == heldout_prompts(2, 2, seed=0)
    files[1].write_text(json.dumps({**other, "arms": arms[1:]}))  # as a table of other arms
    both = steering_table.joined(files[::-1])
    assert both["arms"] == [row["arm"] for row in both["rows"][1:]] == arms[::-1]
    other["settings"]["seed"] = 9
    files[1].write_text(json.dumps(other))
    with pytest.raises(OptionError, match="its settings or its stock differ"):
        steering_table.joined(files)


def test_placebos_of_spacetime(task: Any) -> None:
    """Without a layout a region is everywhere; a neighbour's words change the picture."""
    pictures = {}
    for arm in (
        "spacetime:lam=0.4",
        "placebo everywhere: spacetime:lam=0.4",
        "placebo neighbour's descriptions: spacetime:lam=0.4",
    ):
        with attnctl.patch(task.model, *steering_table.controls_of(task.model, arm)):
            pictures[arm] = task.run(0, 2)
    one, whole, other = pictures.values()
    assert (one != whole).any() and (one != other).any() and (whole != other).any()


def test_a_row_counts_what_was_won_and_lost() -> None:
    """Of five pictures two come right, one goes wrong."""
    stock = {key: np.array([0.0, 0, 0, 1, 1]) for key in steering_table.FIGURES}
    arm = {key: np.array([1.0, 1, 0, 0, 1]) for key in steering_table.FIGURES}
    row = steering_table._row("arm", arm, stock)
    assert (row["won"], row["lost"], row["hits"]) == (2, 1, "11001")
    assert row["gains"]["exact"]["value"] == pytest.approx(0.2)
