"""The judge of the shape world: a small conv net that says what a picture shows.

It answers three questions: which of the 48 (colour, shape) pairs are there, how many objects
there are in all, and whether anything is malformed (fused, two-coloured, cut off, faded). A
picture is exact for a prompt if every prompted pair is there, no other pair is, the number of
objects is the number prompted, and nothing is malformed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import log_softmax, logsigmoid

from attnctl.assets import locate
from attnctl.assets.world.captions import parse
from attnctl.assets.world.palette import PAIRS, pair_index

WEIGHTS = "detector.safetensors"
MOST = 5
Images = Tensor | Sequence[Image.Image]


class Verdict(NamedTuple):
    """Logits for a batch of pictures.

    Attributes:
        presence: ``[B, 48]`` one per pair of `palette.PAIRS`.
        malformed: ``[B]``.
        number: ``[B, 6]`` of objects, 0 to 5.
    """

    presence: Tensor
    malformed: Tensor
    number: Tensor


class Detector(nn.Module):
    """Seven convolutions, then the greatest logit over all places, and a count."""

    def __init__(self, widths: Sequence[int] = (24, 48, 64, 80, 96, 96, 112)) -> None:
        super().__init__()
        strides = (1, 2, 1, 2, 1, 2, 1)
        before = (3, *widths[:-1])
        self.body = nn.Sequential(*map(_layer, before, widths, strides))
        self.things = nn.Conv2d(widths[-1], len(PAIRS) + 1, 1)
        self.count = nn.Linear(widths[-1], MOST + 1)

    def forward(self, images: Tensor) -> Verdict:
        """Verdict on pictures ``[B, 3, H, W]``, RGB in 0 to 1."""
        features = self.body(images * 2 - 1)
        things = self.things(features).flatten(2).amax(-1)
        return Verdict(things[:, :-1], things[:, -1], self.count(features.mean((2, 3))))


def _layer(before: int, width: int, stride: int) -> nn.Module:
    convolution = nn.Conv2d(before, width, 3, stride, padding=1)
    return nn.Sequential(convolution, nn.GroupNorm(8, width), nn.SiLU())


def load(path: Path | str) -> Detector:
    """Detector with weights from a safetensors file, in float32, ready to judge."""
    weights = {name: value.float() for name, value in load_file(path).items()}
    model = Detector()
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


def detector(device: torch.device | str = "cpu") -> Detector:
    """The shipped detector (or that of ``$ATTNCTL_ASSETS``); loaded once per device.

    Raises:
        FileNotFoundError: the package was built without it.
    """
    path = locate(WEIGHTS)
    if path is None:
        raise FileNotFoundError(f"no {WEIGHTS}; train it: python -m attnctl.assets.train detector")
    return _cached(path, str(device))


@lru_cache(maxsize=4)
def _cached(path: Path, device: str) -> Detector:
    # it outlives the caller, who may be in inference mode; later ones may want gradients
    with torch.inference_mode(False):
        return load(path).to(device)


def as_tensor(images: Images) -> Tensor:
    """Pictures as ``[B, 3, H, W]`` floats in 0 to 1; tensors pass through as float32."""
    if isinstance(images, Tensor):
        return images.float()
    arrays = [np.asarray(image.convert("RGB"), dtype=np.float32) / 255 for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def exact(images: Images, prompts: Sequence[str], judge: Detector | None = None) -> Tensor:
    """Does each picture show what its prompt says, and nothing else?

    Args:
        images: ``[B, 3, H, W]`` RGB in 0 to 1, or a list of PIL pictures.
        prompts: B prompts.
        judge: another detector than the shipped one.

    Returns:
        ``[B]`` bool.
    """
    pictures = as_tensor(images)
    wanted = targets(prompts, len(pictures)).to(pictures.device)
    with torch.no_grad():
        return agrees((judge or detector(pictures.device))(pictures), wanted)


def agrees(seen: Verdict, wanted: Tensor) -> Tensor:
    """``[B]`` bool: exactly the wanted pairs ``[B, 48]`` are seen, and nothing malformed."""
    same = ((seen.presence > 0) == wanted).all(1)
    return same & (seen.malformed < 0) & (seen.number.argmax(1) == wanted.sum(1))


def log_prob(images: Images, prompts: Sequence[str], judge: Detector | None = None) -> Tensor:
    """Log-probability the detector gives to exactly the prompted objects.

    The sum over the 48 pairs of log p(present) or log p(absent), plus log p(number of objects),
    plus log p(nothing malformed). Differentiable with respect to the pictures.

    Args:
        images: ``[B, 3, H, W]`` RGB in 0 to 1, or a list of PIL pictures.
        prompts: B prompts of at most five objects.
        judge: another detector than the shipped one.

    Returns:
        ``[B]`` float, at most 0.
    """
    pictures = as_tensor(images)
    wanted = targets(prompts, len(pictures)).to(pictures.device)
    return log_agreement((judge or detector(pictures.device))(pictures), wanted)


def log_agreement(seen: Verdict, wanted: Tensor) -> Tensor:
    """``[B]`` log-probability of exactly the wanted pairs ``[B, 48]`` and nothing malformed."""
    pairs = logsigmoid(torch.where(wanted, seen.presence, -seen.presence)).sum(1)
    number = log_softmax(seen.number, 1).gather(1, wanted.sum(1, keepdim=True)).squeeze(1)
    return pairs + number + logsigmoid(-seen.malformed)


def targets(prompts: Sequence[str], batch: int) -> Tensor:
    """``[B, 48]`` bool: the pairs each prompt names.

    Raises:
        ValueError: the numbers of prompts and pictures differ, a prompt names nothing, one
            object twice, or more than five.
    """
    if len(prompts) != batch:
        raise ValueError(f"{batch} pictures but {len(prompts)} prompts; give one prompt each")
    wanted = torch.zeros(batch, len(PAIRS), dtype=torch.bool)
    for row, prompt in zip(wanted, prompts, strict=True):
        row[[pair_index(*pair) for pair in parse(prompt)]] = True
    if batch and int(wanted.sum(1).max()) > MOST:
        raise ValueError(f"the detector counts to {MOST}; a prompt names more objects")
    return wanted
