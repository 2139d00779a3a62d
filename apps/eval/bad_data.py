"""Data that cannot be used: an error that names file and line, or a skip that is counted."""

from __future__ import annotations

from pathlib import Path

from attnctl.errors import AttnctlError

__all__ = ["BadData", "EvalError", "Skips"]


class EvalError(AttnctlError):
    """An evaluation cannot be run or scored as asked."""


class BadData(EvalError):
    """A file, or a line of it, is not what it should be.

    Args:
        path: the file.
        line: number of the line, from 1; None for the file as a whole.
        what: what is wrong with it.
    """

    def __init__(self, path: Path | str, line: int | None, what: str) -> None:
        place = str(path) if line is None else f"{path}, line {line}"
        super().__init__(f"{place}: {what}")


class Skips:
    """What to do about bad lines: raise, or leave them out and count them.

    Args:
        allowed: whether they may be left out.
    """

    def __init__(self, allowed: bool = False) -> None:
        self.allowed = allowed
        self.reasons: list[str] = []

    def bad(self, error: BadData) -> None:
        """Count a bad line.

        Raises:
            BadData: if none may be left out.
        """
        if not self.allowed:
            raise error
        self.reasons.append(str(error))
