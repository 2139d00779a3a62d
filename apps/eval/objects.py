"""CHAIR's words: from a caption to the objects that it names.

Lower case, tokens, singular, terms of two words joined, then what the synonym table knows,
each as the first word of its line. The table of the COCO objects is data/synonyms.txt of
github.com/LisaAnne/Hallucination, which has no licence and is therefore not shipped.

Three ways to the singular, since published numbers differ in it:

- "rule": ours, needs nothing. A word the table knows stays; else the first singular form of it
  that the table knows is taken.
- "pattern": nltk's tokens, `pattern.en.singularize`; the original and Maxlinn's standalone.
- "lemma": nltk's tokens and tags, WordNet's lemmas; OPERA's copy, PAI, VISTA and lmms-eval.

References:
    Rohrbach et al., "Object Hallucination in Image Captioning", 2018 (arXiv 1809.02156).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from attnctl.errors import MissingExtra

from .bad_data import BadData, EvalError

__all__ = ["WORDS", "Objects", "nltk_parts", "read_synonyms", "singular_forms", "tokens"]

_JOINED = (
    "motor bike", "motor cycle", "air plane", "traffic light", "street light", "traffic signal",
    "stop light", "fire hydrant", "stop sign", "parking meter", "suit case", "sports ball",
    "baseball bat", "baseball glove", "tennis racket", "wine glass", "hot dog", "cell phone",
    "mobile phone", "teddy bear", "hair drier", "potted plant", "laptop computer", "home plate",
    "train track",
)  # fmt: skip
_ANIMALS = (
    "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe",
    "animal", "cub",
)  # fmt: skip
_TAKEN_AS = {
    **{term: term for term in _JOINED},
    **{f"{age} {animal}": animal for age in ("baby", "adult") for animal in _ANIMALS},
    "passenger jet": "jet",
    "passenger train": "train",
    "bow tie": "tie",
    "toilet seat": "toilet",
    "wine glas": "wine glass",
}
"""Two words that count as one thing. A baby bird is no person, a toilet seat no chair."""

_IRREGULAR = {
    "people": "person", "children": "child", "geese": "goose", "mice": "mouse", "feet": "foot",
    "teeth": "tooth", "oxen": "ox", "dice": "die",
}  # fmt: skip
_TOKEN = re.compile(r"n't\b|'\w+|[\w][\w'./-]*[\w]|\w|[^\w\s]")
_CLITIC = re.compile(r"^(.+?)(n't|'(?:s|re|ve|ll|d|m))$")


def tokens(text: str) -> list[str]:
    """Return words, clitics and marks: "a dog's tail." is a, dog, 's, tail and the full stop."""
    found: list[str] = []
    for token in _TOKEN.findall(text):
        parts = _CLITIC.match(token)
        found += parts.groups() if parts else (token,)
    return found


def singular_forms(word: str) -> Iterator[str]:
    """Yield what a word may be the plural of, the likelier first, the word itself at last."""
    if word in _IRREGULAR:
        yield _IRREGULAR[word]
    if word.endswith("men"):
        yield word[:-3] + "man"
    if word.endswith("ves"):
        yield from (word[:-3] + "fe", word[:-3] + "f")
    if word.endswith("ies"):
        yield word[:-3] + "y"
    if word.endswith("s") and not word.endswith("ss"):
        yield word[:-1]
    if word.endswith("es"):
        yield word[:-2]
    if word.endswith("sses") or word.endswith("zzes"):
        yield word[:-3]
    yield word


