"""HeatMap: where in the picture each word of the prompt is attended to. Changes nothing.

For an image query i and the text tokens T_w of a word w, with z the logits of all keys,

    M_w[i] = sum over j in T_w of exp(z_ij - lse_i),    lse_i = log sum_j exp(z_ij)

the exact softmax columns. They are averaged over heads, layers and steps on the fly, at each
resolution; no attention map is ever stored, and only a chunk of logits is held at once. In
joint attention these are the image-to-text entries of the one softmax over image and text.

References:
    Tang et al., "What the DAAM: Interpreting Stable Diffusion Using Cross Attention", 2023
    (arXiv 2210.04885), whose job this does on any model with text keys.

Deviations from DAAM: a word's pieces are summed, not averaged, so that a map is the share of
attention that the word gets; maps are resized bilinearly, not bicubically, so that they stay
within [0, 1]; conditional rows only.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from attnctl.errors import HostError
from attnctl.processors.guidance.heads import head_indices
from attnctl.processors.windowed import Windowed
from attnctl.records import AttentionCall
from attnctl.words.prompts import prompts_of

from .placing import Placing, has_text, place, rows_of_mask
from .token_maps import Key, Positions, TokenMaps
from .token_mass import token_mass

if TYPE_CHECKING:
    from attnctl.hosts.run import Run
    from attnctl.selectors import Selection

__all__ = ["HeatMap"]


@dataclass(frozen=True)
class HeatMap(Windowed):
    """Attention maps of words, read while the model runs; the output stays bit-equal.

    Not in the registry: what it does ends in an object, which a command line has no place for.
    `attnctl.heatmaps` and the command `attnctl heatmap` use it.

    Args:
        words: as in `attnctl.find_words`, for every prompt of the batch; None for the concepts
            of the prompt, which then must be one.
        sink: is called with the `TokenMaps` of each run, when it begins; they fill up while it
            runs. A list's `append`, say. Without it nothing is read.
        heads: selector; cross- and joint-attention sites.
        each_head: keep every head apart, which takes memory for each.
        role: which rows.
        start: fraction of the run at which it begins.
        stop: fraction of the run at which it ends.
    """

    words: Any = None
    sink: Callable[[TokenMaps], Any] | None = None
    heads: Any = "all"
    each_head: bool = False
    role: str = "cond"
    start: float = 0.0
    stop: float = 1.0

    name: ClassVar[str] = "heatmap"
    kinds: ClassVar[tuple[str, ...]] = ("cross", "joint")

    def __post_init__(self) -> None:
        _ = self.schedule

    @property
    def neutral(self) -> bool:
        """Nobody takes the maps."""
        return self.sink is None or self.schedule.empty

    def begin(self, run: Run, selection: Selection) -> TokenMaps:
        """Find the words in the run's prompts and hand out the empty sums."""
        found = [prompt.find(self.words) for prompt in prompts_of(run)]
        names = tuple(word.text for word in found[0])
        if any(tuple(word.text for word in one) != names for one in found):
            raise HostError(
                f"{self.name}: the prompts of this batch have different concepts; name words "
                "that all of them have, or run them one by one"
            )
        positions = tuple(tuple(word.positions for word in one) for one in found)
        maps = TokenMaps(names, positions, self.each_head)
        assert self.sink is not None
        self.sink(maps)
        return maps

    def __str__(self) -> str:
        return super().__str__() if self.sink is None else str(replace(self, sink=None))

    def attend(self, call: AttentionCall) -> Tensor:
        """Return the stock output, having read the maps of the selected rows."""
        out = call.proceed()
        where = place(call, self.role, self.name) if has_text(call) else None
        if where is not None:
            with torch.no_grad():
                self.read(call, where)
        return out

    def read(self, call: AttentionCall, where: Placing) -> None:
        """Add the maps of some rows of a call to its state, a `TokenMaps`."""
        rows, image, count = where.rows, where.image, where.rows.stop - where.rows.start
        heads = head_indices(call)
        site, kept = "", tuple[int, ...]()
        if self.each_head:
            site, kept = call.site.name, tuple(torch.where(call.heads)[0].tolist())
        key = Key(where.grid, site, kept)
        for start, stop, positions in _runs(call.state, where.first, count, where.samples):
            part = call.take(slice(rows.start + start, rows.start + stop), heads)
            mass = token_mass(
                part.q[:, :, image],
                part.repeat_kv(part.k),
                _keys(call, positions, where.text),
                rows_of_mask(part.mask, image),
                part.scale,
                each_head=self.each_head,
            )
            maps = 1 if self.each_head else part.q.shape[1]
            call.state.add(key, where.samples, where.first + start, mass, maps)


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


def _keys(call: AttentionCall, positions: Positions, text: slice) -> list[list[int]]:
    """Return the words' positions counted over all keys."""
    length = text.stop - text.start
    last = max((p for word in positions for p in word), default=0)
    if last >= length:
        raise HostError(
            f"{call.site}: a word has the token position {last}, but there are {length} text "
            "tokens here, counted from 0"
        )
    return [[text.start + p for p in word] for word in positions]
