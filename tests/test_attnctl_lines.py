"""JSON lines: whole or not there."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from attnctl.errors import OptionError
from attnctl.lines import append_line, cut_torn_line, read_lines


def test_a_torn_line_is_left_out_and_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    append_line(path, {"a": "ü\n"})
    with path.open("ab") as file:
        file.write(b'{"b": 1}')
    assert read_lines(path) == [{"a": "ü\n"}]
    cut_torn_line(path)
    append_line(path, {"c": 2})
    assert read_lines(path) == [{"a": "ü\n"}, {"c": 2}]


def test_a_line_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    append_line(path, {"a": 1})

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(os, "fsync", full)
        append_line(path, {"b": 1})
    assert path.read_bytes() == b'{"a": 1}\n'


@pytest.mark.parametrize("line", [b"{]", b"[1]", b"3", b"\xff"])
def test_damaged_lines_are_named(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{}\n" + line + b"\n")
    with pytest.raises(OptionError, match=r"a\.jsonl, line 2"):
        read_lines(path)
