"""Photos at random, with the habits a vision-language model picks up: who comes with whom.

In training photos an object's partner is nearly always there, some couples are in many photos,
a third of the photos is dim and many objects are small. In evaluation photos the partner is there
as often as not, whether the photo is dim or not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnctl.assets.world.couples import couples, popularity
from attnctl.assets.world.photos import GRAIN, Photos
from attnctl.assets.world.sampling import BACKGROUND, place, uniform
from attnctl.assets.world.scenes import Scenes

MOST = 4


@dataclass(frozen=True)
class Habits:
    """How photos are made up.

    Attributes:
        together: chance that the partner of a shown object is shown, in training photos.
        skew: of the couples' popularity in training photos (`couples.popularity`).
        couples: weights of one and of two couples in a training photo.
        dim: share of dim photos in training.
        opacity: least and greatest opacity of the objects of a dim photo.
        noise: least and greatest strength of a dim photo's grain.
        clear_noise: strength of the other photos' grain.
        small: share of small objects.
        small_radius: their least and greatest radius, as a fraction of the side.
        large_radius: the same of the other objects.
        eval_together: chance of the partner in evaluation photos.
        eval_skew: of the popularity in evaluation photos.
        eval_objects: weights of one, two, three and four objects in evaluation photos.
        eval_dim: share of dim photos in evaluation.
        eval_small: share of small objects in evaluation.
    """

    together: float = 0.93
    skew: float = 1.0
    couples: tuple[float, ...] = (0.4, 0.6)
    dim: float = 0.34
    opacity: tuple[float, ...] = (0.03, 0.22)
    noise: tuple[float, ...] = (0.03, 0.09)
    clear_noise: float = 0.01
    small: float = 0.35
    small_radius: tuple[float, ...] = (0.04, 0.075)
    large_radius: tuple[float, ...] = (0.09, 0.17)
    eval_together: float = 0.5
    eval_skew: float = 0.5
    eval_objects: tuple[float, ...] = (0.0, 0.0, 0.5, 0.5)
    eval_dim: float = 0.5
    eval_small: float = 0.35

    @property
    def boundary(self) -> float:
        """Radius that divides small objects from large ones."""
        return (self.small_radius[1] + self.large_radius[0]) / 2


def training_photos(n: int, habits: Habits, source: torch.Generator) -> Photos:
    """``n`` random photos with the training habits, on the generator's device."""
    pair = training_pairs(n, habits, source)
    return photos_of(pair, habits, habits.dim, habits.small, source)


def evaluation_photos(n: int, habits: Habits, source: torch.Generator) -> Photos:
    """``n`` random photos in which partners are there or not regardless of anything else."""
    pair = evaluation_pairs(n, habits, source)
    return photos_of(pair, habits, habits.eval_dim, habits.eval_small, source)


def training_pairs(n: int, habits: Habits, source: torch.Generator) -> Tensor:
    """``[n, 4]`` pair indices, -1 past the last object; couples stand side by side.

    A drawn couple is complete with chance t / (2 - t), which makes P(partner | object) = t.
    """
    both = _ranked(n, 2, habits.skew, source)
    whole = habits.together / (2 - habits.together)
    full = _chance((n, 2), whole, source)
    second = _chance((n, 1), habits.couples[1] / sum(habits.couples), source)
    drawn = torch.cat([torch.ones_like(second), second], dim=1)
    there = torch.stack([drawn, drawn & full], dim=-1)
    return _compact(both.flatten(1), there.flatten(1))


def evaluation_pairs(n: int, habits: Habits, source: torch.Generator) -> Tensor:
    """``[n, 4]`` pair indices: couples are complete with chance ``eval_together``."""
    weights = torch.tensor(habits.eval_objects, device=source.device)
    count = torch.multinomial(weights, n, replacement=True, generator=source) + 1
    both = _ranked(n, MOST, habits.eval_skew, source)
    full = _chance((n, MOST), habits.eval_together, source)
    there = torch.stack([torch.ones_like(full), full], dim=-1).flatten(1)
    there &= there.cumsum(1) <= count[:, None]
    return _compact(both.flatten(1), there)[:, :MOST]


def _ranked(n: int, k: int, skew: float, source: torch.Generator) -> Tensor:
    """``[n, k, 2]`` different couples by popularity, the members of each in random order."""
    weights = popularity(skew).to(source.device).expand(n, -1)
    rank = torch.multinomial(weights, k, replacement=False, generator=source)
    both = torch.tensor(couples(), device=source.device)[rank]
    return torch.where(_chance((n, k, 1), 0.5, source), both.flip(-1), both)


def _chance(shape: tuple[int, ...], chance: float, source: torch.Generator) -> Tensor:
    return torch.rand(*shape, generator=source, device=source.device) < chance


def _compact(pair: Tensor, there: Tensor) -> Tensor:
    """Pairs that are there moved to the front, -1 behind them."""
    order = (~there).to(torch.int8).argsort(dim=1, stable=True)
    return pair.masked_fill(~there, -1).gather(1, order)


def photos_of(
    pair: Tensor, habits: Habits, dim: float, small: float, source: torch.Generator
) -> Photos:
    """Photos of given objects at random places.

    Args:
        pair: ``[B, K]`` pair indices, -1 where there is no object.
        habits: sizes, opacities and strength of the grain.
        dim: share of dim photos.
        small: share of small objects.
        source: random numbers.
    """
    n, shape = len(pair), pair.shape
    tiny = uniform(shape, _two(habits.small_radius), source)
    large = uniform(shape, _two(habits.large_radius), source)
    radius = torch.where(_chance(tuple(shape), small, source), tiny, large)
    scenes = Scenes(
        pair, place(pair >= 0, radius, source), radius, uniform((n,), BACKGROUND, source)
    )
    dark = _chance((n,), dim, source)
    faint = uniform(shape, _two(habits.opacity), source)
    noise = uniform((n,), _two(habits.noise), source)
    grain = torch.randn(n, 3, GRAIN, GRAIN, generator=source, device=source.device)
    return Photos(
        scenes,
        torch.where(dark[:, None], faint, torch.ones_like(faint)),
        torch.where(dark, noise, torch.full_like(noise, habits.clear_noise)),
        grain,
        dark,
    )


def _two(limits: tuple[float, ...]) -> tuple[float, float]:
    low, high = limits
    return low, high
