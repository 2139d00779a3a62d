"""Token tables of all questions with their answers, so that turns are picked on the device.

A turn is what follows the picture in a prompt: question, "ASSISTANT:", answer, end token. It is
padded to a slot of fixed length. Only the answer and the end token are taught.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from attnctl.assets.train.llama_tokenizer import END, IMAGE
from attnctl.assets.world.palette import COLOUR_NAMES, PAIRS, SHAPES
from attnctl.assets.world.questions import (
    CELLS,
    COLOUR,
    COUNT,
    NO,
    NUMBERS,
    POSITION,
    PRESENCE,
    YES,
    presence,
)

SLOT = 25
IGNORED = -100
HEADER = f"USER: {IMAGE}\n"


class Turns(NamedTuple):
    """Token ids and targets, each ``[..., length]``; targets are `IGNORED` outside answers."""

    ids: Tensor
    targets: Tensor

    def take(self, rows: Tensor) -> Turns:
        """The turns of some rows."""
        return Turns(self.ids[rows], self.targets[rows])

    def to(self, device: torch.device) -> Turns:
        """The same on another device."""
        return Turns(self.ids.to(device), self.targets.to(device))


def header(words: PreTrainedTokenizerBase, images: int = 1, tokens: int = 1) -> list[int]:
    """Token ids of what stands before a turn.

    Args:
        words: the tokenizer.
        images: number of pictures.
        tokens: tokens per picture.
    """
    ids: list[int] = words("USER: " + (IMAGE * tokens + "\n") * images)["input_ids"]
    return ids


def turns(
    words: PreTrainedTokenizerBase, said: Iterable[tuple[str, str]], length: int = SLOT
) -> Turns:
    """Turns of questions and answers.

    Args:
        words: the tokenizer.
        said: N questions with answers.
        length: tokens per turn.

    Returns:
        ids and targets, ``[N, length]`` int16.

    Raises:
        ValueError: a turn is longer than ``length``.
    """
    said = list(said)
    start = len(header(words))
    asked = [f"{HEADER}{question} ASSISTANT:" for question, _ in said]
    whole = [f"{one} {answer}{END}" for one, (_, answer) in zip(asked, said, strict=True)]
    before = [len(ids) - start for ids in words(asked)["input_ids"]]
    after = [ids[start:] for ids in words(whole)["input_ids"]]
    longest = max(map(len, after))
    if longest > length:
        raise ValueError(f"a turn takes {longest} tokens, but the slot has {length}")
    pad = words.pad_token_id
    ids = torch.tensor([row + [pad] * (length - len(row)) for row in after], dtype=torch.int16)
    place = torch.arange(length)
    taught = place >= torch.tensor(before)[:, None]
    taught &= place < torch.tensor([len(row) for row in after])[:, None]
    return Turns(ids, ids.masked_fill(~taught, IGNORED))


class Table:
    """All turns of one kind, looked up by what they are about."""

    def __init__(
        self,
        words: PreTrainedTokenizerBase,
        said: Sequence[tuple[str, str]],
        shape: tuple[int, ...],
        device: torch.device,
    ) -> None:
        self.turns, self.shape = turns(words, said).to(device), shape

    def __call__(self, *index: Tensor) -> Turns:
        """Turns by wording and by what else the table runs over; indices broadcast."""
        row = torch.zeros_like(index[0])
        for size, one in zip(self.shape, index, strict=True):
            row = row * size + one
        return self.turns.take(row)


@dataclass(frozen=True)
class Tables:
    """The tables of the four kinds of short questions, each with the wording first."""

    presence: Table
    colour: Table
    count: Table
    position: Table


def tables(words: PreTrainedTokenizerBase, device: torch.device) -> Tables:
    """Presence by pair and answer, colour by shape, count, and position by pair and cell."""
    there = [
        (presence(*pair, wording), answer)
        for wording in PRESENCE
        for pair in PAIRS
        for answer in (NO, YES)
    ]
    colour = [
        (one.format(shape), name) for one in COLOUR for shape in SHAPES for name in COLOUR_NAMES
    ]
    count = [(one, number) for one in COUNT for number in NUMBERS]
    position = [
        (one.format(" ".join(pair)), place)
        for one in POSITION
        for pair in PAIRS
        for place in CELLS
    ]
    return Tables(
        Table(words, there, (len(PRESENCE), len(PAIRS), 2), device),
        Table(words, colour, (len(COLOUR), len(SHAPES), len(COLOUR_NAMES)), device),
        Table(words, count, (len(COUNT), len(NUMBERS)), device),
        Table(words, position, (len(POSITION), len(PAIRS), len(CELLS)), device),
    )
