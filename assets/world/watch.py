"""The judge of clips: are the prompted objects there, and does each move as the prompt says.

What is there is decided by the detector, frame by frame. Where an object is, is the centroid of
the pixels near its prompted colour (two objects of a clip have different colours), and how it
moves is the straight line fitted to that track. Nothing here is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attnctl.assets.world.detector import (
    Detector,
    agrees,
    detector,
    log_agreement,
    targets,
)
from attnctl.assets.world.draw import pixel_centres
from attnctl.assets.world.motion import (
    DIRECTIONS,
    MOTIONS,
    SPAN,
    motion_indices,
    parse_motion,
    velocity_table,
)
from attnctl.assets.world.palette import COLOUR_NAMES, rgb_table

NEAR = 0.25
LEAST_MASS = 0.004
LEAST_FRAMES = 0.8
STILL_WAY = 0.06
SLANT = 0.5
UNSTEADY = 0.03
WAYS = {"slowly": (0.06, 0.19), "": (0.15, 0.34), "fast": (0.27, 0.6)}
TOLERANCE = 0.15
PART = 64


class Verdict(NamedTuple):
    """What the judge says about B clips.

    Attributes:
        objects: ``[B]`` bool: exactly the prompted objects in at least 80 % of the frames.
        direction: ``[B]`` bool: every object moves the prompted way, evenly, or stands still.
        speed: ``[B]`` bool: every object's speed is near the prompted one.
        score: ``[B]`` 0 to 1: mean probability the detector gives to the prompted objects,
            times how near the motions are to the prompted ones.
    """

    objects: Tensor
    direction: Tensor
    speed: Tensor
    score: Tensor

    @property
    def right(self) -> Tensor:
        """``[B]`` bool: objects, direction and speed are all right."""
        return self.objects & self.direction & self.speed


class Tracks(NamedTuple):
    """Straight lines fitted to the objects of B clips, K objects each.

    Attributes:
        way: ``[B, K, 2]`` travelled in `motion.SPAN` frame steps, x and y, in sides.
        unsteady: ``[B, K]`` root mean square distance from the line, in sides.
        seen: ``[B, K]`` share of the frames in which the colour is there.
    """

    way: Tensor
    unsteady: Tensor
    seen: Tensor


def moved(clips: Tensor, prompts: Sequence[str], judge: Detector | None = None) -> Verdict:
    """Does each clip show what its prompt says, moving as the prompt says?

    Args:
        clips: ``[B, F, 3, H, W]`` RGB in 0 to 1, two frames or more.
        prompts: B prompts as of `moving.moving_prompts`.
        judge: another detector than the shipped one.

    Raises:
        ValueError: the numbers differ, a clip is a single picture, or a prompt names an object
            without its motion.
    """
    if len(clips) != len(prompts) or clips.ndim != 5 or clips.shape[1] < 2:
        raise ValueError(
            f"got clips of shape {list(clips.shape)} for {len(prompts)} prompts; "
            "give one clip [F, 3, H, W] of at least two frames per prompt"
        )
    parts = [
        _judged(clips[i : i + PART].float(), prompts[i : i + PART], judge)
        for i in range(0, len(prompts), PART)
    ]
    return Verdict(*map(torch.cat, zip(*parts, strict=True)))


@torch.no_grad()
def _judged(clips: Tensor, prompts: Sequence[str], judge: Detector | None) -> Verdict:
    frames = clips.shape[1]
    named = targets(prompts, len(clips)).to(clips.device).repeat_interleave(frames, 0)
    seen = (judge or detector(clips.device))(clips.flatten(0, 1))
    share = agrees(seen, named).view(-1, frames).float().mean(1)
    sure = log_agreement(seen, named).exp().view(-1, frames).mean(1)
    colour, motion = wanted(prompts, clips.device)
    line = tracks(clips, colour.clamp(min=0))
    idle = motion < 0
    direction = right_direction(line, motion) | idle
    speed = right_speed(line, motion) | idle
    off = (line.way - velocity_table(clips.device)[motion]).norm(dim=-1) / TOLERANCE
    near = (-0.5 * off.square()).exp().masked_fill(idle, 0).sum(1) / (~idle).sum(1)
    return Verdict(share >= LEAST_FRAMES, direction.all(1), speed.all(1), sure * near)


def wanted(prompts: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """Colour and motion indices ``[B, K]`` of the prompts; -1 where one names fewer objects."""
    named = [[COLOUR_NAMES.index(pair[0]) for pair, _ in parse_motion(one)] for one in prompts]
    most = max(map(len, named))
    colour = torch.tensor([row + [-1] * (most - len(row)) for row in named])
    return colour.to(device), motion_indices(prompts, most).to(device)


def tracks(clips: Tensor, colour: Tensor) -> Tracks:
    """Follow the pixels of given colours and fit a straight line by least squares.

    Args:
        clips: ``[B, F, 3, H, W]`` RGB in 0 to 1.
        colour: ``[B, K]`` indices into `palette.COLOUR_NAMES`.
    """
    centre, mass = centroids(clips, colour)
    there = (mass > LEAST_MASS).float()
    time = torch.arange(clips.shape[1], device=clips.device)[None, :, None] / SPAN
    total = there.sum(1).clamp(min=1e-6)
    middle = (there * time).sum(1) / total
    place = (there[..., None] * centre).sum(1) / total[..., None]
    late = (time - middle[:, None]) * there
    spread = late.square().sum(1).clamp(min=1e-6)
    way = (late[..., None] * (centre - place[:, None])).sum(1) / spread[..., None]
    line = place[:, None] + (time - middle[:, None])[..., None] * way[:, None]
    off = ((centre - line).square().sum(-1) * there).sum(1) / total
    return Tracks(way, off.sqrt(), there.mean(1))


def centroids(clips: Tensor, colour: Tensor) -> tuple[Tensor, Tensor]:
    """Centroids ``[B, F, K, 2]`` of colours and their masses ``[B, F, K]``, in whole pictures."""
    rgb = rgb_table(clips.device)[colour][:, None, :, :, None, None]
    away = (clips[:, :, None] - rgb).square().sum(3).sqrt()
    near = (1 - away / NEAR).clamp(min=0)
    mass = near.sum((-2, -1)).clamp(min=1e-6)
    x = (near.sum(-2) * pixel_centres(clips.shape[-1], clips.device)).sum(-1) / mass
    y = (near.sum(-1) * pixel_centres(clips.shape[-2], clips.device)).sum(-1) / mass
    return torch.stack([x, y], dim=-1), mass / near[0, 0, 0].numel()


def right_direction(line: Tracks, motion: Tensor) -> Tensor:
    """``[B, K]`` bool: along the prompted direction, not slanting, and evenly; or still."""
    unit = torch.tensor([DIRECTIONS.get(one.direction, (0.0, 0.0)) for one in MOTIONS])
    unit = unit.to(line.way)[motion]
    along = (line.way * unit).sum(-1)
    across = (line.way - along[..., None] * unit).norm(dim=-1)
    goes = (along > STILL_WAY) & (across < SLANT * along)
    fine = torch.where(unit.any(-1), goes, across < STILL_WAY)
    return fine & (line.unsteady < UNSTEADY) & (line.seen >= LEAST_FRAMES)


def right_speed(line: Tracks, motion: Tensor) -> Tensor:
    """``[B, K]`` bool: the way travelled is within the loose limits of the prompted speed."""
    limits = [WAYS[one.speed] if one.direction else (0.0, STILL_WAY) for one in MOTIONS]
    low, high = torch.tensor(limits).to(line.way)[motion].unbind(-1)
    way = line.way.norm(dim=-1)
    return (way >= low) & (way <= high)
