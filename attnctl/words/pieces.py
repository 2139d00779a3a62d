"""The pieces that a tokenizer makes of a text: which letters each one stands for."""

from __future__ import annotations

import itertools
from typing import Any

from ..errors import HostError

__all__ = ["piece_spans", "pieces_of"]

Span = tuple[int, int] | None


def pieces_of(spans: list[Span], start: int, stop: int, text: str) -> tuple[int, ...]:
    """Return the indices of the pieces that hold letters of text[start:stop].

    Args:
        spans: what `piece_spans` returned.
        start: first letter.
        stop: after the last one.
        text: the text; a blank that a piece begins with is no letter of the word before.
    """
    found = []
    for index, span in enumerate(spans):
        if span is None:
            continue
        first, last = max(span[0], start), min(span[1], stop)
        if first < last and text[first:last].strip():
            found.append(index)
    return tuple(found)


def piece_spans(tokenizer: Any, text: str, length: int | None = None) -> list[Span]:
    """Return the (start, stop) letters of every token of a text, None for special tokens.

    Args:
        tokenizer: any tokenizer of transformers, fast or slow.
        text: the text.
        length: tokens after which the pipeline cuts it off, specials included.

    Raises:
        HostError: if it tells no offsets and its pieces do not spell the text either.
    """
    cut: dict[str, Any] = {} if length is None else {"truncation": True, "max_length": length}
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(
            text, return_offsets_mapping=True, return_special_tokens_mask=True, **cut
        )
        pairs = zip(encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True)
        return [None if special else (a, b) for (a, b), special in pairs]
    return _spelled(tokenizer, text, tokenizer(text, **cut)["input_ids"])


def _spelled(tokenizer: Any, text: str, ids: list[int]) -> list[Span]:
    """Align by spelling: how many letters the first i pieces decode to, blanks left out."""
    whole = tokenizer.tokenize(text)
    at = _first(ids, tokenizer.convert_tokens_to_ids(whole))
    letters = [i for i, letter in enumerate(text) if not letter.isspace()]
    counts = [_count(tokenizer, whole[:i]) for i in range(len(whole) + 1)]
    if counts[-1] != len(letters):
        raise HostError(
            f"{type(tokenizer).__name__} tells no offsets, and its pieces {whole} do not spell "
            f"{text!r}, so words cannot be found: give the token positions themselves"
        )
    spans: list[Span] = [None] * len(ids)
    for i, (a, b) in enumerate(itertools.pairwise(counts)):
        if a == b and not _count(tokenizer, whole[i : i + 1]):
            continue  # a lone blank
        # the pieces of one letter of several bytes all hold that letter
        a = min(a, b - 1)
        if a >= 0 and at + i < len(ids) and ids[at + i] not in tokenizer.all_special_ids:
            spans[at + i] = (letters[a], letters[b - 1] + 1)
    return spans


def _count(tokenizer: Any, tokens: list[str]) -> int:
    return sum(not c.isspace() for c in tokenizer.convert_tokens_to_string(tokens))


def _first(ids: list[int], inner: list[int]) -> int:
    """Return how many special tokens stand before the text's own."""
    return next((i for i in range(len(ids)) if ids[i : i + 1] == inner[:1]), 0)
