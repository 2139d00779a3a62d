"""A small rule that splits a prompt into concepts: adjectives and their noun.

    "a red circle and a blue square"  ->  "red circle", "blue square"

Function words, punctuation and participles that follow a noun are borders; what stands
between two borders is one concept, its last word the noun. That is enough for the usual
prompts of the steering papers, and no parser: "red and blue ball" gives "red" and "blue
ball". Name the words yourself where it is wrong.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .phrases import Phrase, phrases

__all__ = ["Concept", "concepts"]

_BORDERS = frozenset(
    """a an the this that these those some any each every one two three four five six seven
    eight nine ten and or but nor with without of on in at by to from into onto over under
    above below behind beside besides between near next inside outside against around through
    along across up down off out for as than then while where who which whose is are was were
    be being been has have having do does it its his her their my your our there no not very
    left right front back top bottom side""".split()  # noqa: SIM905
)
_FRAMES = frozenset(
    """picture drawing photo photograph image painting illustration sketch render rendering
    portrait close-up closeup view shot""".split()  # noqa: SIM905
)
_NOUNS_IN_ING = frozenset(
    """ring king string wing spring thing building painting ceiling evening morning earring
    clothing drawing swing sling viking pudding sibling duckling dumpling wedding awning
    herring lightning bedding railing wiring icing frosting""".split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Concept:
    """One concept of a prompt.

    Args:
        phrase: all of its words.
        noun: the last one.
        attributes: those before it.
    """

    phrase: Phrase
    noun: Phrase
    attributes: tuple[Phrase, ...]

    def __str__(self) -> str:
        return self.phrase.text


def concepts(prompt: str) -> list[Concept]:
    """Split a prompt into concepts, in order.

    Args:
        prompt: an English prompt.

    Returns:
        The concepts; none if there is no word but function words.
    """
    chunks: list[list[re.Match[str]]] = [[]]
    for match in re.finditer(r"[\w'’]+(?:-\w+)*|[^\w\s]", prompt):
        if _is_border(match[0], chunks[-1]):
            if match[0].lower() == "of" and _is_frame(chunks[-1]):
                chunks[-1] = []
            chunks.append([])
        else:
            chunks[-1].append(match)
    return [_concept(prompt, chunk) for chunk in chunks if chunk]


def _is_border(word: str, before: list[re.Match[str]]) -> bool:
    lower = word.lower()
    if not re.match(r"\w", word) or lower in _BORDERS:
        return True
    # "a cat sitting on": a participle after its noun; "a flying bird": before it
    return bool(before) and lower.endswith("ing") and lower not in _NOUNS_IN_ING


def _is_frame(chunk: list[re.Match[str]]) -> bool:
    """Whether this is "a picture", which an "of" follows."""
    return bool(chunk) and chunk[-1][0].lower() in _FRAMES


def _concept(prompt: str, chunk: list[re.Match[str]]) -> Concept:
    *attributes, noun = (_at(prompt, m.start(), m.end()) for m in chunk)
    whole = _at(prompt, chunk[0].start(), chunk[-1].end())
    return Concept(whole, noun, tuple(attributes))


def _at(prompt: str, start: int, stop: int) -> Phrase:
    """Return the phrase at a place, with the number it has among its like."""
    return next(p for p in phrases(prompt, prompt[start:stop]) if p.start == start)
