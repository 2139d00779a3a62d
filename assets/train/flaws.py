"""Malformed objects, as a failing generator draws them: the detector learns to refuse them."""

from __future__ import annotations

import torch
from torch import Tensor

from attnctl.assets.world.draw import blank, coverage, distance, offsets, paint
from attnctl.assets.world.palette import SHAPES, rgb_table
from attnctl.assets.world.sampling import uniform
from attnctl.assets.world.scenes import Scenes

KINDS = 5
TWO_COLOURED, FUSED, FADED, CUT, COVERED = range(KINDS)


def draw_flawed(scenes: Scenes, kind: Tensor, size: int, source: torch.Generator) -> Tensor:
    """Pictures in which the first object of a scene may be malformed.

    Args:
        scenes: batch of B scenes.
        kind: ``[B]`` what is wrong with the first object; `KINDS` or more: nothing.
        size: side of the picture in pixels.
        source: random numbers.

    Returns:
        ``[B, 3, size, size]`` RGB in 0 to 1.
    """
    scenes = cover(scenes, kind == COVERED, source)
    canvas = blank(scenes.background, size)
    colours = rgb_table(canvas.device)[scenes.colour]
    for k in reversed(range(scenes.pair.shape[1])):
        signed, rgb, opacity = distance(scenes, k, size), colours[:, k], scenes.there[:, k].float()
        if k == 0:
            signed, opacity = misshape(scenes, signed, kind, opacity, source)
            rgb = two_colours(scenes, rgb, kind == TWO_COLOURED, size, source)
        canvas = paint(canvas, coverage(signed, size) * opacity[:, None, None], rgb)
    return canvas


def cover(scenes: Scenes, which: Tensor, source: torch.Generator) -> Scenes:
    """Move the first object over a part of the second."""
    if scenes.pair.shape[1] < 2:
        return scenes
    centre = scenes.centre.clone()
    angle = uniform((len(scenes),), (0.0, 6.2831853), source)
    away = uniform((len(scenes), 1), (0.5, 0.9), source) * scenes.radius[:, 1:2]
    shift = away * torch.stack([angle.cos(), angle.sin()], 1)
    moved = which & scenes.there[:, 1]
    centre[:, 0] = torch.where(moved[:, None], centre[:, 1] + shift, centre[:, 0])
    return Scenes(scenes.pair, centre, scenes.radius, scenes.background)


def misshape(
    scenes: Scenes, signed: Tensor, kind: Tensor, opacity: Tensor, source: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Fuse the first object with another shape, cut it off, or fade it."""
    other = distance(scenes, 0, signed.shape[-1], another_shape(scenes.shape[:, 0], source))
    share = uniform(kind.shape, (0.35, 0.65), source)[:, None, None]
    fused = torch.lerp(signed, other, share)
    cut = torch.maximum(signed, half_plane(scenes, signed.shape[-1], (-0.3, 0.3), source))
    signed = torch.where((kind == FUSED)[:, None, None], fused, signed)
    signed = torch.where((kind == CUT)[:, None, None], cut, signed)
    faint = uniform(kind.shape, (0.25, 0.55), source)
    return signed, torch.where(kind == FADED, opacity * faint, opacity)


def another_shape(shape: Tensor, source: torch.Generator) -> Tensor:
    """A different shape index; never circle and ring, whose mean is again a circle."""
    step = torch.randint(1, len(SHAPES), shape.shape, generator=source, device=shape.device)
    other = (shape + step) % len(SHAPES)
    circle, ring, square = (SHAPES.index(word) for word in ("circle", "ring", "square"))
    alike = (torch.minimum(shape, other) == circle) & (torch.maximum(shape, other) == ring)
    return torch.where(alike, square, other)


def half_plane(
    scenes: Scenes, size: int, shift: tuple[float, float], source: torch.Generator
) -> Tensor:
    """Signed distance to a line of random direction near the first object's centre."""
    x, y = offsets(scenes.centre[:, 0], size)
    angle = uniform((len(scenes), 1, 1), (0.0, 6.2831853), source)
    away = uniform((len(scenes), 1, 1), shift, source) * scenes.radius[:, 0, None, None]
    return x * angle.cos() + y * angle.sin() - away


def two_colours(
    scenes: Scenes, rgb: Tensor, which: Tensor, size: int, source: torch.Generator
) -> Tensor:
    """Colour ``[B, 3, size, size]`` of the first object, a second colour on one side of it."""
    table = rgb_table(rgb.device)
    step = torch.randint(1, len(table), which.shape, generator=source, device=rgb.device)
    second = table[(scenes.colour[:, 0] + step) % len(table)]
    side = coverage(half_plane(scenes, size, (-0.4, 0.4), source), size)
    side = side * which[:, None, None]
    return torch.lerp(rgb[:, :, None, None], second[:, :, None, None], side[:, None])
