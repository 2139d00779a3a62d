"""One run of a pipeline (or of a bare denoiser): step, roles, and the controls' states."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import HostError
from ..records import Rows, Step

if TYPE_CHECKING:
    from .denoiser import Forward

__all__ = ["LOCAL", "Run", "batch_of"]

_UNGUIDED_PAG = ("cond", "pipeline-perturbed")
_LAYOUTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "DiTPipeline": (("cond", "uncond"),),
    r".*InstructPix2PixPipeline": (("cond", "image", "uncond"),),
    r".*PAG.*Pipeline": (
        _UNGUIDED_PAG,
        ("uncond", "cond"),
        ("uncond", "cond", "pipeline-perturbed"),
    ),
}
"""Batched calls that are not [uncond, cond], by a pattern of the whole class name."""


class _Local(threading.local):
    """What this thread is doing; pipelines in other threads see nothing of it."""

    run: Run | None = None
    forward: Forward | None = None
    inside: Any = None  # binding whose denoiser call is under way
    ref: Any = None  # site being run, eager
    site: Tensor | None = None  # site being run, under torch.compile
    capture: type[BaseException] | None = None  # raised with the first denoiser call's inputs
    index: int = 0  # primitive calls so far in this forward of the site


LOCAL = _Local()


@dataclass(eq=False)
class Run:
    """State of one run.

    Args:
        args: the pipeline call's arguments by name, defaults included; empty for a bare
            denoiser.
        pipe: the pipeline, None for a bare denoiser.
        batch: samples of the run (prompts x images per prompt), 0 if unknown.
        fixed: roles given by the user, for a bare denoiser.
        given_steps: number of steps given by the user, for a bare denoiser.
    """

    args: Mapping[str, Any] = field(default_factory=dict)
    pipe: Any = None
    batch: int = 0
    fixed: tuple[str, ...] = ()
    given_steps: int = 0
    index: int = 0
    branch: str | None = None
    cache_context: tuple[Any, Any] = ((), {})
    begun: bool = False
    last: Any = None  # binding of the denoiser that was called last
    calls_in_step: int = 0
    states: dict[int, Any] = field(default_factory=dict)
    watches: dict[Any, dict[Any, Any]] = field(default_factory=dict)
    steps: dict[int, set[int]] = field(default_factory=dict)  # by entry: its denoiser's
    cache: dict[Any, Any] = field(default_factory=dict)
    initial_latents: Tensor | None = None
    raw_latents: Tensor | None = None
    replaced_latents: Tensor | None = None
    scaled_latents: Tensor | None = None  # what scale_model_input made of raw_latents
    latent_shape: tuple[int, ...] = ()  # of one sample, as the scheduler gave it back
    shift: Tensor | None = None  # what controls added to the denoiser's latents in this step
    _last_time: float | None = None

    @property
    def scheduler(self) -> Any:
        """The pipeline's scheduler, None for a bare denoiser."""
        return getattr(self.pipe, "scheduler", None)

    @property
    def count(self) -> int:
        """Denoiser steps of this run, 0 if unknown."""
        if self.pipe is None:
            return self.given_steps
        if not self.begun:  # what pipeline and scheduler say now is of the run before
            return 0
        known = getattr(self.pipe, "_num_timesteps", None)
        if known:
            return int(known)
        times = getattr(self.scheduler, "timesteps", None)
        return 0 if times is None else len(times) - self.first

    @property
    def first(self) -> int:
        """Index of the run's first step in the scheduler's list (image to image skips some)."""
        begin = getattr(self.scheduler, "begin_index", None)
        if begin is not None:
            return int(begin)
        times = getattr(self.scheduler, "timesteps", ())
        known = getattr(self.pipe, "_num_timesteps", None)
        return max(0, len(times) - int(known)) if known else 0

    def step(self, timestep: Any) -> Step:
        """Return the step of a denoiser call with this time input.

        In a pipeline the step is the number of scheduler steps done; for a bare denoiser it
        is the number of changes of the time input, and a run starts anew when noise returns.
        """
        self.begun = True
        if self.pipe is None and timestep is not None:
            self._follow_time(_first_value(timestep))
        sigma_of = None if self.scheduler is None else self._sigma
        return Step(self.index, self.count, timestep, sigma_of)

    def begin_anew(self) -> None:
        """Forget what belongs to the run before, of a bare denoiser."""
        self.index, self._last_time = 0, None
        self.states.clear()
        self.watches.clear()
        self.steps.clear()

    def _follow_time(self, time: float) -> None:
        last = self._last_time
        if last is not None and time != last:
            if time > last:
                self.begin_anew()
            else:
                self.index += 1
            self.calls_in_step = 0
        self._last_time = time

    def _sigma(self) -> float:
        scheduler, at = self.scheduler, self.first + self.index
        sigmas = getattr(scheduler, "sigmas", None)
        if sigmas is not None:
            return float(sigmas[min(at, len(sigmas) - 1)])
        at = int(scheduler.timesteps[min(at, len(scheduler.timesteps) - 1)])
        alpha = float(scheduler.alphas_cumprod[at])
        return ((1 - alpha) / alpha) ** 0.5

    def advance(self) -> None:
        """Note that the scheduler has made a step."""
        self.index += 1
        self.calls_in_step = 0
        self.initial_latents = self.replaced_latents = self.shift = None
        self.raw_latents = self.scaled_latents = None

    def rows(self, batch: int) -> Rows:
        """Return the roles of a denoiser call with this batch size.

        Sources, in this order: roles given by the user; the number of groups in the batch; for
        one group, the branch that the pipeline names (`cache_context`), else the order of calls
        in a step (cond first).
        """
        if self.fixed:
            return _fixed_rows(self.fixed, batch)
        if self.pipe is None:
            return Rows(("cond",), batch)
        n = self.batch or (batch // 2 if self._says_guided() else batch)
        if n and batch > n:
            return Rows(self._layout(batch // n, batch), n)
        if self.branch in ("cond", "uncond"):
            return Rows((self.branch,), batch)
        return Rows(("cond",) if self.calls_in_step == 0 else ("uncond",), batch)

    def _layout(self, groups: int, batch: int) -> tuple[str, ...]:
        """Return the roles of a batch with several groups."""
        name = type(self.pipe).__name__
        for pattern, layouts in _LAYOUTS.items():
            for layout in layouts:
                if re.fullmatch(pattern, name) and len(layout) == groups:
                    if layout == _UNGUIDED_PAG and self._says_guided():
                        continue
                    return layout
        if groups != 2 or batch % groups:
            raise HostError(
                f"{name} called its denoiser with {batch} rows for {self.batch} samples; which "
                "of them are conditional is not known: patch the denoiser itself with rows=(...)"
            )
        return ("uncond", "cond")

    def guided(self, rows: Rows) -> bool:
        """Whether this run uses classifier-free guidance, in one call or two."""
        if "uncond" in rows:
            return True
        if self.args.get("true_cfg_scale") is not None and self.args["true_cfg_scale"] > 1:
            negative = ("negative_prompt", "negative_prompt_embeds")
            return any(self.args.get(name) is not None for name in negative)
        return self._says_guided()

    def _says_guided(self) -> bool:
        return bool(getattr(self.pipe, "do_classifier_free_guidance", False))

    def text_inputs(self, prompt: str) -> dict[str, Tensor]:
        """Return the denoiser's text inputs for another prompt; see `pipeline.text_inputs`."""
        from .pipeline import text_inputs

        return text_inputs(self, prompt)

    @property
    def time(self) -> float:
        """The scheduler's time of the current step, 1000 (noise) to 0."""
        times = getattr(self.scheduler, "timesteps", None)
        if times is None:
            return float("nan")
        return float(times[min(self.first + self.index, len(times) - 1)])

    def guidance_scale(self, denoiser: str) -> float:
        """Return the scale with which the pipeline mixes separate cond and uncond calls."""
        names = ["true_cfg_scale", "guidance_scale"]
        if denoiser == "transformer_2":
            names.insert(0, "guidance_scale_2")
        for name in names:
            value = self.args.get(name)
            if isinstance(value, (int, float)):
                return float(value)
        return float(getattr(self.pipe, "guidance_scale", 1.0))


def _fixed_rows(roles: tuple[str, ...], batch: int) -> Rows:
    if batch % len(roles):
        from ..errors import HostError

        raise HostError(f"a batch of {batch} cannot be divided into the roles {', '.join(roles)}")
    return Rows(roles, batch // len(roles))


def _first_value(time: Any) -> float:
    return float(time.flatten()[0]) if isinstance(time, torch.Tensor) else float(time)


def batch_of(args: Mapping[str, Any]) -> int:
    """Return prompts x images per prompt from a pipeline call's arguments, 0 if unknown."""
    prompts = 0
    prompt = args.get("prompt")
    if isinstance(prompt, str):
        prompts = 1
    elif isinstance(prompt, (list, tuple)):
        prompts = len(prompt)
    elif isinstance(args.get("prompt_embeds"), Tensor):
        prompts = args["prompt_embeds"].shape[0]
    each = args.get("num_images_per_prompt", args.get("num_videos_per_prompt")) or 1
    return prompts * each
