"""`attnctl search-heads` and `attnctl show-heads`, as a person uses them."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from attnctl.apps.cli import run
from attnctl.processors.headhunter import HeadSet

QUICK = ("--steps", "3", "--rounds", "1", "--top-k", "2", "--pool", "L6", "--batch", "8")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("a purple square and a cyan square\n\na red circle\n")
    return file


def test_a_search_writes_heads_that_can_be_drawn(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "red.json"
    words = ("search-heads", "--objective", "redness", "--prompts", str(prompts), *QUICK)
    more = ("--strategy", "halving", "--budget", "0.9", "--out", str(out))
    assert run([*words, *more]) == 0
    told = capsys.readouterr().out
    assert "8 heads, 2 pictures" in told and len(told.splitlines()[0]) <= 80
    found = HeadSet.load(out)
    assert len(found.heads) == 2 and found.model == "tiny-sd3" and found.seeds == (0, 1)
    journal = tmp_path / "red.journal.jsonl"
    before = journal.read_bytes()
    assert run([*words, *more]) == 0 and journal.read_bytes() == before  # all of it was known
    assert HeadSet.load(out) == found and found.forwards > 0
    pictures = tmp_path / "pictures"
    assert run(["show-heads", str(out), "--out", str(pictures), "--no-grid"]) == 0
    assert Image.open(pictures / "sweep.png").width > 5 * 320
    assert Image.open(pictures / "rounds.png").size == (560, 320)
    capsys.readouterr()
    assert run(["show-heads", str(out), "--out", str(pictures), "--no-grid"]) == 2
    assert "exists; give another folder" in capsys.readouterr().err


def test_a_dry_run_only_counts(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    words = ["search-heads", "--objective", "edges", "--prompts", str(prompts), "--dry-run"]
    assert run([*words, "--images", "5", "--rounds", "2", "--steps", "4"]) == 0
    told = capsys.readouterr().out
    # (64 + 61) heads x 5 pictures x 4 steps x 2 passes
    assert "5,000 forwards (100.0 %" in told and "forwards/s" in told
    assert not list(tmp_path.glob("heads*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--objective", "rednes"), "Did you mean 'redness'"),
        (("--perturbation", "nag"), "nag"),
        (("--out", "heads.csv"), "must end in .json or .txt"),
        (("--out", "nowhere/heads.json"), "does not exist"),
        (("--u", "0"), "perturbs nothing"),
        (("--pool", "L9"), "layers 0 to 7"),
        (("--images", "0"), "expected 1 or more"),
    ],
)
def test_wrong_words_are_told_in_one_line(
    words: tuple[str, ...], message: str, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["search-heads", "--objective", "redness", "--prompts", str(prompts)]
    assert run([*base, *words]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert message in told[-1] and told[-1].startswith("attnctl: error:")


def test_a_style_stands_in_front_of_every_prompt(prompts: Path) -> None:
    from attnctl.apps.search_heads import Order

    order = Order("tiny-sd3", "redness", prompts, style="an oil painting", images=3, seed=7)
    assert order.pictures()[1] == [7, 8, 9] and order.pictures()[0][2] == order.pictures()[0][0]
    assert order.hunter.style == "an oil painting"
