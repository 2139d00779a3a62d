"""The training photos of tiny-llava, drawn once, with their captions and close-ups."""

from __future__ import annotations

import random
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from tqdm import trange
from transformers import PreTrainedTokenizerBase

from attnctl.assets.train.llava_parts import GRID
from attnctl.assets.train.llava_slots import Turns, turns
from attnctl.assets.world.habits import Habits, training_photos
from attnctl.assets.world.palette import PAIRS
from attnctl.assets.world.photos import SIZE, Photos, shoot
from attnctl.assets.world.questions import DESCRIBE, cell, description
from attnctl.assets.world.sampling import uniform

CAPTION = 59
CLOSE_UP = (0.25, 0.6)
AIMED = 0.7


class Pool(NamedTuple):
    """N photos, the first M of them with a close-up.

    Attributes:
        pixels: ``[N, 3, side, side]`` uint8.
        pair: ``[N, 4]`` pair indices, -1 where there is no object.
        centre: ``[N, 4, 2]`` places.
        patches: ``[N, 144]`` which pair each patch shows most of, 48 for the background.
        captions: turns ``[N, 59]`` that ask for a description.
        close: ``[M, 3, side, side]`` uint8.
        focus: ``[M]`` place of the object that the close-up is about.
    """

    pixels: Tensor
    pair: Tensor
    centre: Tensor
    patches: Tensor
    captions: Turns
    close: Tensor
    focus: Tensor


def fill_pool(
    words: PreTrainedTokenizerBase,
    n: int,
    side: int,
    habits: Habits,
    source: torch.Generator,
    part: int = 1024,
) -> Pool:
    """Draw and caption ``n`` photos, a quarter of them with a close-up.

    Args:
        words: the tokenizer.
        n: how many.
        side: of the model's pictures in pixels.
        habits: of the photos.
        source: random numbers; the pool is on its device.
        part: photos drawn at once.
    """
    part = min(part, n)
    parts = [
        _part(words, part, side, habits, source, close=4 * done < n, seed=done)
        for done in trange(0, n, part, desc="pool", mininterval=2.0)
    ]
    ids, targets = zip(*(one.captions for one in parts), strict=True)
    columns = {
        name: torch.cat([getattr(one, name) for one in parts])
        for name in Pool._fields
        if name != "captions"
    }
    return Pool(captions=Turns(torch.cat(ids), torch.cat(targets)), **columns)


def _part(
    words: PreTrainedTokenizerBase,
    n: int,
    side: int,
    habits: Habits,
    source: torch.Generator,
    close: bool,
    seed: int,
) -> Pool:
    photos = training_photos(n, habits, source)
    view, focus = close_ups(photos, source)
    kept = n if close else 0
    return Pool(
        seen(photos, side),
        photos.scenes.pair,
        photos.scenes.centre,
        patch_pairs(photos),
        captions(words, photos, random.Random(seed)).to(source.device),
        seen(photos[:kept], side, view[:kept]),
        focus[:kept],
    )


def seen(photos: Photos, side: int, view: Tensor | None = None) -> Tensor:
    """Photos as the model's image processor hands them over, before scaling: uint8.

    They are drawn at their full size and made smaller with the same filter.
    """
    parts = []
    for start in range(0, len(photos), 256):
        rows = slice(start, start + 256)
        drawn = shoot(photos[rows], SIZE, None if view is None else view[rows])
        small = interpolate(drawn, size=(side, side), mode="bicubic", antialias=True)
        parts.append((small.clamp(0, 1) * 255).round().byte())
    empty = torch.zeros(0, 3, side, side, dtype=torch.uint8, device=photos.noise.device)
    return torch.cat([empty, *parts])


def close_ups(photos: Photos, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """Windows ``[B, 3]`` (left, top, side), most about an object, and its place ``[B]``."""
    pair, centre = photos.scenes.pair, photos.scenes.centre
    n = len(pair)
    noise = uniform(pair.shape, (0.0, 1.0), source).masked_fill(pair < 0, -1)
    focus = noise.argmax(1)
    middle = centre[torch.arange(n, device=pair.device), focus]
    aside = uniform((n, 2), (-0.25, 0.25), source)
    side = uniform((n, 1), CLOSE_UP, source)
    aimed = uniform((n, 1), (0.0, 1.0), source) < AIMED
    spot = torch.where(aimed, middle + aside * side, uniform((n, 2), (0.0, 1.0), source))
    corner = torch.minimum((spot - side / 2).clamp(min=0), 1 - side)
    return torch.cat([corner, side], dim=1), focus


def patch_pairs(photos: Photos) -> Tensor:
    """``[B, 144]`` the pair whose middle part covers a patch's centre region, else 48.

    A patch belongs to the nearest object whose radius, plus a third of a patch, reaches it.
    """
    line = (torch.arange(GRID, device=photos.noise.device) + 0.5) / GRID
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).flatten(0, 1)
    away = (grid[None, None] - photos.scenes.centre[:, :, None]).norm(dim=-1)
    away = away - photos.scenes.radius[..., None]
    away = away.masked_fill(~photos.scenes.there[..., None], 1.0)
    least, which = away.min(1)
    pair = photos.scenes.pair.gather(1, which)
    return torch.where(least < 1 / (3 * GRID), pair, len(PAIRS)).to(torch.int16)


def captions(words: PreTrainedTokenizerBase, photos: Photos, chance: random.Random) -> Turns:
    """One description per photo; couples are named one after the other."""
    said = []
    places, backgrounds = photos.scenes.centre.tolist(), photos.scenes.background.tolist()
    for pairs, centres, background in zip(photos.scenes.pairs(), places, backgrounds, strict=True):
        request = chance.choice(DESCRIBE)
        cells = [cell(*centre) for centre in centres[: len(pairs)]]
        said.append((request, description(request, pairs, cells, background)))
    return turns(words, said, CAPTION)
