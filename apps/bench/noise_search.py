"""What InitNO's search for noise costs: a look of it, beside a stock step, at real size.

    python -m attnctl.apps.bench.noise_search --model sd1-5 --model sdxl --out search.json

UNets of real shape with random weights, CFG, one picture, as in `latent_cost`; bfloat16 on a GPU.
A look is a forward and a backward of the conditional rows with the step of Adam: the difference of
a search of many looks and one of few, over the looks between them. Arms: all of the loss, and the
words' maps alone (conflict=0, clean=0), which shows what self-attention and the blobs take.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import attnctl
from attnctl.apps.record import versions

from .cost import Inputs
from .latent_cost import WORDS, build, call_of, peak_of, pipelines

__all__ = ["ARMS", "measure", "search"]

ARMS: dict[str, dict[str, Any]] = {"all": {}, "words' maps alone": {"conflict": 0.0, "clean": 0.0}}
FEW, MANY = 2, 12


def search(looks: int, **options: Any) -> attnctl.Control:
    """Return a search that takes a number of looks, whatever it finds."""
    once: dict[str, Any] = {"scale": 0.0, "rounds": 1, "last_steps": 0, "tau_cross": 1e-9}
    return attnctl.InitNO(words=WORDS, round_steps=looks, **once, **options)


def measure(pipe: Any, inputs: Callable[[int], Inputs], rounds: int) -> dict[str, Any]:
    """Return milliseconds of a stock step and of a look by arm, and GiB of the peaks on a GPU.

    Args:
        pipe: the stock pipeline of `latent_cost.pipelines`.
        inputs: makes the UNet's arguments for n rows.
        rounds: timed runs, after a warm one.
    """
    options = call_of(pipe.unet, inputs, steps=2)
    spent: dict[str, list[float]] = {}
    peaks: dict[str, int] = {}
    for turn in range(rounds + 1):
        peaks["stock"] = peak_of(pipe, None, options)
        if turn:
            spent.setdefault("stock step", []).extend(pipe.scheduler.milliseconds)
        for name, changed in ARMS.items():
            took = []
            for looks in (FEW, MANY):
                begun = time.perf_counter()
                peaks[name] = peak_of(pipe, search(looks, **changed), options)
                took.append(time.perf_counter() - begun)
            if turn:
                look = 1e3 * (took[1] - took[0]) / (MANY - FEW)
                spent.setdefault(f"look, {name}", []).append(look)
    found: dict[str, Any] = {
        name: {"ms": round(statistics.median(times), 3)} for name, times in spent.items()
    }
    for row in found.values():
        row["of a stock step"] = round(row["ms"] / found["stock step"]["ms"], 3)
    if pipe.unet.device.type == "cuda":
        found["peak_gib"] = {name: round(peak / 2**30, 3) for name, peak in peaks.items()}
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("sd1-5", "sdxl", "sd-small"), action="append")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    cuda = torch.cuda.is_available()
    name_of_device = torch.cuda.get_device_name() if cuda else "cpu"
    data: dict[str, Any] = {"device": name_of_device, "versions": versions()}
    for name in given.model or ["sd-small"]:
        unet, inputs = build(name, *(("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)))
        data[name] = measure(pipelines(unet, inputs)[0], inputs, given.rounds)
        if given.out:
            given.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(data, indent=1))


if __name__ == "__main__":
    main()
