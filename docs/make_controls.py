"""Writes the part "All options" of each control's page from its class, docstring and presets.

Run `python docs/make_controls.py`; a test compares the pages with `section`. Everything between
the two marks is replaced, the rest of a page is written by hand. `make_support.py` runs it too.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import attnctl
from attnctl.apps.control_syntax import options_text
from attnctl.apps.controls_table import kind_of, option_docs, papers
from attnctl.control import Control
from attnctl.presets import Preset, presets

PAGES = Path(__file__).parent / "controls"
START, END = "<!-- options: written by docs/make_controls.py -->", "<!-- end of options -->"
_MARKED = re.compile(re.escape(START) + ".*" + re.escape(END), re.DOTALL)


def section(name: str) -> str:
    """Return the marked part of a control's page."""
    cls = attnctl.controls()[name]
    kinds = ", ".join(f"`{kind}`" for kind in cls.kinds)
    parts = [
        START,
        "## All options",
        f'`attnctl.{cls.__name__}(...)`, or `attnctl.control("{name}", ...)`, on attention of the '
        f"[kinds](../concepts.md#site-and-head) {kinds}.",
        table(("option", "values", "default", "meaning"), (option(cls, f) for f in fields(cls))),
    ]
    found = presets(name)
    if found:
        parts += ["Presets:", table(("preset", "options", "from"), map(preset, found))]
    parts += [f"From: {text.rstrip('.')}." for text in papers(cls)]
    return "\n\n".join([*parts, END])


def fields(cls: type[Control]) -> tuple[dataclasses.Field[Any], ...]:
    """Return the options of a control."""
    return dataclasses.fields(cls)


def option(cls: type[Control], f: dataclasses.Field[Any]) -> list[str]:
    """Return one line of the table of options."""
    hint = typing.get_type_hints(cls)[f.name]
    written = options_text({f.name: default(f)}).partition("=")[2]
    docs = option_docs(cls).get(f.name, "")
    return [f"`{f.name}`", kind_of(hint), f"`{written}`" if written else "", docs.rstrip(".")]


def default(f: dataclasses.Field[Any]) -> Any:
    """Return the default of an option, "" if it has to be given."""
    if f.default_factory is not dataclasses.MISSING:
        return f.default_factory()
    return "" if f.default is dataclasses.MISSING else f.default


def preset(found: Preset) -> list[str]:
    """Return one line of the table of presets."""
    options = options_text(found.options) or "the defaults"
    return [f"`{found.name}`", options, f"{found.origin}: {found.source}. {found.note}".strip()]


def table(head: tuple[str, ...], rows: Iterable[list[str]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines)


def cell(text: str) -> str:
    """Return a text that stays within its cell."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


def written(page: str, name: str) -> str:
    """Return a page with the marked part as it should be, at the end if it has none."""
    if START in page:
        return _MARKED.sub(lambda _: section(name), page)
    return f"{page.rstrip()}\n\n{section(name)}\n"


if __name__ == "__main__":
    for name in attnctl.controls():
        page = PAGES / f"{name}.md"
        text = page.read_text(encoding="utf-8")
        page.write_text(written(text, name), encoding="utf-8")
