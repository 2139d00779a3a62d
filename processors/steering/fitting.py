"""A layout that fits the noise: each object where the model would draw it anyway.

From the same noisy latents, let e be the prediction for the whole prompt and e_i that for the
description of object i. Where the picture is about to show object i the two differ least, so of
all orders of the objects next to each other the one is taken with the least

    sum_i mean over region i of (e_i - e)^2

The paper trains a predictor of layouts; this is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import permutations

import torch
from torch import Tensor

from attnctl.errors import HostError, OptionError

from .regions import coverage

__all__ = ["MOST", "arrangements", "differences", "fitted"]

Box = tuple[float, float, float, float]
MOST = 6
"""Objects that can be arranged: there are n! orders."""


def arrangements(count: int) -> list[tuple[Box, ...]]:
    """Return all orders of objects next to each other, in equal boxes.

    Raises:
        OptionError: for more than `MOST` objects.
    """
    if count > MOST:
        raise OptionError(
            f"layout='fit' tries all orders of the objects of a prompt, at most {MOST}; this one "
            f"has {count}: give a layout"
        )
    return list(permutations((i / count, 0.0, (i + 1) / count, 1.0) for i in range(count)))


def differences(one: Tensor, whole: Tensor, channels: int) -> Tensor:
    """Return the mean squared difference [b, h, w] of two predictions at each place.

    Args:
        one: prediction [b, c, ..., h, w] for the description of an object.
        whole: that for the whole prompt.
        channels: of the latents; further channels of a prediction are variances.

    Raises:
        HostError: if the predictions are no pictures.
    """
    if one.ndim < 4:
        raise HostError(
            f"layout='fit' compares predictions as pictures [b, c, h, w], but those of this model "
            f"have shape {tuple(one.shape)}: give a layout, or layout='row'"
        )
    apart = one[:, :channels].float() - whole[:, :channels].float()
    return apart.square().flatten(1, -3).mean(1)


def fitted(apart: Tensor, choose: Callable[..., Sequence[Box]] = min) -> Sequence[Box]:
    """Return the arrangement of one picture's objects.

    Args:
        apart: `differences` of each object [n, h, w].
        choose: `max` for the arrangement that fits least.
    """
    grid = (1, *apart.shape[1:])

    def cost(boxes: Sequence[Box]) -> float:
        each = [
            torch.dot(one.flatten(), inside / inside.sum().clamp_min(1))
            for one, inside in zip(
                apart, (coverage(b, grid, apart.device) for b in boxes), strict=True
            )
        ]
        return float(torch.stack(each).sum())

    return choose(arrangements(len(apart)), key=cost)
