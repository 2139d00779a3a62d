"""Gradients through a whole run: a pipeline's call without its `torch.no_grad`.

diffusers puts the decorator on every pipeline's `__call__`; what it wraps lets gradients flow
from the picture through the autoencoder, the scheduler's steps and every denoiser call.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["with_gradients"]


@contextlib.contextmanager
def with_gradients(pipe: Any) -> Iterator[None]:
    """Within the block, gradients flow through the pipeline's calls; patch inside it.

    The weights take none: autograd keeps only what gradients of activations need.
    """
    stock: Any = type(pipe)
    parts = [m for m in pipe.components.values() if isinstance(m, torch.nn.Module)]
    weights = [p for part in parts for p in part.parameters() if p.requires_grad]
    for weight in weights:
        weight.requires_grad_(False)
    object.__setattr__(pipe, "__class__", _open(stock))
    try:
        with torch.enable_grad():
            yield
    finally:
        object.__setattr__(pipe, "__class__", stock)
        for weight in weights:
            weight.requires_grad_(True)


@functools.cache
def _open(stock: Any) -> Any:
    """Return the class of a pipeline with the function that `__call__` decorates."""
    names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__}
    return type(stock.__name__, (stock,), {**names, "__call__": inspect.unwrap(stock.__call__)})
