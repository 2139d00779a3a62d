"""Questions about a photo and their answers, in the words of the benchmarks, and its captions."""

from __future__ import annotations

from collections.abc import Sequence

from attnctl.assets.world.captions import caption, phrase
from attnctl.assets.world.palette import Pair

YES, NO = "Yes", "No"
POPE = "Is there {} in the image?"
ONE_WORD = " Please answer this question with one word."
SINGLE = "\nAnswer the question using a single word or phrase."
SUFFIXES = ("", ONE_WORD, SINGLE, " Please answer yes or no.")
PRESENCE = (
    *(POPE + suffix for suffix in SUFFIXES),
    "Is there {} in this image?",
    "Is there {} in the picture?",
    "Can you see {} in the image?",
    "Does the image show {}?",
)
COLOUR = (
    "What color is the {}?",
    "What color is the {} in the image?",
    "What color is the {}?" + SINGLE,
)
COUNT = (
    "How many objects are there?",
    "How many objects are there in the image?",
    "How many objects are there in the image?" + SINGLE,
)
POSITION = (
    "Where is the {}?",
    "Where is the {} in the image?",
    "Where is the {} in the image?" + SINGLE,
)
BRIEF = ("Describe the image.", "Describe this image.", "What is in the image?")
GENERAL = ("Write a general description of the image.", "What does the image show?")
DETAILED = (
    "Please describe this image in detail.",
    "Please help me describe the image in detail.",
    "Describe the image in detail.",
)
DESCRIBE = (*BRIEF, *GENERAL, *DETAILED)
NUMBERS = ("1", "2", "3", "4")
CELLS = (
    "top left",
    "top",
    "top right",
    "left",
    "center",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
GREYS = ("dark", "medium", "light")


def presence(colour: str, shape: str, wording: str = POPE) -> str:
    """Is it there? E.g. "Is there an orange ring in the image?"."""
    return wording.format(phrase(colour, shape))


def cell(x: float, y: float) -> str:
    """Which ninth of the picture a place lies in, e.g. "top left".

    Args:
        x: from the left edge, 0 to 1.
        y: from the top edge, 0 to 1.
    """
    return CELLS[3 * min(2, int(3 * y)) + min(2, int(3 * x))]


def grey(background: float) -> str:
    """How light a background is, in a word."""
    return GREYS[min(2, int((background - 0.2) / 0.2))]


def description(
    request: str, pairs: Sequence[Pair], cells: Sequence[str], background: float
) -> str:
    """What a description of a photo says.

    Args:
        request: one of `DESCRIBE`; those in `DETAILED` also tell the places and the background.
        pairs: the objects.
        cells: where each of them is (`cell`).
        background: grey level.
    """
    if request not in DETAILED:
        frame = "There is {} in the image." if request in BRIEF else "The image shows {}."
        return caption(pairs, frame)
    parts = [f"{phrase(*pair)} at the {place}" for pair, place in zip(pairs, cells, strict=True)]
    listed = ", ".join(parts[:-1])
    listed = f"{listed} and {parts[-1]}" if listed else parts[-1]
    return f"The image features {listed}. The background is {grey(background)} gray."


def references(pairs: Sequence[Pair], cells: Sequence[str], background: float) -> list[str]:
    """Five captions of a photo, as the annotators of a caption data set would write them."""
    requests = (BRIEF[0], GENERAL[0], DETAILED[0])
    told = [description(request, pairs, cells, background) for request in requests]
    framed = ("A picture of {}.", f"{{}} on a {grey(background)} gray background.")
    more = [caption(pairs, frame) for frame in framed]
    return [*told, *(words[0].upper() + words[1:] for words in more)]
