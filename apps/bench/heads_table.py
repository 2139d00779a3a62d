"""The tables of the HeadHunter page: searched heads on tiny-sd3 against random ones and layers.

    python -m attnctl.apps.bench.heads_table --n 500 --out tables
    python -m attnctl.apps.bench.heads_table --sweep --n 500 --out tables

The first searches with each strategy from several seeds, then scores every set found, as many
random sets of the same size, every full layer and all heads on held-out prompts and other seeds.
`--only` takes one of the settings, so that they can run beside each other; `--beside FILE`
scores the sets of an earlier table too, such as greedy's, which take long to find; `--block`
takes other pictures, for what was chosen by looking at those of a table. The second
scores the shipped redness set at several strengths u. Minutes on a GPU, a day on a CPU.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch

import attnctl
from attnctl.apps.models import load
from attnctl.assets.world import heldout_prompts, trained_prompts
from attnctl.processors.headhunter import HeadHunter
from attnctl.processors.headhunter.headset import Head, HeadSet
from attnctl.processors.headhunter.objective import objective
from attnctl.processors.headhunter.trials import Trials

from .statistics import Interval, mean_interval, ratio_interval

SETTINGS = (("redness", 3.0), ("world", 1.0), ("world", 3.0))
STRATEGIES = ("greedy", "gradient", "halving")
CALL: dict[str, Any] = {
    "num_inference_steps": 20,
    "guidance_scale": 1.0,
    "max_sequence_length": 16,
}
APART = 1000
"""Between the seeds of one search's first picture and of the next's."""
RANDOM = 6
STRENGTHS = (0.25, 0.5, 0.75, 1.0)
FAR, NEXT = 50_000, 10_000
"""Seed of the first scored picture, away from those of the searches, and between blocks."""
PART = 0.95
"""Of greedy's gain, what the cheap strategies are asked for."""

Sets = dict[str, tuple[Head, ...]]
Facts = dict[str, Any]


def setting_name(name: str, scale: float) -> str:
    """Return what a setting is called in files and on the command line."""
    return f"{name}:{scale:g}"


def searched(pipe: Any, name: str, scale: float, given: argparse.Namespace) -> tuple[Sets, Facts]:
    """Return the sets found by every strategy from every seed, and what each search took."""
    prompts = trained_prompts(20, 2, seed=11)
    sets: Sets = {}
    forwards: Facts = {}
    for strategy in given.strategies.split(","):
        for seed in range(0, APART * given.searches, APART):
            guidance = attnctl.SoftPAG(scale=scale, u=1.0)
            hunter = HeadHunter(
                name, guidance, strategy, given.rounds, given.top_k, budget=given.budget,
                batch=given.batch, slopes=given.slopes,
            )  # fmt: skip
            seeds = range(seed, seed + len(prompts))
            made = hunter.search(pipe, prompts, seeds=seeds, progress=False, **CALL)
            key = f"{strategy} {seed}"
            sets[key], forwards[key] = made.heads, made.forwards
            print(name, scale, key, made.forwards, made.heads, flush=True)
    return sets, forwards


def earlier(file: Path, setting: str) -> Sets:
    """Return the sets that an earlier table's file holds for a setting."""
    written: dict[str, str] = json.loads(file.read_text())[setting]["sets"]
    pairs = {key: re.findall(r"L(\d+)H(\d+)", heads) for key, heads in written.items()}
    return {key: tuple((int(a), int(b)) for a, b in heads) for key, heads in pairs.items()}


def others(pool: list[Head], size: int) -> Iterator[tuple[str, tuple[Head, ...]]]:
    """Random sets of the same size, every full layer, all heads."""
    source = random.Random(5)
    for i in range(RANDOM):
        yield f"random {i}", tuple(source.sample(pool, size))
    for layer in sorted({layer for layer, _ in pool}):
        yield f"layer {layer}", tuple(head for head in pool if head[0] == layer)
    yield "all", tuple(pool)


def trials(pipe: Any, name: str, scale: float, u: float, given: argparse.Namespace) -> Trials:
    """Return what draws and scores the held-out pictures of a block."""
    guidance = attnctl.SoftPAG(scale=scale, u=u)
    prompts = heldout_prompts(given.n, 2, seed=77 + given.block)
    first = FAR + NEXT * given.block
    seeds = range(first, first + given.n)
    return Trials(pipe, guidance, objective(name), prompts, seeds, given.batch, dict(CALL))


def gains(judge: Trials, sets: Sequence[tuple[Head, ...]]) -> np.ndarray:
    """Return the objective minus stock's per set and picture ``[C, n]``."""
    scores: np.ndarray = judge.score([(), *sets]).numpy()
    return scores[1:] - scores[0]


