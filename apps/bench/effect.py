"""Arms of tiny-sd3 by the dozen, for the tables of the docs; one control: `command.py`.

Every arm draws the same prompts from the same seeds. For each arm: the share of pictures that
are exact for their prompt, the detector's log-probability of the caption, the mean colour
saturation as a quality figure, and the paired difference to the first arm, each with a 95 %
bootstrap interval over the prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import attnctl

from .statistics import Interval, mean_interval, paired_interval
from .tasks.pictures import judged

__all__ = ["Arm", "Scores", "draw", "row", "run_arms", "score", "table"]


@dataclass(frozen=True)
class Arm:
    """One way to draw.

    Args:
        name: how the table calls it.
        controls: the stack; empty for stock.
        options: arguments of the pipeline call that differ from the common ones.
    """

    name: str
    controls: tuple[attnctl.Control, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Scores:
    """Per-prompt figures of one arm, each an array [n]."""

    exact: np.ndarray
    log_prob: np.ndarray
    saturation: np.ndarray

    def summary(self, stock: Scores | None = None) -> dict[str, Any]:
        """Return means, and differences to `stock`, with intervals, as plain data."""
        rows: dict[str, Any] = {}
        for name in ("exact", "log_prob", "saturation"):
            rows[name] = asdict(mean_interval(getattr(self, name)))
            if stock is not None:
                pair = paired_interval(getattr(self, name), getattr(stock, name))
                rows[f"{name}_gain"] = asdict(pair)
        return rows


@torch.no_grad()
def draw(
    pipe: Any,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    batch: int = 25,
    label: str = "",
    **options: Any,
) -> Tensor:
    """Draw one picture per prompt.

    Args:
        pipe: a shape-world pipeline.
        prompts: n prompts; prompt i starts from noise seeded with seed + i, drawn on the CPU,
            so that batch size and device do not change it.
        batch: prompts per pipeline call.
        label: text of the progress bar.
        **options: arguments of the pipeline call.

    Returns:
        RGB [n, 3, H, W] in 0 to 1, on the CPU.
    """
    pictures = []
    for start in tqdm(range(0, len(prompts), batch), desc=label, leave=False):
        part = list(prompts[start : start + batch])
        noise = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        pictures.append(pipe(part, generator=noise, output_type="pt", **options).images.cpu())
    return torch.cat(pictures).float()


def score(pictures: Tensor, prompts: Sequence[str]) -> Scores:
    """Judge pictures [n, 3, H, W] against their prompts."""
    found = judged(pictures, prompts)
    return Scores(found["exact"], found["log_prob"], found["saturation"])


def run_arms(
    pipe: Any,
    arms: Sequence[Arm],
    prompts: Sequence[str],
    *,
    seed: int = 0,
    batch: int = 25,
    show: Callable[[str, dict[str, Scores]], None] | None = None,
    **options: Any,
) -> dict[str, Scores]:
    """Return the scores of every arm by name.

    Args:
        pipe: a shape-world pipeline.
        arms: the arms; the first is the one others are compared with.
        prompts: n prompts.
        seed: as in `draw`.
        batch: as in `draw`.
        show: called after every arm with its name and the scores so far.
        **options: arguments of the pipeline call, for every arm.
    """
    pipe.set_progress_bar_config(disable=True)
    results = {}
    for arm in arms:
        call = {**options, **arm.options}
        if arm.controls:
            with attnctl.patch(pipe, *arm.controls):
                pictures = draw(pipe, prompts, seed=seed, batch=batch, label=arm.name, **call)
        else:
            pictures = draw(pipe, prompts, seed=seed, batch=batch, label=arm.name, **call)
        results[arm.name] = score(pictures, prompts)
        if show is not None:
            show(arm.name, results)
    return results


def table(results: dict[str, Scores]) -> str:
    """Return a Markdown table; differences are to the first arm."""
    lines = [
        "| arm | exact, % | gain, points | log-probability | gain | saturation |",
        "|---|---|---|---|---|---|",
    ]
    for name in results:
        lines.append(row(name, results))
    return "\n".join(lines)


def row(name: str, results: dict[str, Scores]) -> str:
    """Return one row of the table, for progress."""
    stock = next(iter(results.values()))
    return _line(name, results[name], None if results[name] is stock else stock)


def _line(name: str, scores: Scores, stock: Scores | None) -> str:
    hits = _percent(mean_interval(scores.exact))
    sure = mean_interval(scores.log_prob)
    vivid = mean_interval(scores.saturation)
    gains = ["", ""]
    if stock is not None:
        gain = paired_interval(scores.log_prob, stock.log_prob)
        gains = [
            _percent(paired_interval(scores.exact, stock.exact), sign=True),
            f"{gain.value:+.2f} [{gain.low:+.2f}, {gain.high:+.2f}]",
        ]
    return (
        f"| {name} | {hits} | {gains[0]} | {sure.value:.2f} [{sure.low:.2f}, {sure.high:.2f}] "
        f"| {gains[1]} | {vivid.value:.3f} |"
    )


def _percent(x: Interval, sign: bool = False) -> str:
    form = "{:+.1f}" if sign else "{:.1f}"
    return f"{form} [{form}, {form}]".format(100 * x.value, 100 * x.low, 100 * x.high)
