"""What latent controls and heat maps cost beside diffusers' Attend-and-Excite, in one run.

    python -m attnctl.apps.bench.latent_cost --model sd1-5 --model sdxl --out cost.json

UNets of real shape with random weights draw one picture with CFG, or several (`--pictures 4`),
from embeddings, in pipelines without text encoders. Arms run in turn, and their steps are
compared by the median; the first step of a run is left out, as what is learnt there (which sites
have the grid) is learnt once:

- stock: StableDiffusionPipeline;
- heatmap: maps of two words read at every step;
- a-star, attend-and-excite: ours, which move the latents at every step, once; every gradient
  pass run by Python;
- a-star, replayed; attend-and-excite, replayed: with gradient passes replayed as CUDA graphs, as
  they are by default in long runs; an error where they cannot be. Not on a CPU;
- a-star, checkpointed: with gradient checkpointing;
- a-star, all at once: with several pictures, all of them in one gradient pass;
- diffusers: its StableDiffusionAttendAndExcitePipeline, likewise once at every step.

That pipeline knows no SDXL, but its loop and its attention processors know nothing about the
size of a UNet either: a subclass gives SDXL's UNet the pooled embeddings that the loop leaves
out, in every arm, so that the rest is diffusers' own code. That pipeline keeps the graph of its
last gradient pass, which is let go before the next run, so as not to count for its memory.

To read: "step / diffusers", the milliseconds of a step against those of diffusers' pipeline, and
"extra / diffusers", the same for the peak of memory less stock's peak; "extra reserved /
diffusers" for the most memory that a run took from the device, "reserved_gib": recorded passes
keep theirs between replays, of which "peak_gib" sees only what is in use. A run's second step, in
which passes are recorded, has a column of its own, "second_ms"; "behind_ms" is how long the device
still works at a step's end, when Python is done: near 0, the step waits for Python.

With `--counts` each arm also gets what a step asks of Python: "operations", calls of PyTorch's
operators, forward and backward; "launches", those of them that compute something, and are no
views.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import itertools
import json
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionAttendAndExcitePipeline,
    StableDiffusionPipeline,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import attnctl

from .cost import MODELS, Inputs, moved_to
from .pooled import Pooled

__all__ = ["counts", "growth", "measure", "moving", "pipelines"]

WORDS = [[3], [7]]
"""Positions of two words; with random weights any will do."""
THEIRS = "diffusers"
ALL = "a-star, all at once"
PARTS = (1, 1.5, 2)
"""Sides of the pictures for `growth`, over the model's own."""


