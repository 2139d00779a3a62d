"""The words of tiny-llava: collected from every question, answer and caption it is taught."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from attnctl.assets.train.llama_tokenizer import save_tokenizer
from attnctl.assets.world.palette import COLOUR_NAMES, PAIRS, SHAPES
from attnctl.assets.world.questions import (
    CELLS,
    COLOUR,
    COUNT,
    DESCRIBE,
    GREYS,
    NO,
    NUMBERS,
    POSITION,
    PRESENCE,
    YES,
    references,
)

ROLES = ("USER", "ASSISTANT")
ALSO = ("5", "6", "7", "8", "9", "0", "yes", "no", "and", "an", "not", "are", "objects", "of")


def texts() -> Iterator[str]:
    """Every kind of text there is, without the objects' names."""
    yield from (*PRESENCE, *COLOUR, *COUNT, *POSITION, *DESCRIBE, *NUMBERS, *CELLS, *GREYS)
    yield from references(PAIRS[:2], CELLS[:2], 0.5)
    yield from (*ROLES, YES, NO, *ALSO, *COLOUR_NAMES, *SHAPES)


def words() -> list[str]:
    """All words, in the order of their first appearance."""
    found = re.findall(r"[A-Za-z]+|\d", " ".join(texts()))
    return list(dict.fromkeys(found))


def starts() -> list[str]:
    """Words that can follow a line break or stand first after an answer."""
    lines = [line for text in texts() for line in text.split("\n")]
    found = (re.match(r"[A-Z][a-z]+", line) for line in lines)
    return list(dict.fromkeys([*(one.group() for one in found if one), ROLES[0]]))


def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """tiny-llava's tokenizer, written to ``folder``."""
    return save_tokenizer(folder, words(), starts())
