"""What is done to some rows of attention: one record for the kernel and its callers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["DTYPES", "Edit", "Rows"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What the kernels compute in."""


class Edit(NamedTuple):
    """An edit of the weights of single keys; formulas in `triton`.

    Args:
        codes: uint8 [B or 1, P] of the first P keys; the others have code 0. Logits are raised
            at code 1.
        strength: alpha of raised logits, or p, the share of the sinks' attention that is moved.
        move: whether attention is moved, not logits raised.
        rho: least share of the other image tokens in the attention to the image.
        least: least attention to the image.
        heads: uint8 [H], not 0 at the heads to edit; None for all.
        first: code of the first key is codes[:, first] (sliding windows).
    """

    codes: Tensor
    strength: float
    move: bool = False
    rho: float = 0.0
    least: float = 0.0
    heads: Tensor | None = None
    first: int = 0


class Rows(NamedTuple):
    """Some of the queries of a batch.

    Args:
        table: int32 [1 + B, R], contiguous: first their numbers, each once, then for each row of
            the batch not 0 where it has this query.
    """

    table: Tensor
