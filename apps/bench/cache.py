"""Stock outputs kept on disk, so that every control's bench need not make them again.

A file is found by a hash of everything that decides its content: the model's files, the cases,
the settings, the versions and the machine's kind. Only outputs are kept, never scores, so that
judging is always done by the present code. `ATTNCTL_CACHE` names another folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["VARIABLE", "Cache", "folder", "hash_of_files"]

VARIABLE = "ATTNCTL_CACHE"
KEPT = 64
"""Files; when there are more, those unused for longest go."""


def folder() -> Path:
    """Return the cache folder: ``$ATTNCTL_CACHE``, or the platform's usual place."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/attnctl"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData/Local"), "attnctl/cache")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "attnctl")


def hash_of_files(place: Path) -> str:
    """Return a hash of the names and contents of every file in a folder."""
    found = hashlib.sha256()
    for file in sorted(p for p in place.rglob("*") if p.is_file()):
        found.update(f"{file.relative_to(place).as_posix()}\0{file.stat().st_size}\0".encode())
        found.update(file.read_bytes())
    return found.hexdigest()


class Cache:
    """The kept outputs of one set of decisive facts.

    Args:
        facts: JSON values that together decide the outputs.
    """

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self.facts = json.dumps(facts, sort_keys=True)
        name = hashlib.sha256(self.facts.encode()).hexdigest()[:32]
        self.path = folder() / "bench" / f"{name}.npz"

    def load(self) -> np.ndarray | None:
        """Return the outputs; None if there are none, or the file is damaged."""
        try:
            with np.load(self.path, allow_pickle=False) as data:
                if str(data["facts"]) != self.facts:
                    return None
                outputs: np.ndarray = data["outputs"]
            self.path.touch()
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        return outputs

    def save(self, outputs: np.ndarray) -> None:
        """Keep outputs, completely or not at all; a cache that cannot be written is no error."""
        part = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with part.open("wb") as file:
                    np.savez_compressed(file, outputs=outputs, facts=np.array(self.facts))
                os.replace(part, self.path)
            finally:
                part.unlink(missing_ok=True)
            self._prune()

    def _prune(self) -> None:
        files = sorted(self.path.parent.glob("*.npz"), key=lambda p: -p.stat().st_mtime)
        for old in files[KEPT:]:
            old.unlink(missing_ok=True)
