"""The denoiser plane: one binding per patched denoiser, one `Forward` per call of it."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AttnctlWarning, ControlConflict, HostError
from ..records import AttentionCall, ForwardCall, Rows, Site, Spans, Step, Watch
from ..sites import Sites
from ..stack import Entry, check_conflicts
from . import tap
from .adopt import Uncopied, adopt, original_class, release
from .batch import extend_inputs, take_inputs
from .checkpoint import checkpointed
from .families import Geometry, family_of, spans
from .parallel import check_parallel, parallelism
from .run import LOCAL, Run

__all__ = ["Binding", "Forward", "binding_of"]

DENOISERS = ("unet", "transformer", "transformer_2")
"""Pipeline attributes that may hold a denoiser."""

ORPHAN = 0
"""Owner of entries whose pipeline is no more."""

SLOT = "_attnctl"
"""Where a patched object keeps its binding; copies and pickles hold None there."""

_NO_HEADS, _ALL = torch.empty(0), slice(None)
_AS_IT_IS: AbstractContextManager[None] = contextlib.nullcontext()


Watches = dict[tuple[tap.SiteRef, int], tuple[Entry, "Watch | None"]]
"""What looks at a site's primitive calls of a number; None where nothing but the control does."""


def binding_of(module: nn.Module) -> Binding | None:
    """Return the binding of a denoiser (compiled or not), None if it has none."""
    held = module.__dict__
    if SLOT not in held:  # not by getattr, for which diffusers' models take their time
        held = held.get("_modules", {}).get("_orig_mod", module).__dict__
    return held.get(SLOT)


