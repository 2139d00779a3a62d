"""Where Triton kernels can run: on NVIDIA GPUs from sm80 on, and on a CPU in the interpreter."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

__all__ = ["is_here", "kernels_on", "several_gpus"]


@functools.cache
def kernels_on(device: torch.device, module: str) -> Any:
    """Return a module of Triton kernels, None where they cannot run.

    Args:
        device: of the tensors.
        module: its full name; it says in `INTERPRETED` whether a CPU will do.
    """
    try:
        found = importlib.import_module(module)
    except ImportError:
        return None
    if device.type == "cuda":
        usable = torch.version.cuda is not None
        usable = usable and torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        usable = device.type == "cpu" and found.INTERPRETED
    return found if usable else None


@functools.cache
def several_gpus() -> bool:
    """Whether torch sees more than one GPU."""
    return torch.cuda.device_count() > 1


def is_here(x: Tensor) -> bool:
    """Whether a kernel on this tensor can be started at once: it starts on the current GPU."""
    return not several_gpus() or not x.is_cuda or x.device.index == torch.cuda.current_device()
