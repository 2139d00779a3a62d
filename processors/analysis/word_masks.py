"""`attnctl.masks`: which part of the picture belongs to which word, from its own attention.

References:
    Shentu et al., "AttenCraft: Attention-guided Disentanglement of Multiple Concepts for
    Text-to-Image Customization", 2024 (arXiv 2405.17965): its mask extraction.

Deviations: maps come from one step of a normal run, not from a noised photograph; any number of
concepts; a phrase is the greatest of its tokens' maps, as there for descriptive words; the heads
of attention to text and of self-attention can be chosen; joint attention works too, its
image-to-image part renormalised. That P is stretched to 0..1 there changes nothing, see
`affinity`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from attnctl.errors import HostError, OptionError, nearest
from attnctl.patch import Report, patch
from attnctl.presets import find

from .affinity import carried, labelled, minmax, sharpened
from .mask_reading import Carriers, Grid, SelfReader, TextReader, WordsRead
from .token_maps import common

__all__ = ["Masks", "extracted", "masks"]

SELF_SIDE, TEXT_SIDE = 32, 16
"""Self-attention and attention to text are taken from the finest grid whose sides do not exceed
these, as published for pictures of 512 pixels."""

_LOG = logging.getLogger("attnctl")


@dataclass(frozen=True)
class Masks(Mapping[str, Tensor]):
    """Masks of words, by word: bool [samples, height, width], for videos [samples, f, h, w].

    Args:
        soft: M [samples, words, ...], float32 from 0 to 1; the background last if there is one.
        labels: int64 [samples, ...], the index of the word, -1 where none is ahead.
        words: names, "background" last.
        images: what the pipeline returned.
        report: which sites and steps were watched; one step is read.
        options: heads, along, at, power and margin that were used.
    """

    soft: Tensor
    labels: Tensor
    words: tuple[str, ...]
    images: Any = None
    report: Report = field(default_factory=lambda: Report(()))
    options: Mapping[str, Any] = field(default_factory=dict)

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

    @property
    def missing(self) -> tuple[tuple[str, ...], ...]:
        """By sample, the words that no place belongs to."""
        return tuple(
            tuple(word for i, word in enumerate(self.words) if not (labels == i).any())
            for labels in self.labels
        )

    def resized(self, height: int, width: int) -> Masks:
        """Return the masks at another size, such as the picture's.

        The maps are resized (bilinearly) and compared again, so that borders run between the
        places of the grid instead of along its squares.

        Args:
            height: rows of the result.
            width: columns of the result.

        Raises:
            OptionError: if a size is below 1.
        """
        if min(height, width) < 1:
            raise OptionError(f"masks of {height} x {width} pixels: expected sizes of at least 1")
        flat = self.soft.flatten(0, -3)[:, None]
        resized = interpolate(flat, (height, width), mode="bilinear")[:, 0]
        soft = resized.unflatten(0, self.soft.shape[:-2])
        return replace(self, soft=soft, labels=labelled(soft, self.options["margin"]))


def masks(
    pipe: Any,
    prompt: str | list[str],
    words: Any = None,
    *,
    background: Any = "start",
    preset: str | None = None,
    heads: Any = None,
    along: Any = None,
    at: float | None = None,
    power: int | None = None,
    margin: float | None = None,
    **call: Any,
) -> Masks:
    """Run a pipeline and return which part of its pictures belongs to each word.

    The pictures are those of the same call without it, bit for bit. What is not given comes from
    the preset "masks" that fits the model (`attnctl.presets.find`); `Masks.options` says what was
    used.

    Args:
        pipe: a diffusers pipeline.
        prompt: the prompt, or a list of prompts that all have the words.
        words: as in `attnctl.find_words`; None for the concepts of the prompt.
        background: "start" lets the token before the first word stand for the background;
            positions, or None for no background.
        preset: name of a preset; None for the first that fits.
        heads: selector of attention to text; cross- and joint-attention sites.
        along: selector of the attention that maps are carried along; self- and joint-attention
            sites.
        at: fraction of the run at which one step is read.
        power: how often maps are carried along self-attention, at least 0.
        margin: by how much a word's map must exceed every other's, in [0, 1].
        **call: arguments of the pipeline's call.

    Raises:
        OptionError: if a word is missing or ambiguous, or an option outside its range.
        SelectorError: if a selector matches nothing.
        HostError: if the model's tokens cannot be told apart, or nothing was read.
    """
    given = {"heads": heads, "along": along, "at": at, "power": power, "margin": margin}
    options = _options(pipe, preset, given)
    texts: list[WordsRead] = []
    images: list[Carriers] = []
    readers = (
        TextReader(texts.append, options["heads"], options["at"], words, background),
        SelfReader(images.append, options["along"], options["at"]),
    )
    with patch(pipe, *readers) as handle:
        out = pipe(prompt=prompt, **call)[0]
        report = handle.report()
    # of two denoisers, the one that ran at the step
    both = zip(texts, images, strict=True)
    read = next((one for one in both if one[0].reader.maps.sums and one[1]), None)
    if read is None:
        raise HostError("no attention was seen at the step that masks are read from")
    soft = extracted(*read, options["power"])
    labels = labelled(soft, options["margin"])
    if soft.shape[2] == 1:
        soft, labels = soft[:, :, 0], labels[:, 0]
    return Masks(soft, labels, read[0].words, out, report, options)


def _options(pipe: Any, preset: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the preset's options with those that were given."""
    found = find("masks", pipe, preset)
    _LOG.info("masks: preset %s (%s, %s) %s", found.name, found.origin, found.source, found.note)
    chosen = {key: value for key, value in given.items() if value is not None}
    options = {**found.options, **chosen}
    at, margin, power = (options[key] for key in ("at", "margin", "power"))
    if not 0 <= at < 1 or not 0 <= margin <= 1 or power < 0:
        raise OptionError(
            f"masks: at={at:g}, margin={margin:g}, power={power}; expected at in [0, 1), margin "
            "in [0, 1] and power 0 or above"
        )
    return options


def extracted(text: WordsRead, images: Carriers, power: int) -> Tensor:
    """Return M of what was read at a step.

    Args:
        text: maps of the words' tokens.
        images: queries and keys of self-attention, of one grid or several.
        power: how often maps are carried, at least 0.

    Returns:
        [samples, words, frames, height, width], float32 on the CPU.
    """
    grid = _grid(list(images), SELF_SIDE)
    summed = text.reader.maps
    finest = _grid([key.grid for key in summed.sums], TEXT_SIDE)
    chosen = {key: value for key, value in summed.sums.items() if key.grid == finest}
    tokens = common([replace(summed, sums=chosen)])  # [samples, tokens, f, h, w]
    samples = len(tokens)
    each = []
    for sample in range(samples):
        counts = text.owners[sample * len(text.owners) // samples]
        parts = tokens[sample, : sum(counts)].split(counts)
        each.append(torch.stack([part.amax(0) for part in parts]))
    maps = sharpened(torch.stack(each), grid[1:])
    sites = images[grid]
    soft = minmax(carried(maps.to(sites[0][0].device), sites, power))
    return soft.cpu().unflatten(-1, grid)


def _grid(grids: list[Grid], side: int) -> Grid:
    """Return the finest grid with sides up to a bound, else the coarsest."""
    small = [grid for grid in grids if max(grid[1:]) <= side]
    return max(small) if small else min(grids)
