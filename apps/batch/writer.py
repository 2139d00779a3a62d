"""Results as files: whole or not there at all, always directly in the output folder."""

from __future__ import annotations

import json
from pathlib import Path

from ..files import write_whole
from ..pictures import png_bytes
from ..videos import mp4_bytes, sidecar
from .output import output_errors
from .rows import Drawn

__all__ = ["write_result"]


def write_result(folder: Path, drawn: Drawn) -> int:
    """Write a picture, or a video after the file with its metadata; return the size in bytes.

    Raises:
        OutputError: if it cannot be written; no half-written file has the final name.
    """
    path, metadata = folder / drawn.plan.file, drawn.metadata or {}
    if path.suffix == ".png":
        data = png_bytes(drawn.frames[0], metadata)
    else:
        data = mp4_bytes(drawn.frames, metadata["fps"], metadata)
        text = json.dumps(metadata, indent=1)
        with output_errors(sidecar(path)):
            write_whole(sidecar(path), text.encode())
    with output_errors(path):
        write_whole(path, data)
    return len(data)
