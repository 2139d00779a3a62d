"""Placebos of SpaceTime: its descriptions without a layout, badly laid out, and other prompts'."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from attnctl.control import Control
from attnctl.errors import OptionError
from attnctl.processors.steering.fitting import fitted
from attnctl.processors.steering.spacetime import Scene, SpaceTime
from attnctl.records import Step
from attnctl.sites import Sites
from attnctl.words.prompts import Prompt

from .placebo import placebo

if TYPE_CHECKING:
    from attnctl.hosts.run import Run
    from attnctl.selectors import Selection

__all__ = ["everywhere", "neighbours_descriptions", "worst_fit"]

WHOLE = (0.0, 0.0, 1.0, 1.0)


@placebo("everywhere")
def everywhere(control: Control, sites: Sites, seed: int) -> Control | None:
    """Return SpaceTime with every object's region the whole picture, at the same weight in all.

    What is left of a gain then does not come from the layout. None for other controls.

    Args:
        control: any control.
        sites: the model's sites.
        seed: unused; nothing is drawn.
    """
    if not isinstance(control, SpaceTime):
        return None

    class Everywhere(type(control)):  # type: ignore[misc]
        name: ClassVar[str] = f"{control.name}-everywhere"

        def places(self, prompt: Prompt, i: int, prompts: int) -> list[tuple[Any, Any]]:
            return [(name, WHOLE) for name, _ in super().places(prompt, i, prompts)]

        def arranged(self, apart: Tensor) -> list[Any]:
            return [WHOLE] * len(apart)

        def _lam(self, objects: int, step: Step) -> float:
            return float(super()._lam(objects, step)) / objects

    return _like(control, Everywhere)


@placebo("neighbour's descriptions")
def neighbours_descriptions(control: Control, sites: Sites, seed: int) -> Control | None:
    """Return SpaceTime whose regions hold what the batch's neighbouring prompt describes.

    None for other controls; arguments as in `everywhere`.
    """
    if not isinstance(control, SpaceTime):
        return None

    class Shuffled(type(control)):  # type: ignore[misc]
        name: ClassVar[str] = f"{control.name}-shuffled"

        def begin(self, run: Run, selection: Selection) -> Scene:
            scene: Scene = super().begin(run, selection)
            if len(scene.inputs) < 2:
                raise OptionError(f"{self.name}: a batch of one prompt has no neighbour")
            scene.inputs = [*scene.inputs[1:], scene.inputs[0]]
            return scene

    return _like(control, Shuffled)


@placebo("worst fit")
def worst_fit(control: Control, sites: Sites, seed: int) -> Control | None:
    """Return SpaceTime with the objects in the order that fits the noise least.

    None for other controls and layouts; arguments as in `everywhere`.
    """
    if not isinstance(control, SpaceTime) or control.layout != "fit":
        return None

    class Worst(type(control)):  # type: ignore[misc]
        name: ClassVar[str] = f"{control.name}-worst-fit"

        def arranged(self, apart: Tensor) -> list[Any]:
            return list(fitted(apart, max))

    return _like(control, Worst)


def _like(control: Control, cls: type[Control]) -> Control:
    return cls(**{f.name: getattr(control, f.name) for f in dataclasses.fields(control)})
