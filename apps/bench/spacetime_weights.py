"""Is SpaceTime's lambda worth choosing for each picture? Beside choosing the noise, on tiny-sd.

    python -m attnctl.apps.bench.spacetime_weights --n 300 --out spacetime-weights.json

Held-out prompts of two objects, these side by side (layout "row"), every arm from the same noise:
stock; each line that `fit_weights` tries; the line it chooses, with the detector's log-probability
of the prompt as its score and no parts; a line at random; and, at the same cost, the first line
from as many noises as there are lines, of which the same score chooses. The detector that chooses
is the one that judges, which flatters both choices alike.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import attnctl
from attnctl.assets import path
from attnctl.assets.world import heldout_prompts, log_prob
from attnctl.processors.steering.weights import LINES, fit_weights

from .effect import Scores, draw, row, score

__all__ = ["best_of", "measure", "similarity"]

ELSEWHERE = 100_000
"""Distance of the seeds of one draw of noise from those of the next."""


def similarity(pictures: Tensor, texts: Sequence[str]) -> Tensor:
    """Return 1 + log-probability of the texts [n], at most 1."""
    return 1 + log_prob(pictures.float(), list(texts)).to(pictures.device)


def best_of(each: Sequence[Scores], chosen: np.ndarray) -> Scores:
    """Return the scores of the arm that is chosen [n] for every prompt."""
    at = np.arange(len(chosen))
    return Scores(
        *(
            np.stack([getattr(one, name) for one in each])[chosen, at]
            for name in ("exact", "log_prob", "saturation")
        )
    )


def measure(pipe: Any, n: int, batch: int, **options: Any) -> dict[str, Scores]:
    """Return the scores of every arm by name, stock first, and print them as they come.

    Args:
        pipe: tiny-sd.
        n: prompts.
        batch: prompts per pipeline call.
        **options: arguments of the pipeline's call.
    """
    prompts = heldout_prompts(n, 2, seed=0)
    found: dict[str, Scores] = {}

    def note(name: str, scores: Scores) -> Scores:
        found[name] = scores
        print(row(name, found), flush=True)
        return scores

    def drawn(seed: int, *controls: attnctl.Control) -> Scores:
        if not controls:
            return score(draw(pipe, prompts, seed=seed, batch=batch, **options), prompts)
        with attnctl.patch(pipe, *controls):
            return score(draw(pipe, prompts, seed=seed, batch=batch, **options), prompts)

    note("stock", drawn(0))
    lines = [attnctl.SpaceTime(lam=lam, slope=slope) for lam, slope in LINES]
    each = [note(str(line), drawn(0, line)) for line in lines]
    note("the line of the best score", score(_fitted(pipe, prompts, batch, options), prompts))
    random = np.random.default_rng(0).integers(len(LINES), size=n)
    note("a line at random", best_of(each, random))
    noises = [each[0], *(drawn(i * ELSEWHERE, lines[0]) for i in range(1, len(LINES)))]
    best = np.stack([one.log_prob for one in noises]).argmax(0)
    note("the noise of the best score", best_of(noises, best))
    return found


def _fitted(pipe: Any, prompts: Sequence[str], batch: int, options: dict[str, Any]) -> Tensor:
    pictures = []
    for start in range(0, len(prompts), batch):
        part = list(prompts[start : start + batch])
        noise = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        fit = fit_weights(
            pipe, attnctl.SpaceTime(), similarity, part, lines=LINES, part=0.0, generator=noise,
            **options,
        )  # fmt: skip
        pictures.append(fit.images.cpu())
    return torch.cat(pictures).float()


def main() -> None:
    """Run from the command line."""
    from diffusers import DiffusionPipeline

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=300)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("spacetime-weights.json"))
    given = parser.parse_args()
    pipe = DiffusionPipeline.from_pretrained(path("tiny-sd")).to(given.device)
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": given.steps, "guidance_scale": 5.0}
    with torch.no_grad():
        found = measure(pipe, given.n, given.batch, **settings)
    stock = found["stock"]
    data = {
        "model": "tiny-sd",
        "n": given.n,
        "settings": settings,
        "arms": {name: scores.summary(stock) for name, scores in found.items()},
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
