"""Whether a model's files are the same as before, found without reading all of them."""

from __future__ import annotations

import hashlib
from pathlib import Path

__all__ = ["fingerprint"]

_WHOLE = 1 << 20
_SAMPLE = 1 << 16
_BESIDE = (".md", ".png", ".jpg", ".jpeg", ".gif")


def fingerprint(folder: Path) -> str:
    """Return a hash of a model's files: names, sizes and contents.

    Those of a pipeline in diffusers' layout: its index and the folders of its parts; what lies
    beside the index, such as a README, does not matter. Those of a model in transformers'
    layout, beside its config.json: all but hidden files, pictures and texts to be read by people.
    Of files above 1 MiB only the first, the middle and the last 64 KiB are read. Another training
    or another number type is noticed, a change of single weights need not be.
    """
    digest = hashlib.sha256()
    parts = [path for path in folder.glob("*/**/*") if not path.is_dir()]
    if (folder / "config.json").is_file() and not (folder / "model_index.json").is_file():
        parts = [path for path in folder.iterdir() if _of_a_model(path)]
    for path in (folder / "model_index.json", *sorted(parts)):
        if path.is_file():
            size = path.stat().st_size
            digest.update(f"{path.relative_to(folder).as_posix()}\0{size}\0".encode())
            with path.open("rb") as file:
                for start, length in _parts(size):
                    file.seek(start)
                    digest.update(file.read(length))
    return digest.hexdigest()


def _of_a_model(path: Path) -> bool:
    return not path.is_dir() and path.name[0] != "." and path.suffix.lower() not in _BESIDE


def _parts(size: int) -> list[tuple[int, int]]:
    if size <= _WHOLE:
        return [(0, size)]
    return [(start, _SAMPLE) for start in (0, (size - _SAMPLE) // 2, size - _SAMPLE)]
