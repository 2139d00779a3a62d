"""Reading maps site by site and step by step, with all that does not change worked out once.

A step of a small model waits for the host, so that what is done at each site of each step has to
be little: which rows are read, where their words lie and where the sums go is found at the first
call of a kind, and kept for the run. On a GPU one kernel then does the rest of a call.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnctl.kernels.lse import Columns, ColumnSums, column_sums, parts_of
from attnctl.processors.guidance.heads import head_indices
from attnctl.records import AttentionCall, Spans, Watch

from .placing import Placing, has_text, place, rows_of_mask, text_keys
from .token_maps import Key, Positions, TokenMaps
from .token_mass import columns_of, token_mass

__all__ = ["Reader"]

_NOWHERE = Key((0, 0, 0))


@dataclass(frozen=True)
class Portion:
    """Rows of a call whose words have the same tokens.

    Args:
        rows: of the batch.
        samples: which samples of the run they are.
        words: the words' positions, counted over all keys.
        kernel: adds their maps; None where torch has to.
    """

    rows: slice
    samples: range
    words: tuple[tuple[int, ...], ...]
    kernel: ColumnSums | None


@dataclass(frozen=True)
class Plan:
    """How calls of one kind are read.

    Args:
        facts: what the plan holds for.
        spans: where the call's tokens lie.
        heads: the control's heads of the site.
        portions: the rows to read; none where the call has no row of the role, or no text.
        chosen: indices of the heads, None for all.
        each: how many maps a portion's call adds to its sums.
        where: places in the call; None without portions.
        key: of the sums.
        tally: by sample, how many maps are in the sums.
    """

    facts: tuple[Any, ...]
    spans: Spans
    heads: Tensor
    portions: tuple[Portion, ...] = ()
    chosen: Tensor | None = None
    each: int = 1
    where: Placing | None = None
    key: Key = _NOWHERE
    tally: list[int] = field(default_factory=list)

    def fits(self, call: AttentionCall, facts: tuple[Any, ...]) -> bool:
        """Whether it is the plan of a call."""
        return self.heads is call.heads and self.facts == facts and self.spans == call.spans


@dataclass(eq=False)
class Reader:
    """Adds maps of attention calls to the sums of a run.

    Args:
        maps: the sums.
        role: which rows are read.
        control: name of the control that reads, for errors.
    """

    maps: TokenMaps
    role: str = "cond"
    control: str = "heatmap"
    plans: dict[Any, Plan] = field(default_factory=dict)

    def read(self, call: AttentionCall) -> None:
        """Add the maps of a call's rows, if it has any of the role and keys of text."""
        plan = self._plan_of(call)
        for portion in plan.portions:
            if portion.kernel is None:
                self._read(call, plan, portion)
            else:
                portion.kernel(call.q, call.k, call.mask)
                for sample in portion.samples:
                    plan.tally[sample] += plan.each

    def watch(self, call: AttentionCall) -> Watch | None:
        """Return what reads calls like this one, None where kernels alone do not."""
        plan = self._plan_of(call)
        facts, tally, each = plan.facts, plan.tally, plan.each
        kernels = [portion.kernel for portion in plan.portions if portion.kernel is not None]
        samples = [sample for portion in plan.portions for sample in portion.samples]
        if len(kernels) < len(plan.portions):
            return None

        def watch(q: Tensor, k: Tensor, mask: Tensor | None, scale: float | None) -> bool:
            if _facts(q, k, mask, scale) != facts:
                return False
            for kernel in kernels:
                kernel(q, k, mask)
            for sample in samples:
                tally[sample] += each
            return True

        return watch

    def _plan_of(self, call: AttentionCall) -> Plan:
        """Return the plan of a call, made anew where something changed."""
        facts, rows = _facts(call.q, call.k, call.mask, call.scale), call.rows
        kind = call.site.index, call.index, rows.groups, rows.n
        plan = self.plans.get(kind)
        if plan is None or not plan.fits(call, facts):
            plan = self.plans[kind] = self._plan(call, facts)
        return plan

    def _read(self, call: AttentionCall, plan: Plan, portion: Portion) -> None:
        """Add a portion's maps in torch."""
        assert plan.where is not None
        each_head, image = self.maps.each_head, plan.where.image
        with torch.no_grad():
            part = call.take(portion.rows, plan.chosen)
            mass = token_mass(
                part.q[:, :, image],
                part.repeat_kv(part.k),
                portion.words,
                rows_of_mask(part.mask, image),
                part.scale,
                each_head=each_head,
            )
            first = portion.samples.start
            self.maps.add(plan.key, plan.where.samples, first, mass, plan.each)

    def _plan(self, call: AttentionCall, facts: tuple[Any, ...]) -> Plan:
        where = place(call, self.role, self.control) if has_text(call) else None
        if where is None:
            return Plan(facts, call.spans, call.heads)
        chosen = head_indices(call)
        heads = call.q.shape[1] if chosen is None else chosen.shape[0]
        site, kept, each = "", tuple[int, ...](), heads
        if self.maps.each_head:
            site, kept, each = call.site.name, tuple(torch.where(call.heads)[0].tolist()), 1
        key, rows = Key(where.grid, site, kept), where.rows.stop - where.rows.start
        parts = heads if self.maps.each_head else _parts(call, rows, where, heads)
        sums = self.maps.begin(key, (where.samples, parts), call.q.device)
        portions = []
        for start, stop, positions in _runs(self.maps, where.first, rows, where.samples):
            words = text_keys(positions, where.text, call.site)
            at = slice(where.rows.start + start, where.rows.start + stop)
            samples = range(where.first + start, where.first + stop)
            columns = Columns(
                at, where.image, chosen, *columns_of(words, call.q.device), sums, samples.start
            )
            kernel = column_sums(call.q, call.k, columns, call.mask, call.scale)
            portions.append(Portion(at, samples, words, kernel))
        tally = self.maps.tallies[key]
        shape = facts, call.spans, call.heads
        return Plan(*shape, tuple(portions), chosen, each, where, key, tally)


def _facts(q: Tensor, k: Tensor, mask: Tensor | None, scale: float | None) -> tuple[Any, ...]:
    """Return what a kernel is made for."""
    of_mask = None if mask is None else (mask.shape, mask.stride(), mask.dtype)
    return (
        q.shape, k.shape, q.stride(), k.stride(), q.dtype, k.dtype, q.device, scale, of_mask,
    )  # fmt: skip


def _parts(call: AttentionCall, rows: int, where: Placing, heads: int) -> int:
    """Return how many partial sums there are: one, unless they share the work of a kernel."""
    if not call.q.is_cuda:
        return 1
    return parts_of(rows, where.image.stop - where.image.start, heads)


def _runs(
    maps: TokenMaps, first: int, count: int, samples: int
) -> Iterator[tuple[int, int, Positions]]:
    """Yield (start, stop, positions) of neighbouring rows whose words have the same tokens."""
    each = [maps.of(first + i, samples) for i in range(count)]
    start = 0
    for positions, group in itertools.groupby(each):
        stop = start + len(list(group))
        yield start, stop, positions
        start = stop
