"""The command `attnctl heatmap`: draw or film, and show where each word was attended to."""

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
from .files import write_whole
from .generate import Settings, call_arguments, controlled, makes_videos, recommended
from .models import first_line, load, local_folder, model_name
from .pictures import PictureError, check_output, free_name, side_by_side, write_png
from .quiet import hush, notes
from .record import record
from .tables import paragraph, terminal_width
from .videos import FPS, mp4_bytes, need_video

__all__ = ["Wanted", "clip", "heatmap", "sheet", "split_words"]

Say = Callable[[str], None]
_COLUMNS = 6
"""Frames of a video on a sheet, at most."""
_SHEET_SIDE, _CLIP_WIDTH = 256, 720
"""Pixels: of a frame on a sheet, and of a row of frames in a clip."""


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
        out: where to, .png or, of a video, .mp4; None for the next free name in this folder.
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
    out = check_output(wanted.out or free_name(stem="heatmap"), (".png", ".mp4"))
    moving = out.suffix.lower() == ".mp4"
    if moving:
        need_video()
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
    if moving and not makes_videos(pipe):
        raise PictureError(f"{wanted.model} draws pictures: the output must end in .png")
    arguments = call_arguments(pipe, wanted.prompt, settings)
    with notes(say), controlled(pipe, chosen):
        found = _run(pipe, arguments, settings.seed, words, wanted.heads)
    picture = found.images[0][0]
    metadata = record(pipe, arguments, settings.seed, chosen, {"picture": picture}, found.report)
    metadata["words"] = list(found)
    subtitle = f"{metadata['model']}, seed {settings.seed}, {metadata['steps']} steps"
    if moving:
        frames = clip(found, wanted.prompt, subtitle)
        _write(mp4_bytes(frames, settings.fps or FPS, metadata), out)
    else:
        write_png(sheet(found, wanted.prompt, subtitle), out, metadata)
    print(paragraph(str(found.report), terminal_width(), "", "  "))
    print(f"wrote {out} ({', '.join(found)})")


def split_words(texts: Sequence[str]) -> list[str]:
    """Return the words of several comma-separated texts."""
    return [word.strip() for text in texts for word in text.split(",") if word.strip()]


def sheet(found: attnctl.Heatmaps, title: str, subtitle: str = "", sample: int = 0) -> Image:
    """Return a picture and each word's map over it, side by side; of a video, a row for each.

    Under each map stands the word and the greatest share of attention that a place gives it.
    """
    captions = ["video" if found.grid_frames > 1 else "picture", *_captions(found, sample)]
    if found.grid_frames == 1:
        pictures = [found.images[sample][0], *(found.overlay(word, sample) for word in found)]
        return side_by_side(pictures, captions, title, subtitle)
    columns = min(_COLUMNS, found.grid_frames)
    last = len(found.images[sample]) - 1
    chosen = [round(i * last / (columns - 1)) for i in range(columns)]
    panels = [_panels(found, i, sample, _SHEET_SIDE) for i in chosen]
    tiles = [one for row in zip(*panels, strict=True) for one in row]
    under = [caption if i == 0 else "" for caption in captions for i in range(columns)]
    return side_by_side(tiles, under, title, subtitle, columns, smallest=128)


def clip(found: attnctl.Heatmaps, title: str, subtitle: str = "", sample: int = 0) -> list[Image]:
    """Return a video whose frames hold the frame itself and each word's map over it."""
    captions = ["video", *_captions(found, sample)]
    side = max(96, _CLIP_WIDTH // len(captions))
    return [
        _even(side_by_side(_panels(found, i, sample, side), captions, title, subtitle, None, side))
        for i in range(len(found.images[sample]))
    ]


def _panels(found: attnctl.Heatmaps, number: int, sample: int, side: int) -> list[Image]:
    """Return a frame and each word's map over it, no larger than some pixels a side."""
    frame = found.images[sample][number].copy()
    frame.thumbnail((side, side))
    return [frame, *(found.over_frame(word, number, sample, frame) for word in found)]


def _captions(found: attnctl.Heatmaps, sample: int) -> list[str]:
    return [f"{word}: up to {float(heat[sample].max()):.1%}" for word, heat in found.items()]


def _even(image: Image) -> Image:
    """Return a picture without the last row and column of odd ones: browsers want even videos."""
    return image.crop((0, 0, image.width // 2 * 2, image.height // 2 * 2))


def _write(data: bytes, out: Path) -> None:
    try:
        write_whole(out.resolve(), data)
    except OSError as error:
        raise PictureError(f"cannot write {out}: {error.strerror or error}") from error


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
