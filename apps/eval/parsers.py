"""How published scorers read an answer as yes or no.

They differ on the same words: "Yes." is yes to POPE's own script and wrong to lmms-eval;
"There isn't a dog" is yes to POPE's and no to PAI's. So the parser is named with every score.

Sources: AoiDragon/POPE evaluate.py; LALBJ/PAI and zhuzhenxiaoshi/VISTA pope_ans;
DAMO-NLP-SG/VCD eval_pope.py; lmms-eval tasks/pope and tasks/mme; VLMEvalKit utils/yorn.py;
MME's calculation.py; AMBER's inference.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from .bad_data import EvalError

__all__ = ["PARSERS", "Parser", "Reading", "find_parser"]

Reading = Literal["yes", "no", "unparsed"]
Gold = Literal["yes", "no"]


@dataclass(frozen=True)
class Parser:
    """A way to read answers.

    Attributes:
        name: what it is called.
        read: (answer, gold) to a reading; only VCD's looks at the gold label.
        unparsed_is_no: whether recall counts an unparsed positive as missed, or leaves it out.
    """

    name: str
    read: Callable[[str, Gold], Reading]
    unparsed_is_no: bool = True


def first_sentence(answer: str, gold: Gold) -> Reading:
    """POPE: no if a word of the first sentence is No, no or not; yes otherwise."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def any_negation(answer: str, gold: Gold) -> Reading:
    """PAI, VISTA: no if any word is No, no, not, NO or ends in n't; yes otherwise."""
    words = answer.replace(".", "").replace(",", "").split(" ")
    negated = any(w in ("No", "not", "no", "NO") or w.endswith("n't") for w in words)
    return "no" if negated else "yes"


def contains_gold(answer: str, gold: Gold) -> Reading:
    """VCD, AGLA: right if the gold word is anywhere in the answer, also inside other words."""
    other: Reading = "no" if gold == "yes" else "yes"
    return gold if gold in answer.lower() else other


def exact(answer: str, gold: Gold) -> Reading:
    """lmms-eval on POPE: the answer is yes or no and nothing else, not even a full stop."""
    text = answer.lower().strip()
    return "yes" if text == "yes" else "no" if text == "no" else "unparsed"


def one_word(answer: str, gold: Gold) -> Reading:
    """VLMEvalKit: one of the words yes and no is there and the other is not."""
    words = _without_punctuation(answer.lower()).split()
    yes, no = "yes" in words, "no" in words
    return "unparsed" if yes == no else "yes" if yes else "no"


def prefix(answer: str, gold: Gold) -> Reading:
    """MME: yes or no within the first four letters."""
    start = answer.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "unparsed"


def tidy_prefix(answer: str, gold: Gold) -> Reading:
    """lmms-eval on MME: as MME, after blanks and full stops are taken away; y and n count."""
    text = answer.lower().strip().replace(".", "")
    if len(text) == 1:
        return "yes" if text == "y" else "no" if text == "n" else "unparsed"
    return prefix(text, gold)


def capital(answer: str, gold: Gold) -> Reading:
    """AMBER: exactly Yes or exactly No."""
    return "yes" if answer == "Yes" else "no" if answer == "No" else "unparsed"


_STRIPPED = ';/[]"{}()=+\\_-><@`,?!'
_STOP = re.compile(r"(?<!\d)\.(?!\d)")
_STOPS_TAKEN = int(re.UNICODE)
"""VLMEvalKit passes the flag where the number of replacements belongs: 32 at most are made."""


def _without_punctuation(text: str) -> str:
    """VLMEvalKit's: marks beside a blank vanish, others become blanks."""
    out, comma_in_number = text, re.search(r"\d,\d", text) is not None
    for mark in _STRIPPED:
        beside = f"{mark} " in text or f" {mark}" in text or comma_in_number
        out = out.replace(mark, "" if beside else " ")
    return _STOP.sub("", out, count=_STOPS_TAKEN)


_PAI = Parser("pai", any_negation)
_VCD = Parser("vcd", contains_gold)
_VLMEVALKIT = Parser("vlmevalkit", one_word)
_MME = Parser("mme", prefix, unparsed_is_no=False)

PARSERS: dict[str, dict[str, Parser]] = {
    "pope": {
        "official": Parser("official", first_sentence),
        "pai": _PAI,
        "vcd": _VCD,
        "lmms-eval": Parser("lmms-eval", exact, unparsed_is_no=False),
        "vlmevalkit": _VLMEVALKIT,
        "mme": _MME,
    },
    "mme": {
        "official": Parser("official", prefix, unparsed_is_no=False),
        "lmms-eval": Parser("lmms-eval", tidy_prefix, unparsed_is_no=False),
        "vlmevalkit": _VLMEVALKIT,
    },
    "amber": {"official": Parser("official", capital), "vlmevalkit": _VLMEVALKIT},
}
"""By benchmark; the first is the benchmark's own."""


def find_parser(benchmark: str, name: str) -> Parser:
    """Return a parser by name.

    Raises:
        EvalError: if the benchmark has none of that name.
    """
    known = PARSERS.get(benchmark, {})
    if name not in known:
        has = f"has {', '.join(known)}" if known else "is not about yes and no and has no parser"
        raise EvalError(f"there is no parser {name!r} here: {benchmark} {has}")
    return known[name]
