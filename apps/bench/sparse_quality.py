"""What sparse attention does to clips of tiny-wan: patterns of about the same density compared.

    python -m attnctl.apps.bench.sparse_quality --n 200 --out tables

Each clip is filmed densely and by each pattern from the same noise. Writes sparse_quality.json
and .png. Minutes on a GPU, hours on a CPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import attnctl
from attnctl.apps.models import load
from attnctl.assets.train.film import film
from attnctl.assets.train.strip import strips
from attnctl.assets.world.detector import detector
from attnctl.assets.world.moving import moving_prompts
from attnctl.assets.world.watch import Verdict, moved
from attnctl.kernels import BlockMask, Window, window_mask
from attnctl.processors.sparse.shapes import VideoTokens
from attnctl.processors.sparse.sparse import SparseAttention

from .similarity import psnr, ssim
from .statistics import mean_interval, paired_interval

CALL: dict[str, Any] = {
    "num_inference_steps": 12,
    "guidance_scale": 3.0,
    "max_sequence_length": 32,
}
BLOCK, TILE = 32, (1, 4, 8)
WHEN = {"from the first step": (0, 0.0), "layer 0 and a quarter of the steps dense": (1, 0.25)}
"""dense_layers and start."""
SHOWN = 2
"""Clips on the sheet."""


@dataclass(frozen=True)
class Pattern:
    """A pattern, with its mask for a sequence and the control that uses it."""

    name: str
    mask: Callable[[VideoTokens], BlockMask]
    control: Callable[[int, float], SparseAttention]


def patterns() -> list[Pattern]:
    """Return radial, random blocks, a window, and two kinds of windows of whole tiles."""
    radial = attnctl.Radial(block=BLOCK)
    made = [
        Pattern(
            "radial",
            lambda tokens: radial.pattern(tokens, joint=False).mask,
            lambda layers, start: attnctl.Radial(block=BLOCK, dense_layers=layers, start=start),
        ),
        _by_rule("random blocks", lambda tokens: (random_blocks(tokens, 0.53), None)),
    ]
    for name, sizes, strides in (
        ("window 5x13x13", (5, 13, 13), (1, 1, 1)),
        ("tiles 5x16x16", (5, 16, 16), TILE),
        ("tiles 7x8x16", (7, 8, 16), TILE),
    ):
        made.append(_by_rule(name, _windows(sizes, strides)))
    return made


def _windows(sizes: tuple[int, ...], strides: tuple[int, ...]) -> Callable[[VideoTokens], Any]:
    windows = [Window(n, stride) for n, stride in zip(sizes, strides, strict=True)]
    return lambda tokens: window_mask(tokens.grid, windows, TILE)


def _by_rule(name: str, rule: Callable[[VideoTokens], Any]) -> Pattern:
    def own(tokens: VideoTokens) -> Any:
        mask, order = rule(tokens)
        return mask if order is None else (mask, order)

    return Pattern(
        name,
        lambda tokens: rule(tokens)[0],
        lambda layers, start: attnctl.BlockSparse(rule=own, dense_layers=layers, start=start),
    )


def random_blocks(tokens: VideoTokens, density: float, seed: int = 0) -> BlockMask:
    """Return a mask that keeps each row's own block and others at random."""
    blocks = -(-tokens.n // BLOCK)
    order = torch.rand(blocks, blocks, generator=torch.Generator().manual_seed(seed))
    order.fill_diagonal_(-1.0)
    kept = order.argsort(1).argsort(1) < round(density * blocks)
    return BlockMask.of_blocks(kept, tokens.n, tokens.n, block=BLOCK)


def figures(clips: Tensor, dense: Tensor, seen: Verdict) -> dict[str, list[float]]:
    """Return per-clip figures."""
    frames = clips.shape[1]
    near = ssim(clips.flatten(0, 1), dense.flatten(0, 1)).view(-1, frames).mean(1)
    return {
        "psnr": psnr(clips, dense).tolist(),
        "ssim": near.tolist(),
        "right": seen.right.double().tolist(),
        "direction": seen.direction.double().tolist(),
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=CALL["num_inference_steps"])
    parser.add_argument("--out", type=Path, default=Path("."))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    pipe = load("tiny-wan", given.device)
    measure(pipe, given.n, {**CALL, "num_inference_steps": given.steps}, given.out)


def measure(pipe: Any, n: int, call: dict[str, Any], out: Path) -> dict[str, Any]:
    """Film n clips densely and by each pattern; print a table, write JSON and a sheet.

    Args:
        pipe: tiny-wan.
        n: clips, prompts of one object.
        call: arguments of the pipeline.
        out: folder for the files.

    Returns:
        What sparse_quality.json holds: per-clip figures by setting and pattern.
    """
    prompts, judge = moving_prompts(n, 1, split="train", seed=5), detector(pipe.device.type)
    batch = 50 if pipe.device.type == "cuda" else 2
    side = 64 // pipe.vae_scale_factor_spatial
    tokens = VideoTokens(9, side, side)
    dense = film(pipe, prompts, seed=7, batch=batch, **call)
    seen = moved(dense, prompts, judge)
    record: dict[str, Any] = {"prompts": prompts, "call": call, "arms": {}}
    record["dense"] = figures(dense, dense, seen)
    print(f"dense: right {mean_interval(_np(seen.right))}")
    rows = [("dense", dense[:SHOWN], seen.right[:SHOWN])]
    for when, (layers, start) in WHEN.items():
        for pattern in patterns():
            with attnctl.patch(pipe, pattern.control(layers, start)):
                clips = film(pipe, prompts, seed=7, batch=batch, **call)
            seen = moved(clips, prompts, judge)
            found = figures(clips, dense, seen)
            density = pattern.mask(tokens).density
            record["arms"][f"{pattern.name}, {when}"] = {"density": density, **found}
            print(line(pattern.name, when, density, found, record["dense"]), flush=True)
            if start == 0:
                rows.append((pattern.name, clips[:SHOWN], seen.right[:SHOWN]))
    (out / "sparse_quality.json").write_text(json.dumps(record))
    sheet(rows, prompts, out / "sparse_quality.png")
    return record


def line(name: str, when: str, density: float, found: dict[str, list[float]], dense: Any) -> str:
    """Return a row of the table."""
    change = paired_interval(_np(found["right"]), _np(dense["right"]))
    cells = [
        f"{name}, {when}",
        f"{density:.2f}",
        str(mean_interval(_np(found["psnr"]))),
        str(mean_interval(_np(found["ssim"]))),
        str(mean_interval(_np(found["right"]))),
        str(change),
    ]
    return f"| {' | '.join(cells)} |"


def sheet(rows: list[tuple[str, Tensor, Tensor]], prompts: list[str], path: Path) -> None:
    """Save the first clips of all patterns as strips."""
    clips = torch.cat([clip for _, clip, _ in rows]).cpu()
    words = [f"{prompt} ({name})" for name, _, _ in rows for prompt in prompts[:SHOWN]]
    good = [bool(x) for _, _, right in rows for x in right]
    strips(clips, words, good, path)


def _np(values: Any) -> Any:
    return torch.as_tensor(values).double().cpu().numpy()


if __name__ == "__main__":
    main()
