"""One question about one image, and the model's answer to it."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from .bad_data import BadData, EvalError, Skips
from .rows import whole_text

__all__ = ["Answer", "Item", "find_image", "safe_name", "sample", "swap_images", "unique"]


@dataclass(frozen=True)
class Item:
    """A question about an image.

    Attributes:
        id: name of the item, unique in its file.
        image: the image's file, relative to the folder of images.
        question: the words that the file gives.
        truth: what the scorer needs to know, as JSON values.
        path, line: where the item stands.
        others: further places in the folder of images where the image may be.
    """

    id: str
    image: str
    question: str
    truth: Mapping[str, Any]
    path: Path = field(default=Path(), compare=False)
    line: int | None = field(default=None, compare=False)
    others: tuple[str, ...] = field(default=(), compare=False)

    def bad(self, what: str) -> BadData:
        """Return an error about this item."""
        return BadData(self.path, self.line, what)


@dataclass(frozen=True)
class Answer:
    """What the model said about an item.

    Attributes:
        item: the item.
        text: the answer.
        ended: whether the model ended it by itself; None if that is not known.
    """

    item: Item
    text: str
    ended: bool | None = None


def safe_name(name: str) -> bool:
    """Whether a file's name stays inside the folder that it is looked up in."""
    parts = PurePosixPath(name.replace("\\", "/"))
    inside = not parts.is_absolute() and ".." not in parts.parts
    return bool(name) and inside and "\0" not in name and whole_text(name)


def unique(items: Sequence[Item], skips: Skips) -> list[Item]:
    """Return the items without those whose id came before.

    Raises:
        BadData: for an id that comes twice and may not be left out.
    """
    seen: dict[str, Item] = {}
    for item in items:
        if item.id in seen:
            first = seen[item.id]
            skips.bad(item.bad(f"the id {item.id!r} was there before, in line {first.line}"))
        else:
            seen[item.id] = item
    return list(seen.values())


def find_image(item: Item, folder: Path) -> Path:
    """Return the file of an item's image.

    Raises:
        BadData: if there is none, or its name leaves the folder.
    """
    for name in (item.image, *item.others):
        if not safe_name(name):
            raise item.bad(f"the image's name {name!r} leads out of the folder of images")
        if _is_file(folder / name):
            return folder / name
    raise item.bad(f"there is no image {folder / item.image}")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # such as a name that is too long
        return False


def sample(items: Sequence[Item], limit: int | None, seed: int) -> list[Item]:
    """Return at most `limit` items in their order: all those about some images, drawn at random.

    Questions about one image stay together, since splits and scores are made of them.

    Raises:
        EvalError: if not even one image's questions fit.
    """
    if limit is None:
        return list(items)
    by_image: dict[str, list[Item]] = {}
    for item in items:
        by_image.setdefault(item.image, []).append(item)
    chosen: set[str] = set()
    names = sorted(by_image)
    for name in random.Random(seed).sample(names, len(names)):
        if len(chosen) + len(by_image[name]) > limit:
            break
        chosen.update(item.id for item in by_image[name])
    if not chosen:
        raise EvalError(
            f"--limit {limit} leaves no item: questions about one image stay together, and here "
            f"there are up to {max(map(len, by_image.values()))}"
        )
    return [item for item in items if item.id in chosen]


def swap_images(items: Sequence[Item], seed: int) -> dict[str, Item]:
    """Return, by id, for every item one about another image: whose image is shown instead.

    Images are passed on along a circle in random order, so that each is used as often as before.

    Raises:
        EvalError: if there is only one image.
    """
    by_image = {item.image: item for item in items}
    if len(by_image) < 2:
        raise EvalError("a mismatched image needs two images at least")
    names = sorted(by_image)
    circle = random.Random(f"swap {seed}").sample(names, len(names))
    following = dict(zip(circle, [*circle[1:], circle[0]], strict=True))
    return {item.id: by_image[following[item.image]] for item in items}
