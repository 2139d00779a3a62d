"""PNG metadata, writing that is safe, and sheets."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from attnctl.apps import pictures
from attnctl.apps.pictures import (
    PictureError,
    check_output,
    free_name,
    parameters_text,
    read_metadata,
    side_by_side,
    write_png,
)

METADATA: dict[str, Any] = {
    "prompt": "ein roter Kreis, красный круг, 红色 🙂\nsecond line",
    "negative_prompt": "blue",
    "model": "tiny-sd3",
    "scheduler": "FlowMatchEulerDiscreteScheduler",
    "controls": [{"name": "softpag", "text": "softpag:u=0.25,heads=L1H2,L3"}],
    "seed": 3,
    "steps": 20,
    "guidance_scale": 3.0,
    "width": 64,
    "height": 48,
    "versions": {"attnctl": "0.1.0"},
}


def picture(width: int = 64, height: int = 64, colour: str = "red") -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def test_metadata_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    write_png(picture(), path, METADATA)
    assert read_metadata(path) == METADATA
    with Image.open(path) as image:
        assert image.size == (64, 64)
        assert image.text["parameters"] == parameters_text(METADATA)


def test_parameters_are_what_web_uis_read() -> None:
    lines = parameters_text(METADATA).split("\n")
    assert lines[:3] == [*METADATA["prompt"].split("\n"), "Negative prompt: blue"]
    assert lines[3] == (
        "Steps: 20, Sampler: FlowMatchEulerDiscrete, CFG scale: 3.0, Seed: 3, Size: 64x48, "
        'Model: tiny-sd3, Controls: "softpag:u=0.25,heads=L1H2,L3", Version: attnctl 0.1.0'
    )


def test_stock_pictures_have_no_controls_in_their_parameters() -> None:
    text = parameters_text({**METADATA, "controls": [], "guidance_scale": None})
    assert "Controls" not in text
    assert "CFG" not in text


@pytest.mark.parametrize(
    ("content", "part"),
    [(None, "No such file"), (b"not a picture", "no picture"), (b"\x89PNG\r\n\x1a\n", "picture")],
)
def test_reading_what_is_no_picture(tmp_path: Path, content: bytes | None, part: str) -> None:
    path = tmp_path / "a.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PictureError, match=part):
        read_metadata(path)


def test_reading_another_programs_picture(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    with pytest.raises(PictureError, match="no metadata of attnctl"):
        read_metadata(tmp_path / "a.png")


def test_cut_off_pictures_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    write_png(Image.effect_noise((64, 64), 50), path, METADATA)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(PictureError, match="cannot read"):
        read_metadata(path)


def test_outputs_are_checked(tmp_path: Path) -> None:
    assert check_output(tmp_path / "a.PNG") == tmp_path / "a.PNG"
    (tmp_path / "folder.png").mkdir()
    for path, part in (
        (tmp_path / "a.jpg", "must end in .png"),
        (tmp_path, "must end in .png"),
        (tmp_path / "folder.png", "is a folder"),
        (tmp_path / "none" / "a.png", "does not exist"),
        (Path("/proc/a.png"), "cannot write into the folder /proc"),
    ):
        with pytest.raises(PictureError, match=part):
            check_output(path)
    assert [p.name for p in tmp_path.iterdir()] == ["folder.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_protected_outputs_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"precious")
    path.chmod(0o400)
    with pytest.raises(PictureError, match="write-protected"):
        check_output(path)
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PictureError, match="cannot write into"):
            check_output(tmp_path / "b.png")
    finally:
        tmp_path.chmod(0o700)


def test_a_failed_write_leaves_the_old_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    write_png(picture(), path, METADATA)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pictures.os, "replace", full)
    with pytest.raises(PictureError, match="No space left"):
        write_png(picture(colour="blue"), path, METADATA)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_links_are_followed_and_the_usual_permissions_kept(tmp_path: Path) -> None:
    target, link = tmp_path / "real.png", tmp_path / "link.png"
    target.write_bytes(b"old")
    link.symlink_to(target)
    write_png(picture(), link, METADATA)
    assert link.is_symlink()
    assert read_metadata(target) == METADATA
    plain = tmp_path / "plain"
    plain.touch()
    assert target.stat().st_mode == plain.stat().st_mode


def test_free_names_never_hit_a_file(tmp_path: Path) -> None:
    assert free_name(tmp_path).name == "attnctl-001.png"
    (tmp_path / "attnctl-001.png").touch()
    assert free_name(tmp_path).name == "attnctl-002.png"


@pytest.mark.parametrize("size", [(64, 64), (64, 128), (100, 40), (512, 512), (1, 1)])
def test_sheets_enlarge_by_whole_factors(size: tuple[int, int]) -> None:
    left, right = picture(*size, "red"), picture(*size, "blue")
    sheet = side_by_side([left, right], ["stock", "softpag u=0.5"], "a prompt", "tiny, seed 0")
    reds, blues = (
        sum(n for n, c in sheet.getcolors(1 << 24) if c == colour)
        for colour in ((255, 0, 0), (0, 0, 255))
    )
    factor = max(1, -(-320 // min(size)))
    assert reds == blues == size[0] * size[1] * factor**2
    assert min(size) * factor >= 256


def test_sheets_do_not_smooth() -> None:
    left = Image.effect_noise((64, 64), 80).convert("RGB")
    sheet = side_by_side([left, left], ["a", "b"], "")
    inner = {c for _, c in left.getcolors(1 << 24)}
    assert inner <= {c for _, c in sheet.getcolors(1 << 24)}


def test_captions_of_any_length_and_script_fit() -> None:
    long = "softpag heads=" + ",".join(f"L{i}H{j}" for i in range(9) for j in range(9))
    for text in (long, "x" * 500, "ein rötlicher Kreis 红色", "", "word " * 200):
        sheet = side_by_side([picture()] * 2, ["stock", text], text, text)
        edge = [sheet.getpixel((sheet.width - 3, y)) for y in range(sheet.height)]
        assert set(edge) == {(255, 255, 255)}
        assert sheet.width < 720 and sheet.height < 560
