"""What lies in the output folder of a batch, for the benches that compare such folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from attnctl.lines import read_lines

__all__ = ["different", "levels", "noted", "results"]


def noted(folder: Path) -> list[str]:
    """Return the files that the manifests of all processes name as done, as often as they do."""
    lines = [line for path in sorted(folder.glob("manifest*.jsonl")) for line in read_lines(path)]
    return [str(line["file"]) for line in lines if line["state"] == "done"]


def results(folder: Path) -> dict[str, bytes]:
    """Return the pictures that have a final name, the contact sheets too."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def different(one: dict[str, bytes], other: dict[str, bytes]) -> list[str]:
    """Return the names that only one of two folders has, or whose bytes differ."""
    return sorted(name for name in {*one, *other} if one.get(name) != other.get(name))


def levels(one: Path, other: Path) -> int:
    """Return the largest difference of two pictures, in steps of 255."""
    arrays = []
    for path in (one, other):
        with Image.open(path) as image:
            arrays.append(np.asarray(image.convert("RGB"), dtype=np.int16))
    return int(np.abs(arrays[0] - arrays[1]).max())
