"""Host libraries: how a stack of controls reaches a model that somebody else wrote."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import HostError
from ..sites import Sites
from .discover import discover
from .pipeline import denoisers
from .vlm_discover import discover_decoder, is_language_model

__all__ = ["find_sites", "is_language_model", "is_pipeline", "survey", "targets"]


def is_pipeline(target: Any) -> bool:
    """Whether the target is a pipeline (something that holds a denoiser and is called)."""
    return not isinstance(target, nn.Module) and hasattr(target, "scheduler") and callable(target)


def targets(target: Any) -> dict[str, nn.Module]:
    """Return the models of a target by name, out of their compiled wrappers.

    Raises:
        HostError: if the target is neither a pipeline nor a module.
    """
    if isinstance(target, nn.Module):
        found = {"model": target}
    elif is_pipeline(target):
        found = denoisers(target)
    else:
        raise HostError(
            f"cannot patch a {type(target).__name__}: expected a diffusers pipeline, a "
            "denoiser module (pipe.unet, pipe.transformer) or a model of transformers"
        )
    return {name: getattr(m, "_orig_mod", m) for name, m in found.items()}


def survey(module: nn.Module, name: str = "model") -> tuple[Sites, list[nn.Module]]:
    """Return the sites of a denoiser or language model in execution order, and their modules.

    Raises:
        HostError: if it has none that can be controlled.
    """
    find = discover_decoder if is_language_model(module) else discover
    return find(module, name)


def find_sites(target: Any) -> Sites:
    """Return the sites of every model of a target, one after the other."""
    return Sites(s for name, m in targets(target).items() for s in survey(m, name)[0])
