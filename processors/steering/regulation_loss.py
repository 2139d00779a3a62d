"""The optimisation inside Attention Regulation: closed-form gradients, no autograd.

Shapes: b samples, h heads, n targets, m image tokens on a grid of f frames. Gaussians lie on
the grid at every second sigma, in each frame, and are products of a row and a column function,
so that S = rows^T w columns is made without a basis of m columns.

A' is a softmax over n + 1 columns: the targets' and one that stands for all other keys, whose
logit is their log-sum-exp. That is the softmax over all keys, exactly.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Aim", "Basis", "Optimum", "loss_and_slope", "optimise", "shares", "upper_quantile"]


@dataclass(frozen=True)
class Aim:
    """What the maps of the targets are to become; names and defaults of the paper's code.

    Args:
        peak: value that the 90 % quantile of each map over the image should have.
        area: mean that each map should have, for up to 1 / area targets; more share 1.
        lam_area: weight of the areas' term.
        lam_reg: weight of the squared Gaussians' weights.
        quantile: which quantile.
    """

    peak: float = 0.9
    area: float = 0.2
    lam_area: float = 80.0
    lam_reg: float = 0.09
    quantile: float = 0.9


@dataclass(frozen=True)
class Basis:
    """Gaussians on a grid.

    Args:
        rows: [c, height], values of c functions of the row.
        columns: [d, width], of d functions of the column.
        frames: f.
        sigma: their width in tokens.
    """

    rows: Tensor
    columns: Tensor
    frames: int = 1
    sigma: int = 1

    @classmethod
    def of(cls, grid: tuple[int, int, int], like: Tensor) -> Basis:
        """Return the basis of a (frames, height, width) grid, sigma = shorter side // 16.

        Args:
            grid: the grid; sides below 16 get sigma 1.
            like: gives dtype and device.
        """
        return _basis(grid, like.dtype, like.device)

    @property
    def step(self) -> float:
        """Factor on the descent's step: 1 on square grids whose side is a multiple of 16.

        A weight moves the mean of a map by about 2 pi sigma^2 / m, so that on few tokens the step
        that is right for many overshoots, and no iteration would be better than none.
        """
        tokens = self.frames * self.rows.shape[1] * self.columns.shape[1]
        return tokens / (16 * self.sigma) ** 2

    def zeros(self, batch: tuple[int, ...]) -> Tensor:
        """Return weights of 0, [*batch, f, c, d]."""
        return self.rows.new_zeros((*batch, self.frames, len(self.rows), len(self.columns)))

    def spread(self, weights: Tensor) -> Tensor:
        """Return sum over Gaussians of weight times Gaussian, [..., f, c, d] to [..., m]."""
        return (self.rows.T @ weights @ self.columns).flatten(-3)

    def gather(self, slope: Tensor) -> Tensor:
        """Return the slope [..., m] with respect to the weights, [..., f, c, d]."""
        sizes = (self.frames, self.rows.shape[1], self.columns.shape[1])
        return self.rows @ slope.unflatten(-1, sizes) @ self.columns.T


@functools.lru_cache(maxsize=64)
def _basis(grid: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Basis:
    """Copied to the device once: a copy per attention call would wait for the GPU each time."""
    frames, high, wide = grid
    sigma = max(1, min(high, wide) // 16)
    with torch.inference_mode(False):
        rows, columns = (_bumps(side, sigma).to(device, dtype) for side in (high, wide))
    return Basis(rows, columns, frames, sigma)


def _bumps(side: int, sigma: int) -> Tensor:
    """Return exp(-(x - x_c)^2 / (2 sigma^2)) at centres 2 sigma, 4 sigma, ... below the side."""
    centres = list(range(2 * sigma, side, 2 * sigma)) or [side // 2]
    x = torch.arange(side, dtype=torch.float64)
    apart = x - torch.tensor(centres, dtype=torch.float64)[:, None]
    return torch.exp(-(apart**2) / (2 * sigma**2))


def shares(rest: Tensor, logits: Tensor) -> Tensor:
    """Return A', the targets' columns of the softmax over all keys.

    Args:
        rest: [b, h, m], log-sum-exp of all other keys.
        logits: [b, h, n, m] of the targets; -inf gives 0.
    """
    total = torch.logaddexp(rest, torch.logsumexp(logits, dim=2))
    floor = torch.finfo(total.dtype).min  # a query without any key
    return torch.exp(logits - total.clamp_min(floor)[:, :, None])


def upper_quantile(maps: Tensor, quantile: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return a linear quantile over the last dimension, and what it depends on.

    Args:
        maps: [..., m].
        quantile: in (0, 1].

    Returns:
        The quantile [...], the two entries it lies between and their weights, [..., 2] each.
    """
    place = quantile * (maps.shape[-1] - 1)
    low = math.floor(place)
    top, index = maps.topk(maps.shape[-1] - low, dim=-1)  # falling: the last one is the low one
    above = -2 if top.shape[-1] > 1 else -1
    ends = index[..., [-1, above]]
    weights = top.new_tensor([1 - (place - low), place - low]).expand(ends.shape)
    return (top[..., [-1, above]] * weights).sum(-1), ends, weights


