"""Photos: scenes as a camera gives them, with faint objects and grain, drawn at any size.

The grain is a field of fixed coarseness that belongs to the photo, so the same photo drawn larger
or cut out of shows the same grain.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from attnctl.assets.world.draw import draw
from attnctl.assets.world.scenes import Scenes

GRAIN = 56
SIZE = 224


@dataclass(frozen=True)
class Photos:
    """A batch of B photos.

    Attributes:
        scenes: what they show, up to K objects each.
        opacity: ``[B, K]`` how visible each object is against the background, 0 to 1.
        noise: ``[B]`` strength of the grain.
        grain: ``[B, 3, GRAIN, GRAIN]`` the grain itself, of unit variance.
        dim: ``[B]`` bool, whether the photo is one of the dim ones.
    """

    scenes: Scenes
    opacity: Tensor
    noise: Tensor
    grain: Tensor
    dim: Tensor

    def __len__(self) -> int:
        return len(self.dim)

    def __getitem__(self, rows: slice | Tensor) -> Photos:
        return Photos(*(getattr(self, field.name)[rows] for field in fields(self)))

    def to(self, device: torch.device | str) -> Photos:
        """The same photos on another device."""
        return Photos(*(getattr(self, field.name).to(device) for field in fields(self)))


def shoot(photos: Photos, size: int = SIZE, view: Tensor | None = None) -> Tensor:
    """Draw photos, or cut-outs of them at full resolution.

    Args:
        photos: B photos.
        size: side of the square picture in pixels.
        view: ``[B, 3]`` left, top and side of the square to show, as fractions of the photo's
            side; None shows the whole photo.

    Returns:
        ``[B, 3, size, size]`` RGB in 0 to 1.
    """
    if view is None:
        view = torch.tensor([0.0, 0.0, 1.0], device=photos.noise.device).expand(len(photos), 3)
    picture = draw(zoomed(photos.scenes, view), size, opacity=photos.opacity)
    grain = grid_sample(
        photos.grain, _grid(view, size), align_corners=False, padding_mode="border"
    )
    return (picture + grain * photos.noise[:, None, None, None]).clamp(0, 1)


def zoomed(scenes: Scenes, view: Tensor) -> Scenes:
    """The scenes as seen through a window.

    Args:
        scenes: B scenes.
        view: ``[B, 3]`` left, top and side of the window.
    """
    side = view[:, None, 2:]
    centre = (scenes.centre - view[:, None, :2]) / side
    return Scenes(scenes.pair, centre, scenes.radius / side[..., 0], scenes.background)


def _grid(view: Tensor, size: int) -> Tensor:
    """Where each pixel of the window lies in the grain, in -1 to 1."""
    side, zero = view[:, 2], torch.zeros_like(view[:, 2])
    across = torch.stack([side, zero, 2 * view[:, 0] + side - 1], dim=1)
    down = torch.stack([zero, side, 2 * view[:, 1] + side - 1], dim=1)
    return affine_grid(torch.stack([across, down], 1), [len(view), 3, size, size], False)
