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

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from attnctl.errors import HostError
from attnctl.processors.windowed import Windowed
from attnctl.records import AttentionCall, Watch
from attnctl.words.prompts import prompts_of

from .reading import Reader
from .token_maps import TokenMaps

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

    def begin(self, run: Run, selection: Selection) -> Reader:
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
        return Reader(maps, self.role, self.name)

    def watching(self, call: AttentionCall) -> Watch | None:
        """Return what reads calls like this one, where kernels do."""
        watch: Watch | None = call.state.watch(call)
        return watch

    def __str__(self) -> str:
        return super().__str__() if self.sink is None else str(replace(self, sink=None))

    def attend(self, call: AttentionCall) -> Tensor:
        """Return the stock output, having read the maps of the selected rows."""
        out = call.proceed()
        call.state.read(call)
        return out
