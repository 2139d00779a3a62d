"""Random block masks, and block-sparse attention by explicit maps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from attnctl.kernels import BlockMask

from . import oracles

__all__ = ["exact", "poisoned", "random_blocks", "random_map"]


def random_blocks(nq: int, nk: int, block: int, *lead: int, seed: int = 0) -> BlockMask:
    """Return a mask of about half of the blocks; the first row of blocks is empty."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(*lead, -(-nq // block), -(-nk // block), generator=generator) < 0.5
    keep[..., 0, :] = False
    return BlockMask.of_blocks(keep, nq, nk, block)


def random_map(nq: int, nk: int, *lead: int, block: int = 32) -> Tensor:
    """Return a bool map with full, empty and partial blocks, and empty rows in between."""
    generator = torch.Generator().manual_seed(1)
    kind = torch.rand(*lead, -(-nq // block), -(-nk // block), generator=generator)
    each = kind.repeat_interleave(block, -2).repeat_interleave(block, -1)[..., :nq, :nk]
    out = torch.where(each < 0.3, False, torch.rand(each.shape, generator=generator) < 0.4)
    out[..., ::7, :] = False
    return out | (each > 0.7)


def exact(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp by the whole map in float64."""
    z = oracles.logits(q, k, mask.dense(), scale)
    return oracles.apply_map(oracles.softmax(z), v), oracles.lse(z)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill fresh memory with NaN, so that an output that is not written shows."""
    with (
        mock.patch("torch.empty", _with_nan(torch.empty)),
        mock.patch("torch.empty_like", _with_nan(torch.empty_like)),
    ):
        yield


def _with_nan(make: Any) -> Any:
    def filled(*args: Any, **kwargs: Any) -> Tensor:
        x = make(*args, **kwargs)
        return x.fill_(torch.nan) if x.is_floating_point() else x

    return filled
