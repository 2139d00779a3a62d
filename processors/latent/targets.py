"""What a latent control steers: the objects of a prompt, each a noun with its attributes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from attnctl.errors import HostError, OptionError
from attnctl.words import Concept, Phrase, concepts, phrases
from attnctl.words.layout import placed_tokenizers
from attnctl.words.phrases import chosen
from attnctl.words.pieces import piece_spans
from attnctl.words.prompts import Prompt

__all__ = ["Target", "content_of", "targets_of"]

Positions = tuple[int, ...]


@dataclass(frozen=True)
class Target:
    """One object of a prompt, as positions in the denoiser's text sequence.

    Args:
        noun: tokens of the noun, all pieces and encoders.
        attributes: tokens of each attribute.
    """

    noun: Positions
    attributes: tuple[Positions, ...] = ()

    @property
    def words(self) -> tuple[Positions, ...]:
        """The attributes, then the noun."""
        return (*self.attributes, self.noun)

    @property
    def tokens(self) -> Positions:
        """All positions."""
        return tuple(sorted({p for word in self.words for p in word}))


def targets_of(prompt: Prompt, words: Any) -> tuple[Target, ...]:
    """Return the objects that words name.

    Args:
        prompt: the prompt of the run.
        words: None for the concepts of the prompt; else one entry an object, in a list or, as
            text, with commas between: a noun with its attributes before it ("red circle"), a
            `Phrase` or `Concept`; or positions, [3] for a noun, [[2], [3]] for attributes and
            noun.

    Raises:
        OptionError: if a word is missing, ambiguous or cut off, two objects have one noun, or
            there is none.
        HostError: if the pipeline's tokens are not known.
    """
    if words is None:
        entries: Sequence[Any] = concepts(prompt.text or "")
        if prompt.text is None:
            prompt.find(["a"])  # raises what to do with embeddings
    elif isinstance(words, str):
        entries = [part.strip() for part in words.split(",") if part.strip()]
    else:
        entries = _listed(words, "words")
    if not entries:
        raise OptionError(f"no object was found in the prompt {prompt.text!r}; name words=[...]")
    found = tuple(_target(prompt, entry) for entry in entries)
    nouns = [one.noun for one in found]
    for i, entry in enumerate(entries):
        if nouns[i] in nouns[:i]:
            raise OptionError(
                f"the noun of {str(entry)!r} is another object's too; name each once"
            )
    return found


def content_of(prompt: Prompt) -> Positions:
    """Return the tokens of all words of a prompt, () where they are not known."""
    if prompt.text is None:
        return ()
    try:
        places = placed_tokenizers(prompt.pipe, prompt.text, prompt.call)
    except HostError:
        return ()
    found: set[int] = set()
    for place in places:
        if place.offset is not None:
            spans = piece_spans(place.tokenizer, place.text, place.length)
            found |= {place.offset + i for i, span in enumerate(spans) if span is not None}
    return tuple(sorted(found))


def _target(prompt: Prompt, entry: Any) -> Target:
    if isinstance(entry, str):
        if prompt.text is None:
            prompt.find([entry])  # raises what to do with embeddings
        entry = _one(entry, chosen(prompt.text or "", entry))
    *attributes, noun = _words(prompt.text or "", entry)
    found = prompt.find({f"{i}": word for i, word in enumerate([*attributes, noun])})
    *first, last = (one.positions for one in found)
    return Target(last, tuple(first))


def _words(text: str, entry: Any) -> list[Any]:
    """Return the attributes and the noun, as phrases or as lists of positions."""
    if isinstance(entry, Phrase):
        return list(_parts(text, entry))
    if isinstance(entry, Concept):
        return [*entry.attributes, entry.noun]
    listed = _listed(entry)
    if not listed:
        raise OptionError("an object without tokens; expected a noun or a list of positions")
    if all(isinstance(one, int) for one in listed):
        return [listed]
    return [_listed(one) for one in listed]


def _one(entry: str, found: list[Phrase]) -> Phrase:
    if len(found) > 1:
        raise OptionError(f"{entry!r} names {len(found)} places; name one object at a time")
    return found[0]


def _listed(entry: Any, what: str = "an object") -> list[Any]:
    if isinstance(entry, int) and what != "words":
        return [entry]
    if isinstance(entry, str) or not isinstance(entry, Iterable):
        raise OptionError(f"{what}: {entry!r} is no list of words or of token positions")
    return list(entry)


def _parts(text: str, phrase: Phrase) -> list[Phrase]:
    """Return the words of a phrase, each with the number it has among its like."""
    return [
        next(p for p in phrases(text, match[0]) if p.start == phrase.start + match.start())
        for match in re.finditer(r"\S+", text[phrase.start : phrase.stop])
    ]
