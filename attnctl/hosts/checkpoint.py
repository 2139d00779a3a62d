"""Gradient checkpointing: a block that runs again in the backward pass meets its controls again.

The backward pass begins after the denoiser's call has ended, and for CUDA in another thread,
so each checkpointed block carries the `Forward` that it was first run in.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .run import LOCAL

if TYPE_CHECKING:
    from .denoiser import Forward

__all__ = ["checkpointed"]

_NAME = "_gradient_checkpointing_func"


class _Within:
    """A block to be called within a `Forward`."""

    def __init__(self, block: Callable[..., Any], forward: Forward) -> None:
        self.block = block
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before = LOCAL.forward, LOCAL.inside
        LOCAL.forward, LOCAL.inside = self.forward, self.forward.binding
        try:
            return self.block(*args, **kwargs)
        finally:
            LOCAL.forward, LOCAL.inside = before


def _run(
    checkpoint: Callable[..., Any], forward: Forward, block: Any, *args: Any, **kwargs: Any
) -> Any:
    return checkpoint(_Within(block, forward), *args, **kwargs)


@contextlib.contextmanager
def checkpointed(module: nn.Module, forward: Forward) -> Iterator[None]:
    """Inside, blocks that the denoiser checkpoints remember `forward`.

    Args:
        module: the denoiser.
        forward: the call of it that is under way.
    """
    if not (torch.is_grad_enabled() and forward.binding.checkpoints):
        yield
        return
    holders = [m for m in module.modules() if callable(m.__dict__.get(_NAME))]
    before = [m.__dict__[_NAME] for m in holders]
    for holder, checkpoint in zip(holders, before, strict=True):
        holder.__dict__[_NAME] = functools.partial(_run, checkpoint, forward)
    try:
        yield
    finally:
        for holder, checkpoint in zip(holders, before, strict=True):
            holder.__dict__[_NAME] = checkpoint
