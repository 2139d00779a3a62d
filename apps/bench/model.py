"""The command `attnctl bench model`: one whole denoising step at real size, random weights.

The model has the widths of the real one and as few blocks as asked for; a block is a block, so
that the time of a block and the ratio to dense attention are those of the real model. Dense
attention is cuDNN's where it can run. Arms are timed in turn and compared by their medians.
"""

from __future__ import annotations

import contextlib
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import attnctl
from attnctl.apps.control_syntax import parse_control
from attnctl.apps.files import write_whole
from attnctl.apps.record import versions
from attnctl.apps.tables import table
from attnctl.errors import OptionError

from .attention import device_named, fast_dense, timed
from .command import output_base

__all__ = ["MODELS", "Inputs", "Row", "Size", "bench_model", "build", "measure", "patched"]

Say = Callable[[str], None]
Inputs = dict[str, Any]
STEPS = 50


@dataclass(frozen=True)
class Size:
    """What is denoised.

    Args:
        frames: of the video.
        height: in pixels.
        width: in pixels.
        layers: transformer blocks.
    """

    frames: int
    height: int
    width: int
    layers: int

    def __post_init__(self) -> None:
        for name in ("frames", "height", "width", "layers"):
            if getattr(self, name) < 1:
                raise OptionError(f"--{name} {getattr(self, name)} must be at least 1")
        if self.height % 16 or self.width % 16 or self.frames % 4 != 1:
            raise OptionError(
                f"{self.frames} frames of {self.height} x {self.width}: expected sides that are "
                "multiples of 16 and a multiple of 4, plus 1, frames"
            )


@dataclass(frozen=True)
class Row:
    """One arm.

    Args:
        arm: "stock", or the control.
        ms: median time of a step.
        ms_layer: of it, per block.
        speedup: stock's time over this.
        peak_gib: peak memory, 0 on a CPU.
        first_s: seconds of the first step, masks and compilation included.
    """

    arm: str
    ms: float
    ms_layer: float
    speedup: float
    peak_gib: float
    first_s: float


def _wan(size: Size, heads: int, wide: int) -> tuple[nn.Module, Inputs]:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=128, ffn_dim=wide, num_layers=size.layers
    )
    grid = (size.frames - 1) // 4 + 1, size.height // 8, size.width // 8
    return model, {
        "hidden_states": torch.randn(1, 16, *grid),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 512, 4096),
    }


def wan_14b(size: Size) -> tuple[nn.Module, Inputs]:
    """Wan 2.1 14B: blocks of 40 heads of 128."""
    return _wan(size, 40, 13824)


def wan_1b(size: Size) -> tuple[nn.Module, Inputs]:
    """Wan 2.1 1.3B: blocks of 12 heads of 128."""
    return _wan(size, 12, 8960)


def hunyuanvideo(size: Size) -> tuple[nn.Module, Inputs]:
    """HunyuanVideo: blocks of 24 heads of 128; a third of them with streams of their own."""
    from diffusers import HunyuanVideoTransformer3DModel

    two = max(1, size.layers // 3)
    model = HunyuanVideoTransformer3DModel(num_layers=two, num_single_layers=size.layers - two)
    grid = (size.frames - 1) // 4 + 1, size.height // 8, size.width // 8
    return model, {
        "hidden_states": torch.randn(1, 16, *grid),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 256, 4096),
        "encoder_attention_mask": torch.ones(1, 256),
        "pooled_projections": torch.randn(1, 768),
        "guidance": torch.tensor([6000.0]),
    }


MODELS = {"wan-14b": wan_14b, "wan-1.3b": wan_1b, "hunyuanvideo": hunyuanvideo}