def loss_and_slope(
    maps: Tensor, weights: Tensor, valid: Tensor, aim: Aim
) -> tuple[Tensor, Tensor, Tensor]:
    """Return each head's loss, its slope in the logits, and that in the weights themselves.

        mean_k (Q(A'_k) - peak)^2 + lam_area mean_k (mean A'_k - area_n)^2 + lam_reg mean w^2

    Args:
        maps: A' [b, h, n, m].
        weights: [b, h, n, f, c, d].
        valid: bool [b, n], which targets a sample has.
        aim: the terms; area_n = min(1, area n) / n.

    Returns:
        loss [b, h], slope in the targets' logits [b, h, n, m], slope of the last term
        [b, h, n, f, c, d]; both are slopes of a head's own loss.
    """
    mine = valid[:, None].to(maps.dtype)  # [b, 1, n]
    count = mine.sum(-1, keepdim=True).clamp_min(1)
    high, ends, between = upper_quantile(maps, aim.quantile)
    short = (high - aim.peak) * mine
    apart = (maps.mean(-1) - (aim.area * count).clamp_max(1) / count) * mine
    weights = weights * mine[..., None, None, None]
    gaussians = weights.shape[-3:].numel()
    loss = (short**2 + aim.lam_area * apart**2).sum(-1, keepdim=True) / count
    loss = loss + aim.lam_reg * (weights**2).sum((-4, -3, -2, -1))[..., None] / (count * gaussians)
    pull = (2 / count * aim.lam_area / maps.shape[-1] * apart)[..., None].expand(maps.shape)
    pull = pull.scatter_add(-1, ends, (2 / count * short)[..., None] * between)
    # of a softmax: A_k (g_k - sum_j A_j g_j)
    slope = maps * (pull - (maps * pull).sum(2, keepdim=True))
    own = 2 * aim.lam_reg / (count * gaussians)[..., None, None, None] * weights
    return loss[..., 0], slope, own


@dataclass(frozen=True)
class Optimum:
    """What an optimisation found.

    Args:
        weights: [b, h, n, f, c, d], of the least loss.
        loss: that loss [b], mean over the heads.
        first: the loss before the first iteration [b].
        best: which iteration it was, [b].
    """

    weights: Tensor
    loss: Tensor
    first: Tensor
    best: Tensor


def optimise(
    rest: Tensor,
    logits: Tensor,
    valid: Tensor,
    basis: Basis,
    aim: Aim,
    *,
    iterations: int = 20,
    rate: float = 100.0,
    start: Tensor | None = None,
) -> Optimum:
    """Descend, and keep each sample's best.

    Args:
        rest: [b, h, m], log-sum-exp of the keys that are no targets.
        logits: [b, h, n, m] of the targets, -inf where a sample has fewer.
        valid: bool [b, n].
        basis: Gaussians on the image's grid.
        aim: the loss.
        iterations: evaluations of the loss, at least 1.
        rate: step, on each head's own loss; it is multiplied by `basis.step`.
        start: first weights, None for 0.

    Returns:
        The optimum. Losses do not fall steadily at the default rate, so none is skipped.
    """
    weights = basis.zeros(tuple(logits.shape[:3])) if start is None else start
    best, least, first = weights, None, None
    at = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    for i in range(iterations):
        maps = shares(rest, logits + basis.spread(weights))
        each, slope, own = loss_and_slope(maps, weights, valid, aim)
        loss = each.mean(1)
        if least is None:
            least = first = loss
        else:
            better = loss < least
            best = torch.where(better.view(-1, *[1] * (best.ndim - 1)), weights, best)
            least, at = torch.where(better, loss, least), torch.where(better, i, at)
        weights = weights - rate * basis.step * (basis.gather(slope) + own)
    assert least is not None and first is not None
    return Optimum(best, least, first, at)
