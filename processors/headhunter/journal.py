"""The search's memory: every score, appended to a file as soon as it is known.

A JSON line per batch of pictures, after a first line with the settings that scores depend on.
A search that was killed takes them up again and draws only what is missing; strategies that
draw the same picture share its score.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attnctl.errors import OptionError
from attnctl.lines import append_line, cut_torn_line, read_lines

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
            append_line(path, {"settings": settings})

    def add(self, values: Mapping[str, Any], forwards: int) -> None:
        """Remember values and what they cost, on the disk before this returns."""
        self.values.update(values)
        self.forwards += forwards
        if self.path is not None:
            append_line(self.path, {"values": values, "forwards": forwards})

    def _read(self, settings: Mapping[str, Any]) -> None:
        assert self.path is not None
        lines = read_lines(self.path)
        if lines:
            self._check(lines[0].get("settings", {}), settings)
        for line in lines[1:]:
            self.values.update(line.get("values", {}))
            self.forwards += line.get("forwards", 0)
        cut_torn_line(self.path)
        if not lines:
            append_line(self.path, {"settings": settings})

    def _check(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        other = sorted(k for k in {*old, *new} if old.get(k) != new.get(k))
        if other:
            raise OptionError(
                f"{self.path} holds a search with other settings ({', '.join(other)}); give "
                "another file, or delete it to start anew"
            )
