"""From two attention maps to a refined picture: the formulas of CARVE.

With A^Q and A^G the attention of the answer's row to the image for the question and for a general
instruction, at layer l and step t,

    C = A^Q / (A^G + lambda),    S = sum_t w_t sum_l C,

resized to the picture. The regions of S at or above its (1 - p) quantile are ranked by the sum of
S; the first ones stay, everything else is black, and the picture is cut to what stayed.

References:
    Ge et al., "Focusing by Contrastive Attention: Enhancing VLMs' Visual Reasoning", 2025
    (arXiv 2509.06461), equations 6 to 10 and algorithm 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Form", "Steps", "box_of", "contrast", "flat", "fused", "refine", "regions"]

Map = np.ndarray[Any, np.dtype[np.float64]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]
Steps = Literal["start", "end", "full"]
Form = Literal["masked crop", "crop", "mask"]
FLAT = 1.05
"""Least ratio of the 99th to the 50th percentile of a map that points at anything."""


def contrast(question: Tensor, general: Tensor, lam: float) -> Tensor:
    """Return C = A^Q / (A^G + lambda), which minimises (C A^G - A^Q)^2 / A^G + lambda C^2.

    Args:
        question: A^Q, any shape.
        general: A^G of the same shape.
        lam: lambda >= 0.
    """
    return question / (general + lam)


def fused(
    question: Tensor, general: Tensor, size: tuple[int, int], lam: float, steps: Steps
) -> Map:
    """Return S [H, W] of a picture.

    Args:
        question: A^Q [T, L, gh, gw], one map a step and layer.
        general: A^G [T', L, gh, gw]; steps that only one of them has are left out.
        size: (W, H) of the picture.
        lam: lambda.
        steps: "start" (the first one), "end" (the last that both have), or "full" (all, the
            t-th with weight t).
    """
    n = min(len(question), len(general))
    chosen = {"start": [0], "end": [n - 1], "full": list(range(n))}[steps]
    total = np.zeros((size[1], size[0]))
    for t in chosen:
        weight = t + 1 if steps == "full" else 1
        for layer in contrast(question[t].double(), general[t].double(), lam):
            total += weight * _resized(layer.cpu().numpy(), size)
    return total


def _resized(grid: Map, size: tuple[int, int]) -> Map:
    from PIL import Image

    small = Image.fromarray(grid.astype(np.float32))
    return np.asarray(small.resize(size, Image.Resampling.BILINEAR), dtype=np.float64)


def flat(s: Map) -> bool:
    """Whether a map points nowhere: question and general instruction attend alike."""
    middle, high = np.percentile(s, [50, 99])
    return bool(high < FLAT * middle)


def regions(s: Map, p: float, keep: int | None) -> Mask:
    """Return the pixels that stay, bool [H, W].

    Args:
        s: S [H, W].
        p: share of the pixels at or above the threshold, in (0, 1].
        keep: the most regions (4 neighbours) that stay; None for the official code's count,
            max(3, p times their number).
    """
    above = s >= np.percentile(s, 100 * (1 - p))
    labels, n = _labelled(above)
    sums = np.bincount(labels.ravel(), weights=s.ravel(), minlength=n + 1)[1:]
    most = max(3, int(n * p)) if keep is None else keep
    best = 1 + np.argsort(-sums, kind="stable")[:most]
    return np.isin(labels, best)


def _labelled(mask: Mask) -> tuple[np.ndarray[Any, Any], int]:
    """Return the number of each pixel's region (4 neighbours), 0 outside, and their count.

    Runs of pixels in a row are joined with the runs they touch in the row above, which costs
    one step a run and not one a pixel.
    """
    height, width = mask.shape
    labels = np.zeros((height, width), dtype=np.int64)
    parent = [0]

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for y in range(height):
        edges = np.flatnonzero(np.diff(mask[y].astype(np.int8), prepend=0, append=0))
        for start, stop in edges.reshape(-1, 2):
            above = labels[y - 1, start:stop] if y else labels[:0, 0]
            roots = sorted({root(int(i)) for i in np.unique(above[above > 0])})
            mine = roots[0] if roots else len(parent)
            if not roots:
                parent.append(mine)
            for other in roots:
                parent[other] = mine
            labels[y, start:stop] = mine
    final = np.array([root(i) for i in range(len(parent))])
    names, order = np.unique(final[labels], return_inverse=True)
    shift = 0 if names[0] == 0 else 1  # no pixel outside
    return order.reshape(labels.shape) + shift, len(names) - 1 + shift


def box_of(mask: Mask) -> tuple[int, int, int, int]:
    """Return (left, top, right, bottom) of the pixels that stay."""
    ys, xs = np.nonzero(mask)
    return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1


def refine(image: Image, mask: Mask, form: Form) -> Image:
    """Return the picture to look at again, no side shorter than before.

    Args:
        image: RGB.
        mask: the pixels that stay, [H, W].
        form: "masked crop" (black outside the regions, cut to their box and enlarged: the
            published one), "crop" (cut and enlarged only) or "mask" (black only).
    """
    from PIL import Image

    if mask.all():
        return image
    if form != "crop":
        image = Image.fromarray(np.asarray(image) * mask[..., None].astype(np.uint8))
    if form == "mask":
        return image
    cut = image.crop(box_of(mask))
    scale = max(image.width / cut.width, image.height / cut.height)
    size = (int(cut.width * scale), int(cut.height * scale))
    return cut.resize(size, Image.Resampling.LANCZOS)
