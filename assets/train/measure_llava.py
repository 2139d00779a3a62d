"""The figures of tiny-llava's card, measured on the saved weights with the stock classes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import trange
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from attnctl.assets.train.llava_sheet import draw_sheet
from attnctl.assets.train.numbers import proportion
from attnctl.assets.train.recipe import Run
from attnctl.assets.train.weights import millions
from attnctl.assets.world.chair import chair
from attnctl.assets.world.evaluation import Photo, Split, album
from attnctl.assets.world.habits import Habits
from attnctl.assets.world.palette import SHAPES
from attnctl.assets.world.pope import SPLITS, Case, Negatives, questions
from attnctl.assets.world.questions import BRIEF, COLOUR, COUNT, DETAILED, POSITION, cell

SEED = 0
HABITUAL: Split = "habitual"
DECORRELATED: Split = "decorrelated"
SHORT, LONG = 6, 80
QUICK = 200
SHEET = 24


def measure(folder: Path, run: Run, habits: Habits) -> dict[str, Any]:
    """All figures of a saved model, and the contact sheet ``tiny-llava.png`` in ``run.out``."""
    teller = Teller.load(folder, run.device)
    n = run.prompts
    apart = album(n, SEED, DECORRELATED, habits)
    alike = album(n, SEED, HABITUAL, habits)
    draw_sheet(teller.answers, apart[: 4 if run.smoke else SHEET], run.out / "tiny-llava.png")
    tower = teller.model.model.vision_tower
    parts = {
        "vision_tower": tower,
        "multi_modal_projector": teller.model.model.multi_modal_projector,
        "language_model": teller.model.model.language_model,
    }
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return {
        "millions": {name: millions(part) for name, part in parts.items()},
        "megabytes": round(size / 1e6, 2),
        "images": n,
        DECORRELATED: split_figures(teller, apart),
        HABITUAL: split_figures(teller, alike),
    }


def split_figures(teller: Teller, photos: Sequence[Photo]) -> dict[str, Any]:
    """POPE, other questions and descriptions on one split."""
    pope, answers = pope_answers(teller, photos)
    return {
        "pope": {name: scores(pope[name], answers[name]) for name in SPLITS},
        "presence": strata(pope, answers),
        **other_questions(teller, photos),
        "chair": {kind: described(teller, photos, kind) for kind in (BRIEF[0], DETAILED[0])},
    }


def pope_answers(
    teller: Teller, photos: Sequence[Photo]
) -> tuple[dict[Negatives, list[Case]], dict[Negatives, list[str]]]:
    """POPE's questions of all three splits and the answers; what recurs is asked once."""
    pope = {name: questions(photos, name, SEED) for name in SPLITS}
    asked = dict.fromkeys((case.photo, case.question) for cases in pope.values() for case in cases)
    told = dict(zip(asked, teller.answers(list(asked)), strict=True))
    answers = {
        name: [told[case.photo, case.question] for case in cases] for name, cases in pope.items()
    }
    return pope, answers


class Teller:
    """A model and its processor that answer questions about photos in batches.

    Args:
        model: on its device, in evaluation mode.
        processor: its processor.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        self.device = next(model.parameters()).device
        self.batch = 250 if self.device.type == "cuda" else 25
        self._pixels: dict[Photo, Tensor] = {}

    @classmethod
    def load(
        cls, folder: Path, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Teller:
        """From a folder, with the stock classes.

        Args:
            folder: the model's.
            device: None for the GPU if there is one.
            dtype: None for float16 on a GPU, float32 on the CPU.
        """
        place = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model: Any = LlavaForConditionalGeneration.from_pretrained(folder)
        half = torch.float16 if place.type == "cuda" else torch.float32
        model = model.to(place, dtype or half)
        return cls(model.eval(), LlavaProcessor.from_pretrained(folder))

    @torch.no_grad()
    def answers(self, asked: Sequence[tuple[Photo, str]], length: int = SHORT) -> list[str]:
        """Greedy answers.

        Args:
            asked: photos with questions.
            length: most tokens per answer.
        """
        pixels = self.pixels(dict.fromkeys(photo for photo, _ in asked))
        told: list[str] = []
        for start in trange(0, len(asked), self.batch, desc="answers", disable=None):
            part = asked[start : start + self.batch]
            words = self.words([question for _, question in part])
            seen = torch.stack([pixels[photo] for photo, _ in part])
            ids = self.model.generate(**words, pixel_values=seen, max_new_tokens=length)
            new = ids[:, words["input_ids"].shape[1] :]
            told += self.processor.batch_decode(new, skip_special_tokens=True)
        return [one.strip() for one in told]

    def pixels(self, photos: Iterable[Photo]) -> dict[Photo, Tensor]:
        """What the image processor makes of photos; each is processed once."""
        fresh = [photo for photo in photos if photo not in self._pixels]
        if fresh:
            pictures = [photo.image for photo in fresh]
            made = self.processor.image_processor(pictures, return_tensors="pt")
            values = made["pixel_values"].to(self.device, self.model.dtype)
            self._pixels.update(zip(fresh, values, strict=True))
        return self._pixels

    def words(self, asked: Sequence[str]) -> dict[str, Tensor]:
        """Prompts of questions, padded on the left, with as many placeholders as patches."""
        image = self.processor.image_token
        many = image * self.model.config.image_seq_length
        chats = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": one}]}]
            for one in asked
        ]
        prompts = self.processor.apply_chat_template(chats, add_generation_prompt=True)
        made = self.processor.tokenizer(
            [prompt.replace(image, many) for prompt in prompts], padding=True, return_tensors="pt"
        )
        return {key: made[key].to(self.device) for key in ("input_ids", "attention_mask")}


def says_yes(answer: str) -> bool:
    """POPE's official reading of an answer: yes unless the first sentence says no or not."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not any(word in words for word in ("No", "not", "no"))


