"""Videos: MP4 with the metadata inside and beside it, through a batch and drawn again."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from attnctl import assets
from attnctl.apps import cli, videos
from attnctl.apps.generate import generate, makes_videos
from attnctl.apps.models import load
from attnctl.apps.pictures import PictureError
from attnctl.apps.videos import mp4_bytes, read_frames, read_video_metadata, sidecar
from attnctl.errors import HostError, MissingExtra

pytest.importorskip("av")


def clip(width: int, height: int, count: int = 5) -> list[Image.Image]:
    """Frames that brighten."""
    return [Image.new("RGB", (width, height), (40 * i, 20, 60)) for i in range(count)]


@pytest.mark.parametrize("size", [(48, 32), (33, 31)])
def test_frames_and_metadata_come_back(size: tuple[int, int], tmp_path: Path) -> None:
    data = {"prompt": "ein roter Kreis, 红色 🙂\n", "seed": 3}
    file = mp4_bytes(clip(*size), 8, data)
    assert file == mp4_bytes(clip(*size), 8, data)
    frames = read_frames(io.BytesIO(file))
    assert [frame.shape for frame in frames] == [(size[1], size[0], 3)] * 5
    for i, frame in enumerate(frames):
        assert abs(frame[..., 0].mean() - 40 * i) < 6
    path = tmp_path / "a.mp4"
    path.write_bytes(file)
    assert read_video_metadata(path) == data
    sidecar(path).write_text(json.dumps({"beside": 1}))
    assert read_video_metadata(path) == {"beside": 1}


def test_what_is_no_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.mp4"
    for text in (None, "no video"):
        if text:
            path.write_text(text)
        with pytest.raises(PictureError):
            read_video_metadata(path)
        with pytest.raises(PictureError, match="is no video"):
            read_frames(path)
    path.write_bytes(mp4_bytes(clip(16, 16), 8, {}))
    sidecar(path).write_text("[]")
    with pytest.raises(PictureError, match="no metadata"):
        read_video_metadata(path)
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(MissingExtra, match=r"attnctl\[video\]"):
        videos.need_video()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Wan pipeline with random weights, as a folder."""
    from diffusers import WanPipeline
    from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

    from attnctl.testing import zoo

    torch.manual_seed(0)
    tiny = zoo.FAMILIES["wan"].build()
    tokenizer = AutoTokenizer.from_pretrained(assets.path("tiny-sd3") / "tokenizer_3")
    config = UMT5Config(
        vocab_size=len(tokenizer) + 8, d_model=20, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    encoder = UMT5EncoderModel(config)
    pipe = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=tiny.vae,
        transformer=tiny.transformer,
        scheduler=tiny.scheduler,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-random-wan"
    pipe.save_pretrained(folder)
    return folder


def test_a_batch_of_videos(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    jobs = [
        {"prompt": "a red circle", "seed": "0-1", "control": "softpag:u=0.5,scale=2"},
        {"prompt": "a ring", "frames": 9, "fps": 8},
    ]
    Path("jobs.jsonl").write_text("\n".join(map(json.dumps, jobs)))
    size = ["--frames", "5", "--height", "32", "--width", "48", "--steps", "1"]
    words = ["batch", "jobs.jsonl", "--out", "out", "--model", str(model), "--batch", "2", *size]
    assert cli.run(words) == 0
    files = sorted(Path("out").glob("*.mp4"))
    assert [path.name[:15] for path in files] == ["a-red-circle-s0", "a-red-circle-s1",
                                                  "a-ring-s0-" + files[2].name[10:15]]  # fmt: skip
    assert [len(read_frames(path)) for path in files] == [5, 5, 9]
    first, second = (np.stack(read_frames(path)) for path in files[:2])
    assert (first != second).any()
    data = json.loads(sidecar(files[2]).read_text())
    assert (data["frames"], data["fps"], data["prompt"]) == (9, 8, "a ring")
    assert "<video" in Path("out/report.html").read_text()
    capsys.readouterr()
    assert cli.run(["show", str(files[1]), "--replay", "--out", "again.mp4"]) == 0
    assert capsys.readouterr().out == "drawn again: the same, bit for bit\n"
    assert Path("again.mp4").read_bytes() == files[1].read_bytes()
    assert cli.run(["show", str(sidecar(files[2]))]) == 0
    assert '"fps": 8' in capsys.readouterr().out
    assert cli.run(words) == 0
    assert "(3 were there before)" in capsys.readouterr().out


def test_generate_sends_video_models_to_the_batch(model: Path) -> None:
    pipe = load(str(model), device="cpu")
    assert makes_videos(pipe)
    with pytest.raises(HostError, match=r"WanPipeline makes videos; .*attnctl batch"):
        generate("x", model=pipe)
