"""Draw a picture, with controls or without, and keep the record of how it was made."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

import attnctl
from attnctl.errors import HostError, OptionError
from attnctl.hosts.adopt import original_class

from .chosen import Chosen, choose
from .control_syntax import options_text
from .models import load, model_name
from .pictures import side_by_side, write_png
from .record import record

__all__ = [
    "Chosen",
    "Result",
    "Settings",
    "batch_arguments",
    "call_arguments",
    "choose",
    "controlled",
    "draw_rows",
    "generate",
    "makes_videos",
    "picture_arguments",
    "recommended",
]

RECOMMENDED: dict[str, dict[str, Any]] = {
    "tiny-sd": {"steps": 20, "guidance_scale": 5.0},
    "tiny-sd3": {"steps": 20, "guidance_scale": 3.0},
    "tiny-wan": {
        "steps": 12,
        "guidance_scale": 3.0,
        "height": 64,
        "width": 64,
        "frames": 17,
        "fps": 8,
    },
}
"""Settings of the shipped models, where their pipeline's own are not meant for them."""

LIMITS = {"steps": 10_000, "height": 16_384, "width": 16_384, "frames": 10_000, "fps": 1000}
"""The most that a setting may be: beyond lie slips of the pen, not pictures."""
PIXELS = 2**26
"""Of one picture or frame."""


@dataclass(frozen=True)
class Settings:
    """How to draw. None leaves the choice to the model.

    Args:
        negative_prompt: what to keep out, for pipelines with classifier-free guidance.
        seed: seed of the noise, drawn on the CPU whatever the device.
        steps: denoising steps, at least 1.
        guidance_scale: scale of classifier-free guidance, as the pipeline counts it.
        height: in pixels, at most 16384.
        width: in pixels, at most 16384.
        frames: of videos, at most 10000.
        fps: frames per second at which a video is shown, 1 to 1000; 16 if None.
    """

    negative_prompt: str | None = None
    seed: int = 0
    steps: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    fps: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise OptionError(f"seed {self.seed} is outside 0 to 2^63 - 1")
        for name, most in LIMITS.items():
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"{name} {value} must be at least 1")
            if value is not None and value > most:
                raise OptionError(f"{name} {value} is too much; at most {most}")
        if (self.height or 1) * (self.width or 1) > PIXELS:
            raise OptionError(f"{self.width} x {self.height} is more than {PIXELS} pixels")
        if self.guidance_scale is not None and not abs(self.guidance_scale) < 1e6:
            raise OptionError(f"guidance scale {self.guidance_scale} is no usable number")


@dataclass(frozen=True)
class Result:
    """What was drawn.

    Args:
        images: by name: "stock" without controls, "controlled" with them; both if compared.
        metadata: JSON values that say how it was made.
        chosen: the controls.
        report: what they touched, None without controls.
        captions: by name, what `picture` writes under each.
    """

    images: dict[str, Image]
    metadata: dict[str, Any]
    chosen: tuple[Chosen, ...] = ()
    report: attnctl.Report | None = None
    captions: dict[str, str] = field(default_factory=dict)

    def picture(self) -> Image:
        """Return the picture, or both side by side if two were drawn."""
        if len(self.images) == 1:
            return next(iter(self.images.values()))
        m = self.metadata
        guidance = "" if m["guidance_scale"] is None else f", guidance {m['guidance_scale']:g}"
        return side_by_side(
            list(self.images.values()),
            [self.captions[name] for name in self.images],
            title=m["prompt"],
            subtitle=f"{m['model']}, seed {m['seed']}, {m['steps']} steps{guidance}",
        )

    def save(self, path: str | Path) -> None:
        """Write `picture()` as PNG with the metadata.

        Raises:
            PictureError: if that is not possible.
        """
        write_png(self.picture(), Path(path), self.metadata)


def generate(
    prompt: str,
    *controls: attnctl.Control | Chosen | str,
    model: Any = "tiny-sd3",
    settings: Settings | None = None,
    compare: bool = False,
    device: str = "auto",
    dtype: str = "auto",
) -> Result:
    """Draw a picture.

    Args:
        prompt: what to draw.
        *controls: the stack, outermost first, as objects or as text such as "softpag:u=0.5";
            a text without options takes the model's preset if there is one.
        model: a shipped model's name, a folder, a hub id, or a pipeline that is loaded.
        settings: seed, steps and so on.
        compare: draw also without the controls, from the same noise.
        device: for a model to be loaded: "auto", "cpu" or "cuda".
        dtype: for a model to be loaded: "auto", "float32", "float16" or "bfloat16".

    Raises:
        AttnctlError: if the model, a control or a setting cannot be used.
    """
    if compare and not controls:
        raise OptionError("to compare, give at least one control")
    pipe = load(str(model), device, dtype) if isinstance(model, (str, Path)) else model
    settings = recommended(settings or Settings(), model_name(pipe))
    arguments = picture_arguments(pipe, prompt, settings)
    chosen = tuple(choose(pipe, control) for control in controls)
    images, report = {}, None
    if chosen:
        with controlled(pipe, chosen) as handle:
            (images["controlled"],) = draw_rows(pipe, arguments, [settings.seed], "controlled")
            report = handle.report() if handle else None
    if compare or not chosen:
        (stock,) = draw_rows(pipe, arguments, [settings.seed], "stock")
        images = {"stock": stock, **images}
    captions = {"stock": "stock", "controlled": " + ".join(map(_caption, chosen))}
    metadata = record(pipe, arguments, settings.seed, chosen, images, report)
    return Result(images, metadata, chosen, report, captions)


