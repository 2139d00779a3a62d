"""The table of the HeadHunter page: searched heads on tiny-sd3 against random ones and layers.

    python -m attnctl.apps.bench.heads_table --out tables

Searches with each strategy from several seeds, then scores every set found, as many random sets
of the same size, every full layer and all heads on held-out prompts and other seeds. Minutes on
a GPU, a day on a CPU.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import attnctl
from attnctl.apps.models import load
from attnctl.assets.world import heldout_prompts, trained_prompts
from attnctl.processors.headhunter import HeadHunter
from attnctl.processors.headhunter.headset import Head
from attnctl.processors.headhunter.objective import objective
from attnctl.processors.headhunter.trials import Trials

from .statistics import paired_interval

SETTINGS = (("redness", 3.0), ("world", 1.0), ("world", 3.0))
CALL: dict[str, Any] = {
    "num_inference_steps": 20,
    "guidance_scale": 1.0,
    "max_sequence_length": 16,
}
SEARCH_SEEDS = (0, 1000, 2000)
RANDOM = 6
FAR = 50_000
"""Seed of the first scored picture, away from those of the searches."""

Sets = dict[str, tuple[Head, ...]]


def searched(pipe: Any, name: str, scale: float, rounds: int, top_k: int, batch: int) -> Sets:
    """Sets found by every strategy from every seed, by "strategy seed"."""
    prompts = trained_prompts(20, 2, seed=11)
    found: Sets = {}
    for strategy in ("greedy", "gradient", "halving"):
        for seed in SEARCH_SEEDS:
            guidance = attnctl.SoftPAG(scale=scale, u=1.0)
            hunter = HeadHunter(name, guidance, strategy, rounds, top_k, batch=batch)
            seeds = range(seed, seed + len(prompts))
            made = hunter.search(pipe, prompts, seeds=seeds, **CALL)
            found[f"{strategy} {seed}"] = made.heads
            print(name, scale, strategy, seed, made.forwards, made.heads, flush=True)
    return found


def others(pool: list[Head], size: int) -> Iterator[tuple[str, tuple[Head, ...]]]:
    """Random sets of the same size, every full layer, all heads."""
    source = random.Random(5)
    for i in range(RANDOM):
        yield f"random {i}", tuple(source.sample(pool, size))
    for layer in sorted({layer for layer, _ in pool}):
        yield f"layer {layer}", tuple(head for head in pool if head[0] == layer)
    yield "all", tuple(pool)


def gains(pipe: Any, name: str, scale: float, sets: Sets, n: int, batch: int) -> dict[str, Any]:
    """Objective minus stock's per picture ``[n]``, by set."""
    prompts = heldout_prompts(n, 2, seed=77)
    guidance = attnctl.SoftPAG(scale=scale, u=1.0)
    trials = Trials(
        pipe, guidance, objective(name), prompts, range(FAR, FAR + n), batch, dict(CALL)
    )
    scores = trials.score([(), *sets.values()]).numpy()
    return dict(zip(sets, scores[1:] - scores[0], strict=True))


def rows(found: dict[str, np.ndarray]) -> Iterator[tuple[str, str]]:
    """Mean gain with its interval: of the searches of a strategy, random sets, best layer, all."""
    for kind in ("greedy", "gradient", "halving", "random"):
        group = [gain for name, gain in found.items() if name.startswith(kind)]
        yield kind, _interval(np.mean(group, axis=0))
    layers = {name: gain for name, gain in found.items() if name.startswith("layer")}
    best = max(layers, key=lambda name: float(layers[name].mean()))
    yield f"best layer ({best.split()[1]})", _interval(layers[best])
    yield "all heads", _interval(found["all"])


def _interval(gain: np.ndarray) -> str:
    found = paired_interval(gain, np.zeros_like(gain))
    return f"{found.value:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--batch", type=int, default=640)
    parser.add_argument("--out", type=Path, default=Path("."))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    pipe = load("tiny-sd3", dtype="float32")
    pipe.set_progress_bar_config(disable=True)
    data: dict[str, Any] = {}
    for name, scale in SETTINGS:
        sets = searched(pipe, name, scale, given.rounds, given.top_k, given.batch)
        pool = Trials(pipe, attnctl.SoftPAG(), objective(name), [""], [0], call=dict(CALL)).pool
        sets |= dict(others(pool, given.rounds * given.top_k))
        found = gains(pipe, name, scale, sets, given.n, given.batch)
        data[f"{name}, w = {scale:g}"] = {
            key: {"heads": sets[key], "gain": gain.tolist()} for key, gain in found.items()
        }
        for row in rows(found):
            print(f"| {name}, w = {scale:g} | {row[0]} | {row[1]} |", flush=True)
        (given.out / "heads.json").write_text(json.dumps(data))


if __name__ == "__main__":
    main()
