"""Rows of text files as they come: JSON lines or an array, any line ends, with line numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .bad_data import BadData, Skips

__all__ = ["Row", "read_json", "read_lines", "read_rows", "whole_text"]

_WIDE = ((b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16"))
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Row:
    """One JSON object of a file."""

    path: Path
    line: int
    data: dict[str, Any]

    def text(self, *names: str) -> str:
        """Return the text in the first of these fields that is there.

        Raises:
            BadData: if there is none, or it is no text.
        """
        value = self.value(*names)
        if not isinstance(value, str):
            raise self.bad(f"{names[0]!r} is {value!r}, expected text")
        if not whole_text(value):
            raise self.bad(f"{names[0]!r} holds half a character: {value[:60]!r}")
        return value

    def whole(self, *names: str) -> int:
        """Return the whole number in the first of these fields that is there.

        Raises:
            BadData: if there is none, or it is no whole number.
        """
        value = self.value(*names)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.bad(f"{names[0]!r} is {value!r}, expected a whole number")
        return value

    def value(self, *names: str) -> Any:
        """Return what the first of these fields holds that is there.

        Raises:
            BadData: if there is none.
        """
        for name in names:
            if name in self.data:
                return self.data[name]
        there = ", ".join(map(repr, self.data)) or "none"
        raise self.bad(f"there is no field {names[0]!r}; the fields are: {there}")

    def bad(self, what: str) -> BadData:
        """Return an error about this row."""
        return BadData(self.path, self.line, what)


def whole_text(text: str) -> bool:
    """Whether a text is without halves of surrogate pairs, which JSON can spell but UTF-8 not."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def read_rows(path: Path, skips: Skips) -> list[Row]:
    """Return the objects of a file that holds JSON lines or one JSON array.

    Args:
        path: the file.
        skips: bad lines go there; within an array nothing can be left out.

    Raises:
        BadData: if the file, or a line that may not be left out, cannot be read.
    """
    data = _bytes(path)
    found = _array(path, data) if data.lstrip()[:1] == b"[" else _json_lines(path, data, skips)
    rows = []
    for line, value in found:
        if isinstance(value, dict):
            rows.append(Row(path, line, value))
        else:
            skips.bad(BadData(path, line, f"expected a JSON object, got {str(value)[:40]!r}"))
    if not rows:
        raise BadData(path, None, "there is no row in this file")
    return rows


def read_lines(path: Path, skips: Skips) -> list[tuple[int, str]]:
    """Return the numbers and texts of the lines that are not blank.

    Raises:
        BadData: if a line that may not be left out is not UTF-8.
    """
    return list(_decoded(path, _bytes(path), skips))


def read_json(path: Path) -> Any:
    """Return the value that a JSON file holds.

    Raises:
        BadData: if it cannot be read.
    """
    text = _decode(path, _bytes(path), 1)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadData(path, getattr(error, "lineno", None), _told(error)) from error


def _bytes(path: Path) -> bytes:
    if path.is_dir():
        raise BadData(path, None, "this is a folder, expected a file")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadData(path, None, f"cannot be read: {error.strerror or error}") from error
    for mark, name in _WIDE:
        if data.startswith(mark):
            raise BadData(path, 1, f"this is {name}; convert it to UTF-8")
    return data.removeprefix(_BOM)


def _decode(path: Path, data: bytes, first: int) -> str:
    """Return the text of bytes that begin in line `first`."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first + data.count(b"\n", 0, error.start)
        what = f"byte 0x{data[error.start]:02x} is not UTF-8; convert the file to UTF-8"
        raise BadData(path, line, what) from error


def _decoded(path: Path, data: bytes, skips: Skips) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(data.split(b"\n"), start=1):
        try:
            text = _decode(path, line, number).strip("\r")
        except BadData as error:
            skips.bad(error)
            continue
        if text.strip():
            yield number, text


def _json_lines(path: Path, data: bytes, skips: Skips) -> Iterator[tuple[int, Any]]:
    for number, text in _decoded(path, data, skips):
        try:
            yield number, json.loads(text)
        except (ValueError, RecursionError) as error:
            skips.bad(BadData(path, number, _told(error)))


def _array(path: Path, data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield the elements of an array with the lines they begin in."""
    text, decoder = _decode(path, data, 1), json.JSONDecoder()
    at, line, counted = text.index("[") + 1, 1, 0
    while True:
        at = _past_blanks(text, at)
        line, counted = line + text.count("\n", counted, at), at
        if text[at : at + 1] == "]":
            break
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise BadData(path, getattr(error, "lineno", line), _told(error)) from error
        yield line, value
        at = _past_blanks(text, at)
        if text[at : at + 1] not in ("]", ","):
            raise BadData(path, line, "the array ends too early: the file is incomplete or broken")
        at += text[at] == ","
    if text[at + 1 :].strip():
        raise BadData(path, line, "there is more text after the array")


def _past_blanks(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _told(error: Exception) -> str:
    told = "too deeply nested" if isinstance(error, RecursionError) else str(error)
    return f"no valid JSON: {told}"
