"""The arms of an evaluation, stock, the control, and both with wrong images, and their runs."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

import attnctl
from attnctl import kernels, processors
from attnctl.apps.chosen import Chosen
from attnctl.apps.record import control_data

from .answer_file import AnswerFile
from .answering import Answerer, Reply, chat
from .bad_data import BadData, EvalError, Skips
from .items import Item, find_image
from .sampling import Sampling
from .second_look import SecondLook

__all__ = ["Arm", "Asking", "patched", "run_arm"]


@dataclass(frozen=True)
class Arm:
    """One way to answer every question.

    Attributes:
        name: e.g. "stock" or "pai".
        chosen: the controls, none for the stock model.
        look: the second look, None for none.
        shown: item whose image is shown instead, by id; None to show each item's own.
    """

    name: str
    chosen: tuple[Chosen, ...] = ()
    shown: Mapping[str, Item] | None = None
    look: SecondLook | None = None

    def facts(self) -> dict[str, Any]:
        """Return what the answers depend on: controls and second look, code, wrong images."""
        code = hashlib.sha256()
        for path in _sources(self.chosen) if self.chosen or self.look else []:
            code.update(path.read_bytes())
        swapped = None if self.shown is None else {k: v.image for k, v in self.shown.items()}
        controls = [control_data(one) for one in self.chosen]
        found = {"controls": controls, "code": code.hexdigest(), "shown": swapped}
        return found if self.look is None else {**found, "look": self.look.facts()}


def _sources(chosen: Sequence[Chosen]) -> list[Path]:
    """Return the files of code that a model runs with controls or a second look.

    attnctl's core, processors and kernels whole: a control's own file is the least of it.
    """
    parts = [attnctl, processors, kernels]
    files = {path for part in parts for path in Path(part.__path__[0]).rglob("*.py")}
    return sorted(files | {Path(inspect.getfile(type(one.control))) for one in chosen})


@dataclass(frozen=True)
class Asking:
    """How questions are put.

    Attributes:
        images: folder of the images.
        prompt: the words, "{question}" standing for the question.
        batch: questions per call.
        max_new_tokens: most tokens per answer.
        sampling: how answers are drawn; None for greedy ones.
    """

    images: Path
    prompt: str = "{question}"
    batch: int = 8
    max_new_tokens: int = 64
    sampling: Sampling | None = None

    def check(self) -> None:
        """Refuse what cannot be asked.

        Raises:
            EvalError: if a value is out of range.
        """
        if "{question}" not in self.prompt:
            raise EvalError(f"--prompt {self.prompt!r} does not hold {{question}}")
        if self.batch < 1 or self.max_new_tokens < 1:
            raise EvalError("--batch and --max-new-tokens must be 1 at least")
        if not self.images.is_dir():
            raise EvalError(f"--images {self.images} is no folder")
        if self.sampling is not None:
            self.sampling.check()


@contextlib.contextmanager
def patched(model: Any, chosen: Sequence[Chosen]) -> Iterator[None]:
    """Run a block with controls installed.

    Raises:
        EvalError: if a control was never reached though the model was called.
    """
    if not chosen:
        yield
        return
    with attnctl.patch(model, *(one.control for one in chosen)) as handle:
        yield
        for line in handle.report().lines:
            if line.steps and not line.calls and not line.forwards and not line.control.neutral:
                raise EvalError(f"{line.control} was never reached by this model's calls")


def run_arm(
    arm: Arm,
    items: Sequence[Item],
    asking: Asking,
    answerer: Answerer,
    file: AnswerFile,
    skips: Skips,
) -> None:
    """Ask what has no answer yet.

    Batches are the same whether a run was interrupted or not, since padding to another length
    may change an answer: a batch of which one answer is missing is asked as a whole.

    Raises:
        BadData: if an image cannot be read and may not be left out.
    """
    parts = [items[i : i + asking.batch] for i in range(0, len(items), asking.batch)]
    todo = [part for part in parts if file.missing(part)]
    if not todo:
        return
    with patched(answerer.model, arm.chosen):
        for part in tqdm(todo, desc=arm.name, mininterval=2.0, disable=None):
            pictures = {item.id: _picture(item, arm, asking.images, skips) for item in part}
            seen = [item for item in part if isinstance(pictures[item.id], Image.Image)]
            replies = _replies(seen, pictures, asking, answerer, arm.look)
            for item in file.missing(part):
                reply = replies.get(item.id)
                if reply is None:
                    file.add(item, {"skipped": pictures[item.id]})
                else:
                    file.add(item, {"answer": reply.text, "ended": reply.ended})


def _replies(
    items: Sequence[Item],
    pictures: Mapping[str, Any],
    asking: Asking,
    answerer: Answerer,
    look: SecondLook | None,
) -> dict[str, Reply]:
    if not items:
        return {}
    asked = [asking.prompt.replace("{question}", item.question) for item in items]
    images = [pictures[item.id] for item in items]
    if look is not None:
        replies = look.reply(answerer, images, asked, asking.max_new_tokens)
    else:
        shown = [[image] for image in images]
        draws = asking.sampling.options([item.id for item in items]) if asking.sampling else {}
        replies = answerer.reply([*map(chat, asked)], shown, asking.max_new_tokens, **draws)
    return {item.id: reply for item, reply in zip(items, replies, strict=True)}


def _picture(item: Item, arm: Arm, folder: Path, skips: Skips) -> Image.Image | str:
    """Return the image to show, or why it cannot be read."""
    shown = item if arm.shown is None else arm.shown[item.id]
    try:
        path = find_image(shown, folder)
        try:
            return Image.open(path).convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise item.bad(f"the image {path} cannot be read: {error}") from error
    except BadData as error:
        skips.bad(error)
        return str(error)
