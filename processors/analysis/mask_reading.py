"""What masks of words are made from: token maps, and self-attention's queries and keys, one step.

Two controls, because the heads that tell words apart and those that tell objects apart differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from attnctl.control import Control
from attnctl.errors import HostError
from attnctl.processors.guidance.heads import head_indices
from attnctl.records import AttentionCall
from attnctl.words.prompts import Prompt, prompts_of

from .reading import Reader
from .token_maps import TokenMaps

if TYPE_CHECKING:
    from attnctl.hosts.run import Run
    from attnctl.selectors import Selection

__all__ = ["BACKGROUND", "Carriers", "Grid", "SelfReader", "TextReader", "WordsRead"]

BACKGROUND = "background"
"""Name of the concept that stands for no word."""

Grid = tuple[int, int, int]
"""(frames, height, width)."""

Carriers = dict[Grid, list[tuple[Tensor, Tensor, float | None]]]
"""(queries, keys, scale) of the self-attention sites, by grid."""


@dataclass(eq=False)
class WordsRead:
    """Maps of one run.

    Args:
        words: names of the words, the background last.
        reader: reads the maps of their tokens, each token's by itself.
        owners: by prompt, how many tokens each word has, in order.
    """

    words: tuple[str, ...]
    reader: Reader
    owners: list[list[int]]


@dataclass(frozen=True)
class OneStep(Control):
    """Reads conditional rows at one step; changes nothing.

    Args:
        sink: is called with the state of each run.
        heads: selector.
        at: fraction of the run.
    """

    sink: Callable[[Any], Any]
    heads: Any = "all"
    at: float = 0.0

    @property
    def selector(self) -> Any:
        """The heads."""
        return self.heads

    def __str__(self) -> str:
        return f"{self.name}(heads={self.heads}, at={self.at:g})"

    def attend(self, call: AttentionCall) -> Tensor:
        """Return the stock output, having read what is needed at the chosen step."""
        out = call.proceed()
        rows = call.slice("cond")
        if rows is not None and call.step.index == int(self.at * call.step.count):
            with torch.no_grad():
                self.read(call, rows)
        return out

    def read(self, call: AttentionCall, rows: slice) -> None:
        """Keep what is needed of a call's rows."""
        raise NotImplementedError


@dataclass(frozen=True)
class TextReader(OneStep):
    """Reads token maps from attention to text.

    Args:
        words: as in `attnctl.find_words`.
        background: positions of the background's tokens, "start" or None.
    """

    words: Any = None
    background: Any = "start"

    name: ClassVar[str] = "masks (text)"
    kinds: ClassVar[tuple[str, ...]] = ("cross", "joint")

    def begin(self, run: Run, selection: Selection) -> WordsRead:
        """Find the words, each of their tokens by itself."""
        each = [self._groups(prompt) for prompt in prompts_of(run)]
        names, *others = [tuple(name for name, _ in groups) for groups in each]
        if any(one != names for one in others):
            raise HostError("the prompts of this batch have different words; run them one by one")
        owners = [[len(group) for _, group in groups] for groups in each]
        tokens = [[(p,) for _, group in groups for p in group] for groups in each]
        most = max(map(len, tokens))
        padded = tuple((*one, *[()] * (most - len(one))) for one in tokens)
        maps = TokenMaps(tuple(map(str, range(most))), padded)
        read = WordsRead(names, Reader(maps, "cond", self.name), owners)
        self.sink(read)
        return read

    def _groups(self, prompt: Prompt) -> list[tuple[str, list[int]]]:
        """Return each word's name and tokens, the background's last."""
        groups = [(word.text, list(word.positions)) for word in prompt.find(self.words)]
        if self.background is None:
            return groups
        start = self.background
        if start == "start":
            start = [p for p in prompt.borders() if p == 0]
            if not start:
                raise HostError(
                    "this text has no token at its beginning to stand for the background: "
                    "give background=[...] (token positions), or None"
                )
        return [*groups, (BACKGROUND, list(start))]

    def read(self, call: AttentionCall, rows: slice) -> None:
        """Add the maps of a call."""
        call.state.reader.read(call)


@dataclass(frozen=True)
class SelfReader(OneStep):
    """Keeps queries and keys of attention among image tokens."""

    name: ClassVar[str] = "masks (image)"
    kinds: ClassVar[tuple[str, ...]] = ("self", "joint")

    def begin(self, run: Run, selection: Selection) -> Carriers:
        """Hand out what will hold them."""
        kept: Carriers = {}
        self.sink(kept)
        return kept

    def read(self, call: AttentionCall, rows: slice) -> None:
        """Keep the image tokens of a call's rows.

        Raises:
            HostError: if it is not known where they lie.
        """
        image, grid = call.spans.queries("image"), call.spans.grid
        if image is None or grid is None or call.q.shape[0] == 1 < len(call.rows):
            raise HostError(
                f"{call.site}: where its image tokens lie is not known here, or it attends to one "
                "row at a time; select other sites"
            )
        part = call.take(rows, head_indices(call))
        q, k = part.q[:, :, image], part.repeat_kv(part.k)[:, :, image]
        call.state.setdefault(grid, []).append((q.clone(), k.clone(), part.scale))
