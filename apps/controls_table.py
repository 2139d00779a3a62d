"""The registry of controls as a table, and one control in detail, read from its class."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import types
import typing
from typing import Any

from attnctl.control import Control
from attnctl.errors import OptionError, nearest
from attnctl.presets import Preset, presets

from .control_syntax import options_text
from .tables import paragraph

__all__ = ["control_text", "controls_text", "cost", "option_docs", "papers", "summary"]

_ENTRY = re.compile(r"(\w+(?:, \w+)*): (.*)")


def controls_text(known: dict[str, type[Control]], width: int) -> str:
    """Return one paragraph per control: name, kinds of sites, summary, options."""
    parts = []
    names = max(map(len, known)) + 2
    for name, cls in known.items():
        line = f"{summary(cls)} [{', '.join(cls.kinds)}]"
        options = options_text({f.name: _default(f) for f in dataclasses.fields(cls)}, "  ")
        parts.append(paragraph(line, width, name.ljust(names)))
        parts.append(paragraph(options, width, " " * names))
    head = f"{'name'.ljust(names)}what it does [sites it acts on], options with defaults"
    foot = "One control in detail: attnctl controls NAME"
    return "\n".join([head, *parts, foot])


def control_text(name: str, known: dict[str, type[Control]], width: int) -> str:
    """Return everything about one control: options, types, defaults, meaning, presets.

    Raises:
        OptionError: if there is none of this name.
    """
    if name not in known:
        hint = nearest(name, known) or f" Known: {', '.join(known)}."
        raise OptionError(f"there is no control {name!r}.{hint}")
    cls = known[name]
    hints, docs = typing.get_type_hints(cls), option_docs(cls)
    acts = "/".join(cls.kinds)
    head = paragraph(summary(cls), width)
    lines = [f"{name} = attnctl.{cls.__name__}, on {acts} attention", head, "", "options"]
    for f in dataclasses.fields(cls):
        default = options_text({f.name: _default(f)})
        head = f"  {default}  ({kind_of(hints[f.name])})"
        lines += [head, paragraph(docs.get(f.name, "no description"), width, "      ")]
    lines += ["", "cost", paragraph(cost(cls), width, "  "), "", "paper"]
    lines += [paragraph(line, width, "  ") for line in papers(cls) or ["none named"]]
    found = presets(name)
    lines += ["", "presets" if found else "no presets", *(_preset(p, width) for p in found)]
    return "\n".join(lines)


def summary(cls: type[Control]) -> str:
    """Return the first line of a control's docstring."""
    line = inspect.cleandoc(cls.__doc__ or "no description").split("\n")[0]
    return re.sub(r"; (further )?options as in `\w+`", "", line)


def option_docs(cls: type[Control]) -> dict[str, str]:
    """Return what the docstrings of a class and its bases say of each option."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        docs |= _entries(inspect.cleandoc(base.__dict__.get("__doc__") or ""))
    return docs


def cost(cls: type[Control]) -> str:
    """Return what a control adds to a run, read from what it declares."""
    if cls.extra:
        return cls.extra
    if cls.adds_rows:
        return "one more row of the batch per sample, at each step of its window"
    if cls.replaces_softmax:
        return "no extra rows; computes the attention itself"
    return "no extra rows"


def papers(cls: type[Control]) -> list[str]:
    """Return the references in the docstring of a control's module, one text each."""
    text = inspect.cleandoc(sys.modules[cls.__module__].__doc__ or "")
    _, _, section = text.partition("References:\n")
    joined = " ".join(section.split("\n\n")[0].split())
    return [part.strip() for part in re.split(r"(?<=[.)]);\s", joined) if part.strip()]


def kind_of(hint: Any) -> str:
    """Return a type in words, as far as it can be written on a command line."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = typing.get_args(hint) if union else (hint,)
    return " or ".join(dict.fromkeys(word for kind in kinds if (word := _word(kind))))


def _word(kind: Any) -> str:
    origin = typing.get_origin(kind)
    if origin is typing.Literal:
        return " | ".join(map(str, typing.get_args(kind)))
    if origin is tuple:
        return "number-number"
    plain = {bool: "true | false", int: "whole number", float: "number", type(None): "none"}
    return "text" if kind in (str, Any) else plain.get(kind, "")


def _entries(text: str) -> dict[str, str]:
    """Read the `Args:` section of a Google-style docstring; lists of names are left out."""
    _, _, section = text.partition("Args:\n")
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in section.split("\n"):
        match = _ENTRY.fullmatch(line[4:]) if re.match(r" {4}\S", line) else None
        if match:
            current = found[match[1]] = [match[2]]
        elif line.startswith("     "):
            current.append(line.strip())
        else:
            break
    return {name: " ".join(words) for name, words in found.items() if "," not in name}


def _default(f: dataclasses.Field[Any]) -> Any:
    if f.default_factory is not dataclasses.MISSING:
        return f.default_factory()
    return "(needed)" if f.default is dataclasses.MISSING else f.default


def _preset(preset: Preset, width: int) -> str:
    head = paragraph(options_text(preset.options, "  "), width, f"  {preset.name}: ", "      ")
    source = f"{preset.origin}: {preset.source}. {preset.note}".strip()
    return f"{head}\n{paragraph(source, width, '      ')}"
