"""tiny-llava's contact sheet: photos, what was asked, and what the model said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from attnctl.assets.train.sheet import contact_sheet
from attnctl.assets.world.chair import mentions
from attnctl.assets.world.evaluation import Photo
from attnctl.assets.world.pope import questions
from attnctl.assets.world.questions import BRIEF, COUNT

TEXT = 80


def draw_sheet(answers: Callable[..., list[str]], photos: Sequence[Photo], path: Path) -> None:
    """Contact sheet of photos with one question each: present, absent, count, description.

    Args:
        answers: answers questions about photos, given as pairs, with a greatest length.
        photos: the photos.
        path: the PNG to write.
    """
    asked = [question(photo) for photo in photos]
    told = answers([(photo, words) for photo, (words, _) in zip(photos, asked, strict=True)], 40)
    good = [check(one) for (_, check), one in zip(asked, told, strict=True)]
    pixels = np.stack([np.asarray(photo.image) for photo in photos])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    lines = [f"{words} {one}" for (words, _), one in zip(asked, told, strict=True)]
    contact_sheet(images, lines, good, path, text=TEXT)


def question(photo: Photo) -> tuple[str, Callable[[str], bool]]:
    """A question about a photo, its kind by the photo's number, and the check of an answer."""
    kind = photo.number % 4
    if kind < 2:
        case = questions([photo], "adversarial")[kind]
        return case.question, lambda told: told.lower() == case.label
    if kind == 2:
        return COUNT[0], lambda told: told == str(len(photo.items))
    names = {one.name for one in photo.items}
    return BRIEF[0], lambda told: {*mentions(told)} == names
