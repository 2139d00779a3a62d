"""The command `attnctl heatmap --image`: ask, and show where each word of the answer looked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image

import attnctl
from attnctl.errors import OptionError

from .chosen import choose
from .control_syntax import parse_control
from .eval.answering import Answerer, folder
from .pictures import check_output, free_name, read_picture, side_by_side, write_png
from .quiet import hush
from .record import control_data, line_data, versions
from .tables import paragraph, terminal_width

__all__ = ["Asked", "answer_heatmap", "answer_sheet", "captions", "words_shown"]

Say = Callable[[str], None]
_COLUMNS = 6
PLAIN = frozenset(("a", "an", "and", "are", "at", "in", "is", "of", "on", "or", "the", "there"))
"""Words that are left out of a picture unless they are asked for."""


@dataclass(frozen=True)
class Asked:
    """What the command line asks for.

    Args:
        model: name, folder or hub id of a vision-language model.
        image: the picture's file.
        question: what is asked about it.
        words: words of the answer to show; none for all but the plainest.
        heads: selector of the heads that are read.
        controls: controls in their text form, at work while the answer is written.
        tokens: of the answer, at most.
        device: where.
        dtype: number type.
        out: where the picture goes; None for the next free name.
    """

    model: str
    image: Path
    question: str
    words: tuple[str, ...] = ()
    heads: str = "all"
    controls: tuple[str, ...] = ()
    tokens: int = 32
    device: str = "auto"
    dtype: str = "auto"
    out: Path | None = None


def answer_heatmap(wanted: Asked, say: Say) -> None:
    """Ask, map, save and report.

    Args:
        wanted: what to ask and to map.
        say: is given notes for the user.

    Raises:
        AttnctlError: if something of it cannot be done.
    """
    out = check_output(wanted.out or free_name(stem="heatmap"))
    picture = read_picture(wanted.image)
    for text in wanted.controls:
        parse_control(text)
    folder(wanted.model)
    hush(say)
    answerer = Answerer.load(wanted.model, wanted.device, wanted.dtype)
    chosen = tuple(choose(answerer.model, text) for text in wanted.controls)
    found = attnctl.answer_maps(
        answerer.model, answerer.processor, picture, wanted.question,
        *(one.control for one in chosen), heads=wanted.heads, max_new_tokens=wanted.tokens,
        pad_token_id=answerer.pad,
    )  # fmt: skip
    shown = words_shown(found, wanted.words)
    words = [bare(found.words[i]) for i in shown]
    facts = {
        "model": wanted.model,
        "question": wanted.question,
        "answer": found.answer,
        "controls": [control_data(one) for one in chosen],
        "heads": wanted.heads,
        "words": words,
        "report": [line_data(line) for line in found.report.lines],
        "versions": versions(),
    }
    print(f"{wanted.question} {found.answer}")
    print(paragraph(str(found.report), terminal_width(), "", "  "))
    write_png(answer_sheet(found, shown, wanted.question, wanted.model), out, facts)
    print(f"wrote {out} ({', '.join(words)})")


def words_shown(found: attnctl.AnswerMaps, wanted: Sequence[str] = ()) -> list[int]:
    """Return the numbers of the words to show.

    Args:
        found: maps of an answer.
        wanted: words, whatever their case and the punctuation after them; none for all but the
            plainest.

    Raises:
        OptionError: if a word is not in the answer.
    """
    plain = [bare(word).lower() for word in found.words]
    missing = [word for word in wanted if word.lower() not in plain]
    if missing:
        raise OptionError(f"the answer has no word {missing[0]!r}: {found.answer}")
    if wanted:
        return [i for i, word in enumerate(plain) if word in {w.lower() for w in wanted}]
    return [i for i, word in enumerate(plain) if word not in PLAIN] or [*range(len(plain))]


def bare(word: str) -> str:
    """Return a word without the punctuation around it."""
    return word.strip(".,;:!?\"'()")


def captions(found: attnctl.AnswerMaps, shown: Sequence[int]) -> list[str]:
    """Return a caption for each word: what share of its attention the image gets, and sinks."""
    shares, sinks = found.shares(), found.maps[:, found.sinks].sum(1)
    some = bool(found.sinks.any())
    return [
        f"{bare(found.words[i])}: {float(shares[i]):.0%}"
        + (f", sinks {float(sinks[i]):.0%}" if some else "")
        for i in shown
    ]


def answer_sheet(
    found: attnctl.AnswerMaps, shown: Sequence[int], title: str, subtitle: str = ""
) -> Image:
    """Return the picture and the words' maps over it, six in a row."""
    subtitle = f"{subtitle}: share of each word's attention on the image".removeprefix(": ")
    pictures: list[Any] = [found.plain(), *(found.overlay(i) for i in shown)]
    under = [found.answer, *captions(found, shown)]
    return side_by_side(pictures, under, title, subtitle, _COLUMNS, smallest=216)
