"""Placebos of the latent controls: random words, and the gradient of another sample."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from attnctl.control import Control
from attnctl.processors.latent.engine import LatentControl
from attnctl.processors.latent.targets import Target
from attnctl.sites import Sites

from .placebo import NoPlacebo, placebo

__all__ = ["drawn_targets", "neighbour_gradient", "random_words"]


@placebo("random words")
def random_words(control: Control, sites: Sites, seed: int) -> Control | None:
    """Return a latent control whose objects are tokens drawn from the rest of the text sequence.

    As many as it would take: other words, the end of the text and padding. None for other
    controls.

    Args:
        control: any control.
        sites: the model's sites.
        seed: of the draw; samples of one prompt get the same tokens.
    """
    if not isinstance(control, LatentControl):
        return None

    class Elsewhere(type(control)):  # type: ignore[misc]
        name: ClassVar[str] = f"{control.name}-random-words"

        def choose(self, targets: tuple[Target, ...], columns: int) -> tuple[Target, ...]:
            return drawn_targets(targets, columns, seed)

    return _like(control, Elsewhere)


@placebo("neighbour's gradient")
def neighbour_gradient(control: Control, sites: Sites, seed: int) -> Control | None:
    """Return a latent control that moves each sample of a batch by its neighbour's gradient.

    None for other controls; arguments as in `random_words`.
    """
    if not isinstance(control, LatentControl):
        return None

    class Shuffled(type(control)):  # type: ignore[misc]
        name: ClassVar[str] = f"{control.name}-shuffled"

        def direction(self, grad: Tensor) -> Tensor:
            return super().direction(grad).roll(1, dims=0)

    return _like(control, Shuffled)


def _like(control: Control, cls: type[Control]) -> Control:
    return cls(**{f.name: getattr(control, f.name) for f in dataclasses.fields(control)})


def drawn_targets(targets: tuple[Target, ...], columns: int, seed: int) -> tuple[Target, ...]:
    """Return objects of as many words, one token each, of none of the targets' tokens.

    Args:
        targets: the objects.
        columns: text tokens; the first and the last are never drawn.
        seed: of the draw.

    Raises:
        NoPlacebo: if there are too few other tokens.
    """
    mine = {token for target in targets for token in target.tokens}
    others = [i for i in range(1, columns - 1) if i not in mine]
    wanted = sum(len(target.words) for target in targets)
    if len(others) < wanted:
        raise NoPlacebo(f"{wanted} words, but only {len(others)} other tokens of {columns}")
    generator = torch.Generator().manual_seed(seed + sum(mine))
    order = iter(torch.randperm(len(others), generator=generator).tolist())
    drawn = [[(others[next(order)],) for _ in target.words] for target in targets]
    return tuple(Target(noun, tuple(attributes)) for *attributes, noun in drawn)
