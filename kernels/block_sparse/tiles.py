"""How the kernels cut their work on a GPU: measured values, kept as data in `tiles.json`.

`python -m attnctl.apps.bench.attention_tiles` measures them on a GPU and writes the file.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = ["OTHER", "Tiles", "gluon_stages", "gpu_name", "tiles_for"]

FILE = Path(__file__).with_name("tiles.json")
OTHER = "other"
"""Entry for GPUs that nobody has measured: small enough for the shared memory of any."""


class Tiles(NamedTuple):
    """How the plain Triton kernel cuts its work.

    Args:
        m: queries of a program; divides the block.
        n: keys taken at once; divides the block.
        warps: warps of a program.
        stages: depth of the software pipeline.
        descriptors: whether keys and values are loaded by tensor descriptors (TMA on sm90).
        registers: most registers of a thread, None for as many as the compiler takes.
    """

    m: int
    n: int
    warps: int
    stages: int
    descriptors: bool = False
    registers: int | None = None


def tiles_for(width: int, block: int, dtype: torch.dtype, gpu: str) -> Tiles:
    """Return the plain kernel's tiles for a head dim.

    Args:
        width: head dim, rounded up to a power of two.
        block: size of a block; no tile is larger.
        dtype: of the queries.
        gpu: as `gpu_name` says; a GPU that is not in the data gets the entry for others.
    """
    table = _data()["triton"]
    kind = "float32" if dtype == torch.float32 else gpu if gpu in table else OTHER
    found = Tiles(**table[kind][_key(table[kind], width)])
    m, n = min(found.m, block), min(found.n, block)
    return found._replace(m=m, n=n, warps=found.warps if m == found.m else 4)


def gluon_stages(gpu: str = "sm90") -> dict[int, int]:
    """Return the Hopper kernel's blocks of keys and of values in shared memory, by head dim."""
    return {int(width): entry["stages"] for width, entry in _data()["gluon"][gpu].items()}


def gpu_name(device: torch.device) -> str:
    """Return the name of a device in the data, such as "sm90"; that of others without CUDA."""
    if device.type != "cuda":
        return OTHER
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def _key(table: dict[str, Any], width: int) -> str:
    """Return the smallest head dim of a table that holds this one."""
    return min((key for key in table if int(key) >= width), key=int)


@functools.cache
def _data() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return data
