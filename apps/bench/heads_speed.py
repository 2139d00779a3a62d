"""How fast a head search draws: candidates as rows of one call, against one at a time, in one run.

    python -m attnctl.apps.bench.heads_speed --size sd3-medium --out speed.json

A transformer of SD3-medium's shapes with random weights (24 blocks of 24 heads of 64, 4096 image
and 333 text tokens) in a pipeline whose text encoders and autoencoder are tiny-sd3's: what a
search spends outside the transformer is therefore less here than on the real model. The same
candidates, one head each, are drawn and scored with every batch size in turn, several rounds;
the first round warms up. Forwards count as in a search: two rows a step for every candidate.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

import attnctl
from attnctl.apps.models import load
from attnctl.processors.headhunter.objective import objective
from attnctl.processors.headhunter.trials import Trials

__all__ = ["SIZES", "measure", "pipeline"]

SIZES: dict[str, tuple[int, int, int]] = {"sd3-medium": (24, 24, 128), "tiny": (2, 2, 16)}
"""Blocks, heads of 64, latent pixels a side."""
GUIDANCE = attnctl.SoftPAG(scale=3.0, u=1.0)
PROMPT = "a red circle"


def pipeline(size: str, device: str, dtype: str) -> Any:
    """Return the pipeline of a size from `SIZES`; device and dtype as in `load`."""
    layers, heads, side = SIZES[size]
    stock = load("tiny-sd3", device, dtype)
    known = stock.transformer.config
    with torch.device(device):
        transformer = SD3Transformer2DModel(
            sample_size=side, patch_size=2, num_layers=layers, num_attention_heads=heads,
            attention_head_dim=64, caption_projection_dim=64 * heads, pos_embed_max_size=192,
            in_channels=known.in_channels, out_channels=known.out_channels,
            joint_attention_dim=4096, pooled_projection_dim=known.pooled_projection_dim,
        )  # fmt: skip
    parts = {**stock.components, "text_encoder_3": None, "tokenizer_3": None}
    pipe = StableDiffusion3Pipeline(**{**parts, "transformer": transformer.to(stock.dtype)})
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def _once(pipe: Any, call: dict[str, Any], candidates: int, batch: int) -> float:
    """Forwards per second of a search that has just begun."""
    trials = Trials(pipe, GUIDANCE, objective("brightness"), [PROMPT], [0], batch, call)
    sets = [(head,) for head in trials.pool[:: max(1, len(trials.pool) // candidates)]]
    start = time.perf_counter()
    trials.score(sets[:candidates])
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return trials.forwards / (time.perf_counter() - start)


def measure(
    pipe: Any, side: int, batches: Sequence[int], candidates: int, steps: int, rounds: int
) -> list[dict[str, Any]]:
    """Return, for each batch size, forwards per second of every round and their median.

    Args:
        pipe: the pipeline.
        side: pixels a side.
        batches: numbers of rows.
        candidates: heads that are tried.
        steps: of each picture.
        rounds: timed rounds after a warm one.
    """
    call = {"num_inference_steps": steps, "guidance_scale": 1.0, "height": side, "width": side}
    speeds: dict[int, list[float]] = {batch: [] for batch in batches}
    peaks: dict[int, float] = {}
    for turn in range(rounds + 1):
        for batch in batches:
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            speed = _once(pipe, call, candidates if turn else min(batch, candidates), batch)
            if turn:
                speeds[batch].append(round(speed, 3))
            print(f"round {turn}: {batch} rows, {speed:.2f} forwards/s", flush=True)
            if torch.cuda.is_available():
                peaks[batch] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return [
        {"batch": b, "median": statistics.median(s), "each": s, "peak_gib": peaks.get(b)}
        for b, s in speeds.items()
    ]


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--batches", default="1,2,4,8,16")
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = pipeline(given.size, device, "auto")
    side = SIZES[given.size][2] * pipe.vae_scale_factor
    batches = [int(b) for b in given.batches.split(",")]
    found = measure(pipe, side, batches, given.candidates, given.steps, given.rounds)
    data = {
        "size": given.size,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in pipe.transformer.parameters()),
        "candidates": given.candidates,
        "steps": given.steps,
        "rows": found,
    }
    print(json.dumps(data, indent=1))
    if given.out:
        given.out.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
