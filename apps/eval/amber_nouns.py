"""AMBER's descriptions: which nouns of its vocabulary they name, and which of those are wrong.

What is close: the official script calls two words alike if the vectors of spaCy's
en_core_web_lg have a cosine above 0.8. Without that model ("exact") only equal words are alike;
such numbers are no AMBER numbers and are named otherwise in the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from attnctl.errors import MissingExtra

from . import open_answers
from .bad_data import BadData, EvalError
from .estimate import Figure, ratio
from .items import Answer
from .objects import nltk_parts, singular_forms, tokens
from .rows import read_json

__all__ = ["FIGURES", "Nouns", "alike", "described", "finder", "read_nouns"]

CLOSE = 0.8
"""Least cosine of words that mean the same, in the official script."""


@dataclass(frozen=True)
class Nouns:
    """AMBER's vocabulary.

    Attributes:
        related: words that go with a word, by word.
        safe: words that never count as wrong.
    """

    related: Mapping[str, Sequence[str]]
    safe: frozenset[str]

    @property
    def known(self) -> frozenset[str]:
        """Every word of the vocabulary."""
        return frozenset([*self.related, *(w for words in self.related.values() for w in words)])


def read_nouns(folder: Path) -> Nouns:
    """Return the vocabulary of AMBER's folder data/.

    Raises:
        BadData: if its files cannot be read.
    """
    path = folder / "relation.json"
    related = read_json(path)
    if not isinstance(related, dict) or not all(isinstance(v, list) for v in related.values()):
        raise BadData(path, None, "expected a JSON object with a list of words for each word")
    safe = folder / "safe_words.txt"
    try:
        words = safe.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadData(safe, None, f"cannot be read: {error}") from error
    return Nouns(related, frozenset(words))


Alike = Callable[[str, str], bool]


def alike(name: str) -> Alike:
    """Return a test of whether two words mean the same: "exact", or "spacy:" and a model's name.

    Raises:
        EvalError: if there is no such test or model.
        MissingExtra: without spaCy.
    """
    if name == "exact":
        return lambda one, other: one == other
    kind, _, model = name.partition(":")
    if kind != "spacy" or not model:
        raise EvalError(
            f"there is no test {name!r} for words that mean the same; expected exact or "
            "spacy:en_core_web_lg"
        )
    try:
        import spacy
    except ImportError as error:
        raise MissingExtra("spacy", "eval", f"--alike {name}") from error
    try:
        language = spacy.load(model)
    except OSError as error:
        raise EvalError(
            f"spaCy has no model {model!r}: python -m spacy download {model}"
        ) from error
    vector = lru_cache(maxsize=None)(language)
    return lambda one, other: vector(one).similarity(vector(other)) > CLOSE


def described(answer: Answer, nouns: Nouns, find: Finder, same: Alike) -> dict[str, float]:
    """Return the counts of one description."""
    truth, invented = answer.item.truth["truth"], answer.item.truth["hallu"]
    named = find(answer.text)
    there, others = _Listed(truth, nouns), _Listed(invented, nouns)
    wrong = 0
    for noun in named:
        if noun in nouns.safe or there.mark(noun, str.__eq__):
            continue
        others.mark(noun, str.__eq__)
        others.mark(noun, same)  # the official script looks twice
        wrong += not there.mark(noun, same)
    return {
        **open_answers.open_counts(answer),
        "named": len(named),
        "wrong": wrong,
        "wrong captions": wrong > 0,
        "covered": len(there.marked),
        "there": len(truth),
        "invented": len(others.marked),
        "likely": len(invented),
    }


class _Listed:
    """Listed words with what goes with them, and which of them were named.

    Related words stand first; a word that is both on the list and related to another of it
    marks the other one, as in the official script.
    """

    def __init__(self, words: Sequence[str], nouns: Nouns) -> None:
        related = [
            (other, i) for i, word in enumerate(words) for other in nouns.related.get(word, ())
        ]
        self.words = [*related, *((word, i) for i, word in enumerate(words))]
        self.marked: set[int] = set()

    def mark(self, noun: str, same: Alike) -> bool:
        """Mark the first word that is the same as a noun; return whether there is one."""
        index = next((i for word, i in self.words if same(noun, word)), None)
        if index is not None:
            self.marked.add(index)
        return index is not None


Finder = Callable[[str], list[str]]


def finder(words: str, known: frozenset[str]) -> Finder:
    """Return what finds the words of the vocabulary in a text, in the singular.

    "lemma" is the official way: what nltk's tagger calls a noun, as WordNet's lemma. "rule"
    needs no data: any word of which the vocabulary has a singular form. Capitals count in both.
    """
    if words == "rule":
        return lambda text: [form for word in tokens(text) for form in _form(word, known)]
    if words != "lemma":
        raise EvalError(f"AMBER's words are found by rule or by lemma, not by {words!r}")
    word_tokenize, pos_tag, lemmatize = nltk_parts()

    def nouns(text: str) -> list[str]:
        tagged = pos_tag(word_tokenize(text))
        lemmas = [lemmatize(word) for word, tag in tagged if tag.startswith("NN")]
        return [lemma for lemma in lemmas if lemma in known]

    return nouns


def _form(word: str, known: frozenset[str]) -> list[str]:
    return [form for form in (word, *singular_forms(word)) if form in known][:1]


FIGURES = (
    Figure("chair", "CHAIR", lambda s: ratio(s["wrong"], s["named"])),
    Figure("cover", "Cover", lambda s: ratio(s["covered"], s["there"])),
    Figure("hal", "Hal", lambda s: ratio(s["wrong captions"], s["captions"])),
    Figure("cog", "Cog", lambda s: ratio(s["invented"], s["likely"])),
    *open_answers.FIGURES,
)
