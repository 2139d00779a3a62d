"""Runs of the page's models: a picture or a video, heat maps, an answer, the head grid."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image, fromarray

import attnctl
from attnctl.apps.chosen import Chosen
from attnctl.apps.eval.answering import chat
from attnctl.apps.generate import Settings, call_arguments, controlled, draw_rows, recommended
from attnctl.apps.pictures import png_bytes
from attnctl.apps.record import control_data, line_data, record, versions
from attnctl.apps.videos import FPS, mp4_bytes
from attnctl.errors import OptionError

from .heads import Grid
from .house import Guest, Kind
from .limits import Limits

__all__ = [
    "Answer",
    "Take",
    "answer",
    "answer_record",
    "call",
    "draw_heads",
    "head_looks",
    "map_answer",
    "map_words",
    "take",
]

HEAD_STEPS: dict[Kind, int] = {"image": 6, "video": 4}
HEAD_FRAMES = 5
"""Steps of a head's sketch, and frames, of which the middle one is shown."""
HEAD_ROWS: dict[Kind, int] = {"image": 8, "video": 2}
"""How many sketches are drawn at once."""


@dataclass(frozen=True)
class Take:
    """A picture or a video.

    Args:
        frames: one picture, or those of the video.
        record: how it was made.
        seconds: it took.
        report: what the controls touched, None without controls.
    """

    frames: tuple[Image, ...]
    record: dict[str, Any]
    seconds: float
    report: attnctl.Report | None

    def file(self) -> tuple[bytes, str]:
        """Return the file with the record inside, and its ending."""
        if "fps" in self.record:
            return mp4_bytes(self.frames, self.record["fps"], self.record), "mp4"
        return png_bytes(self.frames[0], self.record), "png"


@dataclass(frozen=True)
class Answer:
    """What a vision-language model said, with how long it took and what the controls touched."""

    text: str
    seconds: float
    report: attnctl.Report | None


def call(guest: Guest, prompt: str, settings: Settings, limits: Limits) -> dict[str, Any]:
    """Return the pipeline's call for a prompt, every default written out.

    Raises:
        AttnctlError: if the model cannot do it, or it is too large.
    """
    arguments = call_arguments(guest.tool, prompt, recommended(settings, guest.name))
    limits.call(arguments)
    return arguments


def take(
    guest: Guest, arguments: dict[str, Any], settings: Settings, chosen: Sequence[Chosen]
) -> Take:
    """Draw a picture or film a video.

    Args:
        guest: a model for pictures or videos.
        arguments: of `call`.
        settings: the seed and the frames per second are used.
        chosen: controls.
    """
    name, start = "controlled" if chosen else "stock", time.perf_counter()
    with controlled(guest.tool, chosen) as handle:
        (row,) = draw_rows(guest.tool, arguments, [settings.seed], name)
        report = handle.report() if handle else None
    seconds = time.perf_counter() - start
    frames = (row,) if isinstance(row, Image) else tuple(row)
    data = record(guest.tool, arguments, settings.seed, chosen, {name: frames[0]}, report)
    if guest.kind == "video":
        data |= {"frames": len(frames), "fps": fps_of(guest, settings)}
    return Take(frames, data, seconds, report)


def map_words(
    guest: Guest,
    arguments: dict[str, Any],
    seed: int,
    chosen: Sequence[Chosen],
    words: Sequence[str],
) -> tuple[attnctl.Heatmaps, dict[str, Any]]:
    """Draw a picture or film a video and map its words; return the maps and the record.

    Args:
        guest: a model for pictures or videos.
        arguments: of `call`.
        seed: of the noise.
        chosen: controls, at work while the maps are read.
        words: what to map; none for the concepts of the prompt.
    """
    noise = torch.Generator("cpu").manual_seed(seed)
    with controlled(guest.tool, chosen):
        found = attnctl.heatmaps(
            guest.tool, words=list(words) or None, generator=noise, **arguments
        )
    pictures = {"picture": found.images[0][0]}
    data = record(guest.tool, arguments, seed, chosen, pictures, found.report)
    if guest.kind == "video":
        data |= {"frames": len(found.images[0]), "fps": fps_of(guest)}
    return found, {**data, "words": list(found)}


