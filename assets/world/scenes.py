"""Scenes: which objects stand where, one by one or as a batch of tensors.

Lengths are fractions of the picture's side; x runs to the right and y downwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from attnctl.assets.world.palette import PAIRS, SHAPES, Pair, pair_index


@dataclass(frozen=True)
class Object:
    """One object: its words, its centre and its radius (of the circle around it, roughly)."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float

    def __post_init__(self) -> None:
        pair_index(self.colour, self.shape)

    @property
    def pair(self) -> Pair:
        """(colour, shape)."""
        return self.colour, self.shape


@dataclass(frozen=True)
class Scene:
    """Objects, drawn in this order, on a grey background (0 black, 1 white)."""

    objects: tuple[Object, ...]
    background: float = 0.5


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes as tensors, so that thousands are drawn at once.

    Attributes:
        pair: ``[B, K]`` int64 index into `palette.PAIRS`, -1 where there is no object.
        centre: ``[B, K, 2]`` x and y.
        radius: ``[B, K]``.
        background: ``[B]`` grey level.
    """

    pair: torch.Tensor
    centre: torch.Tensor
    radius: torch.Tensor
    background: torch.Tensor

    @classmethod
    def of(cls, scenes: Sequence[Scene]) -> Scenes:
        """Batch of single scenes; shorter ones are filled up with empty places."""
        most = max((len(scene.objects) for scene in scenes), default=0)
        pair = torch.full((len(scenes), most), -1)
        centre = torch.full((len(scenes), most, 2), 0.5)
        radius = torch.full((len(scenes), most), 0.1)
        for b, scene in enumerate(scenes):
            for k, one in enumerate(scene.objects):
                pair[b, k] = pair_index(*one.pair)
                centre[b, k] = torch.tensor([one.x, one.y])
                radius[b, k] = one.radius
        return cls(pair, centre, radius, torch.tensor([scene.background for scene in scenes]))

    def __len__(self) -> int:
        return len(self.pair)

    def __getitem__(self, rows: slice | torch.Tensor) -> Scenes:
        return Scenes(*(getattr(self, field.name)[rows] for field in fields(self)))

    def to(self, device: torch.device | str) -> Scenes:
        """The same scenes on another device."""
        return Scenes(*(getattr(self, field.name).to(device) for field in fields(self)))

    @property
    def there(self) -> torch.Tensor:
        """``[B, K]`` bool: is there an object at this place."""
        return self.pair >= 0

    @property
    def colour(self) -> torch.Tensor:
        """``[B, K]`` colour index (0 where there is no object)."""
        return self.pair.clamp(min=0) // len(SHAPES)

    @property
    def shape(self) -> torch.Tensor:
        """``[B, K]`` shape index (0 where there is no object)."""
        return self.pair.clamp(min=0) % len(SHAPES)

    def pairs(self) -> list[tuple[Pair, ...]]:
        """The words of each scene's objects, in drawing order."""
        return [tuple(PAIRS[i] for i in row if i >= 0) for row in self.pair.tolist()]

    def scene(self, row: int) -> Scene:
        """Scene number ``row`` as a `Scene`."""
        there = [k for k, index in enumerate(self.pair[row].tolist()) if index >= 0]
        return Scene(tuple(self._object(row, k) for k in there), float(self.background[row]))

    def _object(self, row: int, k: int) -> Object:
        x, y = self.centre[row, k].tolist()
        return Object(*PAIRS[int(self.pair[row, k])], x, y, float(self.radius[row, k]))
