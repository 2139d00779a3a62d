"""The words of the shape world: eight colours, six shapes, and their 48 pairs."""

from __future__ import annotations

import torch

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (216, 38, 38),
    "green": (40, 160, 60),
    "blue": (40, 76, 220),
    "yellow": (244, 220, 44),
    "orange": (244, 132, 24),
    "purple": (128, 46, 176),
    "cyan": (56, 208, 226),
    "pink": (248, 136, 190),
}
SHAPES = ("circle", "square", "triangle", "diamond", "ring", "cross")
COLOUR_NAMES = tuple(COLOURS)
PAIRS = tuple((colour, shape) for colour in COLOUR_NAMES for shape in SHAPES)

Pair = tuple[str, str]


def pair_index(colour: str, shape: str) -> int:
    """Index of (colour, shape) in `PAIRS`, 0 to 47.

    Raises:
        ValueError: an unknown word; the message lists the known ones.
    """
    if colour not in COLOURS:
        raise ValueError(f"unknown colour {colour!r}; known: {', '.join(COLOUR_NAMES)}")
    if shape not in SHAPES:
        raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")
    return COLOUR_NAMES.index(colour) * len(SHAPES) + SHAPES.index(shape)


def rgb_table(device: torch.device | str = "cpu") -> torch.Tensor:
    """Colours as ``[8, 3]`` floats in 0 to 1, in the order of `COLOUR_NAMES`."""
    return torch.tensor(list(COLOURS.values()), device=device, dtype=torch.float32) / 255
