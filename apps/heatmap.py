"""The command `attnctl heatmap`: draw, and show where each word was attended to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

import attnctl
from attnctl.errors import AttnctlError, OptionError
from attnctl.words import concepts

from .chosen import choose
from .control_syntax import parse_control
from .generate import Settings, controlled, picture_arguments, recommended
from .models import first_line, load, local_folder, model_name
from .pictures import check_output, free_name, side_by_side, write_png
from .quiet import hush, notes
from .record import record
from .tables import paragraph, terminal_width

__all__ = ["Wanted", "heatmap", "sheet", "split_words"]

Say = Callable[[str], None]


@dataclass(frozen=True)
class Wanted:
    """What the command line asks for.

    Args:
        prompt: what to draw.
        words: what to map, several in one text separated by commas; none for the concepts.
        model: name, folder or hub id.
        heads: selector of the heads that are read.
        controls: controls in their text form, at work while the maps are read.
        settings: options of `generate.Settings`.
        device: where.
        dtype: number type.
        out: where to; None for the next free name in this folder.
    """

    prompt: str
    words: tuple[str, ...] = ()
    model: str = "tiny-sd"
    heads: str = "all"
    controls: tuple[str, ...] = ()
    settings: Settings = field(default_factory=Settings)
    device: str = "auto"
    dtype: str = "auto"
    out: Path | None = None


def heatmap(wanted: Wanted, say: Say) -> None:
    """Draw, map, save and report; what can be refused is refused before anything slow begins.

    Args:
        wanted: what to draw and to map.
        say: is given notes for the user.

    Raises:
        AttnctlError: if something of it cannot be done.
    """
    out = check_output(wanted.out or free_name(stem="heatmap"))
    words = split_words(wanted.words) or None
    if words is None and not concepts(wanted.prompt):
        raise OptionError(f"no concept was found in {wanted.prompt!r}; name some --words")
    for text in wanted.controls:
        parse_control(text)
    local_folder(wanted.model)
    hush(say)
    pipe = load(wanted.model, wanted.device, wanted.dtype)
    pipe.set_progress_bar_config(disable=None)
    chosen = tuple(choose(pipe, text) for text in wanted.controls)
    settings = recommended(wanted.settings, model_name(pipe))
    arguments = picture_arguments(pipe, wanted.prompt, settings)
    with notes(say), controlled(pipe, chosen):
        found = _run(pipe, arguments, settings.seed, words, wanted.heads)
    picture = found.images[0][0]
    metadata = record(pipe, arguments, settings.seed, chosen, {"picture": picture}, found.report)
    metadata["words"] = list(found)
    subtitle = f"{metadata['model']}, seed {settings.seed}, {metadata['steps']} steps"
    write_png(sheet(found, wanted.prompt, subtitle), out, metadata)
    print(paragraph(str(found.report), terminal_width(), "", "  "))
    print(f"wrote {out} ({', '.join(found)})")


def split_words(texts: Sequence[str]) -> list[str]:
    """Return the words of several comma-separated texts."""
    return [word.strip() for text in texts for word in text.split(",") if word.strip()]


def sheet(found: attnctl.Heatmaps, title: str, subtitle: str = "", sample: int = 0) -> Image:
    """Return a picture and each word's map over it, side by side.

    Under each map stands the word and the greatest share of attention that a place gives it.
    """
    pictures = [found.images[sample][0], *(found.overlay(word, sample) for word in found)]
    captions = [f"{word}: up to {float(heat[sample].max()):.1%}" for word, heat in found.items()]
    return side_by_side(pictures, ["picture", *captions], title, subtitle)


def _run(
    pipe: Any, arguments: dict[str, Any], seed: int, words: list[str] | None, heads: str
) -> attnctl.Heatmaps:
    noise = torch.Generator("cpu").manual_seed(seed)
    try:
        return attnctl.heatmaps(pipe, words=words, heads=heads, generator=noise, **arguments)
    except AttnctlError:
        raise
    except ValueError as error:  # how diffusers refuses a size or a prompt
        raise OptionError(first_line(error)) from error
