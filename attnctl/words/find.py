"""From words of a prompt to tokens of every text encoder, and to the denoiser's text sequence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import HostError, OptionError
from .concepts import Concept, concepts
from .layout import Placed, placed_tokenizers
from .phrases import Phrase, chosen, mentions, same_place
from .pieces import piece_spans, pieces_of

__all__ = ["Found", "Words", "find_words", "named"]

Words = Mapping[str, Any] | Iterable[Any]
"""Words to look for: see `find_words`."""


@dataclass(frozen=True)
class Found:
    """Where some words of a prompt are.

    Args:
        text: the words.
        positions: their tokens in the denoiser's text sequence, sorted, over all encoders.
        tokens: their tokens by tokenizer attribute, counted from 0 with its special tokens.
    """

    text: str
    positions: tuple[int, ...]
    tokens: Mapping[str, tuple[int, ...]]


def find_words(
    pipe: Any, prompt: str | None, words: Words | None = None, **call: Any
) -> list[Found]:
    """Find words of a prompt among the tokens of a pipeline.

    Args:
        pipe: a diffusers pipeline with its tokenizers.
        prompt: the prompt; None if all words are positions.
        words: what to find; None for the concepts of the prompt (`attnctl.concepts`). Each is
            a word or phrase that stands in the prompt once; "cat#2" for its second occurrence
            or "cat#all"; a `Phrase` or `Concept`; or a list of positions in the denoiser's
            text sequence. A mapping gives them names.
        **call: further arguments of the pipeline's call that bear on the text:
            `max_sequence_length`, `prompt_2`, `prompt_3`.

    Returns:
        One `Found` per word, in order. All pieces of a word belong to it, in every encoder.

    Raises:
        OptionError: if a word is missing, ambiguous or cut off, or none is given.
        HostError: if the pipeline has no tokenizer, or lays out its text in an unknown way.
    """
    if prompt is None and words is None:
        words = []
    entries = named(prompt, words)
    if all(_is_positions(entry) for entry in entries.values()):
        return [_given(name, entry) for name, entry in entries.items()]
    if prompt is None:
        raise HostError(
            "words are found in a prompt: call the pipeline with prompt=..., not with embeddings, "
            "or give the token positions, such as words={'circle': [5, 6]}"
        )
    places = placed_tokenizers(pipe, prompt, call)
    spans = [piece_spans(p.tokenizer, p.text, p.length) for p in places]
    return [
        _given(name, entry) if _is_positions(entry) else _find(name, entry, prompt, places, spans)
        for name, entry in entries.items()
    ]


def named(prompt: str | None, words: Words | None) -> dict[str, Any]:
    """Return the words with a name each.

    Raises:
        OptionError: if there are none, or two have the same name.
    """
    if words is None:
        words = concepts(prompt or "")
        if not words:
            raise OptionError(f"no concept was found in the prompt {prompt!r}; name some words")
    if isinstance(words, str):
        words = [words]
    if not isinstance(words, Iterable):
        raise OptionError(f"words={words!r} is no list of words, such as words=['circle']")
    pairs = list(words.items()) if isinstance(words, Mapping) else _with_names(list(words))
    if not pairs:
        raise OptionError("no words are given: name at least one, such as words=['circle']")
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise OptionError(f"the word {name!r} is given twice; names must differ")
    return dict(pairs)


def _with_names(words: Sequence[Any]) -> list[tuple[str, Any]]:
    names = [" ".join(map(str, w)) if _is_positions(w) else str(w) for w in words]
    numbered = [
        f"{name}#{_phrase(word).number}" if names.count(name) > 1 and _phrase(word) else name
        for name, word in zip(names, words, strict=True)
    ]
    return list(zip(numbered, words, strict=True))


def _phrase(word: Any) -> Any:
    if isinstance(word, Concept):
        return word.phrase
    return word if isinstance(word, Phrase) else None


def _is_positions(word: Any) -> bool:
    return not isinstance(word, (str, Phrase, Concept))


def _given(name: str, entry: Any) -> Found:
    try:
        positions = [entry] if isinstance(entry, int) else list(entry)
    except TypeError:
        positions = [None]
    if not positions or not all(isinstance(p, int) and p >= 0 for p in positions):
        raise OptionError(
            f"the word {name!r} is {entry!r}; expected a phrase, or a list of token positions, "
            "each 0 or more"
        )
    return Found(name, tuple(sorted(set(positions))), {})


def _find(
    name: str, entry: Any, prompt: str, places: list[Placed], spans: list[list[Any]]
) -> Found:
    wanted = _wanted(entry, prompt, places)
    tokens, positions = {}, set()
    for place, pieces in zip(places, spans, strict=True):
        here = [p for phrase in wanted for p in same_place(place.text, phrase)]
        each = (pieces_of(pieces, p.start, p.stop, place.text) for p in here)
        tokens[place.name] = tuple(sorted({i for found in each for i in found}))
        if place.offset is not None:
            positions |= {place.offset + i for i in tokens[place.name]}
    if not positions:
        limits = ", ".join(f"{p.name}: {p.length} tokens" for p in places if p.length)
        raise OptionError(
            f"{name!r} is cut off by the pipeline, or stands in a prompt that the denoiser does "
            f"not see token by token ({limits}): shorten the prompt or raise max_sequence_length"
        )
    return Found(name, tuple(sorted(positions)), tokens)


def _wanted(entry: Any, prompt: str, places: list[Placed]) -> list[Phrase]:
    """Return the phrases that an entry means, by the first text that mentions it."""
    if not isinstance(entry, str):
        return [_phrase(entry)]
    texts = [prompt, *(place.text for place in places)]
    return chosen(next((text for text in texts if mentions(text, entry)), prompt), entry)