def rows(found: dict[str, np.ndarray]) -> Iterator[Facts]:
    """Gain by kind: the mean over the searches of a strategy, over random sets, best layer, all.

    With greedy among them, also each strategy's part of greedy's gain, and its gain less 95 % of
    greedy's picture by picture. Intervals are over pictures; `each` shows how searches differ.
    """
    kinds: dict[str, list[np.ndarray]] = {}
    for name, gain in found.items():
        kinds.setdefault(name.split()[0], []).append(gain)
    if "layer" in kinds:
        best = max(range(len(kinds["layer"])), key=lambda i: float(kinds["layer"][i].mean()))
        kinds[f"best layer ({best})"] = [kinds.pop("layer")[best]]
    greedy = np.mean(kinds["greedy"], axis=0) if "greedy" in kinds else None
    for kind, group in kinds.items():
        mean = np.mean(group, axis=0)
        row: Facts = {"kind": kind, "gain": told(mean_interval(mean))}
        row["each"] = [round(float(gain.mean()), 5) for gain in group]
        if greedy is not None and kind in STRATEGIES[1:]:
            row["of greedy"] = told(ratio_interval(mean, greedy))
            row["less 95 % of greedy"] = told(mean_interval(mean - PART * greedy))
        yield row


def told(found: Interval) -> list[float]:
    """Return value, low and high, rounded for a file."""
    return [round(x, 5) for x in (found.value, found.low, found.high)]


def table(pipe: Any, name: str, scale: float, given: argparse.Namespace) -> Facts:
    """Search and score one setting."""
    sets, forwards = searched(pipe, name, scale, given)
    if given.beside:
        sets |= earlier(given.beside, setting_name(name, scale))
    judge = trials(pipe, name, scale, 1.0, given)
    if not given.searched_only:
        sets |= dict(others(judge.pool, given.rounds * given.top_k))
    found = dict(zip(sets, gains(judge, list(sets.values())), strict=True))
    made = list(rows(found))
    for row in made:
        print(f"| {name}, w = {scale:g} | {json.dumps(row)[1:-1]} |", flush=True)
    written = {key: " ".join(f"L{a}H{b}" for a, b in heads) for key, heads in sets.items()}
    return {"rows": made, "forwards": forwards, "sets": written}


def sweep(pipe: Any, given: argparse.Namespace) -> list[Facts]:
    """Gain in redness of the shipped set by strength u, and what each u adds to the one before."""
    folder = Path(str(resources.files("attnctl.presets")))
    heads = HeadSet.load(folder / "heads" / "tiny-sd3-redness.json").heads
    stock = trials(pipe, "redness", 3.0, 1.0, given).score([()]).numpy()[0]
    found: list[Facts] = []
    before = np.zeros(given.n)
    for u in STRENGTHS:
        gain = trials(pipe, "redness", 3.0, u, given).score([heads]).numpy()[0] - stock
        step = told(mean_interval(gain - before))
        found.append({"u": u, "gain": told(mean_interval(gain)), "over the last": step})
        print(json.dumps(found[-1]), flush=True)
        before = gain
    return found


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=300)
    parser.add_argument("--block", type=int, default=0, help="of held-out pictures")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--batch", type=int, default=640)
    parser.add_argument("--budget", type=float, default=0.05)
    parser.add_argument("--slopes", type=float, default=0.75, help="part of halving's forwards")
    parser.add_argument("--searches", type=int, default=3, help="by each strategy")
    parser.add_argument("--strategies", default=",".join(STRATEGIES))
    known = [setting_name(*one) for one in SETTINGS]
    parser.add_argument("--only", choices=known, action="append")
    parser.add_argument("--searched-only", action="store_true", help="no random sets, no layers")
    parser.add_argument("--beside", type=Path, help="score the sets of this earlier table too")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("."))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    pipe = load("tiny-sd3", dtype="float32")
    pipe.set_progress_bar_config(disable=True)
    names = ("n", "block", "rounds", "top_k", "budget", "slopes", "searches")
    facts = {k: getattr(given, k) for k in names}
    data: Facts = {**facts, "device": str(pipe.device), "torch": torch.__version__}
    if torch.cuda.is_available():
        data["device"] = torch.cuda.get_device_name()
    if given.sweep:
        data["sweep"] = sweep(pipe, given)
        (given.out / "heads-sweep.json").write_text(json.dumps(data, indent=1) + "\n")
        return
    for name, scale in SETTINGS:
        key = setting_name(name, scale)
        if given.only is None or key in given.only:
            data[key] = table(pipe, name, scale, given)
            file = f"heads-{key.replace(':', '-')}.json" if given.only else "heads.json"
            (given.out / file).write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
