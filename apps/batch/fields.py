"""The options of a job: their names, and their values from text or from JSON and TOML."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

from attnctl.errors import OptionError, nearest

from .limits import PROMPT_LETTERS
from .seeds import seeds

__all__ = ["FIELDS", "is_axis", "value_of", "values_of"]

_NAME = re.compile(r"[\w][\w .-]{0,79}")
_AXIS = re.compile(r"[a-z]\w*\.[A-Za-z_]\w*")


def values_of(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of one job, checked; None and empty text mean not given.

    Raises:
        OptionError: on an unknown option or a value that does not fit.
    """
    given = {k: v for k, v in raw.items() if v is not None and v != "" and v != [""]}
    return {key: value_of(key, value) for key, value in given.items()}


def value_of(key: str, value: Any) -> Any:
    """Return one option's value, checked.

    Raises:
        OptionError: if there is no such option, or the value does not fit.
    """
    if key not in FIELDS:
        short = key if len(key) <= 40 else f"{key[:40]}..."
        raise OptionError(
            f"there is no option {short!r}.{nearest(short, FIELDS)} Options: {', '.join(FIELDS)}"
        )
    return FIELDS[key](key, value)


def is_axis(key: str) -> bool:
    """Whether a grid's key names an option of a control, such as "softpag.u"."""
    return _AXIS.fullmatch(key) is not None


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise OptionError(f"{key} must be text, got {_shown(value)}")
    if len(value) > PROMPT_LETTERS:
        raise OptionError(f"{key} has {len(value)} letters; at most {PROMPT_LETTERS}")
    bad = next(
        (c for c in value if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t\r"), None
    )
    if bad is not None:
        raise OptionError(f"{key} holds the control character U+{ord(bad):04X}")
    return value


def _prompt(key: str, value: Any) -> str:
    text = _text(key, value)
    if not text.strip():
        raise OptionError("the prompt is empty")
    return text


def _controls(key: str, value: Any) -> tuple[str, ...]:
    texts = value if isinstance(value, (list, tuple)) else [value]
    return tuple(_text(key, text) for text in texts if text != "")


def _whole(key: str, value: Any) -> int:
    try:
        if isinstance(value, str) and len(value) < 40:
            return int(value)
    except ValueError:
        pass
    if isinstance(value, bool) or not isinstance(value, int):
        raise OptionError(f"{key}={_shown(value)} is not a whole number")
    return value


def _number(key: str, value: Any) -> float:
    try:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError
        number = float(value)
    except (ValueError, OverflowError):
        raise OptionError(f"{key}={_shown(value)} is not a number") from None
    if not math.isfinite(number):
        raise OptionError(f"{key}={_shown(value)} is no usable number")
    return number


def _name(key: str, value: Any) -> str:
    sound = isinstance(value, str) and _NAME.fullmatch(value) and len(value.encode()) <= 160
    if not sound or value.endswith((" ", ".")):
        raise OptionError(
            f"the name {_shown(value)} cannot be used for files: take at most 80 letters, digits, "
            "'_', '-', '.' and blanks, beginning with a letter or digit; folders are not allowed"
        )
    return value


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"a number of more than {value.bit_length() // 4} digits"
    return text if len(text) <= 60 else f"{text[:60]}..."


FIELDS: dict[str, Callable[[str, Any], Any]] = {
    "prompt": _prompt,
    "negative_prompt": _text,
    "control": _controls,
    "seed": lambda key, value: seeds(value),
    "steps": _whole,
    "guidance_scale": _number,
    "height": _whole,
    "width": _whole,
    "frames": _whole,
    "fps": _whole,
    "name": _name,
}
"""Every option of a job and how its value is read."""
