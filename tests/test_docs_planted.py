"""The tables of planted sinks, placebo heads and CARVE are of the figures that were measured."""

import json
import runpy
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import attnctl
from attnctl import assets
from attnctl.assets.train.measure_llava import Teller
from attnctl.assets.world.pope import pope

DOCS = Path(__file__).parent.parent / "docs"
ARMS = (
    "VAR", "VAR, all of it moved", "VAR, rho 0.5", "random tokens for sinks",
    "random tokens, all of it moved",
)  # fmt: skip
PLACES = {"planted": "any two", "planted-quiet": "quiet", "planted-quiet10": "quiet, bonus 10"}
FILES = sorted((DOCS / "measured/vlm").glob("planted*.json"))


@pytest.fixture(scope="module")
def heads() -> types.SimpleNamespace:
    return types.SimpleNamespace(**runpy.run_path(str(DOCS / "measure_placebo_heads.py")))


def percent(value: float) -> str:
    text = f"{100 * value:.0f}"
    return "0" if text == "-0" else text


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_row(file: Path) -> None:
    arms: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["arms"]
    place, _, kind = file.stem.rpartition("-")
    right = [f"{100 * arms[name]['right']['value']:.1f}" for name in ("stock", "planted")]
    back = [
        "{} [{}, {}]".format(
            *(percent(arms[name]["won_back"][k]) for k in ("value", "low", "high"))
        )
        for name in ARMS
    ]
    row = f"| {' | '.join([kind, PLACES[place], *right, *back])} |"
    assert row in (DOCS / "controls/var.md").read_text(encoding="utf-8")


def test_what_the_page_says_of_all_rows() -> None:
    """More than half comes back, a fifth at most with random tokens; unplanted it is stock."""
    found = [json.loads(file.read_text(encoding="utf-8"))["arms"] for file in FILES]
    assert len(found) == 7
    for arms in found:
        assert arms[ARMS[1]]["won_back"]["value"] > 0.5
        assert all(arms[name]["won_back"]["high"] < 0.2 for name in ARMS[3:])
        assert arms["VAR, every head"]["won_back"] == arms["VAR"]["won_back"]
        assert arms["VAR, nothing planted"] == arms["stock"]


@pytest.mark.parametrize("name", ["var", "pai"])
def test_tables_of_placebo_heads(name: str, heads: types.SimpleNamespace) -> None:
    """Else put in what `python -P docs/measure_placebo_heads.py NAME FILE` prints."""
    data = json.loads((DOCS / "measured/vlm/placebo-heads.json").read_text(encoding="utf-8"))
    assert heads.table(data, name) in (DOCS / f"controls/{name}.md").read_text(encoding="utf-8")
    assert data["n"] >= 200 and len(data["splits"]) == 4


def test_halves_of_the_heads(heads: types.SimpleNamespace) -> None:
    """As many heads in each, of the layers asked for, without one in both; drawn with a seed."""
    masses = {(layer, head): layer + head / 10 for layer in range(4) for head in range(6)}
    every, most, least, drawn = heads.halves(masses, range(1, 4)).values()
    assert len(every) == 18 and len(most) == len(least) == len(drawn) == 9
    assert {*most, *least} == {*every} and min(masses[h] for h in most) > masses[least[0]]
    assert {*drawn} < {*every} and drawn == heads.halves(masses, range(1, 4))[heads.HALVES[3]]
    assert heads.mean(masses, [(0, 0), (1, 0)]) == 0.5


def test_what_heads_give_to_the_image(heads: types.SimpleNamespace) -> None:
    """The watched masses are those of eager attention's maps."""
    teller = Teller.load(assets.path("tiny-llava"), torch.device("cpu"), torch.float32)
    (case,) = pope("random", 1, 0)[:1]
    watch = heads.Watch()
    with attnctl.patch(teller.model, watch):
        teller.answers([(case.photo, case.question)], length=1)
    words = teller.words([case.question])
    teller.model.set_attn_implementation("eager")
    pixels = teller.pixels([case.photo])[case.photo][None]
    with torch.no_grad():
        maps = teller.model(**words, pixel_values=pixels, output_attentions=True).attentions
    image = words["input_ids"][0] == teller.model.config.image_token_id
    for layer, (found,) in watch.found.items():
        assert torch.allclose(found[0], maps[layer][0, :, -1, image].sum(-1), atol=1e-5)
    assert len(watch.found) == len(maps) == 8


def test_table_of_second_looks() -> None:
    """Else put in what `python -P docs/measure_carve.py --page FILE` prints."""
    script = types.SimpleNamespace(**runpy.run_path(str(DOCS / "measure_carve.py")))
    data = json.loads((DOCS / "measured/vlm/carve.json").read_text(encoding="utf-8"))
    assert (data["images"], data["seed"]) == (340, 103)
    assert script.page(data["rows"]) in (DOCS / "carve.md").read_text(encoding="utf-8")
