"""The command `attnctl sinks`: which tokens of a prompt with an image are sinks, and where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL.Image import Image
from torch import Tensor

from attnctl.errors import OptionError
from attnctl.processors.analysis.asking import asked, image_grid, usual_tau
from attnctl.processors.analysis.overlay import overlay
from attnctl.processors.vlm.sink_map import SinkMap, sink_map

from .eval.answering import Answerer
from .pictures import check_output, free_name, read_picture, side_by_side, write_png
from .quiet import hush

__all__ = ["Wanted", "panels", "sinks", "told"]

Say = Callable[[str], None]


@dataclass(frozen=True)
class Wanted:
    """What the command line asks for.

    Args:
        model: a shipped model, a folder, or a hub id.
        image: the picture.
        question: what is asked about it.
        dims: sink dimensions; None to calibrate them on this prompt.
        tau: least phi of a sink; None for 20 scaled to the model's width where it is small.
        device: where.
        dtype: number type.
        out: where the picture goes; None for the next free name.
    """

    model: str
    image: Path
    question: str = "Describe the image."
    dims: tuple[int, ...] | None = None
    tau: float | None = None
    device: str = "auto"
    dtype: str = "auto"
    out: Path | None = None


def sinks(wanted: Wanted, say: Say) -> None:
    """Read one prompt, tell its sinks and draw where they are.

    Args:
        wanted: what to look at.
        say: is given notes for the user.

    Raises:
        AttnctlError: if something of it cannot be done.
    """
    out = check_output(wanted.out or free_name(stem="sinks"))
    picture = read_picture(wanted.image)
    hush(say)
    answerer = Answerer.load(wanted.model, wanted.device, wanted.dtype)
    model = answerer.model
    inputs = asked(model, answerer.processor, picture, wanted.question)
    found = sink_map(model, inputs, wanted.dims)
    if not bool(found.image.any()):
        raise OptionError(f"the prompt of {wanted.model!r} holds no image tokens")
    tau = usual_tau(model) if wanted.tau is None else wanted.tau
    print(told(found, tau))
    grid = image_grid(model, inputs, int(found.image.sum()))
    if grid is None:
        say("the grid of this model's image tokens is not known, so that no picture is drawn")
        return
    drawn, captions = panels(found, picture, grid, tau)
    title = f"{wanted.model}: sink dimensions {_numbers(found.sink_dims)}, tau {tau:g}"
    facts = {"model": wanted.model, "question": wanted.question, "tau": tau}
    facts |= {"sink_dims": list(found.sink_dims)}
    write_png(side_by_side(drawn, captions, title, wanted.question), out, facts)
    print(f"wrote {out}")


def told(found: SinkMap, tau: float) -> str:
    """Return what was found, in lines."""
    if not found.sink_dims:
        return (
            "no dimension of the residual stream stands out at the first token or at those with "
            "most attention: this model shows no sinks of this kind here"
        )
    marked = found.sinks(tau)[:, 0]
    lines = [f"sink dimensions: {_numbers(found.sink_dims)}", "layer  text  image  largest phi"]
    assert found.phi is not None
    for layer, row in enumerate(marked):
        text, image = (int((row & role[0]).sum()) for role in (found.text, found.image))
        lines.append(f"{layer:5}  {text:4}  {image:5}  {float(found.phi[layer, 0].max()):11.1f}")
    number = found.image[0].cumsum(0) - 1
    ever = (marked & found.image[0]).sum(0)
    for at in ever.argsort(descending=True, stable=True)[:10].tolist():
        if ever[at]:
            lines.append(_line(found, at, int(number[at]), int(ever[at])))
    return "\n".join(lines)


def _line(found: SinkMap, at: int, number: int, layers: int) -> str:
    mass = float(found.mass[:, 0, at].mean())
    text = f"image token {number}: {layers} layers, {mass:.2%} of the question's attention"
    if found.norms is not None:
        text += f", norm {float(found.norms[0, number]):.1f}"
    if found.cls is not None:
        text += f", {float(found.cls[0, number]):.2%} of the class token's"
    return text


def panels(
    found: SinkMap, picture: Image, grid: tuple[int, int], tau: float
) -> tuple[list[Image], list[str]]:
    """Return the picture and what marks sinks over it, with captions.

    Args:
        found: what tells the sinks of one prompt.
        picture: its picture.
        grid: rows and columns of its tokens.
        tau: least phi of a sink.
    """
    image, layers = found.image[0], len(found.mass)
    ever = found.sinks(tau)[:, 0, image].float().sum(0)
    maps: list[tuple[str, Tensor | None]] = [
        (f"sink in up to {int(ever.max())} of {layers} layers", ever),
        ("attention from the question", found.mass[:, 0, image].mean(0)),
        ("feature norm", None if found.norms is None else found.norms[0]),
        ("class token's attention", None if found.cls is None else found.cls[0]),
    ]
    drawn, captions = [picture], ["picture"]
    for caption, values in maps:
        if values is not None:
            heat = values.reshape(grid).repeat_interleave(16, 0).repeat_interleave(16, 1)
            drawn.append(overlay(picture, heat))
            captions.append(caption)
    return drawn, captions


def _numbers(dims: tuple[int, ...]) -> str:
    return ", ".join(map(str, dims)) or "none"
