"""Motion in words: "a red circle moving left slowly and a blue square standing still".

Every object of a clip moves at an even speed in one of four directions, or not at all. A speed is
the way travelled in `SPAN` frame steps, the length of a trained clip, as a fraction of the side.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from attnctl.assets.world.captions import parse, phrase
from attnctl.assets.world.palette import COLOUR_NAMES, PAIRS, SHAPES, Pair

FRAMES = 17
SPAN = FRAMES - 1
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
SPEEDS = {"slowly": 0.12, "": 0.24, "fast": 0.4}
SENTENCES = ("{}", "a video of {}", "a clip of {}", "{} on a grey background")
MOTION_WORDS = (*DIRECTIONS, "slowly", "fast", "moving", "standing", "still", "video", "clip")
ONE_IN = 8


class Motion(NamedTuple):
    """A direction of `DIRECTIONS` and a speed of `SPEEDS`; both empty for standing still."""

    direction: str
    speed: str

    def __str__(self) -> str:
        if self == STILL:
            return "standing still"
        return f"moving {self.direction} {self.speed}".strip()


STILL = Motion("", "")
MOTIONS = (*(Motion(one, speed) for one in DIRECTIONS for speed in SPEEDS), STILL)
_FOUND = re.compile(
    rf"\b({'|'.join(COLOUR_NAMES)})\s+({'|'.join(SHAPES)})\s+(?:standing\s+still"
    rf"|moving\s+({'|'.join(DIRECTIONS)})(?:\s+(slowly|fast))?)\b",
    re.IGNORECASE,
)
Moved = tuple[Pair, Motion]


def motion_caption(moved: Iterable[Moved], sentence: str = "{}") -> str:
    """Caption of objects with their motions, joined by "and", put into a sentence.

    Raises:
        ValueError: no object was given.
    """
    parts = [f"{phrase(*pair)} {motion}" for pair, motion in moved]
    if not parts:
        raise ValueError("a caption needs at least one object with its motion")
    return sentence.format(" and ".join(parts))


def parse_motion(prompt: str) -> tuple[Moved, ...]:
    """The objects a prompt names and how each one moves, in its order.

    Raises:
        ValueError: the prompt names no object, one twice, or one without its motion.
    """
    found = tuple(
        ((colour.lower(), shape.lower()), Motion(direction.lower(), speed.lower()))
        for colour, shape, direction, speed in _FOUND.findall(prompt)
    )
    if len(parse(prompt)) > len(found):
        example = motion_caption([(PAIRS[0], MOTIONS[0])])
        raise ValueError(f"not every object of {prompt!r} has a motion; say e.g. {example!r}")
    return found


def is_heldout_motion(pair: Pair, direction: str) -> bool:
    """True if no training clip shows this object moving that way ("": standing still).

    A checksum of the words holds out about one in eight of the 240 combinations.
    """
    text = f"{' '.join(pair)}|{direction or 'still'}"
    return zlib.crc32(text.encode()) % ONE_IN == 0


@lru_cache(maxsize=1)
def _table() -> torch.Tensor:
    rows = [[is_heldout_motion(pair, one.direction) for one in MOTIONS] for pair in PAIRS]
    return torch.tensor(rows)


def shows_heldout_motion(pair: torch.Tensor, motion: torch.Tensor) -> torch.Tensor:
    """Which scenes contain an object whose motion is held out.

    Args:
        pair: ``[B, K]`` pair indices, -1 where there is no object.
        motion: ``[B, K]`` indices into `MOTIONS`.

    Returns:
        ``[B]`` bool.
    """
    held = _table().to(pair.device)[pair.clamp(min=0), motion]
    return (held & (pair >= 0)).any(1)


def velocity_table(device: torch.device | str = "cpu") -> torch.Tensor:
    """``[13, 2]`` way travelled in `SPAN` frame steps by each of `MOTIONS`."""
    ways = [
        [SPEEDS[one.speed] * part for part in DIRECTIONS.get(one.direction, (0.0, 0.0))]
        for one in MOTIONS
    ]
    return torch.tensor(ways, device=device)


def motion_indices(prompts: Sequence[str], objects: int) -> torch.Tensor:
    """``[B, objects]`` indices into `MOTIONS`; -1 where a prompt names fewer objects."""
    found = torch.full((len(prompts), objects), -1)
    for row, prompt in zip(found, prompts, strict=True):
        motions = [MOTIONS.index(motion) for _, motion in parse_motion(prompt)]
        row[: len(motions)] = torch.tensor(motions)
    return found
