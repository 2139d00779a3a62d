"""The page on contrastive decoding says what was measured, and its script draws as it should."""

import importlib.util
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from attnctl import assets
from attnctl.assets.train.measure_llava import Teller
from attnctl.assets.world.evaluation import album

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def script() -> Iterator[types.ModuleType]:
    spec = importlib.util.spec_from_file_location("measure_contrast", DOCS / "measure_contrast.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)  # its dataclasses look there
        spec.loader.exec_module(module)
        yield module


def measured(name: str) -> list[dict[str, Any]]:
    path = DOCS / f"measured/vlm/contrast-{name}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return rows


def trained_again(name: str, seed: int) -> list[dict[str, Any]]:
    path = DOCS / f"measured/vlm/retrained/{name}-{seed}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return rows


@pytest.mark.parametrize("name", ["pope", "captions", "pope-sampled", "captions-sampled"])
def test_table(name: str, script: types.ModuleType) -> None:
    """Else put in what `python -P docs/measure_contrast.py page FILE...` prints."""
    rows, told = measured(name), (DOCS / "contrast.md").read_text(encoding="utf-8")
    assert script.page(rows) in told
    runs = {tuple(run) for row in rows for run in row["runs"]}
    assert runs == {("shipped", seed) for seed in (103, 104, 105)}


def test_table_over_the_cut_off(script: types.ModuleType) -> None:
    """As above, of both sampled files."""
    both = [*measured("pope-sampled"), *measured("captions-sampled")]
    assert script.over_cut_off(both) in (DOCS / "contrast.md").read_text(encoding="utf-8")


def test_table_of_models_trained_again(script: types.ModuleType) -> None:
    """Else put in what `python -P docs/measure_contrast.py models FILE...` prints."""
    kinds = ("pope", "captions", "pope-sampled", "captions-sampled")
    rows = [row for kind in kinds for row in measured(kind)]
    rows += [row for kind in kinds for seed in (1, 2) for row in trained_again(kind, seed)]
    told = (DOCS / "contrast.md").read_text(encoding="utf-8")
    greedy, sampled = script.models(rows)
    goal = script.goal(rows)
    assert greedy in told and sampled in told and goal in told
    assert greedy.count("`stock`") == sampled.count("`stock`") == 3
    met = "sampled | stock | met | met | met |"
    assert f"| `vcd` | {met}" in goal and f"| `vcd:noise_step=999` | {met}" in goal
    assert not [line for line in goal.splitlines() if "greedy" in line and " met " in line]


def test_what_is_missing_of_the_goal(script: types.ModuleType) -> None:
    """Gains beyond the interval, each its own way; recall and length not below it."""
    up, down, even = [0.02, 0.01, 0.03], [-0.02, -0.03, -0.01], [0.0, -0.01, 0.01]
    best = {"chair_s": down, "chair_i": down, "recall": even, "words": up}
    assert script.lacks({"adversarial": {"right": up}, "captions": best}) == "met"
    worse = {"chair_s": even, "chair_i": up, "recall": down, "words": down}
    missing = script.lacks({"adversarial": {"right": even}, "captions": worse})
    assert missing == "adversarial, CHAIR_s, CHAIR_i, recall, words"


def test_models_are_set_beside_each_other(script: types.ModuleType) -> None:
    """Of the arms and the splits that all of them have; stock's figures, others' gains."""

    def row(model: str, arm: str, split: str, gain: float | None) -> dict[str, Any]:
        key = "chair_s" if split == "captions" else "right"
        names = {one.key for one in script.FIGURES["captions" if key == "chair_s" else "pope"]}
        gains = {} if gain is None else dict.fromkeys(names, (gain, gain - 0.01, gain + 0.01))
        about = {"split": split, "sampled": True, "arm": arm, "runs": [[model, 1], [model, 2]]}
        return {**about, "figures": dict.fromkeys(names, 0.5), "gains": gains}

    rows = [row(model, "stock", "captions", None) for model in "ab"]
    rows += [row("a", "vcd", "captions", 0.02), row("b", "vcd", "captions", -0.03)]
    rows += [row("a", "m3id", "captions", 0.0), row("a", "stock", "adversarial", None)]
    rows += [row("a", arm, "adversarial", 0.1) for arm in ("vcd", "m3id")]
    (sampled,) = script.models(rows)
    lines = sampled.splitlines()
    assert lines[0] == "| arm | model | CHAIR_s | CHAIR_i | recall | words |"
    assert [line[:13] for line in lines[2:]] == [
        "| `stock` | a", "| `stock` | b", "| `vcd` | a |", "| `vcd` | b |",
    ]  # fmt: skip
    assert "| 50.0 |" in lines[2] and "| +2.0 [+1.0, +3.0] |" in lines[4]
    assert "| -3.0 [-4.0, -2.0] |" in lines[5]


def test_draws(script: types.ModuleType) -> None:
    """Answers of one token are drawn from the same logits as `generate` draws them."""
    teller = Teller.load(assets.path("tiny-llava"), torch.device("cpu"), torch.float32)
    asked = [(photo, f"Is there a {one} in the image?") for photo in album(2, 0) for one in "abc"]
    teller.batch = 4  # two batches, the second one shorter
    with torch.no_grad(), script.patched(teller.model, "vcd:noise_step=999"):
        told = script.drawn_tokens(teller, asked)
        assert told == script.drawn_texts(teller, asked, 1)
    assert len({tuple(one) for one in told}) > 1