def scores(cases: Sequence[Case], answers: Sequence[str]) -> dict[str, Any]:
    """Accuracy with its interval, precision, recall, F1 and share of yes, as POPE defines them."""
    said = torch.tensor([says_yes(answer) for answer in answers])
    true = torch.tensor([case.label == "yes" for case in cases])
    hits = int((said & true).sum())
    precision = hits / max(1, int(said.sum()))
    recall = hits / max(1, int(true.sum()))
    odd = sum(answer not in ("Yes", "No") for answer in answers)
    return {
        **proportion(said == true),
        "precision": round(precision, 4),
        "recall": round(recall, 4),
        "f1": round(2 * precision * recall / max(1e-9, precision + recall), 4),
        "yes": round(float(said.double().mean()), 4),
        "unparsed": odd,
    }


def strata(
    pope: dict[Negatives, list[Case]], answers: dict[Negatives, list[str]]
) -> dict[str, dict[str, Any]]:
    """Share of right answers by what can be seen, over different questions of all splits."""
    seen = {
        (case.photo, case.pair): (case, says_yes(told) == (case.label == "yes"))
        for name, cases in pope.items()
        for case, told in zip(cases, answers[name], strict=True)
    }
    groups: dict[str, list[bool]] = {}
    for case, right in seen.values():
        light = "dim" if case.dim else "clear"
        if case.item:
            groups.setdefault(f"there, {'small' if case.small else 'large'}, {light}", []).append(
                right
            )
        else:
            kind = "partner there" if case.partner_there else "no partner"
            groups.setdefault(f"absent, {kind}, {light}", []).append(right)
    return {name: proportion(torch.tensor(groups[name])) for name in sorted(groups)}


def other_questions(teller: Teller, photos: Sequence[Photo]) -> dict[str, dict[str, Any]]:
    """Accuracy of colour, count and position, each in clear and in dim photos."""
    kinds = {"colour": colours(photos), "count": counts(photos), "position": positions(photos)}
    figures: dict[str, dict[str, Any]] = {}
    for name, asked in kinds.items():
        told = teller.answers([(photo, question) for photo, question, _ in asked], SHORT)
        right = [one == wanted for one, (_, _, wanted) in zip(told, asked, strict=True)]
        dim = [photo.dim for photo, _, _ in asked]
        for light, wanted in (("clear", False), ("dim", True)):
            rows = [hit for hit, dark in zip(right, dim, strict=True) if dark == wanted]
            if rows:
                figures.setdefault(name, {})[light] = proportion(torch.tensor(rows))
    return figures


Asked = list[tuple[Photo, str, str]]


def colours(photos: Sequence[Photo]) -> Asked:
    """Colour of each shape that a photo shows once."""
    return [
        (photo, COLOUR[0].format(shape), found[0])
        for photo in photos
        for shape in SHAPES
        if len(found := [one.pair[0] for one in photo.items if one.pair[1] == shape]) == 1
    ]


def counts(photos: Sequence[Photo]) -> Asked:
    """How many objects there are."""
    return [(photo, COUNT[0], str(len(photo.items))) for photo in photos]


def positions(photos: Sequence[Photo]) -> Asked:
    """Where the first object is."""
    return [
        (photo, POSITION[0].format(one.name), cell(one.x, one.y))
        for photo in photos
        for one in photo.items[:1]
    ]


def described(teller: Teller, photos: Sequence[Photo], request: str) -> dict[str, Any]:
    """CHAIR figures of the answers to one request."""
    told = teller.answers([(photo, request) for photo in photos], LONG)
    truth = [[one.name for one in photo.items] for photo in photos]
    return chair(told, truth)


def quick(model: Any, processor: Any, habits: Habits, n: int = QUICK) -> dict[str, float]:
    """A few figures while a training runs: POPE's accuracies, and presence by what can be seen."""
    pope, answers = pope_answers(Teller(model, processor), album(n, 9, DECORRELATED, habits))
    rates = {str(name): scores(pope[name], answers[name])["rate"] for name in SPLITS}
    return rates | {name: one["rate"] for name, one in strata(pope, answers).items()}
