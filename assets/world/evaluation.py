"""The evaluation photos of the vision-language bench, with what is in them, from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from PIL import Image

from attnctl.assets.world.habits import Habits, evaluation_photos, training_photos
from attnctl.assets.world.palette import PAIRS, Pair
from attnctl.assets.world.photos import SIZE, Photos, shoot
from attnctl.assets.world.questions import cell, references

Split = Literal["decorrelated", "habitual"]
PART = 50


@dataclass(frozen=True)
class Item:
    """One object in a photo.

    Attributes:
        pair: colour and shape.
        index: of the pair in `palette.PAIRS`.
        x, y: centre, as fractions of the side.
        radius: of the circle around it, roughly, as a fraction of the side.
        small: whether it is one of the small ones.
    """

    pair: Pair
    index: int
    x: float
    y: float
    radius: float
    small: bool

    @property
    def name(self) -> str:
        """In words, e.g. "red circle"."""
        return " ".join(self.pair)


@dataclass(frozen=True, eq=False)
class Photo:
    """One photo and what is in it.

    Attributes:
        number: 1 and up; the id in the data files.
        image: the picture, 224 x 224.
        items: the objects.
        dim: whether it is dim.
        background: grey level.
    """

    number: int
    image: Image.Image
    items: tuple[Item, ...]
    dim: bool
    background: float

    @property
    def file(self) -> str:
        """Name of its file, as in COCO's validation set of 2014."""
        return f"COCO_val2014_{self.number:012d}.jpg"

    def captions(self) -> list[str]:
        """Five captions."""
        cells = [cell(one.x, one.y) for one in self.items]
        return references([one.pair for one in self.items], cells, self.background)


def evaluation_set(n: int, habits: Habits, seed: int, split: Split) -> Photos:
    """Photos as tensors on the CPU; the first of a longer set are those of a shorter one.

    Args:
        n: how many.
        habits: how photos are made up.
        seed: of the set; "habitual" photos of any seed are none that a model was trained on.
        split: "decorrelated", or "habitual" for photos with the training habits.
    """
    make = evaluation_photos if split == "decorrelated" else training_photos
    parts = [
        make(PART, habits, torch.Generator().manual_seed(1_000_003 * (seed + 1) + start))
        for start in range(0, n, PART)
    ]
    return joined(parts)[:n]


def joined(parts: Sequence[Photos]) -> Photos:
    """Photos one after another."""
    scenes = [part.scenes for part in parts]
    names = ("pair", "centre", "radius", "background")
    all_scenes = type(scenes[0])(
        *(torch.cat([getattr(one, name) for one in scenes]) for name in names)
    )
    rest = ("opacity", "noise", "grain", "dim")
    return Photos(all_scenes, *(torch.cat([getattr(one, name) for one in parts]) for name in rest))


@lru_cache(maxsize=4)
def album(
    n: int = 500, seed: int = 0, split: Split = "decorrelated", habits: Habits | None = None
) -> tuple[Photo, ...]:
    """Evaluation photos with their facts; the same for the same arguments, on any machine.

    Args:
        n: how many.
        seed: of the set.
        split: "decorrelated" (an object's partner is there as often as not) or "habitual"
            (as in training).
        habits: how photos are made up; None: as shipped.
    """
    habits = habits or Habits()
    photos = evaluation_set(n, habits, seed, split)
    return tuple(
        _photo(start + row, photos[start : start + PART], row, image, habits)
        for start in range(0, n, PART)
        for row, image in enumerate(images(photos[start : start + PART]))
    )


def images(photos: Photos, size: int = SIZE) -> list[Image.Image]:
    """Photos as PIL pictures."""
    pixels = (shoot(photos, size) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(np.ascontiguousarray(one)) for one in pixels]


def _photo(index: int, photos: Photos, row: int, image: Image.Image, habits: Habits) -> Photo:
    scenes = photos.scenes
    items = [
        Item(PAIRS[pair], pair, x, y, radius, radius < habits.boundary)
        for pair, (x, y), radius in zip(
            scenes.pair[row].tolist(),
            scenes.centre[row].tolist(),
            scenes.radius[row].tolist(),
            strict=True,
        )
        if pair >= 0
    ]
    background = float(scenes.background[row])
    return Photo(index + 1, image, tuple(items), bool(photos.dim[row]), background)
