"""Pictures in and out: PNG metadata, safe writing, and sheets of pictures side by side."""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, PngImagePlugin, UnidentifiedImageError

from attnctl.errors import AttnctlError

from .files import write_whole
from .lettering import lettering, wrapped
from .tables import breakable

__all__ = [
    "PictureError",
    "check_output",
    "free_name",
    "parameters_text",
    "png_bytes",
    "read_metadata",
    "read_picture",
    "side_by_side",
    "write_png",
]

KEY = "attnctl"
"""PNG text key of our JSON."""
PLAIN_KEY = "parameters"
"""PNG text key that web UIs read."""

_SMALLEST = 320
PAPER, INK, _FAINT = (255, 255, 255), (0, 0, 0), (96, 96, 96)
_LINES = 4


class PictureError(AttnctlError):
    """A picture cannot be read, or not be written where it should be."""


# ---- files


def check_output(path: Path, endings: Sequence[str] = (".png",)) -> Path:
    """Return where a picture will lie, once it is sure that it can be written there.

    Args:
        path: where it is wanted.
        endings: what the name may end in.

    Raises:
        PictureError: if it cannot, or ends in something else.
    """
    path = path.expanduser()
    if path.suffix.lower() not in endings:
        raise PictureError(f"the output {path} must end in {' or '.join(endings)}")
    target = path.resolve()
    if target.is_dir():
        raise PictureError(f"the output {path} is a folder")
    if not target.parent.is_dir():
        raise PictureError(f"the output folder {target.parent} does not exist")
    if target.exists() and not os.access(target, os.W_OK):
        raise PictureError(f"the output {path} exists and is write-protected")
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise PictureError(
            f"cannot write into the folder {target.parent}: {error.strerror or error}"
        ) from error
    return path


def free_name(folder: Path = Path(), stem: str = "attnctl") -> Path:
    """Return the first of attnctl-001.png, attnctl-002.png, ... that does not exist."""
    names = (folder / f"{stem}-{i:03}.png" for i in count(1))
    return next(name for name in names if not name.exists())


def write_png(image: Image.Image, path: Path, metadata: Mapping[str, Any]) -> None:
    """Write a picture with its metadata, completely or not at all.

    Args:
        image: the picture.
        path: where to; an existing file is replaced.
        metadata: JSON values, kept under the key "attnctl", and in short, if there is a
            prompt among them, under "parameters".

    Raises:
        PictureError: if it cannot be written.
    """
    try:
        write_whole(path.expanduser().resolve(), png_bytes(image, metadata))
    except OSError as error:
        raise PictureError(f"cannot write {path}: {error.strerror or error}") from error


def png_bytes(image: Image.Image, metadata: Mapping[str, Any]) -> bytes:
    """Return a picture as the PNG that `write_png` writes."""
    info = PngImagePlugin.PngInfo()
    info.add_text(KEY, json.dumps(metadata))
    if "prompt" in metadata:
        info.add_text(PLAIN_KEY, parameters_text(metadata))
    file = io.BytesIO()
    image.save(file, "PNG", pnginfo=info)
    return file.getvalue()


def read_picture(path: Path) -> Image.Image:
    """Return a picture of any format in RGB.

    Raises:
        PictureError: if there is none.
    """
    try:
        return Image.open(path.expanduser()).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise PictureError(f"cannot read the picture {path}: {error}") from error


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Return the metadata that `write_png` put into a picture.

    Raises:
        PictureError: if there is no such picture, or it holds none.
    """
    try:
        with Image.open(path) as image:
            image.load()
            text = getattr(image, "text", {}).get(KEY)
    except UnidentifiedImageError:
        raise PictureError(f"{path} is no picture") from None
    except (OSError, ValueError, SyntaxError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PictureError(f"cannot read {path}: {reason}") from error
    try:
        data = json.loads(text or "null")
    except ValueError:
        data = None
    if not isinstance(data, dict):
        raise PictureError(f"{path} holds no metadata of attnctl")
    return data


def parameters_text(metadata: Mapping[str, Any]) -> str:
    """Return the settings as web UIs write and read them."""
    lines = [str(metadata["prompt"])]
    if metadata.get("negative_prompt"):
        lines.append(f"Negative prompt: {metadata['negative_prompt']}")
    controls = " ".join(c["text"] for c in metadata["controls"])
    values = {
        "Steps": metadata["steps"],
        "Sampler": metadata["scheduler"].removesuffix("Scheduler"),
        "CFG scale": metadata["guidance_scale"],
        "Seed": metadata["seed"],
        "Size": f"{metadata['width']}x{metadata['height']}",
        "Model": metadata["model"],
        "Controls": controls or None,
        "Version": f"attnctl {metadata['versions']['attnctl']}",
    }
    lines.append(", ".join(f"{k}: {_quoted(v)}" for k, v in values.items() if v is not None))
    return "\n".join(lines)


def _quoted(value: Any) -> str:
    text = str(value)
    return json.dumps(text) if any(c in text for c in ',:\n"') else text


# ---- sheets


def side_by_side(
    images: Sequence[Image.Image],
    captions: Sequence[str],
    title: str,
    subtitle: str = "",
    columns: int | None = None,
    smallest: int = _SMALLEST,
) -> Image.Image:
    """Return the pictures in a row, or in several, a caption under each, a title over all.

    Small pictures are enlarged by a whole factor, without smoothing.

    Args:
        images: pictures of one size.
        captions: one text for each; wrapped, at most four lines.
        title: first line.
        subtitle: second line, in grey.
        columns: pictures in a row; None for all.
        smallest: least height and width of a picture, in pixels.
    """
    shown = [_enlarged(image, smallest) for image in images]
    columns = columns or len(shown)
    wide, high = shown[0].size
    size = max(15, wide // 28)
    font, (title, subtitle, *captions) = lettering(size, [title, subtitle, *captions])
    gap = round(1.5 * size)
    across = min(columns, len(shown)) * (wide + gap) - gap
    heads = [(line, INK) for line in wrapped(title, font, across, 2)]
    heads += [(line, _FAINT) for line in wrapped(subtitle, font, across, 1)]
    feet = [wrapped(breakable(caption, 24), font, wide, _LINES) for caption in captions]
    rows = [range(i, min(i + columns, len(shown))) for i in range(0, len(shown), columns)]
    tops, end = [], gap * (1 + len(heads)) + gap // 3
    for row in rows:
        tops.append(end)
        end += high + gap // 3 + gap * (1 + max(len(feet[i]) for i in row))
    sheet = Image.new("RGB", (across + 2 * gap, end), PAPER)
    pen = ImageDraw.Draw(sheet)
    for i, (line, ink) in enumerate(heads):
        pen.text((gap, gap * (i + 0.7)), line, fill=ink, font=font)
    for i, (image, lines) in enumerate(zip(shown, feet, strict=True)):
        left, top = gap + i % columns * (wide + gap), tops[i // columns]
        sheet.paste(image, (left, top))
        for j, line in enumerate(lines):
            pen.text((left, top + high + gap // 3 + j * gap), line, fill=INK, font=font)
    return sheet


def _enlarged(image: Image.Image, smallest: int) -> Image.Image:
    factor = max(1, -(-smallest // min(image.size)))
    size = (image.width * factor, image.height * factor)
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST)
