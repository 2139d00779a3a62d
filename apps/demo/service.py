"""What the page does when a button is pressed, without anything of the page itself."""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from attnctl.apps.answer_heatmap import answer_sheet, words_shown
from attnctl.apps.answer_heatmap import captions as answer_captions
from attnctl.apps.chosen import Chosen
from attnctl.apps.generate import Settings
from attnctl.apps.heatmap import clip, sheet, split_words
from attnctl.apps.pictures import png_bytes
from attnctl.apps.videos import mp4_bytes
from attnctl.errors import OptionError

from .code import answer_code, draw_code
from .heads import Grid
from .house import Guest, House, Kind
from .limits import Limits
from .runs import (
    HEAD_ROWS,
    Answer,
    answer,
    answer_record,
    call,
    draw_heads,
    head_looks,
    map_answer,
    map_words,
    take,
)
from .shelf import Shelf
from .stack import read_stack
from .summary import summary
from .uploads import read_upload
from .watch import Watch

if TYPE_CHECKING:
    from PIL.Image import Image

    from attnctl import AnswerMaps

__all__ = ["Asked", "Made", "Service"]

Tell = Callable[[str, int, int], None]
_SHOWN = 24
"""Words of an answer with a map of their own."""
_LOOKS = 2
"""Calls of a model that look for sinks before its answer."""


@dataclass(frozen=True)
class Asked:
    """What a visitor asks for, as the page gives it.

    Args:
        session: of the visitor's page, to cancel by.
        tell: is given (what runs, steps done, steps in all).
        model: one of the page's names.
        text: the prompt or the question.
        stack: the controls, one per line.
        settings: values of `Settings`; None for the model's own.
    """

    session: str
    tell: Tell
    model: Any
    text: Any
    stack: Any
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Made:
    """What came out.

    Args:
        files: on the shelf, by name: "stock", "controlled"; of heat maps each word.
        report: Markdown.
        code: Python that does the same.
        texts: answers by name.
        captions: of the files, where they have any.
    """

    files: dict[str, str]
    report: str
    code: str
    texts: dict[str, str] = field(default_factory=dict)
    captions: dict[str, str] = field(default_factory=dict)


