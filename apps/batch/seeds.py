"""Seeds of a job: 3, "0-9", "0-3, 8" or a list of these."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from attnctl.errors import OptionError

__all__ = ["seeds", "total"]

_PART = re.compile(r"\s*(\d{1,19})\s*(?:-\s*(\d{1,19})\s*)?")


def seeds(value: Any) -> tuple[range, ...]:
    """Return seeds as ranges, so that a huge range costs nothing before it is refused.

    Args:
        value: a number, a text of numbers and ranges with commas between them, or a list.

    Raises:
        OptionError: if it is none of these.
    """
    if isinstance(value, (list, tuple)):
        return tuple(part for one in value for part in seeds(one))
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63:
        return (range(value, value + 1),)
    if not isinstance(value, str) or len(value) > 10_000:
        raise _wrong(value)
    return tuple(_part(text, value) for text in value.split(","))


def total(ranges: Iterable[range]) -> int:
    """Return how many seeds there are; `len` refuses long ranges."""
    return sum(part.stop - part.start for part in ranges)


def _part(text: str, value: str) -> range:
    match = _PART.fullmatch(text)
    if match is None:
        raise _wrong(value)
    first = int(match[1])
    last = int(match[2]) if match[2] else first
    if last < first:
        raise OptionError(f"the seeds {text.strip()!r} run backwards")
    if last >= 2**63:
        raise OptionError(f"the seed {last} is outside 0 to 2^63 - 1")
    return range(first, last + 1)


def _wrong(value: Any) -> OptionError:
    shown = "that" if isinstance(value, int) and value.bit_length() > 200 else repr(value)[:60]
    return OptionError(f"seed: {shown} is no seed; write 3, '0-9' or '0-3, 8'")
