"""`attnctl.answer_maps`: ask about a picture, and return where each word of the answer looked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnctl.control import Control
from attnctl.errors import HostError, OptionError
from attnctl.hosts.vlm import SLOT
from attnctl.hosts.vlm_discover import decoder_of
from attnctl.patch import Report, patch
from attnctl.processors.vlm.sink_map import SinkMap, sink_map

from .answer_map import AnswerMap, AnswerSums
from .asking import asked, image_grid, picture_seen, usual_tau, words_of
from .overlay import overlay

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["AnswerMaps", "answer_maps"]


@dataclass(frozen=True)
class AnswerMaps:
    """Where the words of an answer looked.

    Args:
        answer: what the model said.
        words: its words, in order.
        maps: [words, n], the share of its attention that the row which predicts the word gives
            to each of the n image tokens, from 0 to 1: the mean over the heads and layers that
            were read, and over the word's tokens.
        heads: [n] by (layer, head): the mean over all tokens of the answer.
        sinks: bool [n], image tokens that are sinks (`attnctl.sink_map`) in some layer.
        grid: rows and columns of the image tokens, None if they lie in no one grid.
        image: the picture as the model was given it, cut and resized.
        report: what was read.
    """

    answer: str
    words: tuple[str, ...]
    maps: Tensor
    heads: dict[tuple[int, int], Tensor]
    sinks: Tensor
    grid: tuple[int, int] | None
    image: Image
    report: Report = field(default_factory=lambda: Report(()))

    def shares(self) -> Tensor:
        """Return the attention to the whole image by word, [words]."""
        return self.maps.sum(1)

    def overlay(self, word: int) -> Image:
        """Return the map of a word, by its number in the answer, over the picture.

        Raises:
            OptionError: if there is no such word.
            HostError: if the image tokens lie in no one grid.
        """
        if not 0 <= word < len(self.words):
            raise OptionError(f"there is no word {word}: the answer has {len(self.words)}")
        return self.over(self.maps[word])

    def over(self, heat: Tensor, framed: bool = True) -> Image:
        """Return any map [n] of the image tokens over the picture.

        It is stretched from its least to its greatest value among those that are no sinks.

        Args:
            heat: the map.
            framed: whether sinks are framed in white.

        Raises:
            HostError: if the image tokens lie in no one grid.
        """
        if self.grid is None:
            raise HostError(
                f"the {heat.numel()} image tokens of this model lie in no one grid, so that they "
                "cannot be laid over the picture; take `maps`"
            )
        rest = heat[~self.sinks] if bool((~self.sinks).any()) else heat
        heat = heat.clamp(rest.min(), rest.max()).reshape(self.grid)
        times = max(1, -(-max(self.image.size) // min(self.grid)))  # cells with sharp edges
        fine = heat.repeat_interleave(times, 0).repeat_interleave(times, 1)
        drawn = overlay(self.image, fine)
        return _framed(drawn, self.sinks.reshape(self.grid)) if framed else drawn

    def plain(self) -> Image:
        """Return the picture at the size of the overlays."""
        return _roomy(self.image) if bool(self.sinks.any()) else self.image


def answer_maps(
    model: Any,
    processor: Any,
    image: Image,
    question: str,
    *controls: Control,
    heads: Any = "all",
    max_new_tokens: int = 32,
    sink_dims: Sequence[int] | None = None,
    tau: float | None = None,
    **options: Any,
) -> AnswerMaps:
    """Ask about a picture and return where in it each word of the answer looked.

    The answer is that of the same call without it, token by token.

    Args:
        model: a vision-language model of transformers. Controls that are patched already take
            part; those that replace the softmax have to be given here instead.
        processor: its processor, with a chat template.
        image: the picture.
        question: what is asked about it.
        *controls: at work while the answer is written and read, outermost first; the maps show
            the attention as they leave it.
        heads: selector of the heads that are read.
        max_new_tokens: most tokens of the answer.
        sink_dims: dimensions that tell sinks; None to look for them on this prompt.
        tau: least phi of a sink; None for 20, scaled to the model's width where it is small.
        **options: of `generate`; one greedy answer unless they say otherwise.

    Raises:
        HostError: if the model is patched with what cannot be read from further in, or its
            prompt holds no image.
        SelectorError: if the selector matches nothing.
    """
    _check_patched(model)
    inputs = asked(model, processor, image, question)
    sinks = sink_map(model, inputs, sink_dims)
    if not bool(sinks.image.any()):
        raise HostError("the prompt holds no image tokens")
    runs: list[AnswerSums] = []
    settings = {"do_sample": False, "num_beams": 1, **options}
    with torch.no_grad(), patch(model, AnswerMap(runs.append, heads), *controls) as handle:
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, **settings)
        report = Report(handle.report().lines[:1])
    new = ids[0, inputs["input_ids"].shape[1] :].tolist()
    tokenizer = getattr(processor, "tokenizer", processor)
    groups = words_of(tokenizer, new)
    sums = runs[0].done()
    maps = sums.tokens()[:, 0]
    return AnswerMaps(
        tokenizer.decode(new, skip_special_tokens=True).strip(),
        tuple(word for word, _ in groups),
        torch.stack([maps[list(at)].mean(0) for _, at in groups]) if groups else maps[:0],
        {head: heat[0] for head, heat in sums.by_head().items()},
        _marked(sinks, usual_tau(model) if tau is None else tau),
        image_grid(model, inputs, maps.shape[1]),
        picture_seen(processor, inputs, image),
        report,
    )


def _check_patched(model: Any) -> None:
    """Refuse what `AnswerMap` cannot read when it is listed after it."""
    binding = decoder_of(model).__dict__.get(SLOT)
    for entry in binding.entries if binding else ():
        if entry.control.replaces_softmax and not entry.control.neutral:
            raise HostError(
                f"this model is patched with {entry.control}, whose weights cannot be read from "
                "outside of it: undo that patch, and give the control to answer_maps itself"
            )


def _marked(found: SinkMap, tau: float) -> Tensor:
    """Return which image tokens are sinks in some layer, bool [n]."""
    return found.sinks(tau)[:, 0, found.image[0]].any(0)


def _framed(picture: Image, cells: Tensor) -> Image:
    """Return a picture with some cells of its grid framed in white."""
    from PIL import ImageDraw

    if not bool(cells.any()):
        return picture
    big = _roomy(picture)
    pen = ImageDraw.Draw(big)
    high, wide = big.height / cells.shape[0], big.width / cells.shape[1]
    for row, column in cells.nonzero().tolist():
        corner = column * wide, row * high, (column + 1) * wide - 1, (row + 1) * high - 1
        pen.rectangle(corner, outline=(255, 255, 255), width=max(2, round(wide / 8)))
    return big


def _roomy(picture: Image) -> Image:
    """Return a picture so large that frames around cells do not hide them."""
    factor = max(1, -(-320 // min(picture.size)))
    return picture.resize((picture.width * factor, picture.height * factor))