def read_synonyms(path: Path) -> list[list[str]]:
    """Return the lines of a synonym table; a line's first term stands for the others.

    The lines are split at a comma and one blank, as the official code does it; a term with two
    blanks before it keeps one and is never found there, nor here.

    Raises:
        BadData: if the file cannot be read or is empty.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadData(path, None, f"cannot be read: {error}") from error
    table = [line.strip().split(", ") for line in text.splitlines() if line.strip()]
    if not table:
        raise BadData(path, None, "there is no line in this table of synonyms")
    return table


class Objects:
    """Finds the objects of captions.

    Args:
        synonyms: lines of the table.
        words: "rule", "pattern" or "lemma".

    Raises:
        EvalError: if there is no such way, or it needs pattern and that is not there.
        MissingExtra: if it needs nltk and that is not there.
    """

    def __init__(self, synonyms: Sequence[Sequence[str]], words: str = "rule") -> None:
        if words not in WORDS:
            raise EvalError(f"there is no way {words!r} to words; expected {', '.join(WORDS)}")
        self.node = {term: line[0] for line in synonyms for term in line}
        pairs = {term: term for term in self.node if term.count(" ") == 1 and term[0] != " "}
        self.taken_as = {**pairs, **_TAKEN_AS}
        parts = {part for term in (*self.node, *self.taken_as) for part in term.split()}
        self._words = WORDS[words](parts)

    def __call__(self, caption: str) -> list[str]:
        """Return the objects that a caption names, one for each time."""
        words = list(self._join(self._words(caption.lower())))
        if "toilet" in words:
            words = [word for word in words if word != "seat"]
        return [self.node[word] for word in words if word in self.node]

    def _join(self, words: Sequence[str]) -> Iterator[str]:
        at = 0
        while at < len(words):
            pair = " ".join(words[at : at + 2])
            yield self.taken_as.get(pair, words[at])
            at += 2 if pair in self.taken_as else 1


Splitter = Callable[[str], list[str]]


def _by_rule(known: set[str]) -> Splitter:
    def split(text: str) -> list[str]:
        return [word if word in known else _known_form(word, known) for word in tokens(text)]

    return split


def _known_form(word: str, known: set[str]) -> str:
    return next((form for form in singular_forms(word) if form in known), word)


def _by_pattern(known: set[str]) -> Splitter:
    word_tokenize = nltk_parts()[0]
    try:
        from pattern.en import singularize
    except ImportError as error:
        raise EvalError(
            "--words pattern needs the package 'pattern': pip install pattern. No extra brings "
            "it, since it is no longer maintained; --words rule needs nothing"
        ) from error
    return lambda text: [singularize(word) for word in word_tokenize(text)]


def _by_lemma(known: set[str]) -> Splitter:
    word_tokenize, pos_tag, lemmatize = nltk_parts()
    kinds = {"J": "a", "V": "v", "N": "n", "R": "r"}

    def split(text: str) -> list[str]:
        tagged = pos_tag(word_tokenize(text))
        return [lemmatize(word, kinds.get(tag[:1], "n")) for word, tag in tagged]

    return split


def nltk_parts() -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """Return nltk's tokeniser, tagger and lemmatiser.

    Raises:
        MissingExtra: without nltk.
        EvalError: from the three, if nltk lacks its data.
    """
    try:
        import nltk
        from nltk.stem import WordNetLemmatizer
    except ImportError as error:
        raise MissingExtra("nltk", "eval", "words other than --words rule") from error

    def told(call: Callable[..., Any]) -> Callable[..., Any]:
        def safe(*args: Any) -> Any:
            try:
                return call(*args)
            except LookupError as error:
                name = re.search(r"nltk\.download\('(.+?)'\)", str(error))
                missing = name[1] if name else "punkt_tab, averaged_perceptron_tagger_eng, wordnet"
                raise EvalError(
                    f"nltk lacks its data: python -m nltk.downloader {missing}; or give --words "
                    "rule, which needs none"
                ) from error

        return safe

    return told(nltk.word_tokenize), told(nltk.pos_tag), told(WordNetLemmatizer().lemmatize)


WORDS: dict[str, Callable[[set[str]], Splitter]] = {
    "rule": _by_rule,
    "pattern": _by_pattern,
    "lemma": _by_lemma,
}
