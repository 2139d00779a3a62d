"""Draw a result again from its own record, and say whether it is the same, bit for bit."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from attnctl.errors import AttnctlError, OptionError

from .chosen import Chosen
from .control_syntax import parse_control
from .files import write_whole
from .fingerprint import fingerprint
from .generate import Settings, batch_arguments, call_arguments, controlled, draw_rows, generate
from .models import find_folder, load
from .pictures import PictureError, png_bytes, read_metadata
from .quiet import hush
from .record import control_data, versions
from .videos import mp4_bytes, read_frames, read_video_metadata

__all__ = ["Replay", "read_record", "replay", "replay_file"]

Say = Callable[[str], None]
Frames = list[NDArray[np.uint8]]


@dataclass(frozen=True)
class Replay:
    """A result drawn again.

    Args:
        data: the new file.
        equal: whether every pixel of every frame is that of the old file.
        largest: the largest difference of a colour value, 0 to 255; None if sizes differ.
    """

    data: bytes
    equal: bool
    largest: int | None

    def __str__(self) -> str:
        if self.equal:
            return "drawn again: the same, bit for bit"
        size = "sizes differ" if self.largest is None else f"by up to {self.largest} of 255"
        return f"drawn again: not the same, {size}"


def read_record(path: Path) -> dict[str, Any]:
    """Return the record in a PNG, in an MP4 or beside it, or in the JSON file of an MP4.

    Raises:
        PictureError: if there is none.
    """
    if path.suffix.lower() == ".json":
        return read_video_metadata(path)
    return read_video_metadata(path) if path.suffix.lower() == ".mp4" else read_metadata(path)


def replay_file(path: Path, out: Path | None, say: Say) -> Replay:
    """Draw a file's picture or video again and compare.

    Args:
        path: a PNG or MP4 of attnctl.
        out: where to write the new one; None for nowhere.
        say: is told what differs from when it was made.

    Raises:
        AttnctlError: if the record does not suffice, or the model is not there.
    """
    data = read_record(path)
    _check(data)
    hush(say)
    for text in _changes(data):
        say(text)
    found = replay(data, _frames(path))
    if out is not None:
        try:
            write_whole(out, found.data)
        except OSError as error:
            raise PictureError(f"cannot write {out}: {error.strerror or error}") from error
    return found


def replay(data: Mapping[str, Any], old: Frames) -> Replay:
    """Draw what a record describes, and compare with the frames that it came with.

    Args:
        data: the record.
        old: uint8 [height, width, 3] each.

    Raises:
        AttnctlError: if the record does not suffice.
    """
    pipe = load(str(data["model"]), str(data["device"]), str(data["dtype"]))
    pipe.set_progress_bar_config(disable=True)
    with _threads(data):
        drawn = _draw(pipe, data)
    if "fps" in data:
        file = mp4_bytes(drawn, int(data["fps"]), data)
        new = read_frames(io.BytesIO(file))
    else:
        file = png_bytes(drawn[0], data)
        new = [np.asarray(drawn[0].convert("RGB"))]
    return Replay(file, *_compared(old, new))


def _draw(pipe: Any, data: Mapping[str, Any]) -> list[Image.Image]:
    settings, chosen = _settings(data), [_control(one) for one in data["controls"]]
    if "batch" not in data and "fps" not in data:
        compare = len(data["pictures"]) == 2
        made = generate(data["prompt"], *chosen, model=pipe, settings=settings, compare=compare)
        return [made.picture()]
    batch = data.get("batch", {"row": 0, "rows": [data]})
    rows = batch["rows"]
    arguments = call_arguments(pipe, data["prompt"], settings)
    seeds = [int(row["seed"]) for row in rows]
    with controlled(pipe, chosen):
        drawn = draw_rows(pipe, batch_arguments(arguments, rows), seeds, "again")
    row = drawn[int(batch["row"])]
    return [row] if isinstance(row, Image.Image) else list(row)


def _check(data: Mapping[str, Any]) -> None:
    needed = ("model", "device", "dtype", "prompt", "seed", "controls", "pictures", "versions")
    missing = [key for key in needed if key not in data]
    if missing or "words" in data:
        what = "is a heat map" if "words" in data else f"lacks {', '.join(missing)}"
        raise OptionError(
            f"the record {what}; only what `generate` and `batch` drew can be drawn again"
        )


def _changes(data: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is not as it was when the result was made."""
    now = versions()
    old = {k: v for k, v in data["versions"].items() if now.get(k) != v}
    if old:
        text = ", ".join(f"{name} {was}, now {now.get(name)}" for name, was in old.items())
        yield f"other versions: {text}"
    known = data.get("model_files")
    if known is not None and known != fingerprint(find_folder(str(data["model"]))):
        yield f"the files of the model {data['model']} have changed"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    if data["device"] == "cuda" and data.get("gpu") != gpu:
        yield f"made on {data.get('gpu')}, now {gpu}"


def _settings(data: Mapping[str, Any]) -> Settings:
    keys = ("negative_prompt", "seed", "steps", "guidance_scale", "height", "width", "frames")
    values: dict[str, Any] = {key: data.get(key) for key in keys}
    return Settings(**values)


def _control(recorded: Mapping[str, Any]) -> Chosen:
    """Return a control from its record.

    Raises:
        OptionError: if its options cannot be had back, such as a tensor.
    """
    try:
        made = Chosen(parse_control(recorded["text"]))
    except AttnctlError as error:
        raise OptionError(f"the control {recorded['text']!r} cannot be made: {error}") from error
    if control_data(made)["options"] != recorded["options"]:
        raise OptionError(f"the options of {recorded['name']} cannot be had back from the record")
    return made


def _frames(path: Path) -> Frames:
    if path.suffix.lower() in (".mp4", ".json"):
        return read_frames(path.with_suffix(".mp4"))
    with Image.open(path) as image:
        return [np.asarray(image.convert("RGB"))]


def _compared(old: Frames, new: Frames) -> tuple[bool, int | None]:
    if [frame.shape for frame in old] != [frame.shape for frame in new]:
        return False, None
    pairs = zip(old, new, strict=True)
    largest = max(int(np.abs(a.astype(int) - b.astype(int)).max()) for a, b in pairs)
    return largest == 0, largest


@contextlib.contextmanager
def _threads(data: Mapping[str, Any]) -> Iterator[None]:
    """Compute with as many threads as then: their number changes the rounding on a CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(int(data.get("threads", before)))
    try:
        yield
    finally:
        torch.set_num_threads(before)
