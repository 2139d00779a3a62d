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

from attnctl.control import Control
from attnctl.errors import HostError
from attnctl.processors.guidance.heads import head_indices
from attnctl.records import AttentionCall
from attnctl.schedule import Schedule, Window
from attnctl.words.find import Found, find_words

from .token_maps import Key, Positions, TokenMaps
from .token_mass import token_mass

if TYPE_CHECKING:
    from attnctl.hosts.run import Run
    from attnctl.selectors import Selection

__all__ = ["HeatMap"]


@dataclass(frozen=True)
class HeatMap(Control):
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
    def selector(self) -> Any:
        """The heads."""
        return self.heads

    @property
    def schedule(self) -> Schedule:
        """Steps that are read."""
        return Schedule((Window(self.start, self.stop),))

    @property
    def neutral(self) -> bool:
        """Nobody takes the maps."""
        return self.sink is None or self.schedule.empty

    def begin(self, run: Run, selection: Selection) -> TokenMaps:
        """Find the words in the run's prompts and hand out the empty sums."""
        found = [self._find(run, prompt) for prompt in _prompts(run)]
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

    def _find(self, run: Run, prompt: dict[str, Any]) -> list[Found]:
        text = prompt.pop("prompt")
        call = {"max_sequence_length": run.args.get("max_sequence_length"), **prompt}
        return find_words(run.pipe, text, self.words, **call)

    def __str__(self) -> str:
        return super().__str__() if self.sink is None else str(replace(self, sink=None))

    def attend(self, call: AttentionCall) -> Tensor:
        """Return the stock output, having read the maps of the selected rows."""
        out = call.proceed()
        rows, spans = call.slice(self.role), call.spans
        if rows is None or (spans.k and spans.keys("text") is None):
            return out  # other rows; or no text here: a refiner, the image branch of an adapter
        with torch.no_grad():
            self._read(call, rows)
        return out

    def _read(self, call: AttentionCall, rows: slice) -> None:
        image, text, grid = _layout(call)
        samples, count = call.rows.n, rows.stop - rows.start
        # one row at a time (Mochi), else a group of rows
        alone = call.q.shape[0] == 1 and len(call.rows) > 1
        first = call.index - call.rows.slice(self.role).start if alone else 0
        if count != samples and not alone:
            raise HostError(
                f"{call.site}: {count} attention rows for {samples} samples (frames folded into "
                f"the batch, perhaps); {self.name} does not know their order: select other sites"
            )
        heads = head_indices(call)
        site, kept = "", tuple[int, ...]()
        if self.each_head:
            site, kept = call.site.name, tuple(torch.where(call.heads)[0].tolist())
        key = Key(grid, site, kept)
        for start, stop, positions in _runs(call.state, first, count, samples):
            part = call.take(slice(rows.start + start, rows.start + stop), heads)
            mass = token_mass(
                part.q[:, :, image],
                part.repeat_kv(part.k),
                _keys(call, positions, text),
                _rows_of(part.mask, image),
                part.scale,
                each_head=self.each_head,
            )
            maps = 1 if self.each_head else part.q.shape[1]
            call.state.add(key, samples, first + start, mass, maps)


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


def _rows_of(mask: Tensor | None, image: slice) -> Tensor | None:
    """Return the mask of the image queries."""
    if mask is None or mask.ndim < 2 or mask.shape[-2] == 1:
        return mask
    return mask[..., image, :]


def _prompts(run: Run) -> list[dict[str, Any]]:
    """Return the texts of each prompt of a run: `prompt`, and `prompt_2` and so on if given."""
    texts = {key: run.args.get(key) for key in ("prompt", "prompt_2", "prompt_3")}
    many = next((len(t) for t in texts.values() if isinstance(t, (list, tuple))), 1)
    return [
        {key: t[i] if isinstance(t, (list, tuple)) else t for key, t in texts.items()}
        for i in range(many)
    ]


def _layout(call: AttentionCall) -> tuple[slice, slice, tuple[int, int, int]]:
    spans = call.spans
    image, text = spans.queries("image"), spans.keys("text")
    if image is None or text is None or spans.grid is None:
        raise HostError(
            f"{call.site}: which tokens are text, and where on the grid the image tokens lie, is "
            "not known here; select other sites"
        )
    return image, text, spans.grid


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
