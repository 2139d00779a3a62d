"""Regions of a picture: discs, boxes and masks, on the grid of any attention call."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from attnctl.errors import OptionError

__all__ = ["RADIUS", "checked_region", "coverage"]

RADIUS = 0.2
"""Of a disc whose radius is not given, in sides of the picture."""


def checked_region(region: Any, name: str) -> Any:
    """Return a region as a tuple of numbers or a mask.

    Args:
        region: (x, y) or (x, y, radius) of a disc, (left, top, right, bottom) of a box, all in
            parts of the picture's sides from its upper left corner; or a mask [h, w], a tensor
            or an array, true or 1 inside.
        name: what it is the region of, for errors.

    Raises:
        OptionError: if it is none of these.
    """
    if isinstance(region, np.ndarray):
        region = torch.from_numpy(region)
    if isinstance(region, Tensor):
        if region.ndim != 2 or not region.numel():
            shape = tuple(region.shape)
            raise OptionError(f"the mask of {name!r} has shape {shape}; expected [h, w]")
        mask = region.float().clamp(0, 1)
        if not mask.isfinite().all() or not mask.any():
            raise OptionError(f"the mask of {name!r} is empty or has values that are no numbers")
        return mask
    try:
        numbers = tuple(float(part) for part in region)
    except (TypeError, ValueError):
        numbers = ()
    disc = len(numbers) in (2, 3) and all(0 <= p <= 1 for p in numbers[:2])
    disc = disc and all(0 < radius < math.inf for radius in numbers[2:])
    box = len(numbers) == 4 and 0 <= numbers[0] < numbers[2] <= 1
    if disc or (box and 0 <= numbers[1] < numbers[3] <= 1):
        return numbers
    raise OptionError(
        f"the region of {name!r} is {region!r}; expected (x, y) or (x, y, radius) of a disc, "
        "(left, top, right, bottom) of a box, in parts of the picture from 0 to 1, or a mask "
        "[h, w]"
    )


def coverage(region: Any, grid: tuple[int, int, int], device: torch.device) -> Tensor:
    """Return which tokens lie in a region, [frames x height x width] from 0 to 1.

    Args:
        region: as `checked_region` returns it. A disc is one in parts of the sides, so on a grid
            that is not square it is as wide as the grid is. Masks are averaged over a token.
        grid: (frames, height, width); every frame has the same region.
        device: of the result.
    """
    if isinstance(region, Tensor):
        flat = interpolate(region[None, None].to(device), grid[1:], mode="area")[0, 0]
        return flat.flatten().repeat(grid[0])
    return _shape(region, grid, device)


@functools.lru_cache(maxsize=256)
def _shape(region: Sequence[float], grid: tuple[int, int, int], device: torch.device) -> Tensor:
    """Copied to the device once: a copy per attention call would wait for the GPU each time."""
    frames, high, wide = grid
    y = ((torch.arange(high) + 0.5) / high)[:, None]
    x = ((torch.arange(wide) + 0.5) / wide)[None]
    if len(region) == 4:
        left, top, right, bottom = region
        inside = (x >= left) & (x < right) & (y >= top) & (y < bottom)
    else:
        radius = region[2] if len(region) == 3 else RADIUS
        inside = (x - region[0]) ** 2 + (y - region[1]) ** 2 < radius**2
    with torch.inference_mode(False):
        return inside.flatten().repeat(frames).float().to(device)