def bench_model(
    name: str,
    size: Size,
    controls: Sequence[str],
    *,
    rounds: int,
    device: str,
    out: Path | None,
    overwrite: bool,
    say: Say,
) -> None:
    """Run the bench, print the table, write the JSON file.

    Args:
        name: of `MODELS`.
        size: of the video and the model.
        controls: in text form, an arm each.
        rounds: timed steps of each arm.
        device: auto, cpu or cuda.
        out: folder, or base name without suffix; None for the next free default name.
        overwrite: whether files of that name may be replaced.
        say: is given notes for the user.

    Raises:
        AttnctlError: if something in the order cannot be done; told before anything slow.
    """
    if name not in MODELS:
        raise OptionError(f"--model {name}: expected one of {', '.join(MODELS)}")
    if rounds < 1:
        raise OptionError(f"--rounds {rounds} must be at least 1")
    where = device_named(device)
    arms = {text: parse_control(text) for text in controls}
    base = output_base(out, overwrite, "model")
    say(f"{name}, {size.layers} blocks, {size.frames} frames of {size.height} x {size.width} ...")
    model, inputs = build(name, size, where)
    rows = measure(model, inputs, size.layers, arms, rounds=rounds, device=where)
    machine = torch.cuda.get_device_name(where) if where.type == "cuda" else "CPU"
    data = {
        "bench": "model",
        "model": name,
        "size": asdict(size),
        "machine": machine,
        "versions": versions(),
        "rounds": rounds,
        "rows": [asdict(row) for row in rows],
    }
    print(_report(f"{machine}: {name}, one step, medians of {rounds}", rows))
    file = base.with_name(f"{base.name}.json")
    write_whole(file, json.dumps(data, indent=1).encode())
    print(f"\nwrote {file}")


def build(name: str, size: Size, device: torch.device) -> tuple[nn.Module, Inputs]:
    """Return a model with random weights and its arguments; bfloat16 on a GPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model, inputs = MODELS[name](size)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False), inputs


@torch.no_grad()
def measure(
    model: nn.Module,
    inputs: Inputs,
    layers: int,
    arms: dict[str, attnctl.Control],
    *,
    rounds: int,
    device: torch.device,
) -> list[Row]:
    """Return what a step of each arm takes, stock first.

    Args:
        model: the denoiser.
        inputs: its arguments, one row of conditional input.
        layers: its blocks.
        arms: controls by name.
        rounds: timed steps of each, after one that is not timed.
        device: where.
    """

    def step() -> None:
        with fast_dense():
            model(**inputs)

    spent: dict[str, list[float]] = {}
    first: dict[str, float] = {}
    peaks: dict[str, float] = {}
    for _ in range(rounds + 1):
        for arm, control in {"stock": None, **arms}.items():
            with patched(model, control):
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                ms = timed(step, device)
            if arm in first:
                spent.setdefault(arm, []).append(ms)
            else:
                first[arm] = ms / 1e3
            if device.type == "cuda":
                peaks[arm] = torch.cuda.max_memory_allocated() / 2**30
    middle = {arm: statistics.median(times) for arm, times in spent.items()}
    return [
        Row(arm, ms, ms / layers, middle["stock"] / ms, peaks.get(arm, 0.0), first[arm])
        for arm, ms in middle.items()
    ]


@contextlib.contextmanager
def patched(model: nn.Module, control: attnctl.Control | None) -> Iterator[None]:
    """Patch a denoiser with a control, None for nothing, while the context lasts."""
    if control is None:
        yield
        return
    with attnctl.patch(model, control, rows=("cond",), steps=STEPS):
        yield


def _report(head: str, rows: Sequence[Row]) -> str:
    cells = [
        (r.arm, f"{r.ms:.1f}", f"{r.ms_layer:.2f}", f"{r.speedup:.2f}", f"{r.peak_gib:.2f}",
         f"{r.first_s:.1f}")
        for r in rows
    ]  # fmt: skip
    heads = ("arm", "ms", "ms a block", "x stock", "peak GiB", "1st s")
    return f"{head}\n\n{table(heads, cells, None, ' rrrrr')}"
