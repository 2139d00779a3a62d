"""Latents inside a denoiser's input: where they lie, and how a control moves them for good.

The pipeline holds its own variable, which no control can reach. What a control adds to the
denoiser's input is therefore kept for the step: the step's other denoiser calls get it too, and
the scheduler's `step` gets it as part of its sample, divided by what `scale_model_input`
multiplied by.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import HostError
from ..records import Rows

if TYPE_CHECKING:
    from ..records import ForwardCall
    from .run import Run

__all__ = ["caught_up", "latents", "move", "noise_size", "shifted", "with_latents"]


def latents(call: ForwardCall) -> Tensor:
    """Return the latents [n, ...] of a call as the denoiser is given them."""
    value = next(iter(call.inputs.values()))
    found: Tensor = value[_place(call.run, value, call.rows)]
    return found


def with_latents(call: ForwardCall, x: Tensor) -> ForwardCall:
    """Return the call with latents [n, ...] in every group of rows; gradients flow to `x`."""
    name, old = next(iter(call.inputs.items()))
    at = _place(call.run, old, call.rows)
    new = old.clone()
    for group in range(len(call.rows.groups)):
        new[group * call.rows.n :][at] = x.to(old.dtype)
    return replace(call, inputs={**call.inputs, name: new})


def move(call: ForwardCall, x: Tensor) -> ForwardCall:
    """Return the call with other latents [n, ...], which hold for the rest of the step too.

    Raises:
        HostError: for a bare denoiser, whose caller holds the latents.
    """
    if call.run.pipe is None:
        raise HostError(
            "a control that moves the latents needs the pipeline, whose scheduler must get them "
            "too: patch the pipeline, not its denoiser"
        )
    step = x.float() - latents(call).float()
    total = step if call.run.shift is None else call.run.shift + step
    call.run.shift = total
    return replace(with_latents(call, x), shift=total)


def caught_up(call: ForwardCall) -> ForwardCall:
    """Return the call with all that was added in this step, by a pass before this one too."""
    total, mine = call.run.shift, call.shift
    if total is None or total is mine:
        return call
    more = total if mine is None else total - mine
    return replace(with_latents(call, latents(call).float() + more), shift=total)


def shifted(run: Run, sample: Tensor) -> Tensor:
    """Return the scheduler's sample with what was added to the denoiser's input.

    Raises:
        HostError: if it has another shape than the latents in that input.
    """
    if run.shift is None:
        return sample
    if run.shift.shape != sample.shape:
        raise HostError(
            f"{type(run.pipe).__name__} gives its scheduler latents of shape "
            f"{tuple(sample.shape)}, but its denoiser {tuple(run.shift.shape)}, so what a control "
            "added cannot be handed on: undo the controls that move latents"
        )
    return (sample.float() + run.shift.to(sample.device) / _factor(run)).to(sample.dtype)


def noise_size(run: Run) -> Tensor | float:
    """Return the standard deviation with which the run's initial noise is given to the denoiser.

    That is `init_noise_sigma` times what `scale_model_input` multiplies by at the first step:
    about 1 for every scheduler, exactly 1 for those that have neither.

    Raises:
        HostError: if the run does not begin with noise alone.
    """
    if run.first > 0:
        raise HostError(
            f"{type(run.pipe).__name__} begins {run.first} steps into the noise schedule (image "
            "to image), so its first latents are no noise that could be exchanged"
        )
    size: Tensor | float = getattr(run.scheduler, "init_noise_sigma", 1.0)
    return size * _factor(run)


def _place(run: Run, value: Any, rows: Rows) -> tuple[slice, ...]:
    """Return where the latents of one group of rows lie: first in every dimension."""
    shape = _shape(run) or tuple(value.shape[1:])
    if len(shape) + 1 != value.ndim or any(
        a > b for a, b in zip(shape, value.shape[1:], strict=True)
    ):
        raise HostError(
            f"{type(run.pipe).__name__} gives its denoiser {tuple(value.shape)} for latents of "
            f"{shape} a sample, so where they lie is not known: undo the controls that move them"
        )
    return (slice(0, rows.n), *(slice(0, size) for size in shape))


def _shape(run: Run) -> tuple[int, ...]:
    for known in (run.initial_latents, run.raw_latents):
        if known is not None:
            return tuple(known.shape[1:])
    return run.latent_shape


def _factor(run: Run) -> Tensor | float:
    """Return what `scale_model_input` multiplied by in this step."""
    raw, scaled = run.raw_latents, run.scaled_latents
    if raw is None or scaled is None or raw is scaled:
        return 1.0
    return scaled.float().norm() / raw.float().norm().clamp_min(torch.finfo(torch.float32).tiny)
