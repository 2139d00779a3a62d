"""Weights: on their device, and rounded to 16 bits, as every model is saved and measured."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def on_device(model: torch.nn.Module, device: torch.device) -> Any:
    """A convolutional model on its device, channels last on a GPU."""
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    return model.to(device).to(memory_format=layout)  # type: ignore[call-overload]


def rounded(model: torch.nn.Module) -> torch.nn.Module:
    """Copy of a model on the CPU in float16, laid out as files hold it."""
    copied = copy.deepcopy(model).cpu().half()
    return copied.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def save_rounded(model: torch.nn.Module, path: Path) -> Path:
    """Write a model's weights to one safetensors file in float16."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: value.half().contiguous().cpu() for name, value in model.state_dict().items()}
    save_file(state, path)
    return path


def millions(model: torch.nn.Module) -> float:
    """Number of parameters, in millions."""
    return round(sum(p.numel() for p in model.parameters()) / 1e6, 3)