def recommended(settings: Settings, model: str) -> Settings:
    """Return the settings with what is recommended for a shipped model where they say nothing."""
    values = RECOMMENDED.get(model, {})
    unset = {key: value for key, value in values.items() if getattr(settings, key) is None}
    return dataclasses.replace(settings, **unset)


def call_arguments(pipe: Any, prompt: str, settings: Settings) -> dict[str, Any]:
    """Return the arguments of a pipeline for pictures or videos, its own defaults written out.

    Args:
        pipe: the pipeline.
        prompt: what to draw.
        settings: how.

    Raises:
        AttnctlError: if it does not draw from a prompt, or lacks a setting.
    """
    cls = original_class(pipe)
    known, kind = inspect.signature(cls.__call__).parameters, cls.__name__
    if "prompt" not in known or "num_inference_steps" not in known:
        raise HostError(f"{kind} does not draw from a prompt")
    given = {
        "num_inference_steps": settings.steps,
        "guidance_scale": settings.guidance_scale,
        "negative_prompt": settings.negative_prompt,
        "height": settings.height,
        "width": settings.width,
        "num_frames": settings.frames,
    }
    arguments: dict[str, Any] = {"prompt": prompt}
    for key, value in given.items():
        default = known[key].default if key in known else None
        if value is not None and key not in known:
            raise OptionError(f"{kind} takes no {key.replace('_', ' ')}")
        if value is not None or default not in (None, inspect.Parameter.empty):
            arguments[key] = default if value is None else value
    own = known.get("true_cfg_scale")
    scale = own.default if own else arguments.get("guidance_scale")
    if settings.negative_prompt and isinstance(scale, (int, float)) and scale <= 1:
        raise OptionError(
            f"a negative prompt changes nothing in {kind} at guidance {scale:g}; the control "
            "nag:negative=... works there"
        )
    return arguments


def picture_arguments(pipe: Any, prompt: str, settings: Settings) -> dict[str, Any]:
    """Return `call_arguments` of a pipeline that draws pictures.

    Raises:
        AttnctlError: if it makes videos, does not draw from a prompt, or lacks a setting.
    """
    if makes_videos(pipe):
        raise HostError(
            f"{original_class(pipe).__name__} makes videos; only pictures can be drawn here, "
            "`attnctl batch` makes videos too"
        )
    return call_arguments(pipe, prompt, settings)


def makes_videos(pipe: Any) -> bool:
    """Whether a pipeline makes videos rather than pictures."""
    return "num_frames" in inspect.signature(original_class(pipe).__call__).parameters


def draw_rows(pipe: Any, arguments: Mapping[str, Any], seeds: Sequence[int], name: str) -> Any:
    """Draw one batch.

    Each row has a noise of its own, so that it is the picture of its prompt and seed whatever
    is drawn with it, up to rounding, which the number of rows may change.

    Args:
        pipe: the pipeline.
        arguments: its keywords; the prompts are a list if there are several rows.
        seeds: seed of the noise of each row.
        name: shown beside the progress bar.

    Returns:
        A picture per row; of video pipelines a list of pictures per row.
    """
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**{"desc": f"{name:>10}", **before})
    noise = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    try:
        generator = noise[0] if len(noise) == 1 else noise
        if makes_videos(pipe):
            return pipe(**arguments, generator=generator, output_type="pil").frames
        return pipe(**arguments, generator=generator).images
    finally:
        pipe.set_progress_bar_config(**before)


def batch_arguments(
    arguments: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return a pipeline's keywords for several rows; for one row they stay as they are.

    Args:
        arguments: those of one row.
        rows: prompt and negative prompt of each.
    """
    if len(rows) == 1:
        return dict(arguments)
    texts = [key for key in ("prompt", "negative_prompt") if key in arguments]
    return {**arguments, **{key: [row[key] for row in rows] for key in texts}}


@contextlib.contextmanager
def controlled(pipe: Any, chosen: Sequence[Chosen]) -> Iterator[attnctl.Handle | None]:
    """Install controls, if there are any, inside a `with` block."""
    if not chosen:
        yield None
        return
    with attnctl.patch(pipe, *(one.control for one in chosen)) as handle:
        yield handle


def _caption(chosen: Chosen) -> str:
    return f"{chosen.control.name} {options_text(chosen.changed, '  ')}".strip()
