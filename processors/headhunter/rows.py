"""Many head sets in one batch: the perturbation with its own strengths in every row.

    O'_bh = lerp(O_bh, P(O_bh), u_bh)

Rows of one denoiser call may belong to different candidates of a search, so that a GPU is
filled by candidates as well as by pictures; and since u enters linearly, one backward gives
the slope of an objective with respect to every head's u at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from attnctl.control import Control
from attnctl.errors import OptionError
from attnctl.processors.guidance.heads import is_added_branch
from attnctl.processors.guidance.perturbed import PerturbedGuidance
from attnctl.records import AttentionCall, ForwardCall, Site
from attnctl.schedule import Schedule

from .headset import Head

if TYPE_CHECKING:
    from attnctl.hosts.run import Run
    from attnctl.selectors import Selection

__all__ = ["RowStrengths", "Strengths", "strengths"]

Strengths = dict[int, Tensor]
"""u [n, H] by site index: a row per sample, a column per head; absent sites have u = 0."""


def strengths(sets: Sequence[Iterable[Head]], u: float, sites: Sequence[Site]) -> Strengths:
    """Return the strengths of one candidate head set per row.

    Args:
        sets: n head sets, some may be empty.
        u: strength of every head in a set.
        sites: the model's sites of the admitted kinds.

    Raises:
        OptionError: if a head is not on the model.
    """
    numbered = {s.layer: s for s in sites if s.layer is not None}
    table: Strengths = {}
    for row, heads in enumerate(sets):
        for layer, head in heads:
            site = numbered.get(layer)
            if site is None or head >= site.heads:
                raise OptionError(f"the model has no head L{layer}H{head} that can be perturbed")
            column = table.setdefault(site.index, torch.zeros(len(sets), site.heads))
            column[row, head] = u
    return table


@dataclass(frozen=True)
class RowStrengths(Control):
    """A perturbation guidance whose strengths differ from row to row.

    Args:
        guidance: the guidance; its own heads and u are not used.
        table: strengths, see `strengths`.
    """

    guidance: PerturbedGuidance
    table: Mapping[int, Tensor] = field(default_factory=dict)

    name: ClassVar[str] = "row-strengths"
    adds_rows: ClassVar[bool] = True
    own_rows_only: ClassVar[bool] = True

    @property
    def kinds(self) -> tuple[str, ...]:  # type: ignore[override]
        """Those of the guidance."""
        return self.guidance.kinds

    @property
    def schedule(self) -> Schedule:
        """That of the guidance."""
        return self.guidance.schedule

    def begin(self, run: Run, selection: Selection) -> Any:
        """Return the guidance's state."""
        return self.guidance.begin(run, selection)

    def strength(self, call: AttentionCall) -> Tensor | None:
        """Return u [n, H] at a call's site, None where nothing is perturbed."""
        return self.table.get(call.site.index)

    def attend(self, call: AttentionCall) -> Tensor:
        """Perturb each of the control's own rows by its own strengths."""
        rows, out = call.slice(call.role), call.proceed()
        u = None if rows is None else self.strength(call)
        if rows is None or u is None or is_added_branch(call):
            return out
        heads = u.detach().any(0).nonzero().flatten() if not u.requires_grad else None
        mine = out[rows] if heads is None else out[rows][:, heads.to(out.device)]
        other = self.guidance.perturb(call.take(rows, heads), mine)
        u = u if heads is None else u[:, heads]
        # a site may fold other axes into the batch, row index slowest
        u = u.to(out).repeat_interleave(len(mine) // len(u), 0)[:, :, None, None]
        mixed = torch.lerp(mine, other.to(mine.dtype), u)
        out = out.clone()
        if heads is None:
            out[rows] = mixed
        else:
            out[rows] = out[rows].index_copy(1, heads.to(out.device), mixed)
        return out

    def denoise(self, call: ForwardCall) -> Tensor:
        """Guide as the guidance does."""
        return self.guidance.denoise(call)