def fps_of(guest: Guest, settings: Settings | None = None) -> int:
    """Return at how many frames per second a model's videos are shown."""
    return recommended(settings or Settings(), guest.name).fps or FPS


def draw_heads(guest: Guest, arguments: dict[str, Any], seed: int, limits: Limits) -> Grid:
    """Draw what the perturbation of each single head does, and return the grid of pictures.

    Raises:
        OptionError: if the model has more heads than the page allows.
    """
    from attnctl.control import control
    from attnctl.processors.headhunter.headset import HeadSet
    from attnctl.processors.headhunter.objective import objective
    from attnctl.processors.headhunter.trials import Trials

    call = {k: v for k, v in arguments.items() if k not in ("prompt", "negative_prompt")}
    # sketches: without CFG and with few steps a head is told from its neighbours all the same
    call |= {"num_inference_steps": min(HEAD_STEPS[guest.kind], call["num_inference_steps"])}
    call |= {"guidance_scale": 1.0} if "guidance_scale" in call else {}
    if "num_frames" in call:
        call["num_frames"] = min(HEAD_FRAMES, call["num_frames"])
    guidance = control(HeadSet.perturbation, scale=3.0, u=1.0)
    judge = objective("brightness")  # Trials needs one; nothing is scored here
    prompt = arguments["prompt"]
    rows = HEAD_ROWS[guest.kind]
    trials = Trials(guest.tool, guidance, judge, [prompt], [seed], rows, call)  # type: ignore[arg-type]
    pool = trials.pool
    if len(pool) > limits.heads:
        raise OptionError(f"the model has {len(pool)} heads; this page draws {limits.heads}")
    cells: list[Image] = []
    for at in range(0, len(pool), trials.batch):
        part = [(head,) for head in pool[at : at + trials.batch]]
        drawn = trials.draw(part, [0] * len(part)).float().cpu()
        drawn = drawn[:, drawn.shape[1] // 2] if drawn.ndim == 5 else drawn
        cells += (Grid.cell(_picture(one)) for one in drawn)
    return Grid(tuple(pool), tuple(cells))


def answer(
    guest: Guest, picture: Image, question: str, tokens: int, chosen: Sequence[Chosen]
) -> Answer:
    """Ask a question about a picture; greedily, so that the answer is the same every time."""
    start, report = time.perf_counter(), None
    if chosen:
        with attnctl.patch(guest.target, *(one.control for one in chosen)) as handle:
            (said,) = guest.tool.reply([chat(question)], [[picture]], tokens)
            report = handle.report()
    else:
        (said,) = guest.tool.reply([chat(question)], [[picture]], tokens)
    return Answer(said.text, time.perf_counter() - start, report)


def _picture(image: torch.Tensor) -> Image:
    """Return a picture [3, H, W] in 0 to 1."""
    array = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return fromarray(array)


def map_answer(
    guest: Guest, picture: Image, question: str, tokens: int, chosen: Sequence[Chosen]
) -> attnctl.AnswerMaps:
    """Ask a question about a picture, and read where each word of the answer looks."""
    controls = (one.control for one in chosen)
    return attnctl.answer_maps(
        guest.target, guest.tool.processor, picture, question, *controls,
        max_new_tokens=tokens, pad_token_id=guest.tool.pad,
    )  # fmt: skip


def head_looks(found: attnctl.AnswerMaps) -> Grid:
    """Return the grid of heads, each with what it looks at on average over the answer."""
    small = dataclasses.replace(found, image=Grid.cell(found.image))
    cells = (small.over(heat, framed=False) for heat in found.heads.values())
    return Grid(tuple(found.heads), tuple(cells))


def answer_record(
    guest: Guest, question: str, tokens: int, chosen: Sequence[Chosen], said: dict[str, Answer]
) -> dict[str, Any]:
    """Return how answers were made, as JSON values."""
    lines = [line for one in said.values() if one.report for line in one.report.lines]
    return {
        "model": guest.name,
        "question": question,
        "max_new_tokens": tokens,
        "controls": [control_data(one) for one in chosen],
        "answers": {name: one.text for name, one in said.items()},
        "report": [line_data(line) for line in lines],
        "versions": versions(),
    }
