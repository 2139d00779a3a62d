"""The record of a picture: JSON values that say how it was made."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from PIL.Image import Image

import attnctl
from attnctl.hosts.adopt import original_class
from attnctl.patch import Report

from .chosen import Chosen
from .models import model_name

__all__ = ["control_data", "line_data", "record", "versions"]


def record(
    pipe: Any,
    arguments: Mapping[str, Any],
    seed: int,
    chosen: Sequence[Chosen],
    images: Mapping[str, Image],
    report: Report | None,
) -> dict[str, Any]:
    """Return the record of pictures.

    Args:
        pipe: the pipeline that drew them.
        arguments: what it was called with.
        seed: seed of the noise.
        chosen: the controls.
        images: the pictures by name.
        report: what the controls touched.
    """
    image = next(iter(images.values()))
    return {
        "prompt": arguments["prompt"],
        "negative_prompt": arguments.get("negative_prompt"),
        "model": model_name(pipe),
        "pipeline": original_class(pipe).__name__,
        "scheduler": original_class(pipe.scheduler).__name__,
        "controls": [control_data(c) for c in chosen],
        "seed": seed,
        "steps": arguments.get("num_inference_steps"),
        "guidance_scale": arguments.get("guidance_scale"),
        "height": image.height,
        "width": image.width,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "device": pipe.device.type,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(pipe.device) if pipe.device.type == "cuda" else None,
        "pictures": list(images),
        "versions": versions(),
        "report": [line_data(line) for line in report.lines] if report else [],
    }


def control_data(chosen: Chosen) -> dict[str, Any]:
    """Return a control as JSON values: name, text form, every option, preset."""
    return {
        "name": chosen.control.name,
        "text": str(chosen),
        "options": {key: _plain(value) for key, value in chosen.options.items()},
        "preset": chosen.preset.name if chosen.preset else None,
    }


def line_data(line: Any) -> dict[str, Any]:
    """Return a line of a report as JSON values."""
    data = {f.name: _plain(getattr(line, f.name)) for f in dataclasses.fields(line)}
    return {**data, "control": line.control.name}


def _plain(value: Any) -> Any:
    """Return a value as JSON can hold it."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, torch.Tensor):
        return f"tensor {list(value.shape)}"
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def versions() -> dict[str, str]:
    """Return the versions of what draws."""
    packages = ("torch", "diffusers", "transformers")
    found = {name: importlib.metadata.version(name) for name in packages}
    # of its own it knows the version without being installed as a package
    return {"attnctl": attnctl.__version__, **found, "python": platform.python_version()}
