"""POPE for the shape world: the official construction, fields and wording.

Up to three objects of a photo are asked about, each followed by one that is not there: drawn at
random, the most frequent absent one, or the absent one most often seen with the object just
asked about. Frequencies are those of the training photos, which the model has its habits from.

References:
    Evaluating Object Hallucination in Large Vision-Language Models, Li et al. 2023,
    arXiv 2305.10355.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image

from attnctl.assets.world.couples import by_company, by_frequency, partner
from attnctl.assets.world.evaluation import Item, Photo, Split, album
from attnctl.assets.world.habits import Habits
from attnctl.assets.world.palette import PAIRS
from attnctl.assets.world.questions import presence

Negatives = Literal["random", "popular", "adversarial"]
SPLITS: tuple[Negatives, ...] = ("random", "popular", "adversarial")
PER_PHOTO = 3


@dataclass(frozen=True)
class Case:
    """One question of POPE.

    Attributes:
        question_id: 1 and up.
        photo: what it is about; ``photo.image`` is the picture.
        pair: index of the object asked about.
        question: e.g. "Is there an orange ring in the image?".
        label: "yes" or "no".
        item: the object itself; None if it is not there.
    """

    question_id: int
    photo: Photo
    pair: int
    question: str
    label: Literal["yes", "no"]
    item: Item | None

    @property
    def image(self) -> Image.Image:
        """The picture."""
        return self.photo.image

    @property
    def dim(self) -> bool:
        """Whether the photo is dim."""
        return self.photo.dim

    @property
    def small(self) -> bool:
        """Whether the object is there and is small."""
        return self.item is not None and self.item.small

    @property
    def partner_there(self) -> bool:
        """Whether the photo shows the partner of the object asked about."""
        return partner(self.pair) in {one.index for one in self.photo.items}

    def row(self) -> dict[str, Any]:
        """The line of the official file."""
        return {
            "question_id": self.question_id,
            "image": self.photo.file,
            "text": self.question,
            "label": self.label,
        }


def pope(
    negatives: Negatives = "adversarial",
    n_images: int = 500,
    seed: int = 0,
    *,
    split: Split = "decorrelated",
    habits: Habits | None = None,
) -> list[Case]:
    """POPE's questions with their pictures, the same as in the exported files.

    Args:
        negatives: how absent objects are chosen: "random", "popular" or "adversarial".
        n_images: photos; six questions about each that shows three objects or more.
        seed: of photos and questions.
        split: of the photos (`evaluation.album`).
        habits: of the photos; None: as shipped.

    Raises:
        ValueError: unknown ``negatives``.
    """
    return questions(album(n_images, seed, split, habits), negatives, seed)


def questions(photos: Sequence[Photo], negatives: Negatives, seed: int = 0) -> list[Case]:
    """POPE's questions about photos; the objects asked about that are there are the same in all.

    Raises:
        ValueError: unknown ``negatives``.
    """
    if negatives not in SPLITS:
        raise ValueError(f"no POPE split {negatives!r}; there are: {', '.join(SPLITS)}")
    cases: list[Case] = []
    for photo in photos:
        chance = random.Random(f"{seed} {photo.number}")
        there = {one.index for one in photo.items}
        asked: set[int] = set()
        for item in chance.sample(photo.items, min(PER_PHOTO, len(photo.items))):
            absent = _absent(item.index, there | asked, negatives, chance)
            asked.add(absent)
            cases.append(_case(len(cases) + 1, photo, item.index, item))
            cases.append(_case(len(cases) + 1, photo, absent, None))
    return cases


def _absent(pair: int, taken: set[int], negatives: Negatives, chance: random.Random) -> int:
    """The first object, in the order of the split, that is neither there nor asked about."""
    if negatives == "random":
        ordered = chance.sample(range(len(PAIRS)), len(PAIRS))
    else:
        ordered = by_frequency() if negatives == "popular" else by_company(pair)
    return next(one for one in ordered if one not in taken)


def _case(question_id: int, photo: Photo, pair: int, item: Item | None) -> Case:
    label: Literal["yes", "no"] = "yes" if item else "no"
    return Case(question_id, photo, pair, presence(*PAIRS[pair]), label, item)