class Binding(Uncopied):
    """Everything attnctl holds on one denoiser: its class, its sites and the stack.

    Args:
        module: the denoiser.
        sites: its attention sites.
        modules: the attention modules by site index.
    """

    def __init__(self, module: nn.Module, sites: Sites, modules: list[nn.Module]) -> None:
        self.module = module
        self.sites = sites
        self.modules = modules
        self.family = family_of(original_class(module))
        kind: Any = original_class(module)
        self.signature = inspect.signature(kind.forward)
        self.names = [
            name
            for name, parameter in list(self.signature.parameters.items())[1:]
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        ]
        self.entries: list[Entry] = []
        self.hooked: dict[int, tap.SiteRef] = {}
        self.spaces: dict[int, dict[str, Any]] = {}
        self.processors: list[type] | None = []  # those of `hooked` that `spaces` are of
        self.caches = hasattr(kind, "is_cache_enabled")
        self.bare = Run()
        self.compiled: list[nn.Module] = []
        self.warned = self.orphaned = False
        weakref.finalize(self, tap.drop_names, self.spaces).atexit = False

    @functools.cached_property
    def checkpointing(self) -> list[nn.Module]:
        """Blocks that gradient checkpointing can be switched on for.

        Looked for once: a walk through all modules takes milliseconds.
        """
        return [m for m in self.module.modules() if hasattr(m, "gradient_checkpointing")]

    @property
    def checkpoints(self) -> bool:
        """Whether it is on for any."""
        return any(block.gradient_checkpointing for block in self.checkpointing)

    # -- attach and detach ---------------------------------------------------------------

    @classmethod
    def attach(cls, module: nn.Module, sites: Sites, modules: list[nn.Module]) -> Binding:
        """Return the binding of a denoiser, made if there is none."""
        binding = binding_of(module)
        if binding is None:
            binding = module.__dict__[SLOT] = cls(module, sites, modules)
            adopt(module, DenoiserCalls)
        return binding

    def add(self, entries: list[Entry]) -> None:
        """Install entries below those already there.

        Raises:
            ControlConflict: if the stack cannot work; nothing is changed then.
            HostError: if a selected site cannot be controlled; nothing is changed then.
        """
        check_conflicts([*self.entries, *entries])
        for entry in entries:
            self._check_processors(entry)
        self._check_cache(entries)
        check_parallel(self.module, entries, bool(self.compiled))
        self.entries += entries
        self._rehook()

    def remove(self, entries: list[Entry]) -> None:
        """Take entries out; the last one restores the denoiser exactly."""
        self.entries = [e for e in self.entries if e not in entries]
        self._rehook(strict=False)
        if not self.entries:
            for module in (self.module, *self.compiled):
                release(module)
            self.compiled.clear()
            self.module.__dict__.pop(SLOT, None)

    def adopt_compiled(self, module: nn.Module) -> None:
        """Wrap the calls of a `torch.compile`d form of the denoiser too."""
        if module is not self.module and module not in self.compiled:
            adopt(module, DenoiserCalls)
            self.compiled.append(module)

    def _rehook(self, strict: bool = True) -> None:
        acting = [e for e in self.entries if e.attends and not e.control.neutral]
        wanted = {index for entry in acting for index in entry.selection}
        for index in set(self.hooked) - wanted:
            tap.unhook(self.modules[index])
            del self.hooked[index]
        for index in wanted - set(self.hooked):
            ref = tap.SiteRef(self, index)
            tap.hook(self.modules[index], ref)
            self.hooked[index] = ref
        self.refresh(strict)

    def refresh(self, strict: bool = True) -> None:
        """Follow processors that were replaced (IP-Adapter, fused projections).

        Raises:
            HostError: if `strict` and one of them cannot be controlled.
        """
        processors = [type(self.modules[index].processor) for index in self.hooked]
        if processors == self.processors:  # at every step, so that only a change costs
            return
        wanted, known = {}, True
        for index in self.hooked:
            space = tap.name_space(self.modules[index].processor)
            known = known and space is not None
            if space is not None:
                wanted[id(space)] = space
            elif strict:
                raise HostError(_bypasses(self.sites[index].name, self.modules[index].processor))
        if wanted.keys() != self.spaces.keys():
            tap.exchange_names(self.spaces, wanted)
        # where one cannot be controlled, the next call looks again, to refuse it
        self.processors = processors if known else None

    def _check_processors(self, entry: Entry) -> None:
        if not entry.attends:
            return
        for index in entry.selection:
            processor = self.modules[index].processor
            if tap.name_space(processor) is None:
                raise HostError(_bypasses(self.sites[index].name, processor))

    def _check_cache(self, entries: list[Entry]) -> None:
        if not self.caches or not any(entry.control.adds_rows for entry in entries):
            return
        config = type(getattr(self.module, "_cache_config", None)).__name__
        if config.startswith(("PyramidAttention", "FasterCache")):
            for entry in entries:
                if entry.control.adds_rows and not entry.control.neutral:
                    raise ControlConflict(
                        f"{entry.control} adds a pass, but {config} keeps one cached output per "
                        "module and would mix the passes: call disable_cache() first"
                    )

    # -- calls ---------------------------------------------------------------------------

    def current_run(self) -> tuple[Run, list[Entry]]:
        """Return the run of this thread and the entries that take part in it.

        Controls installed through a pipeline act only in that pipeline's runs, so that other
        pipelines which share the denoiser are left alone.
        """
        run = LOCAL.run or self.bare
        return run, self.acting(run)

    def acting(self, run: Run) -> list[Entry]:
        """Return the entries that take part in a run."""
        owners = (None,) if run.pipe is None else (None, id(run.pipe))
        return [e for e in self.entries if e.owner in owners]

    def name_inputs(self, args: Any, kwargs: Any) -> dict[str, Any]:
        """Return a denoiser call's arguments by name, in the order of its signature."""
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        inputs = {name: given[name] for name in self.names if name in given}
        if set(self.names[:1]) & set(inputs) and len(inputs) == len(args) + len(kwargs):
            return inputs
        # further names, or an error that Python words best
        bound = self.signature.bind(None, *args, **kwargs)
        inputs = dict(list(bound.arguments.items())[1:])
        inputs.update(inputs.pop("kwargs", {}) or {})
        return inputs

    def call(self, stock: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run one denoiser call through the stack; `stock` is the unpatched call."""
        if self.orphaned:
            self.orphaned = False
            self.remove([e for e in self.entries if e.owner == ORPHAN])
        before, LOCAL.inside = LOCAL.inside, self
        try:
            return self._call(stock, args, kwargs)
        finally:
            LOCAL.inside = before

    def bypassed(self) -> None:
        """Refuse attention calls of this denoiser that did not come through `call`.

        Raises:
            HostError: if some control should have acted on them.
        """
        if any(not e.control.neutral for e in self.current_run()[1]):
            name = original_class(self.module).__name__
            raise HostError(
                f"this {name} was called past the patch: its forward directly, or by a "
                "torch.compile wrapper made after the patch. Call the module itself, or patch "
                "the compiled one: attnctl.patch(torch.compile(model), ...)"
            )

    def _warn_outside(self) -> None:
        """Say once that a pipeline's controls do not act on calls by hand."""
        acting = any(not e.control.neutral for e in self.entries)
        if self.warned or not acting or LOCAL.run is not None or _in_pipeline(self.module):
            return
        self.warned = True
        warnings.warn(
            f"this {original_class(self.module).__name__} was patched through a pipeline, so the "
            "controls act only in calls of that pipeline, not in this call by hand; patch the "
            "module itself for that: attnctl.patch(pipe.transformer, ...)",
            AttnctlWarning,
            stacklevel=6,
        )

    def _call(self, stock: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        run, entries = self.current_run()
        if not entries:
            self._warn_outside()
            return stock(*args, **kwargs)
        # parallelism may have come after the patch
        check_parallel(self.module, entries, bool(self.compiled))
        inputs = self.name_inputs(args, kwargs)
        sample = next(iter(inputs.values()))
        if not isinstance(sample, Tensor):
            raise HostError(
                f"{original_class(self.module).__name__} takes a {type(sample).__name__} of "
                "samples, which attnctl does not support yet; expected a batched tensor"
            )
        step = run.step(inputs.get("timestep"))
        rows = run.rows(sample.shape[0])
        run.calls_in_step += 1
        run.last = self
        for entry in entries:
            run.steps.setdefault(entry.serial, set()).add(step.index)
        active = [e for e in entries if e.active(step)]
        if not active:
            # by name like the calls of other steps: compiled code tells the forms apart
            return stock(**inputs)
        self._check_cache(active)
        self.refresh()
        return Forward(self, run, step, active, stock).call(inputs, rows)


def _in_pipeline(module: nn.Module) -> bool:
    """Whether some caller is a method of a pipeline that holds this denoiser.

    An unpatched pipeline that shares a denoiser cannot be told from a call by hand otherwise.
    """
    frame = sys._getframe(1)
    while frame is not None:
        names = frame.f_code.co_varnames[: min(2, frame.f_code.co_argcount)]
        for name in names:  # self, and for Modular blocks the components
            held = getattr(frame.f_locals.get(name), "__dict__", {})
            parts = [held.get(k) for k in DENOISERS] if "scheduler" in held else []
            if any(getattr(part, "_orig_mod", part) is module for part in parts):
                return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _bypasses(site: str, processor: Any) -> str:
    name = type(processor).__name__
    advice = {
        "SlicedAttnProcessor": "call pipe.disable_attention_slicing() first",
        "XFormersAttnProcessor": "call disable_xformers_memory_efficient_attention() first",
        "AttnProcessor": "call set_attn_processor(AttnProcessor2_0()) first",
    }.get(name, "choose other sites or another processor")
    return f"{site} uses {name}, which computes attention by itself, past any control: {advice}"


class DenoiserCalls:
    """Mixin put in front of a denoiser's class while it is patched."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        stock = super().__call__  # type: ignore[misc]
        if torch.compiler.is_compiling():
            return stock(*args, **kwargs)
        binding = binding_of(self)  # type: ignore[arg-type]
        if LOCAL.forward is not None or LOCAL.inside is binding:
            return stock(*args, **kwargs)
        if LOCAL.capture is not None and binding is not None:
            raise LOCAL.capture(binding.name_inputs(args, kwargs))
        return stock(*args, **kwargs) if binding is None else binding.call(stock, args, kwargs)

    @contextlib.contextmanager
    def cache_context(self, name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Note which branch (cond, uncond) the pipeline says it runs."""
        binding = binding_of(self)  # type: ignore[arg-type]
        if LOCAL.forward is not None or binding is None:  # our own, for a pass of extra rows
            with super().cache_context(name, *args, **kwargs):  # type: ignore[misc]
                yield
            return
        run = LOCAL.run or binding.bare
        run.branch, run.cache_context = name, (args, kwargs)
        try:
            with super().cache_context(name, *args, **kwargs):  # type: ignore[misc]
                yield
        finally:
            run.branch = None
            run.cache.pop("reentered", None)


@dataclass(eq=False)
class Forward:
    """One denoiser call that some controls take part in.

    Args:
        binding: the denoiser's binding.
        run: the run it belongs to.
        step: where that run stands.
        active: entries that act at this step, outermost first.
        stock: the unpatched call.
    """

    binding: Binding
    run: Run
    step: Step
    active: list[Entry]
    stock: Callable[..., Any]
    rows: Rows = field(default_factory=lambda: Rows(("cond",), 1))
    inputs: dict[str, Any] = field(default_factory=dict)
    wrap: Callable[[Tensor], Any] | None = None

    def call(self, inputs: dict[str, Any], rows: Rows) -> Any:
        """Run the denoiser plane and return what the denoiser returns."""
        inputs = self._between(inputs, rows)
        for entry in self.active:
            entry.steps.add(self.step.index)
        cached = self.binding.caches and bool(self.binding.module.is_cache_enabled)
        if not cached and self.run.shift is None and not any(e.denoises for e in self.active):
            self.rows, self.inputs = rows, inputs
            return self._through()
        call = ForwardCall(
            inputs=inputs,
            rows=rows,
            step=self.step,
            run=self.run,
            base=self._model,
            extend_inputs=self._extend,
            take_inputs=self._take,
            denoiser=self.denoiser,
            cached=cached,
            rest=tuple(e for e in self.active if e.denoises),
            model=self.binding.module,
            stack=tuple(self.active),
        ).caught_up()
        sample = call.proceed()
        assert self.wrap is not None  # some control ran the model
        return self.wrap(sample)

    @property
    def denoiser(self) -> str:
        """Attribute of the pipeline that holds the denoiser."""
        owned = [e for e in self.active if e.owner is not None]
        return (owned or self.active)[0].sites[0].denoiser

    def _extend(self, inputs: dict[str, Any], rows: Rows, at: slice) -> dict[str, Any]:
        return extend_inputs(inputs, len(rows), at, self.binding.family.unbatched)

    def _take(self, inputs: dict[str, Any], rows: Rows, at: slice) -> dict[str, Any]:
        return take_inputs(inputs, len(rows), at, self.binding.family.unbatched)

    def _model(self, call: ForwardCall) -> Tensor:
        """Run the model itself for one pass of the denoiser plane."""
        this = replace(self, rows=call.rows, inputs=call.inputs)
        sample, self.wrap = _open(this._through(self._own_cache(call)))
        return sample

    def _through(self, cache: AbstractContextManager[None] = _AS_IT_IS) -> Any:
        """Run the model on these rows and inputs, with the attention plane switched on.

        Args:
            cache: entered around it; it finds this forward already under way.
        """
        blocks = _AS_IT_IS
        if torch.is_grad_enabled() and self.binding.checkpoints:
            blocks = checkpointed(self.binding.module, self)
        before, LOCAL.forward = LOCAL.forward, self
        try:
            with cache, blocks:
                out = self.stock(**self.inputs)
        finally:
            LOCAL.forward, LOCAL.ref, LOCAL.site = before, None, None
        self._check_touched()
        return out

    def _check_touched(self) -> None:
        """Warn once of a control whose sites made no attention call in a whole forward.

        Raises:
            HostError: on several GPUs, where no cache explains it.
        """
        for entry in self.active:
            if not entry.calls and any(entry.wants(site, self.rows) for site in entry.selection):
                if parallelism(self.binding.module):
                    raise HostError(
                        f"{entry.control} reached no attention call of a model under context "
                        "parallelism: leave torch.compile, caches or the parallelism out"
                    )
                entry.warn_untouched()

    @contextlib.contextmanager
    def _own_cache(self, call: ForwardCall) -> Iterator[None]:
        """Give a pass of extra rows its own cache state, where a diffusers cache is on."""
        if not call.cached or {"cond", "uncond"} & set(call.rows.groups):
            yield
            return
        module: Any = self.binding.module
        args, kwargs = self.run.cache_context
        self.run.cache.pop("reentered", None)
        try:
            with module.cache_context(call.rows.groups[0], *args, **kwargs):
                yield
        finally:
            if self.run.branch is not None:
                # contexts of diffusers do not nest: enter the outer one again, and keep it,
                # for it would be left when it is collected
                outer = module.cache_context(self.run.branch, *args, **kwargs)
                outer.__enter__()
                self.run.cache["reentered"] = outer

    # -- attention plane -----------------------------------------------------------------

    def wanting(self, site: int) -> tuple[Entry, ...]:
        """Return the entries whose attention plane acts at a site."""
        found = self._wanting.get(site)
        if found is None:
            found = tuple([e for e in self.active if e.wants(site, self.rows)])
            self._wanting[site] = found
        return found

    @functools.cached_property
    def _wanting(self) -> dict[int, tuple[Entry, ...]]:
        """The same for every forward of a run with these rows and these entries at work."""
        of = "wanting", self.rows, self._who
        known: dict[int, tuple[Entry, ...]] = self.run.cache.setdefault(of, {})
        return known

    @functools.cached_property
    def _who(self) -> tuple[int, ...]:
        return tuple([entry.serial for entry in self.active])

    def attend(
        self, ref: tap.SiteRef, index: int, *call: Any, part: slice | None = None
    ) -> Tensor:
        """Run the attention plane of one primitive call; see `tap._attend`."""
        q, k, v, mask, scale, is_causal, gqa, base = call
        site = ref.index
        rest, where = self.wanting(site), self.binding.sites[site]
        if index and self._is_ip(where, index, q, k):
            rest = tuple(e for e in rest if "cross" in e.control.kinds)
        if not rest:
            return base(*call[:-1])
        if part is None and self.spread:
            raise HostError(
                f"{where} does not exchange its tokens with the other "
                f"processes, so {rest[0].control} would see a part of them: choose other sites"
            )
        made = AttentionCall.quick(
            {
                "q": q, "k": k, "v": v, "mask": mask, "scale": scale, "is_causal": is_causal,
                "enable_gqa": gqa, "site": where, "rows": self.rows, "step": self.step,
                "index": index, "spans_of": self._spans, "base": base, "rest": rest,
                "heads": _NO_HEADS, "state": None, "run": self.run, "role": "",
                "residual": None, "every_head": False, "plain": False,
                "part": _ALL if part is None else part,
            }
        )  # fmt: skip
        if len(rest) == 1 and part is None:
            entry = rest[0]
            made = entry.alone(made)
            if entry.watches:
                self._watch(entry, ref, made)
            return entry.attend_alone(made)
        return made.proceed()

    def _watch(self, entry: Entry, ref: tap.SiteRef, call: AttentionCall) -> None:
        """Ask a site's only control what looks at calls like this one.

        Once in a run, and again where what it named has just refused a call, of another kind.
        """
        at = ref, call.index
        known = self.watches.get(at)
        if known is None or known[1] is not None:
            self.watches[at] = entry, entry.control.watching(call)

    @functools.cached_property
    def watches(self) -> Watches:
        """What looks at the calls of a site, as `tap` asks at each of them."""
        if not any(entry.watches for entry in self.active):
            return {}
        of = self._who, self.rows, self.geometry
        known: Watches = self.run.watches.setdefault(of, {})
        return known

    @functools.cached_property
    def spread(self) -> bool:
        """Whether the denoiser is spread over processes."""
        return bool(parallelism(self.binding.module))

    @staticmethod
    def _is_ip(site: Site, index: int, q: Tensor, k: Tensor) -> bool:
        """Whether this is the image branch that an IP-Adapter adds to joint attention."""
        return site.kind == "joint" and index > 0 and q.shape[2] != k.shape[2]

    def _spans(self, call: AttentionCall) -> Spans:
        at = call.site.index, call.index, call.q.shape[2], call.k.shape[2]
        found = self._known_spans.get(at)
        if found is None:
            found = self._known_spans[at] = self._find_spans(call)
        return found

    @functools.cached_property
    def _known_spans(self) -> dict[tuple[int, int, int, int], Spans]:
        """Spans of calls on this grid, the same at every step of a run."""
        of = "spans", self.binding.sites[0].denoiser, self.geometry
        known: dict[tuple[int, int, int, int], Spans] = self.run.cache.setdefault(of, {})
        return known

    def _find_spans(self, call: AttentionCall) -> Spans:
        module = self.binding.modules[call.site.index]
        # Wan I2V attends to its image first; IP-Adapter comes after the text
        added = getattr(module, "add_k_proj", None) is not None
        image_first = added and call.site.kind == "cross"
        role = "ip" if (call.index == 0) == image_first else "text"
        nq, nk, site = call.q.shape[2], call.k.shape[2], call.site
        if self._is_ip(site, call.index, call.q, call.k):
            site = replace(site, kind="cross")
        return spans(self.binding.family, site, self.geometry, nq, nk, role)

    @functools.cached_property
    def geometry(self) -> Geometry:
        """Token grid of this pass, read when a control asks for it."""
        return self.binding.family.grid(self.binding.module.config, self.inputs)

    # -- step plane ----------------------------------------------------------------------

    def _between(self, inputs: dict[str, Any], rows: Rows) -> dict[str, Any]:
        """Let the step plane change the latents before the first denoiser call of a run."""
        run = self.run
        if run.pipe is None or (run.replaced_latents is None and "initial" in run.cache):
            return inputs
        from .pipeline import before_first_step

        return before_first_step(self, inputs, rows)


def _open(out: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Return the sample of a denoiser's output and a function that puts another one in."""
    if isinstance(out, Tensor):
        return out, lambda sample: sample
    if isinstance(out, tuple):
        return out[0], lambda sample: (sample, *out[1:])
    name = next(iter(out.keys()))
    return out[name], lambda sample: type(out)(**{**out, name: sample})
