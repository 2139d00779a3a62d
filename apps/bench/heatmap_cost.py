"""What reading heat maps costs beside the untouched pipeline, in one run.

    python -m attnctl.apps.bench.heatmap_cost --model sd1-5 --model sdxl --out cost.json

UNets of real shape with random weights draw one picture with CFG, or several (`--pictures 4`),
as in `latent_cost`. Arms run in turn, in another order in every round; the first steps of a run,
in which what does not change is worked out, are left out:

- stock: StableDiffusionPipeline;
- tap: a control that is asked at every cross-attention site and only goes on;
- every site: maps of two words read at every site and step, the default of `attnctl.HeatMap`;
- up: at the sites of the second half only (heads="up");
- torch: at every site, with the kernel switched off; `--without torch` leaves it out.

To read: "paired / stock", which compares an arm's steps with stock's of the same round and takes
the median over the rounds, so that other work on the processor, which comes and goes, falls on
both; by the median step of a round and by its least. "range" is where the middle half of the
rounds lies. "step / stock" and "least / stock" compare all steps at once. On a CPU there is no
kernel, and no peak of memory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor

import attnctl
from attnctl.kernels.lse import columns
from attnctl.records import AttentionCall

from .cost import Inputs
from .latent_cost import WORDS, build, call_of, peak_of, pipelines

__all__ = ["arms", "figures", "measure", "memory", "order"]

SKIPPED = 2
"""Steps of a run that are not timed."""
TORCH = "torch"
SIDES = (1, 1.5, 2)
"""Sides of the pictures for `memory`, over the model's own."""


class Tap(attnctl.Control):
    """Is asked everywhere and does nothing."""

    name: ClassVar[str] = "tap"
    kinds: ClassVar[tuple[str, ...]] = ("cross", "joint")

    def attend(self, call: AttentionCall) -> Tensor:
        """Return the stock output."""
        return call.proceed()


def arms() -> dict[str, attnctl.Control | None]:
    """Return the controls by arm, None for none."""

    def maps(heads: str = "all") -> attnctl.HeatMap:
        return attnctl.HeatMap(WORDS, sink=lambda maps: None, heads=heads)

    return {
        "stock": None,
        "tap": Tap(),
        "every site": maps(),
        "up": maps("up"),
        TORCH: maps(),
    }


def without_kernel(off: bool) -> AbstractContextManager[Any]:
    """Leave the kernel out if `off`."""
    if not off:
        return contextlib.nullcontext()
    return mock.patch.object(columns, "kernels_on", lambda device, module: None)


def measure(
    pipe: Any,
    inputs: Callable[[int], Inputs],
    *,
    steps: int,
    rounds: int,
    pictures: int = 1,
    without: Collection[str] = (),
) -> dict[str, Any]:
    """Return by arm milliseconds a step and the ratios of the module docstring.

    Args:
        pipe: from `latent_cost.pipelines`.
        inputs: makes the UNet's arguments for n rows.
        steps: of a run.
        rounds: timed runs after a warm one.
        pictures: drawn in one call.
        without: arms that are left out.
    """
    every = {name: control for name, control in arms().items() if name not in without}
    spent: dict[str, list[list[float]]] = {name: [] for name in every}
    peaks: dict[str, int] = {}
    options = call_of(pipe.unet, inputs, steps, pictures=pictures)
    for turn in range(rounds + 1):
        for name in order(list(every), turn):
            with without_kernel(name == TORCH):
                peaks[name] = peak_of(pipe, every[name], options)
            if turn:
                spent[name].append(pipe.scheduler.milliseconds[SKIPPED - 1 :])
    found = figures(spent)
    for name, peak in peaks.items():
        if peak:
            found[name]["peak_gib"] = round(peak / 2**30, 4)
    return found


def order(names: list[str], turn: int) -> list[str]:
    """Return the arms in the order of a round: begun with each in turn, and then backwards."""
    at = turn // 2 % len(names)
    names = names[at:] + names[:at]
    return names[::-1] if turn % 2 else names


def figures(spent: dict[str, list[list[float]]]) -> dict[str, dict[str, Any]]:
    """Return the figures of the arms.

    Args:
        spent: milliseconds of the steps by arm and round, the rounds in the same order.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, rounds in spent.items():
        times = sorted(time for one in rounds for time in one)
        row: dict[str, Any] = {
            "step_ms": statistics.median(times),
            "least_ms": times[len(times) // 10],
        }
        for key in ("step", "least"):
            row[f"{key} / stock"] = row[f"{key}_ms"] / found.get("stock", row)[f"{key}_ms"]
        for key, of in (("paired", statistics.median), ("least paired", min)):
            ratios = sorted(
                of(mine) / of(stock) for mine, stock in zip(rounds, spent["stock"], strict=True)
            )
            row[f"{key} / stock"] = statistics.median(ratios)
            row[f"{key} range"] = [round(ratios[len(ratios) * n // 4], 4) for n in (1, 3)]
        found[name] = {k: v if isinstance(v, list) else round(v, 4) for k, v in row.items()}
    return found


def memory(pipe: Any, inputs: Callable[[int], Inputs]) -> dict[str, dict[str, float]]:
    """Return GiB of the peaks of stock and of every site, by the side of the latents."""
    found = {}
    for part in SIDES:
        options = call_of(pipe.unet, inputs, 2, part)
        peaks = {n: peak_of(pipe, arms()[n], options) / 2**30 for n in ("stock", "every site")}
        peaks["more"] = peaks["every site"] - peaks["stock"]
        found[str(options["latents"].shape[-1])] = {k: round(v, 5) for k, v in peaks.items()}
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("sd1-5", "sdxl", "sd-small"), action="append")
    parser.add_argument("--pictures", type=int, action="append", help="drawn in one call")
    parser.add_argument("--steps", type=int, default=8, help="of a run")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--without", choices=list(arms())[1:], action="append", default=[])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    if given.steps <= SKIPPED or given.rounds < 1:
        parser.error(f"--steps must be above {SKIPPED}, --rounds above 0")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    data: dict[str, Any] = {
        "bench": "heat map cost",
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "dtype": str(dtype),
    }

    def write() -> None:
        if given.out is not None:
            given.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")

    for name in given.model or ["sd-small"]:
        unet, inputs = build(name, device, dtype)
        pipe, _ = pipelines(unet, inputs)
        for pictures in given.pictures or [1]:
            case = name if pictures == 1 else f"{name}, {pictures} pictures"
            data[case] = {
                "rounds": given.rounds,
                "steps": given.steps,
                "arms": measure(
                    pipe,
                    inputs,
                    steps=given.steps,
                    rounds=given.rounds,
                    pictures=pictures,
                    without=given.without,
                ),
            }
            write()  # after every case: the next may not fit
        if device == "cuda" and 1 in (given.pictures or [1]):
            data[name]["memory by side of the latents"] = memory(pipe, inputs)
            write()
    print(json.dumps(data, indent=1))


if __name__ == "__main__":
    main()