class Clock(DDIMScheduler):
    """DDIM that notes when each of its steps ends, for Python and for the device."""

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """Begin a run."""
        self.ends: list[float] = []
        self.launched: list[float] = []
        super().set_timesteps(*args, **kwargs)

    def step(self, model_output: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the step, having noted the times."""
        out = super().step(model_output, *args, **kwargs)
        self.launched.append(time.perf_counter())
        if model_output.is_cuda:
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        return out

    @property
    def milliseconds(self) -> list[float]:
        """What each step of the last run took, but the first."""
        return [1e3 * (b - a) for a, b in itertools.pairwise(self.ends)]

    @property
    def behind(self) -> list[float]:
        """How many milliseconds later than Python the device was done, as `milliseconds`."""
        pairs = zip(self.launched[1:], self.ends[1:], strict=True)
        return [1e3 * (end - launched) for launched, end in pairs]


def build(name: str, device: str, dtype: torch.dtype) -> tuple[nn.Module, Callable[[int], Inputs]]:
    """Return a UNet of `cost.MODELS` made on the device, and what makes its arguments."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            unet, inputs = MODELS[name]()
    finally:
        torch.set_default_dtype(before)
    return unet.eval(), lambda n: moved_to(inputs(n), device, dtype)


def pipelines(unet: nn.Module, inputs: Callable[[int], Inputs]) -> tuple[Any, Any]:
    """Return the stock pipeline and diffusers' Attend-and-Excite around one UNet.

    Args:
        unet: the UNet; it becomes a `Pooled` if it needs more than a text sequence.
        inputs: makes its arguments for n rows.
    """
    if "added_cond_kwargs" in inputs(1):
        whole: Any = unet
        whole.__class__ = Pooled
        whole.pooled = functools.cache(lambda rows: inputs(rows)["added_cond_kwargs"])
    # only its number of levels counts: latents are an eighth of the picture
    vae = AutoencoderKL(
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2,
    ).to(unet.device, unet.dtype)
    scheduler = Clock(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
    )
    both = []
    for cls in (StableDiffusionPipeline, StableDiffusionAttendAndExcitePipeline):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the second one is deprecated
            pipe = cls(
                vae=vae, text_encoder=None, tokenizer=None, unet=unet, scheduler=scheduler,
                safety_checker=None, feature_extractor=None, requires_safety_checker=False,
            )  # fmt: skip
        pipe.set_progress_bar_config(disable=True)
        both.append(pipe)
    return both[0], both[1]


def arms(pictures: int = 1, cuda: bool = False) -> dict[str, attnctl.Control | None]:
    """Return the controls by arm, None for none.

    Args:
        pictures: drawn in one call.
        cuda: whether the arms come that only run there.
    """
    once: dict[str, Any] = {"words": WORDS, "updates": 0}
    every: dict[str, attnctl.Control | None] = {
        "stock": None,
        "heatmap": attnctl.HeatMap(WORDS, sink=lambda maps: None),
        "a-star": attnctl.AStar(**once, replay=False),
        "a-star, replayed": attnctl.AStar(**once, replay=True),
        "a-star, checkpointed": attnctl.AStar(**once, replay=False, checkpoint=True),
        ALL: attnctl.AStar(**once, replay=False, at_once=pictures),
        "attend-and-excite": attnctl.AttendAndExcite(**once, stop=1.0, replay=False),
        "attend-and-excite, replayed": attnctl.AttendAndExcite(**once, stop=1.0, replay=True),
        THEIRS: None,
    }
    if pictures == 1:
        del every[ALL]  # as without
    return {name: arm for name, arm in every.items() if cuda or not name.endswith(", replayed")}


def moving(steps: int, pictures: int = 1) -> dict[str, Any]:
    """Return the arguments with which diffusers' pipeline moves the latents as our arms do."""
    return {
        "token_indices": [[one[0] for one in WORDS]] * pictures,
        "max_iter_to_alter": steps,
        "thresholds": {},
        "attn_res": None,  # a quarter of the latents' sides; 16 x 16 unless it is given
    }


def measure(
    both: tuple[Any, Any],
    inputs: Callable[[int], Inputs],
    *,
    steps: int,
    rounds: int,
    pictures: int = 1,
    without: Sequence[str] = (),
) -> dict[str, Any]:
    """Return by arm milliseconds a step, peak memory, and the ratios of the module docstring.

    Args:
        both: from `pipelines`.
        inputs: makes the UNet's arguments for n rows.
        steps: of a run, the first of which is not timed.
        rounds: timed runs after a warm one.
        pictures: drawn in one call.
        without: arms that are left out.
    """
    spent: dict[str, list[float]] = {}
    peaks: dict[str, tuple[int, int]] = {}
    second: dict[str, list[float]] = {}
    behind: dict[str, list[float]] = {}
    for turn in range(rounds + 1):
        for name in arms(pictures, both[0].unet.device.type == "cuda"):
            if name in without:
                continue
            peaks[name], clock = _run(both, inputs, name, steps, pictures)
            if turn:
                spent.setdefault(name, []).extend(clock.milliseconds)
                second.setdefault(name, []).append(clock.milliseconds[0])
                behind.setdefault(name, []).extend(clock.behind)
    found = _figures(spent, peaks if both[0].unet.device.type == "cuda" else {})
    for name, row in found.items():
        row["second_ms"] = round(statistics.median(second[name]), 3)
        row["behind_ms"] = round(statistics.median(behind[name]), 3)
    return found


def _run(
    both: tuple[Any, Any], inputs: Callable[[int], Inputs], name: str, steps: int, pictures: int
) -> tuple[tuple[int, int], Clock]:
    """Run an arm and return its peaks of memory, in use and taken, and the clock of its steps."""
    _let_go(both[1])
    pipe, more = (both[1], moving(steps, pictures)) if name == THEIRS else (both[0], {})
    options = {**call_of(pipe.unet, inputs, steps, pictures=pictures), **more}
    peak = peak_of(pipe, arms(pictures, cuda=True)[name], options)
    reserved = torch.cuda.max_memory_reserved() if peak else 0
    return (peak, reserved), pipe.scheduler


def _let_go(theirs: Any) -> None:
    """Free what diffusers' pipeline keeps: maps, with the graph of its last gradient pass."""
    theirs.attention_store = None
    gc.collect()
    torch.cuda.empty_cache()


# -- what a step consists of ------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Counts calls of PyTorch's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.all: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        computes = not func.is_view and func.name() not in _NO_WORK
        self.all.update(["operations", "launches"] if computes else ["operations"])
        return func(*args, **(kwargs or {}))


_NO_WORK = {
    f"aten::{name}"
    for name in ("_unsafe_view", "empty.memory_format", "empty_like", "empty_strided",
                 "new_empty", "_local_scalar_dense", "lift_fresh")
}  # fmt: skip
"""Operators that are no views and launch nothing all the same."""


def counts(
    both: tuple[Any, Any], inputs: Callable[[int], Inputs], *, pictures: int = 1
) -> dict[str, dict[str, float]]:
    """Return by arm the operations and launches of a step.

    Each is the difference of a run of four steps and one of three, so that what a run does once
    is left out.

    Args:
        both: from `pipelines`.
        inputs: makes the UNet's arguments for n rows.
        pictures: drawn in one call.
    """
    found: dict[str, dict[str, float]] = {}
    for name in arms(pictures, both[0].unet.device.type == "cuda"):
        totals = []
        for steps in (3, 4):
            with Operations() as operations:
                _run(both, inputs, name, steps, pictures)
            totals.append(operations.all)
        found[name] = {key: totals[1][key] - totals[0][key] for key in totals[0]}
    return found


# -- memory -----------------------------------------------------------------------------------


def growth(
    pipe: Any, inputs: Callable[[int], Inputs], *, steps: int = 2
) -> dict[str, dict[str, float]]:
    """Return GiB of the peaks of stock and of heat maps, by the side of the latents."""
    found = {}
    for part in PARTS:
        options = call_of(pipe.unet, inputs, steps, part)
        peaks = {n: peak_of(pipe, c, options) for n, c in list(arms().items())[:2]}
        row = {name: round(peak / 2**30, 4) for name, peak in peaks.items()}
        row["more"] = round((peaks["heatmap"] - peaks["stock"]) / 2**30, 4)
        found[str(options["latents"].shape[-1])] = row
    return found


def call_of(
    unet: Any, inputs: Callable[[int], Inputs], steps: int, part: float = 1, pictures: int = 1
) -> dict[str, Any]:
    """Return the arguments of a pipeline's call, pictures `part` times as wide and high."""
    text = inputs(2 * pictures)["encoder_hidden_states"]
    side = int(unet.config.sample_size * part)
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(pictures, unet.config.in_channels, side, side, generator=draw)
    return {
        "prompt": None,
        "prompt_embeds": text[:pictures],
        "negative_prompt_embeds": text[pictures:],
        "latents": noise.to(text),
        "height": 8 * side,
        "width": 8 * side,
        "num_inference_steps": steps,
        "guidance_scale": 7.5,
        "output_type": "latent",
    }


def peak_of(pipe: Any, control: attnctl.Control | None, options: dict[str, Any]) -> int:
    """Run a pipeline and return the peak of the GPU's memory in bytes, 0 on a CPU."""
    inside: AbstractContextManager[Any] = contextlib.nullcontext()
    if control is not None:
        inside = attnctl.patch(pipe, control)
    cuda = pipe.unet.device.type == "cuda"
    with inside:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        pipe(**options)
        return torch.cuda.max_memory_allocated() if cuda else 0


def _figures(spent: dict[str, list[float]], peaks: dict[str, tuple[int, int]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, times in spent.items():
        found[name] = {
            "step_ms": round(statistics.median(times), 3),
            "range_ms": [round(min(times), 3), round(max(times), 3)],
        }
        if peaks:
            for key, peak in zip(("peak_gib", "reserved_gib"), peaks[name], strict=True):
                found[name][key] = round(peak / 2**30, 4)
    stock, theirs = found["stock"], found[THEIRS]
    for name, row in found.items():
        row["step / stock"] = round(row["step_ms"] / stock["step_ms"], 4)
        if name not in ("stock", "heatmap", THEIRS):
            row["step / diffusers"] = round(row["step_ms"] / theirs["step_ms"], 4)
            if peaks:
                for which, key in enumerate(("extra / diffusers", "extra reserved / diffusers")):
                    mine, most = (peaks[n][which] - peaks["stock"][which] for n in (name, THEIRS))
                    row[key] = round(mine / most, 4)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("sd1-5", "sdxl", "sd-small"), action="append")
    parser.add_argument("--pictures", type=int, action="append", help="drawn in one call")
    parser.add_argument("--steps", type=int, default=7, help="of a run")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument(
        "--without", metavar="ARM", action="append", default=[], choices=list(arms(2, cuda=True))
    )
    parser.add_argument("--counts", action="store_true", help="and what a step consists of")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    data: dict[str, Any] = {
        "bench": "latent cost",
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "dtype": str(dtype),
    }
    for name in given.model or ["sd-small"]:
        unet, inputs = build(name, device, dtype)
        both = pipelines(unet, inputs)
        for pictures in given.pictures or [1]:
            case = name if pictures == 1 else f"{name}, {pictures} pictures"
            found = measure(
                both, inputs, steps=given.steps, rounds=given.rounds, pictures=pictures,
                without=given.without,
            )  # fmt: skip
            data[case] = {"arms": found}
            _write(given.out, data)
            if device == "cuda" and pictures == 1:
                _let_go(both[1])
                data[case]["heat maps by side of the latents"] = growth(both[0], inputs)
            _write(given.out, data)  # after every case: the next may not fit
            if given.counts:
                data[case]["a step"] = counts(both, inputs, pictures=pictures)
                _write(given.out, data)
    print(json.dumps(data, indent=1))


def _write(out: Path | None, data: dict[str, Any]) -> None:
    if out is not None:
        out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
