"""`attnctl.masks`: which part of the picture belongs to which word, from its own attention.

References:
    Shentu et al., "AttenCraft: Attention-guided Disentanglement of Multiple Concepts for
    Text-to-Image Customization", 2024 (arXiv 2405.17965): its mask extraction.

Deviations: maps come from one step of a normal run, not from a noised photograph; P has rows
that sum to 1 instead of being stretched to 0..1 as a whole; any number of concepts; a phrase is
the greatest of its tokens' maps, as there for descriptive words; joint attention works too, its
image-to-image part renormalised.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from attnctl.control import Control
from attnctl.errors import HostError, OptionError, nearest
from attnctl.patch import Report, patch
from attnctl.processors.guidance.heads import head_indices
from attnctl.records import AttentionCall
from attnctl.words.prompts import prompts_of

from .affinity import carried, labelled, minmax, sharpened
from .reading import Reader
from .token_maps import TokenMaps, common

if TYPE_CHECKING:
    from attnctl.hosts.run import Run
    from attnctl.selectors import Selection

__all__ = ["Masks", "masks"]

BACKGROUND = "background"
SELF_SIDE, TEXT_SIDE = 32, 16
"""Self-attention and attention to text are taken from the finest grid whose sides do not exceed
these, as published for pictures of 512 pixels."""

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Masks(Mapping[str, Tensor]):
    """Masks of words, by word: bool [samples, height, width], for videos [samples, f, h, w].

    Args:
        soft: M [samples, words, ...], float32 from 0 to 1; the background last if there is one.
        labels: int64 [samples, ...], the index of the word, -1 where none is ahead.
        words: names, "background" last.
        images: what the pipeline returned.
        report: which sites and steps were watched; one step is read.
    """

    soft: Tensor
    labels: Tensor
    words: tuple[str, ...]
    images: Any = None
    report: Report = field(default_factory=lambda: Report(()))

    def __getitem__(self, word: str) -> Tensor:
        if word not in self.words:
            hint = nearest(word, self.words) or f" There are: {', '.join(self.words)}."
            raise OptionError(f"there is no mask of {word!r}.{hint}")
        return self.labels == self.words.index(word)

    def __iter__(self) -> Iterator[str]:
        return iter(self.words)

    def __len__(self) -> int:
        return len(self.words)

    @property
    def unassigned(self) -> Tensor:
        """Share of the picture that belongs to no word, [samples]."""
        return (self.labels < 0).float().flatten(1).mean(1)


@dataclass(eq=False)
class Read:
    """State of one run.

    Args:
        words: names of the words.
        reader: reads the tokens' maps.
        owners: by prompt, how many tokens each word has, in order.
        sites: (queries, keys, scale) of self-attention by grid.
    """

    words: tuple[str, ...]
    reader: Reader
    owners: list[list[int]]
    sites: dict[Grid, list[tuple[Tensor, Tensor, float | None]]] = field(default_factory=dict)


@dataclass(frozen=True)
class MaskReader(Control):
    """Reads token maps and self-attention's queries and keys at one step; changes nothing.

    Args:
        words: as in `attnctl.find_words`.
        background: positions of the background's tokens, "start" or None.
        sink: is called with the `Read` of the run.
        heads: selector.
        at: fraction of the run.
    """

    words: Any
    background: Any
    sink: Any
    heads: Any = "all"
    at: float = 0.7

    name: ClassVar[str] = "masks"
    kinds: ClassVar[tuple[str, ...]] = ("self", "cross", "joint")

    @property
    def selector(self) -> Any:
        """The heads."""
        return self.heads

    def begin(self, run: Run, selection: Selection) -> Read:
        """Find the words, each of their tokens by itself."""
        names, owners, positions = [], [], []
        for prompt in prompts_of(run):
            found = prompt.find(self.words)
            groups = [list(word.positions) for word in found]
            name = [word.text for word in found]
            if self.background is not None:
                start = self.background
                if start == "start":
                    start = [p for p in prompt.borders() if p == 0]
                    if not start:
                        raise HostError(
                            "this text has no token at its beginning to stand for the background: "
                            "give background=[...] (token positions), or None"
                        )
                groups.append(list(start))
                name.append(BACKGROUND)
            names.append(tuple(name))
            owners.append([len(group) for group in groups])
            positions.append(tuple((p,) for group in groups for p in group))
        if any(one != names[0] for one in names):
            raise HostError("the prompts of this batch have different words; run them one by one")
        most = max(map(len, positions))
        padded = tuple(one + ((),) * (most - len(one)) for one in positions)
        maps = TokenMaps(tuple(map(str, range(most))), padded)
        read = Read(names[0], Reader(maps, "cond", self.name), owners)
        self.sink(read)
        return read

    def attend(self, call: AttentionCall) -> Tensor:
        """Return the stock output, having read what is needed at the chosen step."""
        out, read = call.proceed(), call.state
        rows = call.slice("cond")
        if rows is None or call.step.index != int(self.at * call.step.count):
            return out
        with torch.no_grad():
            if call.site.kind != "self":
                read.reader.read(call)
            if call.site.kind != "cross":
                self._keep(call, rows, read)
        return out

    @staticmethod
    def _keep(call: AttentionCall, rows: slice, read: Read) -> None:
        image, grid = call.spans.queries("image"), call.spans.grid
        if image is None or grid is None or call.q.shape[0] == 1 < len(call.rows):
            raise HostError(
                f"{call.site}: where its image tokens lie is not known here, or it attends to one "
                "row at a time; select other sites"
            )
        part = call.take(rows, head_indices(call))
        q, k = part.q[:, :, image], part.repeat_kv(part.k)[:, :, image]
        read.sites.setdefault(grid, []).append((q.clone(), k.clone(), part.scale))


def masks(
    pipe: Any,
    prompt: str | list[str],
    words: Any = None,
    *,
    at: float = 0.7,
    background: Any = "start",
    margin: float = 0.1,
    power: int = 4,
    heads: Any = "all",
    **call: Any,
) -> Masks:
    """Run a pipeline and return which part of its pictures belongs to each word.

    The pictures are those of the same call without it, bit for bit.

    Args:
        pipe: a diffusers pipeline.
        prompt: the prompt, or a list of prompts that all have the words.
        words: as in `attnctl.find_words`; None for the concepts of the prompt.
        at: fraction of the run at which one step is read; the last third is best.
        background: "start" lets the token before the first word stand for the background;
            positions, or None for no background.
        margin: by how much a word's map must exceed every other's, in [0, 1].
        power: how often maps are carried along self-attention, at least 0.
        heads: selector; its cross-, self- and joint-attention sites.
        **call: arguments of the pipeline's call.

    Raises:
        OptionError: if a word is missing or ambiguous, or an option outside its range.
        HostError: if the model's tokens cannot be told apart, or nothing was read.
    """
    if not 0 <= at < 1 or not 0 <= margin <= 1 or power < 0:
        raise OptionError(
            f"masks: at={at:g}, margin={margin:g}, power={power}; expected at in [0, 1), margin "
            "in [0, 1] and power 0 or above"
        )
    found: list[Read] = []
    with patch(pipe, MaskReader(words, background, found.append, heads, at)) as handle:
        out = pipe(prompt=prompt, **call)[0]
        report = handle.report()
    read = next((one for one in found if one.sites and one.reader.maps.sums), None)
    if read is None:
        raise HostError(
            "masks need self-attention and attention to text, or joint attention, at the step "
            "that is read; the selected sites had only one of them or none"
        )
    soft = _soft(read, power)
    labels = labelled(soft, margin)
    if soft.shape[2] == 1:
        soft, labels = soft[:, :, 0], labels[:, 0]
    return Masks(soft, labels, read.words, out, report)


def _soft(read: Read, power: int) -> Tensor:
    """Return M [samples, words, frames, height, width]."""
    grid = _grid(list(read.sites), SELF_SIDE)
    summed = read.reader.maps
    text = _grid([key.grid for key in summed.sums], TEXT_SIDE)
    chosen = {key: value for key, value in summed.sums.items() if key.grid == text}
    tokens = common([replace(summed, sums=chosen)])  # [samples, tokens, f, h, w]
    samples = len(tokens)
    each = []
    for sample in range(samples):
        counts = read.owners[sample * len(read.owners) // samples]
        parts = tokens[sample, : sum(counts)].split(counts)
        each.append(torch.stack([part.amax(0) for part in parts]))
    maps = sharpened(torch.stack(each), grid[1:])
    sites = read.sites[grid]
    soft = minmax(carried(maps.to(sites[0][0].device), sites, power))
    return soft.cpu().unflatten(-1, grid)


def _grid(grids: list[Grid], side: int) -> Grid:
    """Return the finest grid with sides up to a bound, else the coarsest."""
    small = [grid for grid in grids if max(grid[1:]) <= side]
    return max(small) if small else min(grids)
