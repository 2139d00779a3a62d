"""The search's memory: every score, appended to a file as soon as it is known.

A JSON line per batch of pictures, after a first line with the settings that scores depend on.
A search that was killed takes them up again and draws only what is missing; strategies that
draw the same picture share its score.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attnctl.errors import OptionError

__all__ = ["Journal"]


class Journal:
    """Numbers by key, and the forwards they took, in memory and, with a path, in a file.

    Args:
        path: JSON lines file; None for none.
        settings: everything the numbers depend on, as plain data.

    Raises:
        OptionError: if the file holds a search with other settings; the message names them.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.values: dict[str, Any] = {}
        self.forwards = 0
        settings = json.loads(json.dumps(settings))
        if path is None:
            return
        if path.exists() and path.stat().st_size:
            self._read(settings)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._append({"settings": settings})

    def add(self, values: Mapping[str, Any], forwards: int) -> None:
        """Remember values and what they cost, on the disk before this returns."""
        self.values.update(values)
        self.forwards += forwards
        if self.path is not None:
            self._append({"values": values, "forwards": forwards})

    def _append(self, line: Mapping[str, Any]) -> None:
        assert self.path is not None
        with self.path.open("ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self, settings: Mapping[str, Any]) -> None:
        assert self.path is not None
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        lines = [_parse(self.path, n, line) for n, line in enumerate(whole.splitlines(), 1)]
        if lines:
            self._check(lines[0].get("settings", {}), settings)
        for line in lines[1:]:
            self.values.update(line.get("values", {}))
            self.forwards += line.get("forwards", 0)
        if len(whole) < len(data):  # the line that was being written when the search died
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        if not lines:
            self._append({"settings": settings})

    def _check(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        other = sorted(k for k in {*old, *new} if old.get(k) != new.get(k))
        if other:
            raise OptionError(
                f"{self.path} holds a search with other settings ({', '.join(other)}); give "
                "another file, or delete it to start anew"
            )


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(line)
    except ValueError as error:
        raise OptionError(f"{path}, line {number}: no valid JSON: {error}") from error
    return found
