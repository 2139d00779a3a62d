"""Results drawn again from their own record: the same, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from attnctl.apps import cli, replay
from attnctl.apps.fingerprint import fingerprint
from attnctl.apps.generate import Settings, generate
from attnctl.apps.models import load
from attnctl.apps.pictures import read_metadata, write_png
from attnctl.apps.replay import replay_file


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load("tiny-sd3", device="cpu")


@pytest.fixture(autouse=True)
def loaded(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "load", lambda *_: pipe)
    monkeypatch.setattr("attnctl.apps.batch.command.load", lambda *_: pipe)


def said(path: Path, out: Path | None = None) -> tuple[replay.Replay, list[str]]:
    notes: list[str] = []
    return replay_file(path, out, notes.append), notes


@pytest.mark.parametrize("batch", [1, 3])
def test_each_result_of_a_batch(
    batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = ["prompt,seed,negative_prompt", "a red circle,3-4,blue", "a ring,5,green"]
    Path("jobs.csv").write_text("\n".join(lines))
    words = ["--control", "softpag:heads=L0H1,L2,scale=2", "--steps", "2", "--batch", str(batch)]
    assert cli.run(["batch", "jobs.csv", "--out", "out", *words]) == 0
    files = [p for p in Path("out").glob("a-*.png")]
    assert len(files) == 3
    capsys.readouterr()
    for path in files:
        assert ("batch" in read_metadata(path)) == (batch > 1)
        assert cli.run(["show", str(path), "--replay", "--out", "again.png"]) == 0
        assert capsys.readouterr().out == "drawn again: the same, bit for bit\n"
        assert Path("again.png").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("control", [[], ["pag"], ["softpag", "nag:negative=blue"]])
def test_pictures_of_generate(control: list[str], tmp_path: Path, pipe: Any) -> None:
    compare = len(control) == 2
    settings = Settings(steps=1, seed=9, height=32)
    result = generate("a ring", *control, model=pipe, settings=settings, compare=compare)
    result.save(tmp_path / "a.png")
    found, notes = said(tmp_path / "a.png")
    assert found.equal and not notes


def test_a_default_control_is_not_taken_for_a_preset(tmp_path: Path, pipe: Any) -> None:
    import attnctl

    generate("x", attnctl.SoftPAG(), model=pipe, settings=Settings(steps=1)).save(
        tmp_path / "a.png"
    )
    assert read_metadata(tmp_path / "a.png")["controls"][0]["text"] == "softpag"
    assert said(tmp_path / "a.png")[0].equal


def test_a_change_is_seen_and_told(
    tmp_path: Path, pipe: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.png"
    result = generate("a ring", model=pipe, settings=Settings(steps=1))
    pixels = np.array(result.picture())
    pixels[3, 4, 1] ^= 1
    data = {**result.metadata, "model_files": "other"}
    data["versions"] = {**data["versions"], "torch": "1.0"}
    write_png(Image.fromarray(pixels), path, data)
    found, notes = said(path)
    assert (found.equal, found.largest) == (False, 1)
    assert notes == [
        f"other versions: torch 1.0, now {torch.__version__}",
        "the files of the model tiny-sd3 have changed",
    ]
    assert cli.run(["show", str(path), "--replay"]) == 1
    assert "not the same, by up to 1 of 255" in capsys.readouterr().out
    write_png(Image.fromarray(pixels[:8]), path, data)
    assert str(said(path)[0]) == "drawn again: not the same, sizes differ"


def test_it_computes_with_as_many_threads_as_then(
    tmp_path: Path, pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen = tmp_path / "a.png", []
    result = generate("a ring", model=pipe, settings=Settings(steps=1))
    write_png(result.picture(), path, {**result.metadata, "threads": 2})
    before, draw = torch.get_num_threads(), replay._draw

    def watched(*args: Any) -> Any:
        seen.append(torch.get_num_threads())
        return draw(*args)

    monkeypatch.setattr(replay, "_draw", watched)
    said(path)
    assert seen == [2]
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"words": ["ring"]}, "is a heat map"),
        ({"seed": None}, "lacks seed"),
        ({"controls": [{"name": "x", "text": "nope", "options": {}}]}, "cannot be made"),
        ({"controls": [{"name": "pag", "text": "pag", "options": {}}]}, "cannot be had back"),
        ({"steps": 10**9}, "steps 1000000000 is too much"),
    ],
)
def test_records_that_do_not_suffice(
    change: dict[str, Any], part: str, tmp_path: Path, pipe: Any, capsys: Any
) -> None:
    result = generate("a ring", model=pipe, settings=Settings(steps=1))
    data = {k: v for k, v in {**result.metadata, **change}.items() if (k, v) != ("seed", None)}
    info = PngImagePlugin.PngInfo()
    info.add_text("attnctl", json.dumps(data))
    result.picture().save(tmp_path / "a.png", pnginfo=info)
    assert cli.run(["show", str(tmp_path / "a.png"), "--replay"]) == 2
    assert part in capsys.readouterr().err


def test_the_fingerprint_sees_every_file_of_the_model(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "part").mkdir(parents=True)
    (folder / "part" / "config.json").write_text("{}")
    (folder / "part" / "weights").write_bytes(bytes(3 << 20))
    seen = {fingerprint(folder)}
    (folder / "README.md").write_text("new")
    assert fingerprint(folder) in seen
    for path, data in (
        ("model_index.json", b"{}"),
        ("part/config.json", b"[]"),
        ("part/weights", bytes(3 << 20)[:-1] + b"x"),
        ("part/weights", b"x" + bytes((3 << 20) - 1)),
        ("part/weights", bytes((3 << 20) + 1)),
        ("part/more", b""),
    ):
        (folder / path).write_bytes(data)
        assert fingerprint(folder) not in seen
        seen.add(fingerprint(folder))
