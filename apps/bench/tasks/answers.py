"""Answers about photos: POPE's question on each, and a description whose objects are checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from attnctl.apps.models import ModelError, first_line, placed
from attnctl.assets.train.measure_llava import Teller, says_yes
from attnctl.assets.world.chair import mentions
from attnctl.assets.world.pope import SPLITS, Case, pope
from attnctl.assets.world.questions import DETAILED

from .task import Figure, Request, Shown, TaskError, chosen_kind

__all__ = ["Answers", "one_per_photo", "open_task"]

BATCH = {"cpu": 25, "cuda": 200}
KINDS = ("adversarial", *(kind for kind in SPLITS if kind != "adversarial"))
DESCRIBE = DETAILED[0]
SHORT, LONG = 6, 80

FIGURES = (
    Figure("right", "right", "%", 100.0, 1),
    Figure("yes", "says yes", "%", 100.0, 1),
    Figure("unclear", "neither Yes nor No", "%", 100.0, 1),
    Figure("invents", "descriptions that invent", "%", 100.0, 1),
    Figure("invented", "objects invented"),
    Figure("found", "objects found", "%", 100.0, 1),
    Figure("words", "words", digits=1),
)


def open_task(request: Request) -> Answers:
    """Load the model and draw the photos.

    Raises:
        TaskError: if there are no such questions, or an option has no meaning here.
        ModelError: if the model cannot be loaded.
    """
    kind = chosen_kind(request, KINDS)
    for name in ("steps", "guidance_scale", "objects"):
        if getattr(request, name) is not None:
            option = name.replace("_", "-")
            raise TaskError(f"answers about photos have no --{option}; leave it out")
    if request.repeats > 1:
        raise TaskError("answers are not drawn at random, so --repeats has no meaning here")
    place, dtype = placed(request.device, request.dtype)
    try:
        teller = Teller.load(request.folder, place)
        teller.model.to(dtype)
    except Exception as error:
        raise ModelError(
            f"the model {request.model!r} cannot be loaded: {first_line(error)}"
        ) from error
    cases = one_per_photo(pope(kind, request.n, request.seed))  # type: ignore[arg-type]
    return Answers(teller, cases, kind, request)


def one_per_photo(cases: Sequence[Case]) -> list[Case]:
    """Return one question on each photo, yes and no in turn, so that the cases are independent."""
    found: dict[int, Case] = {}
    for case in cases:
        wanted = "yes" if case.photo.number % 2 else "no"
        if case.label == wanted:
            found.setdefault(case.photo.number, case)
    return list(found.values())


class Answers:
    """A vision-language model trained on the shape world, with questions that have answers.

    Args:
        teller: model and processor.
        cases: the questions.
        kind: how the objects that are not there were chosen.
        request: the settings.
    """

    name: ClassVar[str] = "answers"
    unit: ClassVar[str] = "right answers"

    def __init__(self, teller: Teller, cases: Sequence[Case], kind: str, request: Request) -> None:
        self.teller, self.cases, self.model = teller, list(cases), teller.model
        self.figures = FIGURES
        self.prompts = [f"{case.question} ({case.label})" for case in cases]
        self.batch = request.batch or BATCH.get(teller.device.type, BATCH["cpu"])
        self.settings = {"kind": kind, "describe": DESCRIBE, "longest": [SHORT, LONG]}

    def describe(self) -> str:
        """Return the kind of questions in words."""
        return f"{self.settings['kind']} questions on as many photos, each also described"

    def run(self, start: int, stop: int) -> np.ndarray:
        """Return texts [stop - start, 2]: answer and description."""
        part = self.cases[start:stop]
        asked = self._told(part, [case.question for case in part], SHORT)
        described = self._told(part, [DESCRIBE] * len(part), LONG)
        return np.array([asked, described]).T

    @torch.inference_mode()
    def _told(self, cases: Sequence[Case], questions: Sequence[str], length: int) -> list[str]:
        pixels = self.teller.pixels(dict.fromkeys(case.photo for case in cases))
        words = self.teller.words(questions)
        ids = self.model.generate(
            **words,
            pixel_values=torch.stack([pixels[case.photo] for case in cases]),
            max_new_tokens=length,
        )
        new = ids[:, words["input_ids"].shape[1] :]
        told = self.teller.processor.batch_decode(new, skip_special_tokens=True)
        return [text.strip() for text in told]

    def score(self, outputs: np.ndarray) -> dict[str, np.ndarray]:
        """Return the figures of the texts [n, 2].

        An answer is read as POPE's official script reads it. An object of a description is
        invented if the photo does not show it.
        """
        rows = zip(self.cases, outputs.tolist(), strict=True)
        found: list[dict[str, Any]] = [_judged(case, *texts) for case, texts in rows]
        return {f.key: np.array([row[f.key] for row in found], float) for f in FIGURES}

    def show(self, case: int, output: np.ndarray) -> Shown:
        """Return the photo with the answer."""
        return Shown(self.cases[case].image, str(output[0]))


def _judged(case: Case, answer: str, description: str) -> dict[str, float]:
    said, there = mentions(description), {item.name for item in case.photo.items}
    wrong = [name for name in said if name not in there]
    yes = says_yes(answer)
    return {
        "right": yes == (case.label == "yes"),
        "yes": yes,
        "unclear": answer.rstrip(".") not in ("Yes", "No"),
        "invents": bool(wrong),
        "invented": len(wrong),
        "found": len(there & {*said}) / len(there),
        "words": len(description.split()),
    }
