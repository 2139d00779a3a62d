"""A second look (CARVE) as part of a method: `carve:p=0.1,regions=1` among its controls.

CARVE changes the picture, not the attention, so that it is no control; here it is named like
one. What else is listed acts in all of its passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import attnctl
from attnctl.apps.control_syntax import control_text, split_control
from attnctl.errors import OptionError

from .answering import Answerer, Reply
from .bad_data import EvalError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["NAME", "SecondLook", "carve_options", "take_look"]

NAME = "carve"


def _two(text: str) -> tuple[int, int]:
    first, last = text.split("-")
    return int(first), int(last)


def _or_none(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: None if text == "none" else kind(text)


_KINDS: dict[str, Callable[[str], Any]] = {
    "p": float,
    "regions": _or_none(int),
    "steps": str,
    "lam": float,
    "layers": _or_none(_two),
    "inputs": str,
    "form": str,
    "general": str,
    "suffix": str,
}


def carve_options(text: str) -> dict[str, Any]:
    """Return options of `attnctl.Carver` from text such as `carve:p=0.1,layers=1-2`.

    Raises:
        OptionError: if an option or a value is none.
    """
    given = split_control(text)[1]
    options: dict[str, Any] = {}
    for key, value in given.items():
        if key not in _KINDS:
            raise OptionError(f"{NAME} has no option {key!r} here; it has {', '.join(_KINDS)}")
        try:
            options[key] = _KINDS[key](value)
        except ValueError as error:
            raise OptionError(f"{NAME}: {key}={value} cannot be read: {error}") from error
    attnctl.Carver(None, None, **options)  # refuses values out of range
    return options


def take_look(controls: Sequence[str]) -> tuple[tuple[str, ...], SecondLook | None]:
    """Return the texts of the controls, and of the second look if one is among them.

    Raises:
        EvalError: if there are several.
        OptionError: if its options are wrong.
    """
    looks = [text for text in controls if text.partition(":")[0].strip() == NAME]
    if len(looks) > 1:
        raise EvalError(f"{NAME} is given {len(looks)} times; there is one second look")
    others = tuple(text for text in controls if text not in looks)
    return others, SecondLook(carve_options(looks[0])) if looks else None


@dataclass(frozen=True)
class SecondLook:
    """CARVE with options, for a model that answers a benchmark.

    Attributes:
        options: of `attnctl.Carver`.
    """

    options: dict[str, Any]

    def __str__(self) -> str:
        return control_text(NAME, self.options)

    def facts(self) -> dict[str, Any]:
        """Return what answers depend on, beside the code: every option."""
        full = attnctl.Carver(None, None, **self.options)
        return {"options": {key: getattr(full, key) for key in _KINDS}}

    def reply(
        self,
        answerer: Answerer,
        images: Sequence[Image],
        questions: Sequence[str],
        max_new_tokens: int,
    ) -> list[Reply]:
        """Answer questions about images, one about each, after a second look.

        General maps are made anew for every batch: those of another batch may differ in the
        last bit, and answers must not depend on where a run was stopped.
        """
        carver = attnctl.Carver(
            answerer.model, answerer.processor, max_new_tokens=max_new_tokens, **self.options
        )
        return [Reply(one.answer, one.ended) for one in carver.many(images, questions)]
