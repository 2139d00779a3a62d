"""Pictures of a head search: what each head does, how the objective grew, what u does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image, ImageDraw
from torch import Tensor

from attnctl.control import control
from attnctl.errors import OptionError
from attnctl.processors.headhunter.headset import Head, HeadSet
from attnctl.processors.headhunter.objective import objective
from attnctl.processors.headhunter.trials import Trials
from attnctl.sites import sites

from .lettering import lettering
from .models import load
from .pictures import PictureError, side_by_side

__all__ = ["Order", "curve", "draw_heads", "head_grid"]

US = (0.0, 0.25, 0.5, 0.75, 1.0)
_CELL, _FRAME, _MARGIN = 96, 5, 44
_PAPER, _INK, _FAINT = (255, 255, 255), (0, 0, 0), (150, 150, 150)
_LOW, _HIGH = (178, 60, 40), (20, 120, 80)


@dataclass(frozen=True)
class Order:
    """What was asked for.

    Args:
        heads: the head set's file.
        prompt: what to draw; None for the first prompt of the search.
        model: None for the search's own.
        seed: of the noise.
        out: folder of the pictures.
        grid: whether to draw one picture per head, which takes longest.
        batch: rows per denoiser call.
    """

    heads: Path
    prompt: str | None = None
    model: str | None = None
    seed: int = 0
    out: Path = Path("heads")
    grid: bool = True
    batch: int = 8


def draw_heads(order: Order, say: Callable[[str], None]) -> None:
    """Write rounds.png, sweep.png and grid.png into a folder.

    Raises:
        OptionError: if the file is no head set, or was made for another model.
        PictureError: if the folder exists and holds one of the pictures.
    """
    found = HeadSet.load(order.heads)
    names = ["sweep.png", *(["rounds.png"] if found.rounds else []), *["grid.png"] * order.grid]
    taken = [name for name in names if (order.out / name).exists()]
    if taken:
        raise PictureError(f"{order.out / taken[0]} exists; give another folder with --out")
    trials = _trials(order, found)
    order.out.mkdir(parents=True, exist_ok=True)
    made: dict[str, Callable[[], Image.Image]] = {
        "rounds.png": lambda: curve(found),
        "sweep.png": lambda: sweep(trials, found),
        "grid.png": lambda: head_grid(trials, _first_scores(found)),
    }
    for name in names:
        made[name]().save(order.out / name, optimize=True)
        say(str(order.out / name))


def _trials(order: Order, found: HeadSet) -> Trials:
    model = order.model or found.model
    prompt = order.prompt or next(iter(found.prompts), None)
    if not model or prompt is None:
        raise OptionError("the head set names no model or prompt: give --model and --prompt")
    pipe = load(model)
    found.check(sites(pipe))
    pipe.set_progress_bar_config(disable=True)
    guidance = control(found.perturbation, **{"u": 1.0, "scale": 3.0, **found.options})
    judge = objective(found.objective) if found.objective else objective("brightness")
    call = {"num_inference_steps": 20, "guidance_scale": 1.0, **found.call}
    return Trials(pipe, guidance, judge, [prompt], [order.seed], order.batch, call)  # type: ignore[arg-type]


def _first_scores(found: HeadSet) -> Mapping[Head, float]:
    """Scores of single heads: those of the first round, for later ones stand on others."""
    return found.rounds[0].scores if found.rounds else {}


# -- one picture per head ------------------------------------------------------------------


def head_grid(trials: Trials, scores: Mapping[Head, float]) -> Image.Image:
    """Draw one picture per head: layers downwards, heads to the right, framed by score.

    Args:
        trials: the pipeline and one picture.
        scores: of the heads; frames go from red (lowest) to green (highest), grey without.
    """
    pool = trials.pool
    images: list[Tensor] = []
    for at in range(0, len(pool), trials.batch):
        part = [(head,) for head in pool[at : at + trials.batch]]
        images += trials.draw(part, [0] * len(part)).float().cpu()
    layers = sorted({layer for layer, _ in pool})
    wide = 1 + max(head for _, head in pool)
    step = _CELL + _FRAME + 3
    sheet = Image.new("RGB", (_MARGIN + wide * step, _MARGIN + len(layers) * step), _PAPER)
    pen = ImageDraw.Draw(sheet)
    font, _ = lettering(14, [])
    for head in range(wide):
        pen.text((_MARGIN + head * step + _CELL // 2, 14), f"H{head}", fill=_INK, font=font)
    for row, layer in enumerate(layers):
        pen.text((8, _MARGIN + row * step + _CELL // 2), f"L{layer}", fill=_INK, font=font)
    for (layer, head), image in zip(pool, images, strict=True):
        x, y = _MARGIN + head * step, _MARGIN + layers.index(layer) * step
        frame = _colour(scores, (layer, head))
        sheet.paste(frame, (x, y, x + _CELL + _FRAME, y + _CELL + _FRAME))
        sheet.paste(_picture(image, _CELL - _FRAME), (x + _FRAME, y + _FRAME))
    return sheet


def _colour(scores: Mapping[Head, float], head: Head) -> tuple[int, ...]:
    if head not in scores:
        return _FAINT
    low, high = min(scores.values()), max(scores.values())
    part = (scores[head] - low) / ((high - low) or 1.0)
    return tuple(round(a + part * (b - a)) for a, b in zip(_LOW, _HIGH, strict=True))


def _picture(image: Tensor, side: int | None = None) -> Image.Image:
    array = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    made = Image.fromarray(array)
    return made if side is None else made.resize((side, side), Image.Resampling.BICUBIC)


# -- the objective over the rounds ---------------------------------------------------------


def curve(found: HeadSet, size: tuple[int, int] = (560, 320)) -> Image.Image:
    """Draw the scores of all heads tried in each round, the chosen ones in green."""
    every = [s for one in found.rounds for s in one.scores.values()]
    low, high = min(every), max(every)
    sheet = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(sheet)
    font, _ = lettering(14, [])
    left, right, top, bottom = 78, size[0] - 20, 40, size[1] - 40
    pen.line([(left, top), (left, bottom), (right, bottom)], fill=_FAINT)
    unit = " slope (1 is the mean size)" if found.strategy == "gradient" else ""
    pen.text((left, 12), f"{found.objective}{unit} by round; chosen: green", _INK, font)

    def height(score: float) -> float:
        return bottom - 8 - (score - low) / ((high - low) or 1.0) * (bottom - top - 16)

    for value in (low, high):
        pen.text((6, height(value) - 8), f"{value:.4g}", fill=_INK, font=font)
    for r, one in enumerate(found.rounds):
        x = left + (r + 0.5) / len(found.rounds) * (right - left)
        pen.text((x - 4, bottom + 10), str(r + 1), fill=_INK, font=font)
        for head, score in sorted(one.scores.items(), key=lambda item: item[0] in one.chosen):
            chosen = head in one.chosen
            wide = 14 if chosen else 8
            ink = _HIGH if chosen else _FAINT
            pen.line([(x - wide, height(score)), (x + wide, height(score))], fill=ink, width=2)
    return sheet


# -- the strength --------------------------------------------------------------------------


def sweep(trials: Trials, found: HeadSet, us: Sequence[float] = US) -> Image.Image:
    """Draw the head set at several strengths side by side, with the objective under each."""
    images, captions = [], []
    for u in us:
        one = replace(trials, guidance=replace(trials.guidance, u=u or 1.0))
        image = one.draw([found.heads if u else ()], [0])
        score = float(trials.objective.score(image, list(trials.prompts))[0])
        images.append(_picture(image[0].float()))
        captions.append(f"u = {u:g}: {score:.4g}")
    title = f"{trials.prompts[0]} - {trials.objective}, {len(found.heads)} heads"
    return side_by_side(images, captions, title, f"scale {trials.guidance.scale:g}")
