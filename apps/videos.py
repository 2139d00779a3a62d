"""Videos in and out: MP4 through PyAV, with the metadata inside and in a file beside it."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from attnctl.errors import MissingExtra

from .pictures import PictureError

__all__ = ["FPS", "mp4_bytes", "need_video", "read_frames", "read_video_metadata", "sidecar"]

FPS = 16
"""Frames per second unless something else is asked for."""
_QUALITY = {"crf": "14", "preset": "medium"}


def need_video() -> ModuleType:
    """Return PyAV.

    Raises:
        MissingExtra: if it is not installed.
    """
    try:
        import av
    except ImportError:
        raise MissingExtra("av", "video", "writing videos") from None
    module: ModuleType = av
    return module


def mp4_bytes(frames: Sequence[Image.Image], fps: int, metadata: Mapping[str, Any]) -> bytes:
    """Return an MP4 file (H.264), the same bytes for the same frames.

    Args:
        frames: pictures of one size.
        fps: frames per second.
        metadata: JSON values, kept in the container's comment.

    Raises:
        MissingExtra: if PyAV is not installed.
    """
    av = need_video()
    file = io.BytesIO()
    width, height = frames[0].size
    with av.open(file, "w", format="mp4") as container:
        container.metadata["comment"] = json.dumps(metadata)
        stream = container.add_stream("libx264", rate=fps, options=_QUALITY)
        stream.width, stream.height = width, height
        # colour at half the resolution needs even sizes
        stream.pix_fmt = "yuv444p" if width % 2 or height % 2 else "yuv420p"
        stream.codec_context.thread_count = 1  # the number of threads changes the bytes
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame.convert("RGB"))))
        container.mux(stream.encode())
    return file.getvalue()


def read_frames(file: Path | io.BytesIO) -> list[NDArray[np.uint8]]:
    """Return the frames of a video, uint8 [height, width, 3] each.

    Raises:
        PictureError: if it is none.
        MissingExtra: if PyAV is not installed.
    """
    av = need_video()
    try:
        with av.open(file if isinstance(file, io.BytesIO) else str(file)) as container:
            return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except (OSError, ValueError, IndexError) as error:
        raise PictureError(f"{file} is no video: {error}") from error


def sidecar(path: Path) -> Path:
    """Return where the metadata of a video lies beside it."""
    return path.with_suffix(".json")


def read_video_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata of a video, from the file beside it or else from the video itself.

    Raises:
        PictureError: if there is none.
    """
    beside = sidecar(path)
    try:
        text = beside.read_text(encoding="utf-8") if beside.is_file() else _comment(path)
        data = json.loads(text or "null")
    except OSError as error:
        raise PictureError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError:
        data = None
    if not isinstance(data, dict):
        raise PictureError(f"{path} holds no metadata of attnctl")
    return data


def _comment(path: Path) -> str:
    with need_video().open(str(path)) as container:
        return str(container.metadata.get("comment", ""))
