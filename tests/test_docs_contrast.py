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


def test_draws(script: types.ModuleType) -> None:
    """Answers of one token are drawn from the same logits as `generate` draws them."""
    teller = Teller.load(assets.path("tiny-llava"), torch.device("cpu"), torch.float32)
    asked = [(photo, f"Is there a {one} in the image?") for photo in album(2, 0) for one in "abc"]
    teller.batch = 4  # two batches, the second one shorter
    with torch.no_grad(), script.patched(teller.model, "vcd:noise_step=999"):
        told = script.drawn_tokens(teller, asked)
        assert told == script.drawn_texts(teller, asked, 1)
    assert len({tuple(one) for one in told}) > 1
