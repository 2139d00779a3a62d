"""Which controls can run in ComfyUI, read from the registry."""

from __future__ import annotations

import attnctl
from attnctl.control import Control
from attnctl.processors.guidance.perturbed import PerturbedGuidance

__all__ = ["eligible", "refusal"]

DENOISER_KINDS = frozenset({"self", "cross", "joint"})


def eligible() -> dict[str, type[Control]]:
    """Return the controls that need queries, keys, values, heads and tokens alone, by name."""
    return {name: cls for name, cls in attnctl.controls().items() if refusal(cls) is None}


def refusal(cls: type[Control]) -> str | None:
    """Return why a control cannot run in ComfyUI, None if it can.

    A guidance by a perturbed pass qualifies as well, since ComfyUI's sampler can run that pass
    and add the term.
    """
    if not DENOISER_KINDS & set(cls.kinds):
        return "it is for language models"
    if issubclass(cls, PerturbedGuidance):
        return None
    for plane, what in (
        ("denoise", "runs the denoiser its own way"),
        ("between", "changes latents between steps"),
        ("decode", "changes the logits of a language model"),
    ):
        if cls.plane(plane):
            return f"it {what}"
    if not cls.plane("attend"):
        return "it does nothing inside attention"
    if cls.begin is not Control.begin:
        return "it needs to know the run: the prompt, the pipeline or earlier calls"
    return None
