"""Captions and back: "a red circle, a blue square and an orange ring"."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import cycle, islice

import torch

from attnctl.assets.world.palette import COLOUR_NAMES, PAIRS, SHAPES, Pair
from attnctl.assets.world.sampling import Split, sample_pairs

FRAMES = ("{}", "a picture of {}", "a drawing of {}", "{} on a grey background")
WORDS = (*COLOUR_NAMES, *SHAPES, "a", "an", "and", ",", "picture", "drawing", "of", "on", "grey")
WORDS = (*WORDS, "background")
_FOUND = re.compile(rf"\b({'|'.join(COLOUR_NAMES)})\s+({'|'.join(SHAPES)})\b", re.IGNORECASE)


def caption(pairs: Iterable[Pair], frame: str = "{}") -> str:
    """Caption of (colour, shape) pairs in the given order, put into a sentence frame.

    Raises:
        ValueError: no pair was given.
    """
    parts = [phrase(*pair) for pair in pairs]
    if not parts:
        raise ValueError("a caption needs at least one (colour, shape) pair")
    listed = ", ".join(parts[:-1])
    return frame.format(f"{listed} and {parts[-1]}" if listed else parts[-1])


def phrase(colour: str, shape: str) -> str:
    """One object in words, e.g. "an orange ring"."""
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape}"


def parse(prompt: str) -> tuple[Pair, ...]:
    """The (colour, shape) pairs a prompt names, in its order; other words are ignored.

    Raises:
        ValueError: the prompt names no object, or the same one twice.
    """
    found = tuple((colour.lower(), shape.lower()) for colour, shape in _FOUND.findall(prompt))
    if not found:
        raise ValueError(f"no object in {prompt!r}; say e.g. {caption(PAIRS[:1])!r}")
    if len(set(found)) < len(found):
        raise ValueError(f"{prompt!r} names an object twice; prompts name each one once")
    return found


def trained_prompts(n: int, objects: int = 2, *, seed: int = 0) -> list[str]:
    """``n`` prompts of the training distribution (no held-out combination)."""
    return _prompts(n, objects, "train", seed)


def heldout_prompts(n: int, objects: int = 2, *, seed: int = 0) -> list[str]:
    """``n`` prompts, each with two objects that no training picture shows together.

    There are about 450 different ones of two objects (either order); a prompt may come again
    if more are asked for.

    Raises:
        ValueError: ``objects`` is 1; every single object is trained.
    """
    return _prompts(n, objects, "heldout", seed)


def _prompts(n: int, objects: int, split: Split, seed: int) -> list[str]:
    if split == "heldout" and objects < 2:
        raise ValueError("held-out prompts name two objects or more; every single one is trained")
    source, drawn = torch.Generator().manual_seed(seed), dict[str, None]()
    while len(drawn) < n:
        rows = sample_pairs(4 * n, [0.0] * (objects - 1) + [1.0], split, source).tolist()
        known = len(drawn)
        drawn.update(dict.fromkeys(caption(PAIRS[i] for i in row) for row in rows))
        if len(drawn) == known:
            break
    return list(islice(cycle(drawn), n))
