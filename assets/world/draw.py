"""Anti-aliased drawing of scenes by signed distances, batched, on CPU or GPU."""

from __future__ import annotations

import torch

from attnctl.assets.world.palette import rgb_table
from attnctl.assets.world.scenes import Scenes
from attnctl.assets.world.shapes import DISTANCES

SIZE = 64


def draw(
    scenes: Scenes,
    size: int = SIZE,
    centres: torch.Tensor | None = None,
    opacity: torch.Tensor | None = None,
) -> torch.Tensor:
    """Pictures of scenes, or clips when the objects' places are given frame by frame.

    Args:
        scenes: batch of B scenes.
        size: side of the square picture in pixels.
        centres: ``[B, F, K, 2]`` places per frame for a clip; None draws ``scenes.centre``.
        opacity: ``[B, K]`` how much objects cover what is behind them (pictures only);
            None: wholly.

    Returns:
        ``[B, 3, size, size]``, or ``[B, F, 3, size, size]`` for clips; RGB in 0 to 1.
    """
    if centres is None:
        return _picture(scenes, size, opacity)
    frames = centres.shape[1]
    pair, radius, background = (
        one.repeat_interleave(frames, 0) for one in (scenes.pair, scenes.radius, scenes.background)
    )
    many = Scenes(pair, centres.flatten(0, 1), radius, background)
    return _picture(many, size).unflatten(0, (-1, frames))


def _picture(scenes: Scenes, size: int, opacity: torch.Tensor | None = None) -> torch.Tensor:
    canvas = blank(scenes.background, size)
    solid = scenes.there.float() if opacity is None else scenes.there * opacity
    colours = rgb_table(canvas.device)[scenes.colour]
    for k in range(scenes.pair.shape[1]):
        shown = coverage(distance(scenes, k, size), size) * solid[:, k, None, None]
        canvas = paint(canvas, shown, colours[:, k])
    return canvas


def blank(background: torch.Tensor, size: int) -> torch.Tensor:
    """Empty canvas ``[B, 3, size, size]`` of the given grey levels ``[B]``."""
    return background[:, None, None, None].expand(-1, 3, size, size).clone()


def pixel_centres(size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """``[size]`` coordinates of the pixels' centres along one side, in 0 to 1."""
    return (torch.arange(size, device=device) + 0.5) / size


def offsets(centre: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x ``[B, 1, size]`` and y ``[B, size, 1]`` of every pixel from centres ``[B, 2]``."""
    line = pixel_centres(size, centre.device)
    x = line[None, None, :] - centre[:, 0, None, None]
    y = line[None, :, None] - centre[:, 1, None, None]
    return x, y


def distance(scenes: Scenes, k: int, size: int, shape: torch.Tensor | None = None) -> torch.Tensor:
    """Signed distance ``[B, size, size]`` to object ``k`` of every scene, negative inside.

    Args:
        scenes: batch of B scenes.
        k: which object.
        size: side of the picture in pixels.
        shape: ``[B]`` shape indices to use instead of the scenes' own.
    """
    x, y = offsets(scenes.centre[:, k], size)
    radius = scenes.radius[:, k, None, None]
    every = torch.stack([one(x, y, radius) for one in DISTANCES])
    chosen = scenes.shape[:, k] if shape is None else shape
    return every[chosen, torch.arange(len(scenes), device=every.device)]


def coverage(signed: torch.Tensor, size: int) -> torch.Tensor:
    """Share of each pixel that lies inside, from distances in fractions of the side."""
    return (0.5 - signed * size).clamp(0, 1)


def paint(canvas: torch.Tensor, shown: torch.Tensor, rgb: torch.Tensor) -> torch.Tensor:
    """Canvas with a colour laid over it.

    Args:
        canvas: ``[B, 3, H, W]``.
        shown: ``[B, H, W]`` opacity, 0 to 1.
        rgb: ``[B, 3]``, or ``[B, 3, H, W]`` for a colour that varies.
    """
    rgb = rgb[:, :, None, None] if rgb.ndim == 2 else rgb
    return torch.lerp(canvas, rgb.expand_as(canvas), shown[:, None])
