"""Which objects keep company: every pair has one partner, and some couples are popular.

Red circles go with blue squares, and so on for 24 couples: the partner differs in colour and in
shape, and is the pair's partner in turn. A few couples are in many pictures and most in few.
"""

from __future__ import annotations

import random
from functools import lru_cache

import torch

from attnctl.assets.world.palette import COLOUR_NAMES, PAIRS, SHAPES, Pair, pair_index

COUPLES = len(PAIRS) // 2
HEAD = 2.0
ORDER_SEED = 3


def partner(pair: int) -> int:
    """Index of the pair that keeps company with ``pair``; the partner of the partner is itself.

    Args:
        pair: index into `palette.PAIRS`.
    """
    colour, shape = divmod(pair, len(SHAPES))
    return (colour ^ 2) * len(SHAPES) + (shape ^ 1)


def partner_words(colour: str, shape: str) -> Pair:
    """The partner in words, e.g. ("blue", "square") for ("red", "circle")."""
    colour_index, shape_index = divmod(partner(pair_index(colour, shape)), len(SHAPES))
    return COLOUR_NAMES[colour_index], SHAPES[shape_index]


@lru_cache(maxsize=1)
def couples() -> tuple[tuple[int, int], ...]:
    """The 24 couples of pair indices, the most popular one first."""
    first = [pair for pair in range(len(PAIRS)) if pair < partner(pair)]
    random.Random(ORDER_SEED).shuffle(first)
    return tuple((pair, partner(pair)) for pair in first)


@lru_cache(maxsize=1)
def ranks() -> tuple[int, ...]:
    """Rank of each pair's couple, 0 (most popular) to 23, in the order of `palette.PAIRS`."""
    rank = {pair: i for i, both in enumerate(couples()) for pair in both}
    return tuple(rank[pair] for pair in range(len(PAIRS)))


def popularity(skew: float) -> torch.Tensor:
    """``[24]`` chances of the couples by rank, after Zipf: 1 / (rank + 2) to the power ``skew``.

    Args:
        skew: 0 makes all couples equally frequent.
    """
    weights = (torch.arange(COUPLES) + HEAD) ** -skew
    return weights / weights.sum()


def by_frequency() -> list[int]:
    """Pair indices, most frequent in the training pictures first; couples stay together."""
    return [pair for both in couples() for pair in both]


def by_company(pair: int) -> list[int]:
    """The other 47 pairs by how often training pictures show them with ``pair``, most first."""
    rest = [other for other in by_frequency() if other not in (pair, partner(pair))]
    return [partner(pair), *rest]
