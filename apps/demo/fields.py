"""The options of a control as fields of a form, read from its class."""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal

from attnctl.apps.chosen import Chosen
from attnctl.apps.control_syntax import options_text
from attnctl.apps.controls_table import kind_of, option_docs
from attnctl.control import Control
from attnctl.errors import AttnctlError

__all__ = ["Field", "fields", "value_text"]


@dataclass(frozen=True)
class Field:
    """One option.

    Args:
        key: its name.
        kind: "flag", "choice", "whole", "number", "part" (a number of 0 to 1) or "text".
        value: its present value; of "text", in the text form of controls,
            and empty if it is not given.
        about: what it means.
        choices: of "choice".
    """

    key: str
    kind: Literal["flag", "choice", "whole", "number", "part", "text"]
    value: Any
    about: str
    choices: tuple[str, ...] = ()


def fields(chosen: Chosen) -> list[Field]:
    """Return the options that can be written in a form, in the order of the class."""
    cls = type(chosen.control)
    hints, docs = typing.get_type_hints(cls), option_docs(cls)
    return [
        _field(cls, f.name, hints[f.name], chosen.options[f.name], docs.get(f.name, ""))
        for f in dataclasses.fields(cls)
        if kind_of(hints[f.name]) not in ("", "none")
    ]


def value_text(key: str, value: Any) -> str:
    """Return a value, as a form gives it, in the text form of controls."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = options_text({key: value}).removeprefix(f"{key}=")
    return " ".join(text.split())


def _field(cls: type[Control], key: str, hint: Any, value: Any, about: str) -> Field:
    kinds = _kinds(hint)
    if len(kinds) == 1 and typing.get_origin(kinds[0]) is Literal:
        return Field(key, "choice", value, about, tuple(map(str, typing.get_args(kinds[0]))))
    if kinds == (bool,):
        return Field(key, "flag", value, about)
    if kinds == (int,):
        return Field(key, "whole", value, about)
    if kinds == (float,):
        return Field(key, "part" if _is_part(cls, key) else "number", value, about)
    # of an option that takes anything, "none" would be a word like any other
    empty = value is None and type(None) not in kinds
    return Field(key, "text", "" if empty else value_text(key, value), about)


def _kinds(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def _is_part(cls: type[Control], key: str) -> bool:
    """Whether an option takes numbers of 0 to 1 only, asked of the class itself."""
    return not _takes(cls, key, -0.01) and not _takes(cls, key, 1.01) and _takes(cls, key, 1.0)


def _takes(cls: type[Control], key: str, value: float) -> bool:
    try:
        cls(**{key: value})
    except AttnctlError:
        return False
    return True
