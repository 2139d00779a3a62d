"""Settings of a training changed from the command line: ``--set steps=3000 --set objects=3,1,0``.

A setting is a field of the recipe's frozen dataclasses, its plan and its own tunables.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any


def changed(parts: Sequence[Any], settings: Sequence[str]) -> tuple[list[Any], dict[str, Any]]:
    """Dataclasses with some fields set anew.

    Args:
        parts: frozen dataclass instances; where two have a field of the same name, both change.
        settings: texts such as ``"lr=2e-3"``; the last of several for one name counts.

    Returns:
        the changed instances in their order, and the new values by name.

    Raises:
        ValueError: a text without ``=``, an unknown name (the message lists the known ones), or
            a value of another kind than the present one.
    """
    known = {field.name: getattr(part, field.name) for part in parts for field in fields(part)}
    values: dict[str, Any] = {}
    for text in settings:
        name, equals, value = (piece.strip() for piece in text.partition("="))
        if not equals:
            raise ValueError(f"setting {text!r} must read NAME=VALUE, e.g. steps=3000")
        if name not in known:
            raise ValueError(f"no setting called {name!r}; there are: {', '.join(sorted(known))}")
        values[name] = converted(name, value, known[name])
    return [_replaced(part, values) for part in parts], values


def _replaced(part: Any, values: dict[str, Any]) -> Any:
    own = {field.name for field in fields(part)}
    return replace(part, **{name: value for name, value in values.items() if name in own})


def texts(values: Mapping[str, Any]) -> list[str]:
    """Settings, as `changed` takes them, from the new values it returned."""
    return [f"{name}={_text(value)}" for name, value in values.items()]


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def converted(name: str, text: str, present: Any) -> Any:
    """The value a text stands for, of the kind of the present value.

    Whole numbers pass where a fraction is expected, a single value where a tuple is, and
    anything where the present value is None.

    Raises:
        ValueError: it is of another kind.
    """
    value = _literal(text)
    if isinstance(present, tuple):
        return tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if isinstance(present, str):
        return text
    if isinstance(present, float) and type(value) is int:
        return float(value)
    if present is not None and type(value) is not type(present):
        kind = type(present).__name__
        raise ValueError(f"setting {name}={text} must be a value like {present!r} ({kind})")
    return value


def _literal(text: str) -> Any:
    """A Python literal, or else the text itself, split at its commas."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return tuple(text.split(",")) if "," in text else text
