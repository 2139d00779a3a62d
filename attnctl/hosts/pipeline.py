"""The pipeline side: run scope, step counting and the step plane, without pipeline classes."""

from __future__ import annotations

import inspect
import threading
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import HostError
from ..records import Rows, StepCall
from ..stack import Entry
from .adopt import Uncopied, adopt, original_class, release
from .denoiser import DENOISERS, ORPHAN, SLOT, Binding, binding_of
from .families import family_of
from .latents import shifted
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
        known = [weakref.ref(b) for b in bindings.values()]
        self.orphans = weakref.finalize(pipe, _abandon, known, id(pipe))
        self.orphans.atexit = False
        self.signature = inspect.signature(original_class(pipe).__call__)
        self.scheduler: Any = None
        self.lock = threading.Lock()
        self.uses = 0

    @classmethod
    def attach(cls, pipe: Any, bindings: dict[str, Binding]) -> PipelineBinding:
        """Return the pipeline's binding, made if there is none; counted."""
        binding = pipe.__dict__.get(SLOT)
        if binding is None:
            # by the names of this pipeline: a bare patch may have named them otherwise
            found = {n: binding_of(m) for n, m in denoisers(pipe).items()}
            named = {n: b for n, b in found.items() if b is not None}
            binding = pipe.__dict__[SLOT] = cls(pipe, named)
            adopt(pipe, PipelineCalls)
        binding.uses += 1
        return binding

    def detach(self) -> None:
        """Undo one `attach`; the last one restores the pipeline exactly."""
        self.uses -= 1
        if self.uses == 0:
            self.orphans.detach()
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
            LOCAL.run = run = self._start(args, kwargs)
            for entry in self.entries():
                if not entry.control.neutral:
                    entry.state(run)
            out = stock(*args, **kwargs)
            for entry in self.entries():
                entry.close(run)
            return out
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
        modules = denoisers(self.pipe)
        for name in {**self.bindings, **modules}:
            module, binding = modules.get(name), self.bindings.get(name)
            if binding is None or module is None or binding_of(module) is not binding:
                raise HostError(
                    f"pipe.{name} was replaced after attnctl.patch; undo the patch and patch again"
                )
            binding.adopt_compiled(module)

    def entries(self) -> list[Entry]:
        """Return the entries that act in this pipeline's runs."""
        mine = (None, id(self.pipe))
        return [e for b in self.bindings.values() for e in b.entries if e.owner in mine]


def _abandon(bindings: list[weakref.ref[Binding]], owner: int) -> None:
    """Let the controls of a pipeline that is no more act nowhere.

    The garbage collector calls this at any moment, perhaps while torch.compile works: the
    denoiser itself is restored when it is called next.
    """
    for binding in filter(None, (ref() for ref in bindings)):
        for entry in binding.entries:
            if entry.owner == owner:
                entry.owner, binding.orphaned = ORPHAN, True


class PipelineCalls:
    """Mixin put in front of a pipeline's class while it is patched."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        stock = super().__call__  # type: ignore[misc]
        binding = self.__dict__.get(SLOT)
        return stock(*args, **kwargs) if binding is None else binding.call(stock, args, kwargs)

    def prepare_latents(self, *args: Any, **kwargs: Any) -> Any:
        """Note the initial latents, which the denoiser may get among other channels."""
        out = super().prepare_latents(*args, **kwargs)  # type: ignore[misc]
        first = out[0] if isinstance(out, (tuple, list)) and out else out
        run = LOCAL.run
        if run is not None and run.pipe is self and isinstance(first, Tensor):
            run.initial_latents = first
        return out


class SchedulerCalls:
    """Mixin put in front of the scheduler's class: counts steps and offers the latents."""

    def scale_model_input(self, sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        run = _run_of(self)
        out: Tensor = super().scale_model_input(sample, *args, **kwargs)  # type: ignore[misc]
        if run is not None:
            run.raw_latents, run.scaled_latents = sample, out
        return out

    def step(
        self, model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any
    ) -> Any:
        run = _run_of(self)
        stock = super().step  # type: ignore[misc]
        if run is None:
            return stock(model_output, timestep, sample, *args, **kwargs)
        if run.replaced_latents is not None:
            if run.replaced_latents.shape != sample.shape:
                raise _mixed(run)
            sample = run.replaced_latents.to(sample.dtype)
        sample = shifted(run, sample)
        out = stock(model_output, timestep, sample, *args, **kwargs)
        run.advance()
        if run.index >= run.count:
            return out
        return _between_steps(run, out)


def _run_of(scheduler: Any) -> Run | None:
    run = LOCAL.run
    return run if run is not None and run.scheduler is scheduler else None


def _apply(run: Run, latents: Tensor) -> Tensor:
    """Run the step plane: once a control, with the state of the denoiser that ran last."""
    entries = [] if run.last is None else run.last.acting(run)
    if not any(entry.steers for entry in entries):
        return latents
    step, calls = run.step(None), run.calls_in_step
    # a control may call the denoiser itself: as if it were the first call of a step
    before, LOCAL.inside, run.calls_in_step = LOCAL.inside, None, 0
    try:
        for entry in entries:
            if entry.steers and entry.active(step):
                entry.steps.add(step.index)
                latents = entry.control.between(StepCall(latents, step, run, entry.state(run)))
    finally:
        LOCAL.inside, run.calls_in_step = before, calls
    return latents


def _between_steps(run: Run, out: Any) -> Any:
    old = out[0] if isinstance(out, tuple) else out.prev_sample
    run.latent_shape = tuple(old.shape[1:])
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
        raw = _raw_latents(run, inputs, rows)
        new = _apply(run, raw)
        run.replaced_latents = None if new is raw else new
    if run.replaced_latents is None:
        return inputs
    return _with_latents(run, inputs, rows)


def _raw_latents(run: Run, inputs: dict[str, Any], rows: Rows) -> Tensor:
    """Return the latents that the pipeline holds, without scaling or further channels."""
    if run.initial_latents is not None:
        return run.initial_latents
    raw = next(iter(inputs.values())) if run.raw_latents is None else run.raw_latents
    return raw[: rows.n]


def _with_latents(run: Run, inputs: dict[str, Any], rows: Rows) -> dict[str, Any]:
    """Put the replaced latents in the place of the raw ones in the denoiser's input."""
    name, old = next(iter(inputs.items()))
    raw, new = _raw_latents(run, inputs, rows), run.replaced_latents
    assert new is not None
    if raw.ndim != old.ndim or raw.shape[0] != rows.n or new.shape != raw.shape:
        raise _mixed(run)
    at = tuple(slice(0, size) for size in raw.shape)
    mine = old[at].float()
    if mine.shape != raw.shape:
        raise _mixed(run)
    # what scale_model_input multiplied by; asking it again would count a step
    factor = (mine * raw.float()).sum() / raw.float().square().sum()
    slack = 8 * torch.finfo(old.dtype).eps * mine.abs().max()
    if not torch.allclose(mine, raw.float() * factor, rtol=0, atol=float(slack)):
        raise _mixed(run)
    result = old.clone()
    for group in range(len(rows.groups)):
        result[group * rows.n :][at] = (new.float() * factor).to(old.dtype)
    return {**inputs, name: result}


def _mixed(run: Run) -> HostError:
    return HostError(
        f"{type(run.pipe).__name__} mixes its latents with something else on their way to the "
        "denoiser or scheduler, so a control cannot change them before the first step; give it "
        "a window that begins later, such as start=0.01 or steps:1-999"
    )


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
