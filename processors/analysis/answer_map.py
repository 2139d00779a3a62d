"""AnswerMap: where in the image a language model looks for each token that it writes.

The row of attention that predicts token t of the answer is the prompt's last one for the first
token, and the row of token t - 1 for all later ones. For an image token j and z the row's logits,

    A_t[j] = exp(z_tj - lse_t),    lse_t = log sum_j exp(z_tj).

One row of a map at a time: nothing of the size of a map is ever stored. Where other controls
follow in the stack, their effect is read too: the row is computed once more with values that are
1 at one image token and 0 elsewhere, so that what comes out is the weight that acts, whatever
they do to logits and weights. (What a control does to outputs that is not linear in the values
has no weights, and is not seen.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from attnctl.control import Control
from attnctl.kernels.group_attention import row_probabilities
from attnctl.processors.guidance.heads import head_indices
from attnctl.processors.vlm.rows import tokens_of
from attnctl.records import AttentionCall

if TYPE_CHECKING:
    from attnctl.hosts.run import Run
    from attnctl.selectors import Selection
    from attnctl.sites import Site

__all__ = ["AnswerMap", "AnswerSums"]

_COLUMNS = 64
"""Image tokens whose acting weights are read at once: values have as many columns."""


@dataclass(eq=False)
class AnswerSums:
    """What was read of one answer.

    Args:
        steps: attention [B, n] to the n image tokens by forward, summed over heads and layers.
        counts: how many heads are in each of these sums.
        sites: attention [B, h, n] of each selected head by layer, summed over the forwards.
        heads: numbers of these heads by layer.
    """

    steps: dict[int, Tensor] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)
    sites: dict[int, Tensor] = field(default_factory=dict)
    heads: dict[int, tuple[int, ...]] = field(default_factory=dict)
    _last: dict[int, tuple[int, Tensor]] = field(default_factory=dict)

    def add(self, site: Site, step: int, heads: tuple[int, ...], shares: Tensor) -> None:
        """Add the attention [B, h, n] of a layer's heads in one forward.

        A control further out may have the row computed again: the last time counts.
        """
        layer = site.index if site.layer is None else site.layer
        if layer in self._last and self._last[layer][0] != step:
            self._count(layer)
        self._last[layer] = step, shares
        self.heads[layer] = heads

    def _count(self, layer: int) -> None:
        step, shares = self._last.pop(layer)
        total = shares.sum(1)
        self.steps[step] = self.steps[step] + total if step in self.steps else total
        self.counts[step] = self.counts.get(step, 0) + shares.shape[1]
        self.sites[layer] = self.sites[layer] + shares if layer in self.sites else shares

    def done(self) -> AnswerSums:
        """Return the sums, the last forward included."""
        for layer in list(self._last):
            self._count(layer)
        return self

    def tokens(self) -> Tensor:
        """Return the mean over heads and layers by written token, [T, B, n] on the CPU."""
        means = [self.steps[step] / self.counts[step] for step in sorted(self.steps)]
        return torch.stack(means).cpu()

    def by_head(self) -> dict[tuple[int, int], Tensor]:
        """Return the mean over the written tokens by (layer, head), [B, n] on the CPU."""
        return {
            (layer, head): total[:, i].cpu() / len(self.steps)
            for layer, total in sorted(self.sites.items())
            for i, head in enumerate(self.heads[layer])
        }


@dataclass(frozen=True)
class AnswerMap(Control):
    """The attention of each written token to the image; the output stays bit-equal.

    Not in the registry, as `HeatMap`; `attnctl.answer_maps` and `attnctl heatmap --image` use it.
    List it first: it reads what the controls after it do.

    Args:
        sink: is called with the `AnswerSums` of each answer, when it begins; they fill up while
            it is written. Without it nothing is read.
        heads: selector of the heads that are read.
    """

    sink: Callable[[AnswerSums], Any] | None = None
    heads: Any = "all"

    name: ClassVar[str] = "answer-map"
    kinds: ClassVar[tuple[str, ...]] = ("causal",)

    @property
    def selector(self) -> Any:
        """The heads."""
        return self.heads

    @property
    def neutral(self) -> bool:
        """Nobody takes the maps."""
        return self.sink is None

    def __str__(self) -> str:
        return super().__str__() if self.sink is None else str(replace(self, sink=None))

    def begin(self, run: Run, selection: Selection) -> AnswerSums:
        """Hand out the empty sums."""
        sums = AnswerSums()
        assert self.sink is not None
        self.sink(sums)
        return sums

    def attend(self, call: AttentionCall) -> Tensor:
        """Return the output, having read the row that predicts the next token."""
        out = call.proceed()
        columns = tokens_of(call, self.name).columns("answer")
        if len(columns):  # none in the first parts of a prompt that is read in parts
            with torch.no_grad():
                heads = tuple(torch.where(call.heads)[0].tolist())
                shares = self._shares(call, columns[-1:])
                call.state.add(call.site, call.step.index, heads, shares)
        return out

    def _shares(self, call: AttentionCall, column: Tensor) -> Tensor:
        """Return the attention [B, h, n] of one query to the image tokens."""
        tokens, heads = tokens_of(call, self.name), head_indices(call)
        slots = tokens.slots("image").any(0).nonzero()[:, 0]
        keys = slots - tokens.first
        here = keys[keys >= 0]  # the first ones have left a sliding window
        shares = weights(call.queries_at(column), here)[:, :, 0]
        shares = shares if heads is None else shares[:, heads]
        return torch.nn.functional.pad(shares, (len(slots) - len(here), 0))


def weights(call: AttentionCall, keys: Tensor) -> Tensor:
    """Return the attention weights of a call's few queries to some keys.

    Args:
        call: a call on R queries.
        keys: numbers [n].

    Returns:
        [B, H, R, n] in float32 or wider, as the rest of the stack leaves them.
    """
    if not call.rest:
        return row_probabilities(call.q, call.k, call.mask, call.scale)[..., keys]
    wide = torch.promote_types(call.q.dtype, torch.float32)
    mask = call.mask
    if mask is not None and mask.is_floating_point():
        mask = mask.to(wide)
    q, k = call.q.to(wide), call.k.to(wide)
    parts = [call.proceed(q=q, k=k, v=_marks(k, part), mask=mask) for part in keys.split(_COLUMNS)]
    return torch.cat(parts, dim=-1)


def _marks(k: Tensor, keys: Tensor) -> Tensor:
    """Return values [B, Hkv, Nk, n]: column i is 1 at key i of `keys` and 0 elsewhere."""
    marks = k.new_zeros((k.shape[2], len(keys)))
    marks[keys, torch.arange(len(keys), device=k.device)] = 1
    return marks.expand(*k.shape[:2], -1, -1)
