"""Where the time of a prompt goes under a patch: before the decoder, in its layers, or waiting.

    python -m attnctl.apps.bench.vlm_where --model llava-1.5-7b

`vlm_cost` says how long a prompt takes; this says why. `generate` reads a prompt and writes one
token. Noted is when the decoder is called, when each of its layers is, and when its call returns:
times of the host. A GPU that is then still at work is waited for. Arms run in turn, in an order of
their own each round. For stock the medians are given, for the others those of the differences to
stock in the same round:

- before: up to the decoder's call, the ids of a prompt fetched and labelled among it;
- first: from there until the fifth layer, where controls look up what later layers share;
- layers: the others, to the end of the call;
- waiting: the GPU's work that is left. Where it is long, the GPU is what is waited for, and what
  the host does in the layers costs nothing; where it is short, the host.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import attnctl
from attnctl.hosts.vlm_discover import decoder_of

from .vlm_cost import MODELS, arms, chosen

__all__ = ["PARTS", "measure"]

PARTS = ("before", "first", "layers", "waiting", "total")

FIRST = 4
"""Layers that count as the first ones."""


class _Clock:
    """Notes when a decoder and its layers are called, and when it is done; a context."""

    def __init__(self, model: Any) -> None:
        self.decoder = decoder_of(model)
        self.device, self.at = model.device, list[float]()
        self.hooks = ExitStack()

    def __enter__(self) -> _Clock:
        for module in (self.decoder, *self.decoder.layers):  # type: ignore[misc]
            self._keep(module.register_forward_pre_hook(lambda *_: self.note()))
        self._keep(self.decoder.register_forward_hook(lambda *_: self._end()))
        return self

    def __exit__(self, *error: object) -> None:
        self.hooks.close()

    def _keep(self, handle: Any) -> None:
        self.hooks.callback(handle.remove)

    def note(self) -> None:
        """Note the time."""
        self.at.append(1e3 * time.perf_counter())

    def _end(self) -> None:
        self.note()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.note()

    def parts(self) -> tuple[float, ...]:
        """Return the milliseconds of `PARTS`."""
        start, called, *layers, done, end = self.at
        fifth = layers[min(FIRST, len(layers) - 1)]
        return called - start, fifth - called, done - fifth, end - done, end - start


@torch.inference_mode()
def measure(
    model: Any, inputs: dict[str, Tensor], *, rounds: int, only: Sequence[str] = ("pai", "var")
) -> dict[str, dict[str, float]]:
    """Return the milliseconds of `PARTS`: of stock, and what every other arm adds to them.

    Args:
        model: the model.
        inputs: the prompt.
        rounds: timed rounds after a warm one.
        only: names of the arms besides stock, of those of `vlm_cost`.
    """
    spent: dict[str, list[tuple[float, ...]]] = {name: [] for name in ("stock", *only)}
    order, stacks = [*spent], arms()
    with _Clock(model) as clock:
        for turn in range(rounds + 1):
            random.Random(turn).shuffle(order)
            for name in order:
                inside: AbstractContextManager[Any] = nullcontext()
                if stacks[name]:
                    inside = attnctl.patch(model, *stacks[name])
                with inside:
                    clock.at.clear()
                    clock.note()
                    model.generate(**inputs, min_new_tokens=1, max_new_tokens=1, do_sample=False)
                if turn:
                    spent[name].append(clock.parts())
    return {name: _medians(times, spent["stock"]) for name, times in spent.items()}


def _medians(times: list[tuple[float, ...]], stock: list[tuple[float, ...]]) -> dict[str, float]:
    """Return the medians of an arm, of what it adds where it is not stock."""
    found = times
    if times is not stock:
        found = [
            tuple(a - b for a, b in zip(mine, other, strict=True))
            for mine, other in zip(times, stock, strict=True)
        ]
    sides = zip(PARTS, zip(*found, strict=True), strict=True)
    return {name: round(statistics.median(side), 4) for name, side in sides}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--tower", action="store_true", help="with the vision tower")
    parser.add_argument("--arms", default="pai,var", help="default: pai,var")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    only, known = tuple(filter(None, given.arms.split(","))), {*arms()} - {"stock", "eager"}
    for name in only:
        if name not in known:
            parser.error(f"--arms: got {name}; take {', '.join(sorted(known))}")
    model, inputs, where = chosen(parser, given.model, 1, given.tower)
    found = measure(model, inputs, rounds=given.rounds, only=only)
    print(f"{'ms':8}" + "".join(f"{part:>10}" for part in PARTS))
    for name, parts in found.items():
        sign = "" if name == "stock" else "+"
        print(f"{name:8}" + "".join(f"{parts[part]:{sign}10.3f}" for part in PARTS))
    if given.out:
        data = {"bench": "vlm_where", "model": given.model, "device": where, "arms": found}
        given.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
