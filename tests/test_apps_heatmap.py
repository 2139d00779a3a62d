"""The command `attnctl heatmap`."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from attnctl.apps import cli
from attnctl.apps.heatmap import split_words
from attnctl.apps.pictures import read_metadata
from attnctl.apps.videos import read_frames, read_video_metadata

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


MOVING = ["heatmap", "a red circle moving left", "--words", "circle, left", "--model", "tiny-wan"]


def test_a_video_is_a_row_of_frames_per_word(tmp_path: Path) -> None:
    out = tmp_path / "maps.png"
    assert cli.run([*MOVING, "--steps", "1", "--frames", "5", "--out", str(out)]) == 0
    with Image.open(out) as sheet:  # three frames of the maps, the video and two words
        assert 3 * 128 < sheet.width < 4 * 128 + 80 and sheet.height > 3 * 128
        picture = sheet.convert("RGB")
    white = [all(p == (255, 255, 255) for p in row(picture, y)) for y in range(picture.height)]
    bands = [y for y in range(1, len(white)) if white[y - 1] and not white[y]]
    assert len([y for y in bands if not any(white[y : y + 120])]) == 3
    assert read_metadata(out)["words"] == ["circle", "left"]


def row(picture: Image.Image, y: int) -> list[tuple[int, ...]]:
    return [picture.getpixel((x, y)) for x in range(0, picture.width, 7)]  # type: ignore[misc]


def test_a_video_as_a_video(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("av")
    out = tmp_path / "maps.mp4"
    assert cli.run([*MOVING, "--steps", "1", "--frames", "5", "--out", str(out)]) == 0
    frames = read_frames(out)
    assert len(frames) == 5 and frames[0].shape[1] > 3 * 240
    assert not any(n % 2 for n in frames[0].shape[:2])  # browsers play no others
    assert read_video_metadata(out)["words"] == ["circle", "left"]
    assert cli.run(["heatmap", PROMPT, "--steps", "1", "--out", str(out)]) == cli.BAD_INPUT
    assert "must end in .png" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([PROMPT, "--words", "ring"], "'ring' is not in the prompt"),
        (["a ring and a ring", "--words", "ring"], "ring#1"),
        (["and", "--out", "x.png"], "no concept was found"),
        ([PROMPT, "--heads", "L99"], "matches nothing"),
        ([PROMPT, "--out", "x.jpg"], "must end in .png"),
        ([PROMPT, "--model", "no-such-model"], "no-such-model"),
        ([PROMPT, "--frames", "5"], "takes no num frames"),
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
