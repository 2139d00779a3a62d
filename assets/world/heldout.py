"""The held-out split: combinations of two objects that no training picture shows.

A combination is an unordered couple of different (colour, shape) pairs; there are 1128. A
checksum of their names holds out about one in five. Every single object is trained; what is new
in a held-out prompt is which two objects meet. A scene of three objects counts as held out if
any two of its objects are a held-out combination.
"""

from __future__ import annotations

import zlib
from functools import lru_cache
from itertools import combinations

import torch

from attnctl.assets.world.palette import PAIRS, Pair, pair_index

ONE_IN = 5


def is_heldout(first: Pair, second: Pair) -> bool:
    """True if no training picture shows these two objects together; order does not matter."""
    text = "|".join(sorted(" ".join(pair) for pair in (first, second)))
    return first != second and zlib.crc32(text.encode()) % ONE_IN == 0


def heldout_combinations() -> list[tuple[Pair, Pair]]:
    """All held-out combinations, in the order of `PAIRS`."""
    return [(one, two) for one, two in combinations(PAIRS, 2) if is_heldout(one, two)]


@lru_cache(maxsize=1)
def _table() -> torch.Tensor:
    table = torch.zeros(len(PAIRS), len(PAIRS), dtype=torch.bool)
    for one, two in heldout_combinations():
        i, j = pair_index(*one), pair_index(*two)
        table[i, j] = table[j, i] = True
    return table


def shows_heldout(pair: torch.Tensor) -> torch.Tensor:
    """Which scenes contain a held-out combination.

    Args:
        pair: ``[B, K]`` pair indices, -1 where there is no object.

    Returns:
        ``[B]`` bool.
    """
    table, there = _table().to(pair.device), pair >= 0
    index = pair.clamp(min=0)
    both = there[:, :, None] & there[:, None, :]
    return (table[index[:, :, None], index[:, None, :]] & both).flatten(1).any(1)
