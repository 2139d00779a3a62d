"""Numbers as cards print them, with their 95 % intervals, and the file that keeps them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from attnctl.assets.train.recipe import Run

Z = 1.959964


def proportion(hits: torch.Tensor) -> dict[str, Any]:
    """Share of hits with Wilson's 95 % interval.

    Args:
        hits: ``[N]`` bool.

    Returns:
        rate, low, high (each 0 to 1) and n.
    """
    n, p = len(hits), float(hits.double().mean())
    middle = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return {"rate": round(p, 4), "low": round(low, 4), "high": round(high, 4), "n": n}


def percent(figure: dict[str, Any]) -> str:
    """``93 % (90 to 95)`` from `proportion`'s result."""
    rate, low, high = (100 * figure[key] for key in ("rate", "low", "high"))
    return f"{rate:.1f} % ({low:.1f} to {high:.1f})"


def figures_path(run: Run, name: str) -> Path:
    """JSON file of a model's figures: in its folder, or beside its file."""
    folder = run.out / name
    return folder / "figures.json" if folder.is_dir() else run.out / f"{name}.figures.json"


def figures_of(run: Run, *names: str) -> dict[str, Any]:
    """Figures of models trained before in the same place, by name; unknown ones are left out."""
    paths = {name: figures_path(run, name) for name in names}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
