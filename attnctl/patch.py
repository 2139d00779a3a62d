"""`patch` installs a stack of controls; its `Handle` undoes it exactly and reports what it did."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import nn

from .control import Control
from .errors import HostError, OptionError
from .hosts import is_language_model, is_pipeline, survey, targets
from .hosts.denoiser import Binding
from .hosts.pipeline import PipelineBinding
from .hosts.vlm import DecoderBinding
from .stack import Entry

__all__ = ["Handle", "Report", "ReportLine", "patch"]


def patch(
    target: Any,
    *controls: Control,
    rows: Sequence[str] = ("cond",),
    steps: int = 0,
) -> Handle:
    """Install controls on a pipeline, a denoiser or a vision-language model.

    Args:
        target: a diffusers pipeline, a bare denoiser module, or a model of transformers.
        *controls: the stack, outermost first; it goes inside controls patched earlier.
        rows: for a bare denoiser, the roles of its batch rows in equal groups, such as
            ("uncond", "cond"). Pipelines tell their own.
        steps: for a bare denoiser, the number of steps of a run, if windows by fraction are
            used.

    Returns:
        The handle: `undo()`, context manager, `report()`.

    Raises:
        SelectorError: if a control's selector matches no site or head.
        ControlConflict: if controls cannot work together; the message names both.
        HostError: if the target cannot be patched.
        OptionError: if no control is given or one is not a control.
    """
    if not controls:
        raise OptionError("attnctl.patch needs at least one control, such as attnctl.SoftPAG()")
    for item in controls:
        if not isinstance(item, Control):
            raise OptionError(
                f"expected a control, got {item!r}; attnctl.control(name, **options) makes one"
            )
    owner = target if is_pipeline(target) else None
    prepared = []
    for name, module in targets(target).items():
        prepared.append((module, *_prepare(name, module, controls, owner)))
    return Handle(target, owner, prepared, tuple(rows), steps)


def _prepare(
    name: str, module: nn.Module, controls: Sequence[Control], owner: Any
) -> tuple[Any, list[nn.Module], list[Entry]]:
    sites, modules = survey(module, name)
    entries = []
    for item in controls:
        control = item.resolve(sites)
        cls = type(control)
        needs_sites = cls.plane("attend") or cls.plane("decode")  # logits: the model must fit
        selection = sites.select(control.selector, control.kinds) if needs_sites else {}
        if not cls.plane("attend"):
            selection = {}
        entries.append(Entry(control, selection, sites, None if owner is None else id(owner)))
    return sites, modules, entries


class Handle:
    """An installed stack of controls. Leaving its `with` block, or `undo()`, takes it out."""

    def __init__(
        self,
        target: Any,
        owner: Any,
        prepared: list[tuple[nn.Module, Any, list[nn.Module], list[Entry]]],
        rows: tuple[str, ...],
        steps: int,
    ) -> None:
        self.target = target
        self._bindings: list[tuple[Binding | DecoderBinding, list[Entry]]] = []
        self._pipeline: PipelineBinding | None = None
        self._installed = True
        try:
            for module, sites, modules, entries in prepared:
                self._install(module, sites, modules, entries)
            if owner is not None:
                named = {b.sites[0].denoiser: b for b in self._denoisers()}
                self._pipeline = PipelineBinding.attach(owner, named)
            else:
                self._set_bare(rows, steps)
        except BaseException:
            self.undo()
            raise

    def _install(
        self, module: nn.Module, sites: Any, modules: list[nn.Module], entries: list[Entry]
    ) -> None:
        if is_language_model(module):
            decoder = DecoderBinding.attach(module, sites, modules)
            self._bindings.append((decoder, entries))
            decoder.add(entries, module)
            return
        binding = Binding.attach(module, sites, modules)
        self._bindings.append((binding, entries))
        binding.add(entries)

    def _denoisers(self) -> list[Binding]:
        return [b for b, _ in self._bindings if isinstance(b, Binding)]

    def _set_bare(self, rows: tuple[str, ...], steps: int) -> None:
        for binding in self._denoisers():
            binding.bare.fixed, binding.bare.given_steps = rows, steps
            if self.target is not binding.module:
                binding.adopt_compiled(self.target)
        if not self._denoisers() and (rows != ("cond",) or steps):
            raise OptionError(
                "rows and steps are for bare denoisers: all rows of a language model are alike, "
                "and its steps are the tokens it writes"
            )

    @property
    def controls(self) -> tuple[Control, ...]:
        """The controls, outermost first."""
        return tuple(e.control for e in self._bindings[0][1])

    def undo(self) -> None:
        """Take the controls out; the target is then as it was, bit for bit. Idempotent."""
        if not self._installed:
            return
        self._installed = False
        for binding, entries in self._bindings:
            binding.remove(entries)
        if self._pipeline is not None:
            self._pipeline.detach()

    @contextlib.contextmanager
    def rows(self, *roles: str) -> Iterator[None]:
        """Say which roles the rows of a bare denoiser's calls have inside this block."""
        if self._pipeline is not None or not self._installed or not self._denoisers():
            raise HostError("rows() is for an installed patch of a bare denoiser")
        bare = self._denoisers()[0].bare
        before, bare.fixed = bare.fixed, tuple(roles)
        try:
            yield
        finally:
            bare.fixed = before

    def reset(self) -> None:
        """Begin a new run on a bare denoiser (it is noticed by itself when noise returns)."""
        for binding in self._denoisers():
            binding.bare.begin_anew()

    def report(self) -> Report:
        """Return what each control was given to touch and what it did touch so far."""
        for binding, entries in self._bindings:
            # a run of a bare denoiser has no end
            if isinstance(binding, Binding) and self._pipeline is None and binding.bare.begun:
                for entry in entries:
                    entry.close(binding.bare)
        return Report(tuple(_line(e) for _, entries in self._bindings for e in entries))

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        state = "installed" if self._installed else "undone"
        return f"<attnctl.Handle {state}>\n{self.report()}"


