"""Host libraries: how a stack of controls reaches a model that somebody else wrote."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import HostError
from ..sites import Sites
from .discover import discover
from .pipeline import denoisers

__all__ = ["find_sites", "is_pipeline", "targets"]


def is_pipeline(target: Any) -> bool:
    """Whether the target is a pipeline (something that holds a denoiser and is called)."""
    return not isinstance(target, nn.Module) and hasattr(target, "scheduler") and callable(target)


def targets(target: Any) -> dict[str, nn.Module]:
    """Return the denoisers of a target by name, out of their compiled wrappers.

    Raises:
        HostError: if the target is neither a pipeline nor a module.
    """
    if isinstance(target, nn.Module):
        found = {"model": target}
    elif is_pipeline(target):
        found = denoisers(target)
    else:
        raise HostError(
            f"cannot patch a {type(target).__name__}: expected a diffusers pipeline or a "
            "denoiser module (pipe.unet, pipe.transformer)"
        )
    return {name: getattr(m, "_orig_mod", m) for name, m in found.items()}


def find_sites(target: Any) -> Sites:
    """Return the sites of every denoiser of a target, one after the other."""
    return Sites(s for name, m in targets(target).items() for s in discover(m, name)[0])
