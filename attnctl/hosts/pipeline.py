"""The pipeline side: run scope, step counting and the step plane, without pipeline classes."""

from __future__ import annotations

import inspect
import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import HostError
from ..records import Rows, StepCall
from ..stack import Entry
from .adopt import Uncopied, adopt, original_class, release
from .denoiser import DENOISERS, SLOT, Binding, binding_of
from .families import family_of
from .run import LOCAL, Run, batch_of

if TYPE_CHECKING:
    from .denoiser import Forward

__all__ = ["DENOISERS", "PipelineBinding", "before_first_step", "denoisers"]


def denoisers(pipe: Any) -> dict[str, torch.nn.Module]:
    """Return the denoisers of a pipeline by attribute name.

    Raises:
        HostError: if it has none of the known attributes.
    """
    found = {name: getattr(pipe, name, None) for name in DENOISERS}
    modules = {k: v for k, v in found.items() if isinstance(v, torch.nn.Module)}
    if not modules:
        raise HostError(
            f"{type(pipe).__name__} has no denoiser: none of its attributes "
            f"{', '.join(DENOISERS)} is a module"
        )
    return modules


class PipelineBinding(Uncopied):
    """What attnctl holds on one pipeline: its class, its scheduler's class, its denoisers."""

    def __init__(self, pipe: Any, bindings: dict[str, Binding]) -> None:
        self.pipe = pipe
        self.bindings = bindings
        self.signature = inspect.signature(original_class(pipe).__call__)
        self.scheduler: Any = None
        self.lock = threading.Lock()
        self.uses = 0

    @classmethod
    def attach(cls, pipe: Any, bindings: dict[str, Binding]) -> PipelineBinding:
        """Return the pipeline's binding, made if there is none; counted."""
        binding = pipe.__dict__.get(SLOT)
        if binding is None:
            binding = pipe.__dict__[SLOT] = cls(pipe, bindings)
            adopt(pipe, PipelineCalls)
        binding.uses += 1
        return binding

    def detach(self) -> None:
        """Undo one `attach`; the last one restores the pipeline exactly."""
        self.uses -= 1
        if self.uses == 0:
            release(self.pipe)
            if self.scheduler is not None:
                release(self.scheduler)
            self.pipe.__dict__.pop(SLOT, None)

    def call(self, stock: Any, args: Any, kwargs: Any) -> Any:
        """Run the pipeline with a fresh `Run` in this thread."""
        if not self.lock.acquire(blocking=False):
            raise HostError(
                "this patched pipeline is already running in another thread; one pipeline "
                "serves one call at a time (make a second one with from_pipe)"
            )
        before = LOCAL.run
        try:
            self._follow()
            LOCAL.run = self._start(args, kwargs)
            for entry in self.entries():
                if not entry.control.neutral:
                    entry.state(LOCAL.run)
            return stock(*args, **kwargs)
        finally:
            LOCAL.run = before
            self.lock.release()

    def _start(self, args: Any, kwargs: Any) -> Run:
        try:
            bound = self.signature.bind(None, *args, **kwargs)
        except TypeError:
            return Run(pipe=self.pipe)  # the pipeline itself reports wrong arguments best
        bound.apply_defaults()
        values = dict(list(bound.arguments.items())[1:])
        return Run(args=values, pipe=self.pipe, batch=batch_of(values))

    def _follow(self) -> None:
        """Follow a scheduler or denoiser that was put in place after the patch."""
        scheduler = getattr(self.pipe, "scheduler", None)
        if scheduler is not self.scheduler:
            if self.scheduler is not None:
                release(self.scheduler)
            adopt(scheduler, SchedulerCalls)
            self.scheduler = scheduler
        for name, binding in self.bindings.items():
            module = getattr(self.pipe, name)
            if binding_of(module) is not binding:
                raise HostError(
                    f"pipe.{name} was replaced after attnctl.patch; undo the patch and patch again"
                )
            binding.adopt_compiled(module)

    def entries(self) -> list[Entry]:
        """Return the entries that act in this pipeline's runs."""
        mine = (None, id(self.pipe))
        return [e for b in self.bindings.values() for e in b.entries if e.owner in mine]


