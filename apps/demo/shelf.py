"""The output folder: every file the page serves lies here, under a name nobody can guess."""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
from pathlib import Path

from attnctl.apps.files import write_whole
from attnctl.errors import AttnctlError

__all__ = ["Shelf"]


class Shelf:
    """A folder of bounded size.

    Args:
        folder: where; made if it is not there.
        most: bytes, uploads of visitors included; beyond that the oldest files are removed.

    Raises:
        AttnctlError: if it cannot be made.
    """

    def __init__(self, folder: Path, most: int) -> None:
        self.folder, self.most, self._lock = folder.resolve(), most, threading.Lock()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise AttnctlError(f"cannot make {folder}: {error.strerror or error}") from error

    def put(self, data: bytes, name: str) -> str:
        """Write a file and return its path.

        Args:
            data: all of it.
            name: such as "controlled.png"; random letters are put before its ending.

        Raises:
            AttnctlError: if it cannot be written.
        """
        stem, ending = name.rsplit(".", 1)
        path = self.folder / f"{stem}-{secrets.token_hex(8)}.{ending}"
        try:
            write_whole(path, data)
        except OSError as error:
            raise AttnctlError(f"cannot save the result: {error.strerror or error}") from error
        self.prune()
        return str(path)

    def prune(self) -> None:
        """Remove the oldest files until the rest is small enough."""
        with self._lock:
            sizes = sorted((s.st_mtime, s.st_size, path) for path, s in self._files())
            total = sum(size for _, size, _ in sizes)
            for _, size, path in sizes:
                if total <= self.most:
                    return
                with contextlib.suppress(OSError):
                    path.unlink()
                total -= size

    def _files(self) -> list[tuple[Path, os.stat_result]]:
        found = []
        for path in self.folder.rglob("*"):
            with contextlib.suppress(OSError):
                if path.is_file():
                    found.append((path, path.stat()))
        return found