class Service:
    """The page's work.

    Args:
        house: the models.
        shelf: the output folder.
        limits: what visitors may ask for.
    """

    def __init__(self, house: House, shelf: Shelf, limits: Limits) -> None:
        self.house, self.shelf, self.limits = house, shelf, limits
        self._watches: dict[str, set[Watch]] = collections.defaultdict(set)
        self._lock = threading.Lock()

    def cancel(self, session: str) -> int:
        """End the runs of a visitor; return how many there were."""
        with self._lock:
            watches = list(self._watches.get(session, ()))
        for watch in watches:
            watch.cancel()
        return len(watches)

    def draw(self, asked: Asked, kind: Kind) -> Made:
        """Draw a picture or film a video, stock and, if there are controls, controlled.

        Raises:
            AttnctlError: if something of it cannot be done.
        """
        guest, settings, arguments, chosen = self._order(asked, kind)
        made = {}
        with self._running(asked) as watch:
            for name, stack in _stacks(chosen).items():
                self._tell(watch, asked, name)
                with watch.over(guest.target):
                    made[name] = take(guest, arguments, settings, stack)
        files = {}
        for name, one in made.items():
            data, ending = one.file()
            files[name] = self.shelf.put(data, f"{name}.{ending}")
        last = list(made.values())[-1]
        report = summary(chosen, last.report, made["stock"].seconds, last.seconds)
        code = draw_code(guest.name, arguments, settings.seed, chosen, kind == "video")
        return Made(files, report, code)

    def map_words(self, asked: Asked, words: Any, kind: Kind = "image") -> Made:
        """Draw a picture or film a video, and lay a heat map of each word over it.

        Raises:
            AttnctlError: if something of it cannot be done.
        """
        guest, settings, arguments, chosen = self._order(asked, kind)
        wanted = split_words([self.limits.text("list of words", words, needed=False)])
        if len(wanted) > self.limits.words:
            raise OptionError(f"{len(wanted)} words; at most {self.limits.words}")
        with self._running(asked) as watch:
            self._tell(watch, asked, "maps")
            with watch.over(guest.target):
                found, data = map_words(guest, arguments, settings.seed, chosen, wanted)
        titles = data["prompt"], f"{guest.name}, seed {settings.seed}"
        files = {"sheet": self.shelf.put(png_bytes(sheet(found, *titles), data), "heatmap.png")}
        captions: dict[str, str] = {}
        code = draw_code(guest.name, arguments, settings.seed, chosen, kind == "video")
        if kind == "video":
            video = mp4_bytes(clip(found, *titles), data["fps"], data)
            files["clip"] = self.shelf.put(video, "heatmap.mp4")
            return Made(files, str(found.report), code)
        for word, heat in found.items():
            over = found.overlay(word)
            files[word] = self.shelf.put(png_bytes(over, data), "word.png")
            captions[word] = f"{word}: {float(heat[0].max()):.1%}"
        return Made(files, str(found.report), code, captions=captions)

    def draw_heads(self, asked: Asked, kind: Kind = "image") -> Grid:
        """Draw what each head does.

        Raises:
            AttnctlError: if something of it cannot be done.
        """
        guest, settings, arguments, _ = self._order(asked, kind)
        with self._running(asked) as watch:
            batches = math.ceil(len(guest.heads) / HEAD_ROWS[kind])
            steps = itertools.count(1)
            watch.tell = lambda _, total: asked.tell("heads", next(steps), total * batches)
            with watch.over(guest.target):
                return draw_heads(guest, arguments, settings.seed, self.limits)

    def answer(self, asked: Asked, upload: Any, tokens: Any) -> Made:
        """Ask a question about an uploaded picture, stock and controlled.

        Raises:
            AttnctlError: if something of it cannot be done.
        """
        guest, picture, question, most, chosen = self._question(asked, upload, tokens)
        said: dict[str, Answer] = {}
        with self._running(asked) as watch:
            for name, stack in _stacks(chosen).items():
                self._tell(watch, asked, name)
                with watch.over(guest.target, most):
                    said[name] = answer(guest, picture, question, most, stack)
        data = answer_record(guest, question, most, chosen, said)
        file = self.shelf.put(json.dumps(data, indent=1).encode(), "answer.json")
        last = list(said.values())[-1]
        report = summary(chosen, last.report, said["stock"].seconds, last.seconds)
        texts = {name: one.text for name, one in said.items()}
        return Made({"record": file}, report, answer_code(guest.name, most, chosen), texts)

    def map_answer(self, asked: Asked, upload: Any, tokens: Any) -> Made:
        """Ask a question about an uploaded picture, and map where each word looks.

        Raises:
            AttnctlError: if something of it cannot be done.
        """
        guest, picture, question, most, chosen = self._question(asked, upload, tokens)
        found = self._mapped(asked, guest, picture, question, most, chosen)
        shown = words_shown(found)[:_SHOWN]
        data = answer_record(guest, question, most, chosen, {}) | {"answer": found.answer}
        whole = answer_sheet(found, shown, question, guest.name)
        files = {"sheet": self.shelf.put(png_bytes(whole, data), "heatmap.png")}
        captions = {}
        for i, caption in zip(shown, answer_captions(found, shown), strict=True):
            files[f"{i}"] = self.shelf.put(png_bytes(found.overlay(i), data), "word.png")
            captions[f"{i}"] = caption
        sinks = int(found.sinks.sum())
        report = f"{found.report}\n\n" + (
            f"{sinks} image tokens are sinks, framed in white."
            if sinks
            else "No image token is a sink here."
        )
        code = answer_code(guest.name, most, chosen)
        return Made(files, report, code, {"answer": found.answer}, captions)

    def look_heads(self, asked: Asked, upload: Any, tokens: Any) -> Grid:
        """Ask a question about an uploaded picture, and draw where each head looks.

        Raises:
            AttnctlError: if something of it cannot be done.
        """
        order = self._question(asked, upload, tokens)
        return head_looks(self._mapped(asked, *order))

    def _mapped(
        self,
        asked: Asked,
        guest: Guest,
        picture: Image,
        question: str,
        most: int,
        chosen: tuple[Chosen, ...],
    ) -> AnswerMaps:
        with self._running(asked) as watch:
            self._tell(watch, asked, "maps")
            with watch.over(guest.target, most + _LOOKS):
                return map_answer(guest, picture, question, most, chosen)

    def _question(
        self, asked: Asked, upload: Any, tokens: Any
    ) -> tuple[Guest, Image, str, int, tuple[Chosen, ...]]:
        guest = self.house.guest(asked.model, "vlm")
        question = self.limits.text("question", asked.text)
        most = _whole("tokens", tokens)
        if most is None or not 1 <= most <= self.limits.tokens:
            raise OptionError(f"tokens={tokens}: expected 1 to {self.limits.tokens}")
        picture = read_upload(upload, self.limits)
        return guest, picture, question, most, read_stack(asked.stack, guest.target, self.limits)

    def _order(
        self, asked: Asked, kind: Kind
    ) -> tuple[Guest, Settings, dict[str, Any], tuple[Chosen, ...]]:
        guest = self.house.guest(asked.model, kind)
        prompt = self.limits.text("prompt", asked.text)
        settings = self._settings(asked.settings)
        arguments = call(guest, prompt, settings, self.limits)
        return guest, settings, arguments, read_stack(asked.stack, guest.target, self.limits)

    def _settings(self, values: dict[str, Any]) -> Settings:
        numbers = {k: _whole(k, values.get(k)) for k in ("steps", "width", "height", "frames")}
        guidance = values.get("guidance_scale")
        if guidance is not None and not math.isfinite(_number("guidance", guidance)):
            raise OptionError(f"guidance {guidance} is no usable number")
        negative = self.limits.text("negative prompt", values.get("negative_prompt"), False)
        seed = _whole("seed", values.get("seed")) or 0
        return Settings(
            negative_prompt=negative or None, seed=seed, guidance_scale=guidance, **numbers
        )

    @contextlib.contextmanager
    def _running(self, asked: Asked) -> Iterator[Watch]:
        """Wait for the slot, then watch over what is done in the block."""
        watch = Watch(self.limits.seconds)
        with self._lock:
            self._watches[asked.session].add(watch)
        try:
            with self.house.turn():
                watch.start()
                yield watch
        finally:
            with self._lock:
                self._watches[asked.session].discard(watch)
                if not self._watches[asked.session]:
                    del self._watches[asked.session]

    @staticmethod
    def _tell(watch: Watch, asked: Asked, name: str) -> None:
        watch.tell = lambda done, total: asked.tell(name, done, total)


def _stacks(chosen: Sequence[Chosen]) -> dict[str, Sequence[Chosen]]:
    """Return the stacks that are run: always stock, for the comparison."""
    return {"stock": (), "controlled": chosen} if chosen else {"stock": ()}


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise OptionError(f"{name}={value!r} is no number")
    return float(value)


def _whole(name: str, value: Any) -> int | None:
    """Return a whole number, None for an empty field.

    Raises:
        OptionError: if it is none.
    """
    if value is None:
        return None
    number = _number(name, value)
    if not math.isfinite(number) or number != int(number):
        raise OptionError(f"{name}={value} is no whole number")
    return int(number)
