"""Errors of the output folder, told so that the user knows what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from attnctl.errors import AttnctlError

__all__ = ["OutputError", "output_errors"]


class OutputError(AttnctlError):
    """The output folder cannot be used; what is done stays done."""


@contextlib.contextmanager
def output_errors(path: Path, verb: str = "write") -> Iterator[None]:
    """Turn errors of the system into an `OutputError` with the path and the way on."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot {verb} {path}: {error.strerror or error}; what is done stays done, the same "
            "command goes on from there once that is mended"
        ) from error
