"""JSON lines that survive a kill: appended whole, on the disk before the next one.

A process that is killed while it writes leaves at most one line without its end. Such a line was
never reported as written, so readers leave it out and the next writer cuts it off.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import OptionError

__all__ = ["append_line", "cut_torn_line", "read_lines"]


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Append a line; it is on the disk when this returns, and not in the file if it raises.

    Raises:
        OSError: if it cannot be written.
    """
    data = json.dumps(line).encode() + b"\n"
    with path.open("ab", buffering=0) as file:  # a buffer would be written again on closing
        before = os.fstat(file.fileno()).st_size
        try:
            if file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(path, before)
            raise


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a file.

    Raises:
        OptionError: if a line is no JSON object; the message names it.
        OSError: if the file cannot be read.
    """
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    return [_parse(path, n, line) for n, line in enumerate(whole.splitlines(), 1)]


def cut_torn_line(path: Path) -> None:
    """Cut off the line that was being written when the last writer died, if there is one."""
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with path.open("r+b") as file:
            file.truncate(whole)


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{path}, line {number}: no valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise OptionError(f"{path}, line {number}: expected a JSON object")
    return found
