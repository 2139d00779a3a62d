"""The stack of controls on one denoiser: entries, order, conflicts, and what each one touched."""

from __future__ import annotations

import warnings
from collections import defaultdict
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .control import Control
from .errors import AttnctlWarning, ControlConflict
from .records import AttentionCall, ForwardCall, LogitsCall, Rows, Step
from .selectors import Selection
from .sites import Sites

if TYPE_CHECKING:
    from .hosts.run import Run

__all__ = ["Entry", "check_conflicts"]

_SERIAL = count()


@dataclass(eq=False)
class Entry:
    """One control installed on one denoiser.

    Args:
        control: the control, with model-dependent options filled in.
        selection: heads it may touch, by site index.
        sites: the denoiser's sites.
        owner: the pipeline it was installed through, by id; None for a bare denoiser.
    """

    control: Control
    selection: Selection
    sites: Sites
    owner: int | None = None
    serial: int = field(default_factory=lambda: next(_SERIAL))
    calls: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    steps: set[int] = field(default_factory=set)
    forwards: int = 0
    warned: bool = False
    account: Any = None  # what the control adds to the report of its latest run

    def __post_init__(self) -> None:
        cls = type(self.control)
        self.attends = cls.plane("attend")
        self.denoises = cls.plane("denoise")
        self.decodes = cls.plane("decode")
        self.watches = cls.plane("watching")
        self.steers = cls.plane("between")
        # options are fixed: asked for at every step
        self.schedule, self.neutral = self.control.schedule, self.control.neutral
        # sites of which all heads are selected: asked for at every call
        self.entire = {site for site, heads in self.selection.items() if bool(heads.all())}
        # role of the extra rows that this entry adds to a forward
        self.role = f"{self.control.name}/{self.serial}"

    def active(self, step: Step) -> bool:
        """Whether the control acts at this step."""
        return not self.neutral and step in self.schedule

    def wants(self, site: int, rows: Rows) -> bool:
        """Whether the control's attention plane has anything to do at this site."""
        if not self.attends or site not in self.selection:
            return False
        return self.role in rows or not self.control.own_rows_only

    def warn_untouched(self) -> None:
        """Warn, once, that a forward reached none of the selected sites."""
        if not self.warned:
            self.warned = True
            warnings.warn(
                f"{self.control} touched no attention call in a whole forward: the model left "
                "its sites out (a cache), or torch.compile cut their attention into pieces "
                "(Mochi); the control has no effect there",
                AttnctlWarning,
                stacklevel=2,
            )

    def state(self, run: Run) -> Any:
        """Return the control's state of this run, made at first use."""
        if self.serial not in run.states:
            run.states[self.serial] = self.control.begin(run, self.selection)
        return run.states[self.serial]

    def close(self, run: Run) -> None:
        """Take down what the control has to say about a run."""
        self.account = None
        if self.serial in run.states:
            steps = tuple(sorted(run.steps.get(self.serial, ())))
            self.account = self.control.account(run.states[self.serial], steps, self.sites)

    def attend(self, call: AttentionCall) -> Tensor:
        """Run the control's attention plane on a call."""
        assert call.run is not None
        self.calls[call.site.index] += 1
        site = call.site.index
        heads = self.selection[site]
        if call.part != slice(None):
            heads = heads[call.part]
        own = call.seen_by(heads, self.state(call.run), self.role, site in self.entire)
        return self.control.attend(own)

    def attend_alone(self, call: AttentionCall) -> Tensor:
        """Run the attention plane of a stack's only entry on a call made by `alone`."""
        self.calls[call.site.index] += 1
        return self.control.attend(call)

    def alone(self, call: AttentionCall) -> AttentionCall:
        """Return a call that nobody else holds as a stack's only entry sees it."""
        assert call.run is not None
        site = call.site.index
        call.heads, call.every_head = self.selection[site], site in self.entire
        call.state, call.role, call.rest = self.state(call.run), self.role, ()
        return call

    def denoise(self, call: ForwardCall) -> Tensor:
        """Run the control's denoiser plane on a call."""
        self.forwards += 1
        self.steps.add(call.step.index)
        return self.control.denoise(replace(call, state=self.state(call.run), role=self.role))

    def decode(self, call: LogitsCall) -> Tensor:
        """Run the control's decode plane on a call."""
        self.forwards += 1
        return self.control.decode(replace(call, state=self.state(call.run)))


def check_conflicts(entries: list[Entry]) -> None:
    """Refuse stacks that cannot work.

    Raises:
        ControlConflict: the same control object twice; two controls that each compute the
            attention themselves on the same heads; such a control listed before one that
            works around the attention of the same heads.
    """
    for i, first in enumerate(entries):
        for second in entries[i + 1 :]:
            _check_pair(first, second)


def _check_pair(first: Entry, second: Entry) -> None:
    a, b = first.control, second.control
    if a is b:
        raise ControlConflict(f"{a} is already in the stack; make a second object to use it twice")
    if not (a.replaces_softmax and second.attends):
        return
    shared = _overlap(first, second)
    if shared is None:
        return
    if b.replaces_softmax:
        raise ControlConflict(
            f"{a} and {b} both compute the attention of {shared} themselves; "
            "give them different heads or drop one of them"
        )
    raise ControlConflict(
        f"{a} computes the attention of {shared} itself, so {b}, listed after it, would never "
        f"be reached: list {b.name} before {a.name}"
    )


def _overlap(first: Entry, second: Entry) -> str | None:
    """Return the name of a site where both select a common head."""
    for index, mask in first.selection.items():
        other = second.selection.get(index)
        if other is not None and bool((mask & other).any()):
            return first.sites[index].name
    return None
