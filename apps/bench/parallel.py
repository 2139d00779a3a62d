"""A step of a video model on several GPUs beside one: dense, and with controls.

    torchrun --nproc_per_node 2 -m attnctl.apps.bench.parallel --out parallel.json

Every process first computes the step alone, then all share it by diffusers' context parallelism
(Ulysses), with the same weights and inputs. Writes times and how far the two outputs are apart,
beside how far the control moves them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

import attnctl
from attnctl.apps.control_syntax import parse_control
from attnctl.apps.record import versions

from .attention import fast_dense, timed
from .model import MODELS, Inputs, Size, build, patched

__all__ = ["Row", "main", "measure"]

CONTROLS = ("radial:start=0,dense_layers=1",)
STOCK = "stock"


@dataclass(frozen=True)
class Row:
    """One arm.

    Args:
        arm: "stock", or the control.
        alone_ms: median time of a step in one process.
        shared_ms: in all of them together, the slowest of them.
        apart: mean difference of the two outputs over the mean size of the stock output.
        moved: mean difference to the stock output, both alone, over the same.
    """

    arm: str
    alone_ms: float
    shared_ms: float
    apart: float
    moved: float


def main(words: Sequence[str] | None = None) -> None:
    """Run from the command line, in each process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=[m for m in MODELS if m.startswith("wan")],
                        default="wan-1.3b")  # fmt: skip
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--control", action="append", help="an arm, in text form; repeatable")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("parallel.json"))
    given = parser.parse_args(words)
    size = Size(given.frames, given.height, given.width, given.layers)
    controls = {text: parse_control(text) for text in given.control or CONTROLS}
    with _group(given.device) as device:
        torch.manual_seed(0)
        model, inputs = build(given.model, size, device)
        for tensor in (*model.parameters(), *inputs.values()):
            distributed.broadcast(tensor.data, 0)
        rows = measure(model, inputs, controls, rounds=given.rounds, device=device)
        if distributed.get_rank() == 0:
            machine = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
            data = {
                "bench": "parallel",
                "model": given.model,
                "size": asdict(size),
                "machine": machine,
                "processes": distributed.get_world_size(),
                "versions": versions(),
                "rows": [asdict(row) for row in rows],
            }
            given.out.write_text(json.dumps(data, indent=1))
            print(json.dumps(data["rows"], indent=1))


@torch.no_grad()
def measure(
    model: nn.Module,
    inputs: Inputs,
    controls: dict[str, attnctl.Control],
    *,
    rounds: int,
    device: torch.device,
) -> list[Row]:
    """Return what a step of each arm takes alone and shared, stock first.

    Args:
        model: a denoiser of diffusers that knows how to spread itself.
        inputs: its arguments, the same in all processes.
        controls: arms by name.
        rounds: timed steps of each, after one that is not timed.
        device: of this process.
    """
    from diffusers import ContextParallelConfig

    arms: dict[str, attnctl.Control | None] = {STOCK: None, **controls}
    alone = {arm: _arm(model, inputs, control, rounds, device) for arm, control in arms.items()}
    degree = distributed.get_world_size()
    spread: Any = model
    spread.enable_parallelism(config=ContextParallelConfig(ulysses_degree=degree))
    shared = {arm: _arm(model, inputs, control, rounds, device) for arm, control in arms.items()}
    stock = alone[STOCK][0]

    def apart(a: Tensor, b: Tensor) -> float:
        return float((a - b).abs().mean() / stock.abs().mean())

    return [
        Row(arm, alone[arm][1], shared[arm][1], apart(alone[arm][0], shared[arm][0]),
            apart(alone[arm][0], stock))
        for arm in arms
    ]  # fmt: skip


def _arm(
    model: nn.Module,
    inputs: Inputs,
    control: attnctl.Control | None,
    rounds: int,
    device: torch.device,
) -> tuple[Tensor, float]:
    """Return the output and the median time of a step, of the slowest process."""

    def step() -> Tensor:
        out: Tensor = model(**inputs, return_dict=False)[0]
        return out

    times = []
    with patched(model, control), fast_dense():
        out = step()
        for _ in range(rounds):
            distributed.barrier()
            times.append(timed(step, device))
    slowest = torch.tensor([statistics.median(times)], device=device)
    distributed.all_reduce(slowest, distributed.ReduceOp.MAX)
    return out.float(), float(slowest)


@contextlib.contextmanager
def _group(kind: str) -> Iterator[torch.device]:
    """Yield this process's device, in a group of all processes."""
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    elif hasattr(torch, "accelerator"):  # diffusers divides by the number of accelerators
        torch.accelerator.device_count = lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "2"))
    own = not distributed.is_initialized()
    if own:
        distributed.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        yield device
        distributed.barrier()
    finally:
        if own:
            distributed.destroy_process_group()


if __name__ == "__main__":
    main()