class PipelineCalls:
    """Mixin put in front of a pipeline's class while it is patched."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        stock = super().__call__  # type: ignore[misc]
        binding = self.__dict__.get(SLOT)
        return stock(*args, **kwargs) if binding is None else binding.call(stock, args, kwargs)


class SchedulerCalls:
    """Mixin put in front of the scheduler's class: counts steps and offers the latents."""

    def scale_model_input(self, sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        run = _run_of(self)
        if run is not None:
            run.raw_latents = sample
        return super().scale_model_input(sample, *args, **kwargs)  # type: ignore[misc]

    def step(
        self, model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any
    ) -> Any:
        run = _run_of(self)
        stock = super().step  # type: ignore[misc]
        if run is None:
            return stock(model_output, timestep, sample, *args, **kwargs)
        if run.replaced_latents is not None:
            sample = run.replaced_latents.to(sample.dtype)
        out = stock(model_output, timestep, sample, *args, **kwargs)
        run.advance()
        if run.index >= run.count:
            return out
        return _between_steps(run, out)


def _run_of(scheduler: Any) -> Run | None:
    run = LOCAL.run
    return run if run is not None and run.scheduler is scheduler else None


def _apply(run: Run, latents: Tensor) -> Tensor:
    binding = run.pipe.__dict__.get(SLOT)
    step = run.step(None)
    for entry in binding.entries() if binding is not None else ():
        if type(entry.control).plane("between") and entry.active(step):
            entry.steps.add(step.index)
            latents = entry.control.between(StepCall(latents, step, run, entry.state(run)))
    return latents


def _between_steps(run: Run, out: Any) -> Any:
    old = out[0] if isinstance(out, tuple) else out.prev_sample
    new = _apply(run, old)
    if new is old:
        return out
    if isinstance(out, tuple):
        return (new, *out[1:])
    out.prev_sample = new
    return out


def before_first_step(forward: Forward, inputs: dict[str, Any], rows: Rows) -> dict[str, Any]:
    """Offer the initial latents to the step plane, before the run's first denoiser call.

    The pipeline holds its own variable, so changed latents are put into the denoiser's input
    for the calls of this step, and into the scheduler's `step` after them.
    """
    run = forward.run
    if run.index == 0 and "initial" not in run.cache:
        run.cache["initial"] = True
        name = next(iter(inputs))
        raw = (inputs[name] if run.raw_latents is None else run.raw_latents)[: rows.n]
        new = _apply(run, raw)
        run.replaced_latents = None if new is raw else new
    if run.replaced_latents is None:
        return inputs
    return _with_latents(run, inputs, rows)


def _with_latents(run: Run, inputs: dict[str, Any], rows: Rows) -> dict[str, Any]:
    name, old = next(iter(inputs.items()))
    new = run.replaced_latents
    assert new is not None
    if run.raw_latents is not None:
        # the same factor that scale_model_input applied; asking it again would count a step
        raw = run.raw_latents[: rows.n]
        at = raw.abs().flatten().argmax()
        new = new * (old[: rows.n, : raw.shape[1]].flatten()[at] / raw.flatten()[at])
    new = torch.cat([new.to(old.dtype)] * len(rows.groups))
    extra = old[:, new.shape[1] :] if old.ndim == new.ndim and old.ndim > 3 else old[:, :0]
    return {**inputs, name: torch.cat([new, extra], dim=1) if extra.shape[1] else new}


class _Captured(BaseException):
    """Carries a denoiser call's inputs out of a pipeline that need not go further."""

    def __init__(self, inputs: dict[str, Any]) -> None:
        self.inputs = inputs


_ONE_PASS = {
    "guidance_scale": 1.0,
    "true_cfg_scale": 1.0,
    "num_inference_steps": 1,
    "sigmas": None,
    "timesteps": None,
    "generator": None,
    "latents": None,
    "output_type": "latent",
}


def text_inputs(run: Run, prompt: str) -> dict[str, Tensor]:
    """Return what the denoiser would get as text for another prompt.

    The pipeline's own code encodes it: its call runs, without touching any random generator,
    up to the first denoiser call. Only before the run itself has begun (`Control.begin`).

    Args:
        run: the run; its pipeline was called with a prompt, not with embeddings.
        prompt: the other prompt, used for every sample.

    Raises:
        HostError: if there is no pipeline, or it was called with embeddings.
    """
    if run.pipe is None or run.args.get("prompt") is None:
        raise HostError(
            "a negative prompt can be encoded only by a pipeline that is called with prompt=...; "
            "otherwise give the denoiser's inputs: negative={'encoder_hidden_states': tensor}"
        )
    many = isinstance(run.args["prompt"], (list, tuple))
    args: dict[str, Any] = {
        name: None if "embeds" in name or name.startswith(("negative_", "callback")) else value
        for name, value in run.args.items()
    }
    args.update({k: v for k, v in _ONE_PASS.items() if k in args})
    args["prompt"] = [prompt] * len(run.args["prompt"]) if many else prompt
    args = {k: v for k, v in args.items() if v is not None}
    inputs = _capture(run.pipe, args)
    family = family_of(original_class(next(iter(denoisers(run.pipe).values()))))
    return {k: v for k, v in inputs.items() if k in family.text_inputs and isinstance(v, Tensor)}


def _capture(pipe: Any, args: dict[str, Any]) -> dict[str, Any]:
    devices = [pipe._execution_device] if pipe._execution_device.type == "cuda" else []
    before, LOCAL.capture = LOCAL.capture, _Captured
    quiet = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(**{**quiet, "disable": True})
    try:
        with torch.random.fork_rng(devices=devices):
            original_class(pipe).__call__(pipe, **args)
    except _Captured as captured:
        return captured.inputs
    finally:
        LOCAL.capture = before
        pipe._progress_bar_config = quiet
    raise HostError(f"{type(pipe).__name__} never called its denoiser")
