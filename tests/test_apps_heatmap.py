"""The command `attnctl heatmap`."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from attnctl.apps import cli
from attnctl.apps.heatmap import split_words
from attnctl.apps.pictures import read_metadata

PROMPT = "a red circle and a blue square"


def test_a_sheet_of_the_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "maps.png"
    words = ["--words", "red circle, square", "--words", "blue", "--control", "pladis:lam=1.5"]
    assert cli.run(["heatmap", PROMPT, *words, "--steps", "2", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "14 attention calls at 7 sites" in " ".join(said.split())
    assert f"wrote {out} (red circle, square, blue)" in said
    with Image.open(out) as sheet:
        assert sheet.width > 4 * 320 and sheet.height > 320
    data = read_metadata(out)
    assert data["words"] == ["red circle", "square", "blue"] and data["steps"] == 2
    assert [c["text"] for c in data["controls"]] == ["pladis:lam=1.5"]


def test_concepts_by_default_and_joint_attention(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "maps.png"
    more = ["--model", "tiny-sd3", "--steps", "1", "--heads", "L2", "--out", str(out)]
    assert cli.run(["heatmap", PROMPT, *more]) == 0
    assert read_metadata(out)["words"] == ["red circle", "blue square"]
    assert "8 heads of 1 site" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([PROMPT, "--words", "ring"], "'ring' is not in the prompt"),
        (["a ring and a ring", "--words", "ring"], "ring#1"),
        (["and", "--out", "x.png"], "no concept was found"),
        ([PROMPT, "--heads", "L99"], "matches nothing"),
        ([PROMPT, "--out", "x.jpg"], "must end in .png"),
        ([PROMPT, "--model", "no-such-model"], "no-such-model"),
    ],
)
def test_bad_input_is_told_in_one_line(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run(["heatmap", *arguments, "--steps", "1"]) == cli.BAD_INPUT
    error = capsys.readouterr().err
    assert message in error and "attnctl: error:" in error
    assert not list(tmp_path.iterdir())


def test_words_are_split_at_commas() -> None:
    assert split_words(["a b, c#2,", " d "]) == ["a b", "c#2", "d"]
