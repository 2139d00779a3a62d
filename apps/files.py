"""Files that are there completely or not at all, after a kill, a full disk or a power cut too."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

__all__ = ["clear_parts", "sync_folder", "write_whole"]


def write_whole(path: Path, data: bytes) -> None:
    """Write a file under a name of its own, bring it onto the disk, then give it its name.

    Args:
        path: the final name; an existing file is replaced.
        data: all of it.

    Raises:
        OSError: if that fails; nothing is left under the final name that was not there.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def sync_folder(folder: Path) -> None:
    """Bring a folder's list of names onto the disk, where the system can do that."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def clear_parts(path: Path) -> None:
    """Remove what killed writers of this file have left beside it."""
    start, end = f".{path.name}.", ".part"
    for entry in os.scandir(path.parent):
        if entry.name.startswith(start) and entry.name.endswith(end):
            os.unlink(entry.path)
