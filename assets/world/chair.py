"""CHAIR for the shape world: which named objects are not in the picture.

CHAIR_i = hallucinated mentions / mentions, CHAIR_s = captions with any / captions, both over the
whole set; recall = objects found / objects there; length in words.

References:
    Object Hallucination in Image Captioning, Rohrbach et al. 2018, arXiv 1809.02156.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from attnctl.assets.world.palette import COLOUR_NAMES, SHAPES

_NAMED = re.compile(rf"\b({'|'.join(COLOUR_NAMES)}) ({'|'.join(SHAPES)})\b")


def mentions(caption: str) -> list[str]:
    """The objects a caption names, in its order, repetitions kept, e.g. ``["red circle"]``."""
    return [" ".join(found) for found in _NAMED.findall(caption.lower())]


def chair(captions: Sequence[str], truth: Sequence[Sequence[str]]) -> dict[str, Any]:
    """CHAIR figures.

    Args:
        captions: N captions.
        truth: the names of the objects in each of the N pictures.

    Returns:
        chair_s, chair_i and recall (0 to 1), length (words), distinct (share of different
        captions), and n. Shares of nothing are 0.
    """
    named = [mentions(caption) for caption in captions]
    wrong = [
        [one for one in said if one not in there] for said, there in zip(named, truth, strict=True)
    ]
    found = sum(len({*said} & {*there}) for said, there in zip(named, truth, strict=True))
    count = max(1, len(captions))
    return {
        "chair_s": round(sum(map(bool, wrong)) / count, 4),
        "chair_i": round(sum(map(len, wrong)) / max(1, sum(map(len, named))), 4),
        "recall": round(found / max(1, sum(map(len, truth))), 4),
        "length": round(sum(len(caption.split()) for caption in captions) / count, 2),
        "distinct": round(len(set(captions)) / count, 4),
        "n": len(captions),
    }
