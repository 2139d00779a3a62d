"""What has been done: JSON lines in the output folder, only ever appended to.

Each process writes a file of its own, `manifest.jsonl` the first and `manifest-1.jsonl` and so on
the others, so that they need not wait for each other, on other machines either.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from attnctl.lines import append_line, cut_torn_line, read_lines

from ..files import sync_folder
from .output import OutputError, output_errors

with contextlib.suppress(ImportError):  # Windows: runs are not kept apart there
    import fcntl

__all__ = ["Manifest", "read_states"]

States = dict[str, dict[str, Any]]


def read_states(folder: Path) -> States:
    """Return the latest line of every key, from the files of all processes.

    Raises:
        OptionError: if a line is damaged.
    """
    states: States = {}
    with output_errors(folder, "read"):
        for path in sorted(folder.glob("manifest*.jsonl")):
            for line in read_lines(path):
                old = states.get(str(line.get("key")), {})
                if old.get("state") != "done" or line.get("state") == "done":
                    states[str(line.get("key"))] = line
    return states


class Manifest:
    """The lines of one process. Only one run at a time can have it.

    Args:
        folder: the output folder.
        rank: number of the process.

    Raises:
        OutputError: if the folder cannot be written, or another run holds the file.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = folder / (f"manifest-{rank}.jsonl" if rank else "manifest.jsonl")
        with output_errors(self.path):
            self._handle = self.path.open("ab")
        try:
            self._lock(self._handle)
            with output_errors(self.path):
                sync_folder(folder)
                cut_torn_line(self.path)
        except BaseException:
            self.close()
            raise

    def _lock(self, handle: BinaryIO) -> None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except NameError:
            return
        except BlockingIOError:
            raise OutputError(f"another run is writing {self.path}; wait for it") from None

    def add(self, line: Mapping[str, Any]) -> None:
        """Append a line; it is on the disk when this returns."""
        with output_errors(self.path):
            append_line(self.path, line)

    def close(self) -> None:
        """Let go of the file."""
        self._handle.close()


def settled(
    states: Mapping[str, Mapping[str, Any]], folder: Path, keys: Iterable[str]
) -> set[str]:
    """Return the keys that need no more work: failed, or done and the file is still whole."""
    found = set()
    for key in keys:
        line = states.get(key)
        if line is not None and (line["state"] == "failed" or _whole(folder, line)):
            found.add(key)
    return found


def _whole(folder: Path, line: Mapping[str, Any]) -> bool:
    path = folder / Path(str(line["file"])).name
    return path.is_file() and path.stat().st_size == line["bytes"]
