"""What a head search maximises: one number per picture.

| name | what it is | weights |
|---|---|---|
| `world` | the shape-world detector's log-probability of the caption | shipped |
| `redness`, `brightness`, `edges` | plain pixel statistics | none |
| `clip:FOLDER` | cosine of a CLIP model, times 100 | local |
| `pickscore:FOLDER` | PickScore: a CLIP model's cosine times its learned scale | local |
| `hpsv2:FILE` | HPS v2 (ViT-H-14 checkpoint, through open_clip) | local |
| `aesthetic:FOLDER+FILE` | LAION aesthetic head FILE on the CLIP model in FOLDER | local |
| `package.module:function` | your own `f(images, prompts) -> scores` | yours |
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnctl.errors import OptionError, nearest

__all__ = ["Custom", "Objective", "objective", "objectives"]

_KNOWN: dict[str, type[Objective]] = {}
_MODULES = ("pixels", "world", "learned")


class Objective:
    """Base of the objectives; subclasses set `name` and define `score`."""

    name: ClassVar[str] = ""
    """On the command line."""
    takes: ClassVar[str] = ""
    """What comes after the colon, empty for nothing."""
    differentiable: bool | None = True
    """Whether gradients with respect to the pictures flow; None where nobody has said."""

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        if cls.name:
            _KNOWN[cls.name] = cls

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return one score per picture, higher is better.

        Args:
            images: RGB [n, 3, H, W] in 0 to 1.
            prompts: n prompts, with the style in front if the search has one.

        Returns:
            [n] float32.
        """
        raise NotImplementedError

    def __str__(self) -> str:
        return self.name


class Custom(Objective):
    """A user's function as objective.

    Args:
        function: `f(images, prompts) -> scores`, as `Objective.score`; a list of numbers will
            do, but then there are no gradients.
        name: what head sets call it.
        differentiable: whether it has gradients; None if that is not known: the strategy
            `gradient` tries, `halving` does without.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        name: str = "",
        differentiable: bool | None = None,
    ) -> None:
        self.function = function
        self.differentiable = differentiable
        self.label = name or f"{function.__module__}:{getattr(function, '__qualname__', '?')}"

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Call the function and check what it returns.

        Raises:
            OptionError: if that is not one number per picture.
        """
        found = torch.as_tensor(self.function(images, list(prompts)), device=images.device)
        if found.shape != (len(images),):
            raise OptionError(
                f"objective {self.label} returned shape {tuple(found.shape)} for {len(images)} "
                f"pictures; expected [{len(images)}]"
            )
        return found.float()

    def __str__(self) -> str:
        return self.label


def objectives() -> dict[str, type[Objective]]:
    """Return the named objectives."""
    for module in _MODULES:
        importlib.import_module(f".{module}", __package__)
    return dict(sorted(_KNOWN.items()))


def objective(spec: str | Objective | Callable[..., Any]) -> Objective:
    """Return the objective that a text, a function or an objective describes.

    Raises:
        OptionError: on an unknown name, a missing or superfluous argument, or a function that
            cannot be imported.
    """
    if isinstance(spec, Objective):
        return spec
    if not isinstance(spec, str):
        return Custom(spec)
    known = objectives()
    name, _, rest = spec.partition(":")
    cls = known.get(name)
    if cls is None:
        return _imported(spec, known)
    if bool(rest) != bool(cls.takes):
        form = f"{name}:{cls.takes}" if cls.takes else name
        raise OptionError(f"objective {spec!r}: expected {form}")
    return cls(rest) if rest else cls()  # type: ignore[call-arg]


def _imported(spec: str, known: dict[str, type[Objective]]) -> Objective:
    module, _, function = spec.partition(":")
    if not function:
        hint = nearest(spec, known) or f" Known: {', '.join(known)}, or module:function."
        raise OptionError(f"there is no objective {spec!r}.{hint}")
    try:
        return Custom(getattr(importlib.import_module(module), function), spec)
    except (ImportError, AttributeError) as error:
        raise OptionError(f"objective {spec!r} cannot be imported: {error}") from error