@dataclass(frozen=True)
class ReportLine:
    """What one control did on one denoiser.

    Args:
        control: the control with its options.
        denoiser: name of the denoiser.
        sites: sites selected.
        heads: heads selected, over all sites.
        calls: attention calls it took part in.
        sites_hit: sites with at least one such call.
        forwards: denoiser calls it took part in.
        steps: indices of the steps at which it acted.
        account: what the control itself says about the latest run that came to its end, such
            as a `SparseAccount`; None if nothing.
    """

    control: Control
    denoiser: str
    sites: int
    heads: int
    calls: int
    sites_hit: int
    forwards: int
    steps: tuple[int, ...]
    account: Any = None


@dataclass(frozen=True)
class Report:
    """What a stack did; prints as one line per control and denoiser."""

    lines: tuple[ReportLine, ...]

    @property
    def calls(self) -> int:
        """Attention calls touched by all controls."""
        return sum(line.calls for line in self.lines)

    def __str__(self) -> str:
        return "\n".join(map(_text, self.lines))


def _line(entry: Entry) -> ReportLine:
    return ReportLine(
        control=entry.control,
        denoiser=entry.sites[0].denoiser,
        sites=len(entry.selection),
        heads=int(sum(mask.sum() for mask in entry.selection.values())),
        calls=sum(entry.calls.values()),
        sites_hit=len(entry.calls),
        forwards=entry.forwards,
        steps=tuple(sorted(entry.steps)),
        account=entry.account,
    )


def _text(line: ReportLine) -> str:
    steps = f"steps {_ranges(line.steps)}" if line.steps else "no step yet"
    what = f"{_many(line.heads, 'head')} of {_many(line.sites, 'site')}, " if line.sites else ""
    more = "" if line.account is None else "\n" + textwrap.indent(str(line.account), "  ")
    return (
        f"{line.control} on {line.denoiser}: {what}{_many(line.calls, 'attention call')} at "
        f"{_many(line.sites_hit, 'site')}, {_many(line.forwards, 'forward')}, {steps}{more}"
    )


def _many(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def _ranges(numbers: Sequence[int]) -> str:
    """Write 0 1 2 5 as "0-2, 5"."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][1] + 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return ", ".join(f"{a}-{b}" if a < b else str(a) for a, b in parts)
