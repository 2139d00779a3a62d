"""Seeded sampling of moving scenes, drawing them as clips, and prompts of the same kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import torch
from torch import Tensor

from attnctl.assets.world.draw import SIZE, draw
from attnctl.assets.world.motion import (
    FRAMES,
    MOTIONS,
    SPAN,
    STILL,
    Moved,
    motion_caption,
    shows_heldout_motion,
    velocity_table,
)
from attnctl.assets.world.palette import PAIRS, SHAPES
from attnctl.assets.world.sampling import (
    BACKGROUND,
    TRIES,
    Split,
    sample_pairs,
    smallest_gap,
    uniform,
)
from attnctl.assets.world.scenes import Scenes

RADIUS = (0.13, 0.18)
JITTER = (0.92, 1.08)
STANDING = 0.12
MARGIN = 0.02


@dataclass(frozen=True)
class Moving:
    """A batch of moving scenes.

    Attributes:
        scenes: as they are in the first frame.
        motion: ``[B, K]`` indices into `motion.MOTIONS`.
        centres: ``[B, F, K, 2]`` place of every object in every frame.
    """

    scenes: Scenes
    motion: Tensor
    centres: Tensor

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, rows: slice | Tensor) -> Moving:
        return Moving(self.scenes[rows], self.motion[rows], self.centres[rows])

    def draw(self, size: int = SIZE) -> Tensor:
        """Clips ``[B, F, 3, size, size]``, RGB in 0 to 1."""
        return draw(self.scenes, size, self.centres)

    def moved(self) -> list[tuple[Moved, ...]]:
        """The words of each scene's objects and motions, in drawing order."""
        rows = zip(self.scenes.pair.tolist(), self.motion.tolist(), strict=True)
        return [_words(*row) for row in rows]

    def captions(self) -> list[str]:
        """One bare caption per scene."""
        return [motion_caption(row) for row in self.moved()]


def _words(pair: list[int], motion: list[int]) -> tuple[Moved, ...]:
    both = zip(pair, motion, strict=True)
    return tuple((PAIRS[i], MOTIONS[m]) for i, m in both if i >= 0)


def sample_moving(
    n: int,
    *,
    objects: int | Sequence[float] = (2, 1),
    split: Split = "any",
    seed: int | torch.Generator = 0,
    frames: int = FRAMES,
    radius: tuple[float, float] = RADIUS,
) -> Moving:
    """Random moving scenes; objects have different colours, keep apart and stay inside.

    In clips much longer than `motion.FRAMES`, objects that are not slow leave the picture.

    Args:
        n: how many.
        objects: a fixed number of objects, or the weights of 1, 2, ... objects.
        split: "train" shows no held-out motion and no held-out combination of two objects,
            "heldout" at least one held-out motion, "any" both.
        seed: a number (then the scenes are on the CPU) or a generator (then on its device).
        frames: length of the clips.
        radius: least and greatest radius, as a fraction of the picture's side.
    """
    weights = [0.0] * (objects - 1) + [1.0] if isinstance(objects, int) else list(objects)
    source = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    pair, motion = sample_motions(n, weights, split, source)
    size = uniform(pair.shape, radius, source)
    centres = paths(pair >= 0, size, motion, frames, source)
    scenes = Scenes(pair, centres[:, 0], size, uniform((n,), BACKGROUND, source))
    return Moving(scenes, motion, centres)


def sample_motions(
    n: int, weights: Sequence[float], split: Split, source: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Pair and motion indices, each ``[n, len(weights)]``; pairs are -1 where there is none."""
    pair, motion = _draw(n, weights, split, source)
    wrong = _wrong(pair, motion, split)
    while bool(wrong.any()):
        pair[wrong], motion[wrong] = _draw(int(wrong.sum()), weights, split, source)
        wrong = _wrong(pair, motion, split)
    return pair, motion


def _draw(
    n: int, weights: Sequence[float], split: Split, source: torch.Generator
) -> tuple[Tensor, Tensor]:
    pair = sample_pairs(n, weights, "train" if split == "train" else "any", source)
    chance = torch.full((len(MOTIONS),), (1 - STANDING) / (len(MOTIONS) - 1))
    chance[MOTIONS.index(STILL)] = STANDING
    chance = chance.to(source.device)
    motion = torch.multinomial(chance, pair.numel(), replacement=True, generator=source)
    return pair, motion.view(pair.shape)


def _wrong(pair: Tensor, motion: Tensor, split: Split) -> Tensor:
    """Rows of another split, and those in which two objects share a colour."""
    colour = torch.where(pair >= 0, pair // len(SHAPES), -1 - torch.arange(pair.shape[1]).to(pair))
    twice = (colour[:, :, None] == colour[:, None]).sum((1, 2)) > pair.shape[1]
    if split == "any":
        return twice
    return twice | (shows_heldout_motion(pair, motion) == (split == "train"))


def paths(
    there: Tensor, radius: Tensor, motion: Tensor, frames: int, source: torch.Generator
) -> Tensor:
    """Places ``[B, F, K, 2]`` along straight lines: of `TRIES`, the first without overlap.

    Args:
        there: ``[B, K]`` bool, is there an object.
        radius: ``[B, K]``.
        motion: ``[B, K]`` indices into `motion.MOTIONS`.
        frames: F.
        source: random numbers.
    """
    batch, most = radius.shape
    way = velocity_table(radius.device)[motion] * (frames - 1) / SPAN
    way = way * uniform((batch, most, 1), JITTER, source)
    edge = (radius + MARGIN)[..., None]
    low, high = edge - way.clamp(max=0), 1 - edge - way.clamp(min=0)
    free = uniform((batch, TRIES, most, 2), (0.0, 1.0), source)
    start = torch.lerp(low[:, None], high[:, None], free)
    time = torch.linspace(0, 1, frames, device=radius.device)[:, None, None]
    gap = smallest_gap(
        (start[:, :, None] + way[:, None, None] * time).flatten(1, 2), there, radius
    )
    gap = gap.unflatten(1, (TRIES, frames)).amin(2)
    first = torch.where(gap > MARGIN, 2.0, gap).argmax(1)
    chosen = start[torch.arange(batch, device=radius.device), first]
    return chosen[:, None] + way[:, None] * time


def moving_prompts(
    n: int,
    objects: int = 1,
    *,
    split: Split = "train",
    seed: int = 0,
    speeds: Sequence[str] = ("slowly", "", "fast"),
) -> list[str]:
    """``n`` prompts, different ones as long as there are enough.

    Args:
        n: how many.
        objects: objects per prompt.
        split: "train", "heldout" (a motion that no training clip shows) or "any".
        seed: of the choice.
        speeds: of `motion.SPEEDS`, those that may occur; standing still has the speed "".
    """
    source, drawn = torch.Generator().manual_seed(seed), dict[str, None]()
    weights = [0.0] * (objects - 1) + [1.0]
    while len(drawn) < n:
        pair, motion = sample_motions(8 * n, weights, split, source)
        rows = [_words(*row) for row in zip(pair.tolist(), motion.tolist(), strict=True)]
        fit = (row for row in rows if all(motion.speed in speeds for _, motion in row))
        known = len(drawn)
        drawn.update(dict.fromkeys(map(motion_caption, fit)))
        if len(drawn) == known:
            break
    return list(islice(cycle(drawn), n))
