"""The effect bench command: what it prints and writes, its placebos, its cache, its refusals."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

import attnctl
from attnctl.apps import cli
from attnctl.apps.bench import cache as cache_module
from attnctl.apps.bench.cache import Cache
from attnctl.apps.bench.compare import compare, sentences
from attnctl.apps.bench.montage import montage
from attnctl.apps.bench.placebo import KINDS, placebos
from attnctl.apps.bench.placebo import placebo as placebo_kind
from attnctl.apps.bench.statistics import mcnemar
from attnctl.apps.bench.tasks import Figure, Request, Shown, find_task, open_task
from attnctl.apps.bench.tasks.answers import Answers, one_per_photo
from attnctl.apps.bench.tasks.clips import Clips
from attnctl.apps.bench.tasks.pictures import diversity, pixels
from attnctl.apps.bench.trials import Outcome, Trial, parts
from attnctl.apps.pictures import read_metadata
from attnctl.assets import path
from attnctl.assets.world.moving import sample_moving
from attnctl.assets.world.palette import PAIRS
from attnctl.assets.world.pope import pope

QUICK = ("--n", "4", "--steps", "2")
SOME = "softpag:heads=L2-3,scale=1,u=0.25"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("ATTNCTL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def effect(*words: str) -> int:
    return cli.run(["bench", "effect", *words])


# -- the command -------------------------------------------------------------------------------


def test_it_prints_a_report_and_writes_a_record_and_a_picture(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert effect("--control", SOME, "--against", "pag", *QUICK) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert "pag = pag:scale=1.5 (preset any-model, ours" in text
    name = "effect-softpag-tiny-sd3-001"
    assert sorted(p.name for p in place.iterdir()) == [f"{name}.json", f"{name}.png"]

    data = json.loads((place / f"{name}.json").read_text(encoding="utf-8"))
    arms = {arm["name"]: arm for arm in data["arms"]}
    assert list(arms) == [
        "stock", "softpag", "pag", "placebo: neighbour", "placebo: other heads",
    ]  # fmt: skip
    assert [arm["role"] for arm in arms.values()] == [
        "stock", "control", "against", "placebo", "placebo",
    ]  # fmt: skip
    assert data["metric"] == "exact" and data["settings"]["steps"] == 2
    assert data["settings"]["options"]["max_sequence_length"] == 16
    assert {"torch", "diffusers", "attnctl"} <= set(data["versions"])
    for arm in arms.values():
        assert arm["seconds"] > 0
        for key, cases in arm["cases"].items():
            shown = arm["figures"][key]
            assert len(cases) == 4 and shown["value"] == pytest.approx(np.mean(cases), abs=1e-5)
            assert shown["low"] <= shown["value"] <= shown["high"]
    gain = next(p for p in data["pairs"] if (p["arm"], p["base"]) == ("softpag", "stock"))
    differences = np.subtract(arms["softpag"]["cases"]["log_prob"],
                              arms["stock"]["cases"]["log_prob"])  # fmt: skip
    assert gain["gains"]["log_prob"]["value"] == pytest.approx(differences.mean(), abs=1e-5)
    assert {(p["arm"], p["base"]) for p in data["pairs"] if p["arm"] == "softpag"} == {
        ("softpag", base) for base in arms if base != "softpag"
    }
    shown = read_metadata(place / f"{name}.png")
    assert shown["control"] == data["control"] == SOME and shown["said"] == data["said"]


def test_the_same_command_gives_the_same_numbers_from_the_cache_too(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--control", SOME, *QUICK, "--no-placebo")
    for out, more in (("a", ()), ("b", ()), ("c", ("--no-cache",))):
        assert effect(*words, "--out", out, *more) == 0
    assert "stock = no control, from the cache" in capsys.readouterr().out
    a, b, c = (json.loads((place / f"{name}.json").read_text())["arms"] for name in "abc")
    assert [arm[0]["cached"] for arm in (a, b, c)] == [False, True, False]
    assert [arm["cases"] for arm in a] == [arm["cases"] for arm in b]
    assert [arm["cases"] for arm in a] == [arm["cases"] for arm in c]
    assert [arm["name"] for arm in a] == ["stock", "softpag"]


def test_other_weights_or_settings_are_not_taken_from_the_cache(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (place.parent / "other").mkdir()
    folder = place.parent / "other/tiny-sd3"
    shutil.copytree(path("tiny-sd3"), folder)
    monkeypatch.setenv("ATTNCTL_ASSETS", str(folder.parent))
    assert effect(*QUICK, "--out", "a") == 0
    weights = folder / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["decoder.conv_out.bias"] += 0.2
    save_file(tensors, weights, metadata={"format": "pt"})
    assert effect(*QUICK, "--out", "b") == 0
    assert effect(*QUICK, "--out", "c", "--seed", "1") == 0
    assert effect(*QUICK, "--out", "d") == 0
    made = [json.loads((place / f"{name}.json").read_text()) for name in "abcd"]
    assert [one["arms"][0]["cached"] for one in made] == [False, False, False, True]
    assert made[0]["model_files"] != made[1]["model_files"]
    first, second = (one["arms"][0]["cases"]["saturation"] for one in made[:2])
    assert first != second and made[1]["arms"][0]["cases"] == made[3]["arms"][0]["cases"]
    assert not list(place.glob("*.png"))  # stock alone has no pairs to show


def test_files_are_not_replaced_unasked(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "mine.png").write_bytes(b"precious")
    assert effect("--control", SOME, *QUICK, "--out", "mine") == 2
    assert "mine.png would be replaced" in capsys.readouterr().err
    assert (place / "mine.png").read_bytes() == b"precious"
    (place / "effect-stock-tiny-sd3-001.png").touch()
    assert effect(*QUICK) == 0
    assert (place / "effect-stock-tiny-sd3-002.json").is_file()
    assert effect(*QUICK, "--out", "effect-stock-tiny-sd3-002.json", "--overwrite") == 0


REFUSED = [
    (("--n", "0"), "at least 2 pairs"),
    (("--n", "1"), "at least 2 pairs"),
    (("--n", "5", "--repeats", "2"), "--repeats 2 must divide --n 5"),
    (("--batch", "1"), "--batch 1 must be at least 2"),
    (("--steps", "0"), "--steps 0 must be at least 1"),
    (("--objects", "1"), "--prompts trained"),
    (("--objects", "4"), "name 2 to 3 objects"),
    (("--prompts", "new"), "heldout, trained"),
    (("--model", "tiny-sd4"), "there is no model 'tiny-sd4'. Did you mean 'tiny-sd'"),
    (("--model", "org/name"), "the model 'org/name' has no task"),
    (("--control", "softpaq"), "Did you mean 'softpag'?"),
    (("--against", "pag"), "--against needs a --control"),
    (("--control", "softpag:heads=L99", *QUICK), "matches nothing"),
    (("--out", "nowhere/effect"), "does not exist"),
]


@pytest.mark.parametrize(("words", "said"), REFUSED, ids=[" ".join(w) for w, _ in REFUSED])
def test_what_cannot_be_done_is_told_in_one_line(
    words: tuple[str, ...], said: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert effect(*words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not list(place.iterdir())


def test_models_of_another_world_have_no_task(tmp_path: Path) -> None:
    folder = tmp_path / "sd"
    (folder / "tokenizer").mkdir(parents=True)
    index = folder / "model_index.json"
    index.write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(attnctl.AttnctlError, match="is a FluxPipeline, for which there is no"):
        find_task(str(folder))
    index.write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    words = {f"w{i}": i for i in range(49408)}
    (folder / "tokenizer/vocab.json").write_text(json.dumps(words))
    with pytest.raises(attnctl.AttnctlError, match="was not trained on the shape world"):
        find_task(str(folder))


def test_bench_alone_and_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench"]) == 0 and "effect" in capsys.readouterr().out
    assert cli.run(["bench", "effect", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--against" in text and max(map(len, text.splitlines())) <= 80


# -- statistics --------------------------------------------------------------------------------


def test_mcnemar_by_hand() -> None:
    # 9 wins, 2 losses: 2 (1 + 11 + 55) / 2^11
    assert mcnemar(9, 2) == mcnemar(2, 9) == pytest.approx(134 / 2048)
    assert mcnemar(5, 0) == pytest.approx(2 / 32)
    assert mcnemar(0, 0) == mcnemar(3, 3) == 1.0
    assert 0 < mcnemar(300, 100) < 1e-20


def test_repeats_of_a_prompt_are_not_counted_as_prompts() -> None:
    source = np.random.default_rng(0)
    by_prompt = source.normal(size=20)
    stock = outcome("stock", by_prompt > 0)
    alike = outcome("stock", np.tile(by_prompt > 0, 4))
    zeros = outcome("x", np.zeros(20)), outcome("x", np.zeros(80))
    one = compare(stock, zeros[0], "hit").gains["hit"]
    four = compare(alike, zeros[1], "hit", repeats=4).gains["hit"]
    naive = compare(alike, zeros[1], "hit").gains["hit"]
    assert (four.value, four.low, four.high) == (one.value, one.low, one.high)
    assert naive.high - naive.low < 0.7 * (four.high - four.low)


def test_diversity_is_the_distance_to_the_others_of_the_prompt() -> None:
    pictures = np.zeros((4, 3, 2, 2), np.uint8)
    pictures[2] = 255  # the second picture of the first prompt
    assert diversity(pictures, 2).tolist() == [1.0, 0.0, 1.0, 0.0]


def test_no_batch_is_of_one_case() -> None:
    for n in range(2, 40):
        for batch in range(2, 12):
            found = parts(n, batch)
            assert [i for a, b in found for i in range(a, b)] == list(range(n))
            assert min(b - a for a, b in found) >= 2
            assert max(b - a for a, b in found) <= batch + 1


# -- what is said ------------------------------------------------------------------------------


class Cards:
    """A task of no model, for wording and pictures."""

    name, unit, batch = "cards", "red cards", 2
    figures = (Figure("hit", "hit", "%", 100.0, 1),)
    settings: ClassVar[dict[str, Any]] = {}

    def __init__(self, n: int) -> None:
        self.prompts = [f"card {i}" for i in range(n)]

    def show(self, case: int, output: np.ndarray) -> Shown:
        return Shown(Image.new("RGB", (8, 8)), "yes")


def outcome(name: str, hits: Any, role: str = "stock") -> Outcome:
    values = np.asarray(hits, float)
    return Outcome(Trial(name, role), values, {"hit": values}, 1.0)  # type: ignore[arg-type]


def said(stock: Any, control: Any, placebo: Any) -> list[str]:
    arms = [
        outcome("stock", stock),
        outcome("push", control, "control"),
        outcome("placebo: x", placebo, "placebo"),
    ]
    pairs = [compare(one, arms[0], "hit") for one in arms[1:]]
    pairs.append(compare(arms[1], arms[2], "hit"))
    return sentences(Cards(len(stock)), arms, pairs)  # type: ignore[arg-type]


def test_words_say_no_more_than_the_intervals() -> None:
    low, high = np.arange(40) < 10, np.arange(40) < 30
    better, against_placebo = said(low, high, low)
    assert better.startswith("push gives more red cards than stock: +50.0 [")
    assert against_placebo.startswith("push does better than the placebo (x): +50.0 [")
    _, as_good = said(low, high, high)
    assert "as well, as far as is shown" in as_good
    assert "need not come from where the control points" in as_good
    worse, above = said(high, low, high)
    assert worse.startswith("push gives fewer") and "placebo (x) does better" in above
    unclear, _ = said(low, np.arange(40) < 11, low)
    assert "no effect on red cards is shown" in unclear and "contains 0" in unclear
    alike, _ = said(low, low, low)
    assert "no case out of 40 came out otherwise" in alike


@pytest.mark.parametrize("hits", [(8, 2), (0, 0), (40, 0)])
def test_the_montage_shows_wins_and_losses_of_any_number(hits: tuple[int, int]) -> None:
    wins, losses = hits
    stock = outcome("stock", np.arange(40) < losses)
    arm = outcome("push", np.arange(40) >= 40 - wins, "control")
    pair = compare(arm, stock, "hit")
    sheet = montage(Cards(40), arm, stock, pair, "title " * 30, "words " * 60)  # type: ignore[arg-type]
    colours = {c for _, c in sheet.getcolors(1 << 24) or ()}
    assert ({(0, 110, 60), (180, 40, 20)} <= colours) == (wins + losses > 0)
    assert sheet.width < 1000 and sheet.height < 2000


# -- placebos ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sites() -> Any:
    return attnctl.sites(DiffusionPipeline.from_pretrained(path("tiny-sd3")))


def heads_of(control: attnctl.Control, sites: Any) -> set[tuple[int, int]]:
    chosen = sites.select(control.selector, control.kinds)
    return {(i, h) for i, mask in chosen.items() for h in mask.nonzero().flatten().tolist()}


@pytest.mark.parametrize(
    "control",
    [attnctl.SoftPAG(heads="L1H0-2,L4", scale=2.0, u=0.5), attnctl.SEG(heads=[(3, 1)])],
    ids=str,
)
def test_random_heads_are_as_many_others(control: attnctl.Control, sites: Any) -> None:
    made = placebos(control, sites, seed=0)
    assert list(made) == ["neighbour", "other heads"]
    mine, others = heads_of(control, sites), heads_of(made["other heads"], sites)
    assert len(mine) == len(others) and not mine & others
    assert type(made["other heads"]) is type(control)
    assert {**vars(made["other heads"]), "heads": 0} == {**vars(control), "heads": 0}
    again, another = (placebos(control, sites, seed=s)["other heads"] for s in (0, 1))
    assert heads_of(again, sites) == others != heads_of(another, sites)
    assert made["neighbour"].name == f"{control.name}-shuffled"


def test_what_has_no_placebo_says_so(sites: Any) -> None:
    notes: list[str] = []
    assert list(placebos(attnctl.SoftPAG(), sites, 0, notes.append)) == ["neighbour"]
    assert not notes  # all heads: there are no others, which is no failure
    assert list(placebos(attnctl.SoftPAG(heads="!L0"), sites, 0, notes.append)) == ["neighbour"]
    assert "takes 56 of 64 heads, which leaves 8" in notes.pop()
    assert placebos(attnctl.NAG(negative="red"), sites, 0, notes.append) == {}
    assert "there is no placebo of nag" in notes.pop()


def test_further_kinds_plug_in(sites: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnctl.apps.bench.placebo.KINDS", KINDS)
    monkeypatch.setitem(KINDS, "half", KINDS["neighbour"])

    @placebo_kind("half")
    def half(control: attnctl.Control, sites: Any, seed: int) -> attnctl.Control | None:
        return attnctl.NAG(scale=2.0) if isinstance(control, attnctl.NAG) else None

    assert list(placebos(attnctl.NAG(), sites, 0)) == ["half"]


# -- the cache ---------------------------------------------------------------------------------


def test_the_cache_keeps_arrays_and_survives_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Cache({"a": 1})
    assert kept.load() is None
    for outputs in (np.arange(6, dtype=np.uint8).reshape(2, 3), np.array([["Yes", "a ring"]])):
        kept.save(outputs)
        found = kept.load()
        assert found is not None and found.dtype == outputs.dtype
        assert np.array_equal(found, outputs)
    assert Cache({"a": 2}).load() is None
    kept.path.write_bytes(b"PK damaged")
    assert kept.load() is None
    monkeypatch.setattr(cache_module, "KEPT", 2)
    for i in range(4):
        one = Cache({"b": i})
        one.save(np.zeros(1))
        os.utime(one.path, (1e9 + i, 1e9 + i))
    assert len(list(kept.path.parent.iterdir())) == 2


def test_a_cache_that_cannot_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ATTNCTL_CACHE", str(tmp_path / "file"))
    kept = Cache({"a": 1})
    kept.save(np.zeros(2))
    assert kept.load() is None


# -- the picture task --------------------------------------------------------------------------


def test_the_noise_of_a_case_is_its_own(tmp_path: Path) -> None:
    request = Request("tiny-sd3", path("tiny-sd3"), n=4, steps=2, repeats=2)
    task = open_task("pictures", request)
    assert task.prompts[:2] == task.prompts[2:]
    together, apart = task.run(0, 4), np.concatenate([task.run(0, 2), task.run(2, 4)])
    assert together.dtype == np.uint8 and together.shape == (4, 3, 64, 64)
    assert np.abs(together.astype(int) - apart).max() <= 3
    assert not np.array_equal(together[0], together[2])
    assert set(task.score(together)) == {figure.key for figure in task.figures}
    assert torch.is_grad_enabled()


# -- the other tasks, judged without a model ---------------------------------------------------


def pipe_without_model() -> Any:
    return SimpleNamespace(device=torch.device("cpu"), set_progress_bar_config=lambda **_: None)


def test_clips_are_judged_by_what_moves_and_how(tmp_path: Path) -> None:
    scenes = sample_moving(6, objects=1, seed=0)
    task = Clips(pipe_without_model(), scenes.captions(), Request("tiny-wan", tmp_path, n=6))
    right = pixels(scenes.draw())
    found = task.score(right)
    assert set(found) == {figure.key for figure in task.figures}
    assert found["right"].mean() > 0.8 and found["malformed"].max() < 0
    still = np.repeat(right[:, :1], right.shape[1], axis=1)
    assert (
        task.score(still)["flicker"].max() == 0 == task.score(still)["speed"][~_still(task)].max()
    )
    assert task.show(0, right[0]).image.size == (64, 3 * 64)
    assert "17 frames, 12 steps, guidance 1" in task.describe()


def _still(task: Clips) -> np.ndarray:
    return np.array(["standing still" in prompt for prompt in task.prompts])


def test_answers_are_read_as_pope_reads_them(tmp_path: Path) -> None:
    cases = one_per_photo(pope("adversarial", 6))
    assert [case.label for case in cases] == ["yes", "no"] * 3
    assert [case.photo.number for case in cases] == [1, 2, 3, 4, 5, 6]
    teller: Any = SimpleNamespace(device=torch.device("cpu"), model=None)
    task = Answers(teller, cases, "adversarial", Request("tiny-llava", tmp_path, n=6))
    there = cases[0].photo.items
    whole = f"There is a {there[0].name} and a {_absent(cases[0])}."
    texts = [["Yes", whole], *[["No.", ""]] * 3, ["yes, maybe", "x y"], ["Perhaps", ""]]
    found = task.score(np.array(texts))
    assert found["right"].tolist() == [1, 1, 0, 1, 1, 0]
    assert found["yes"].tolist() == [1, 0, 0, 0, 1, 1]
    assert found["unclear"].tolist() == [0, 0, 0, 0, 1, 1]
    assert found["invents"].tolist() == [1, 0, 0, 0, 0, 0] == found["invented"].tolist()
    assert found["found"][0] == 1 / len({item.name for item in there})
    assert found["words"].tolist() == [9, 0, 0, 0, 2, 0]
    assert task.show(0, np.array(texts[0])).text == "Yes"


def _absent(case: Any) -> str:
    there = {item.name for item in case.photo.items}
    return next(" ".join(pair) for pair in PAIRS if " ".join(pair) not in there)


@pytest.mark.parametrize(
    ("name", "refused"), [("tiny-wan", "matches nothing"), ("tiny-llava", "attnctl[: ]")]
)
def test_shipped_models_of_the_other_tasks(
    name: str, refused: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = ["--steps", "1"] if name == "tiny-wan" else []
    assert effect("--model", name, "--n", "2", *quick) == 0
    (record,) = (json.loads(file.read_text()) for file in place.glob("*.json"))
    assert record["arms"][0]["name"] == "stock" and len(record["prompts"]) == 2
    assert effect("--model", name, "--n", "2", "--control", "softpag:heads=L99", *quick) == 2
    assert re.search(refused, capsys.readouterr().err)
