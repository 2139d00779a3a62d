"""Phrases in a text: every place where one stands, and what to say if there is none or several."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import OptionError, nearest

__all__ = ["Phrase", "chosen", "mentions", "phrases", "same_place"]

_NUMBERED = re.compile(r"(?P<text>.+)#(?P<which>\d+|all)")


@dataclass(frozen=True)
class Phrase:
    """A word, or several in a row, at one place of a text.

    Args:
        text: the letters as they stand there.
        number: which occurrence of these words it is, from 1.
        start: first letter.
        stop: after the last letter.
    """

    text: str
    number: int
    start: int
    stop: int

    def __str__(self) -> str:
        return self.text


def phrases(text: str, words: str) -> list[Phrase]:
    """Return every place where some words stand in a text, in order.

    Whole words only, whatever the case; blanks between them may be of any length.

    Args:
        text: the prompt.
        words: a word or several, such as "red circle".
    """
    parts = [re.escape(part) for part in words.split()]
    if not parts:
        return []
    return [
        Phrase(match[0], number, match.start(), match.end())
        for number, match in enumerate(re.finditer(_pattern(parts), text, re.IGNORECASE), 1)
    ]


def _pattern(parts: list[str]) -> str:
    # a border only where the phrase begins or ends with a letter: "C++" ends with none
    first = r"(?<!\w)" if re.match(r"\w", parts[0]) else ""
    last = r"(?!\w)" if re.search(r"\w$", parts[-1]) else ""
    return first + r"\s+".join(parts) + last


def mentions(text: str, words: str) -> bool:
    """Whether some words, or those before a "#2", stand anywhere in a text."""
    match = _NUMBERED.fullmatch(words)
    return bool(phrases(text, words) or (match and phrases(text, match["text"])))


def chosen(text: str, words: str) -> list[Phrase]:
    """Return the places that a user means.

    Args:
        text: the prompt.
        words: a phrase that stands there once, or with "#2" for the second occurrence, "#all"
            for all of them.

    Raises:
        OptionError: if it is missing, or stands there more than once and no number says which;
            the message shows what there is.
    """
    found = phrases(text, words)
    if len(found) == 1:
        return found
    if found:
        raise OptionError(_ambiguous(text, words, found))
    match = _NUMBERED.fullmatch(words)
    if match is None:
        raise OptionError(_missing(text, words))
    found = phrases(text, match["text"])
    if not found:
        raise OptionError(_missing(text, match["text"]))
    if match["which"] == "all":
        return found
    if not 1 <= int(match["which"]) <= len(found):
        raise OptionError(
            f"{match['text']!r} stands {len(found)} times in {text!r}, so there is no "
            f"{words!r}; count from {match['text']}#1"
        )
    return [found[int(match["which"]) - 1]]


def same_place(text: str, phrase: Phrase) -> list[Phrase]:
    """Return the occurrence with the phrase's number in a text, nothing if there are fewer."""
    return [p for p in phrases(text, phrase.text) if p.number == phrase.number]


def _ambiguous(text: str, words: str, found: list[Phrase]) -> str:
    shown = ", ".join(f'{words}#{p.number} in "{_around(text, p)}"' for p in found)
    return (
        f"{words!r} stands {len(found)} times in the prompt: {shown}; say which, or "
        f"{words}#all for all of them"
    )


def _around(text: str, phrase: Phrase, letters: int = 12) -> str:
    start, stop = max(0, phrase.start - letters), phrase.stop + letters
    left = text[start : phrase.start]
    return (
        f"{'...' if start else ''}{left}[{phrase.text}]{text[phrase.stop : stop]}"
        f"{'...' if stop < len(text) else ''}"
    )


def _missing(text: str, words: str) -> str:
    known = list(dict.fromkeys(re.findall(r"\w+", text)))
    close = nearest(words, known)
    return f"{words!r} is not in the prompt {text!r}.{close} Its words: {', '.join(known)}"
