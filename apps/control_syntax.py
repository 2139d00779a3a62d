"""The text form of a control on command lines and in files: `softpag:u=0.5,heads=L1H2,L3H4`.

A comma ends a value only where a `key=` follows it, so that selectors may hold commas.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from attnctl.control import Control, control
from attnctl.errors import OptionError

__all__ = ["control_text", "options_text", "parse_control", "split_control"]

_NEXT_OPTION = re.compile(r",\s*(?=[A-Za-z_]\w*\s*=)")
_OPTION = re.compile(r"\s*([A-Za-z_]\w*)\s*=(.*)", re.DOTALL)
_FORM = "write NAME or NAME:key=value,key=value"


def parse_control(text: str) -> Control:
    """Return the control that a text describes.

    Args:
        text: `NAME` or `NAME:key=value,...`; values are converted to the options' types.

    Raises:
        OptionError: if the text is malformed, or the name, an option or a value is wrong.
    """
    name, options = split_control(text)
    return control(name, **options)


def split_control(text: str) -> tuple[str, dict[str, str]]:
    """Return the name and the options, as text, that a control's text form holds.

    Raises:
        OptionError: if the text is malformed or an option comes twice.
    """
    name, colon, rest = text.partition(":")
    name = name.strip()
    if not name or (colon and not rest.strip()):
        missing = "options after the colon" if name else "a name"
        raise OptionError(f"the control {text!r} lacks {missing}: {_FORM}")
    options: dict[str, str] = {}
    for part in _NEXT_OPTION.split(rest) if colon else ():
        match = _OPTION.fullmatch(part)
        if match is None:
            raise OptionError(
                f"the control {text!r} has {part!r} where key=value belongs: {_FORM}"
            )
        key, value = match[1], match[2].strip()
        if key in options:
            raise OptionError(f"the control {text!r} gives {key} twice")
        options[key] = value
    return name, options


def control_text(name: str, options: Mapping[str, Any]) -> str:
    """Return the text form of a control: the reverse of `parse_control` for plain values."""
    return f"{name}:{options_text(options)}" if options else name


def options_text(options: Mapping[str, Any], separator: str = ",") -> str:
    """Return options as `key=value` words, in the form that `parse_control` reads."""
    return separator.join(f"{key}={_value(key, value)}" for key, value in options.items())


def _value(key: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if key != "heads" and isinstance(value, (list, tuple)):
        return "-".join(_value("", v) for v in value)
    if isinstance(value, (list, tuple)):
        return ",".join(v if isinstance(v, str) else "L{}H{}".format(*v) for v in value)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
