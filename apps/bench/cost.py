"""What a patch costs, measured side by side in one run on a denoiser with random weights.

    python -m attnctl.apps.bench.cost --model sd3-medium --out cost.json

Arms are timed in turn, many rounds, and compared by their medians:

- stock: the untouched denoiser on its rows (uncond and cond with CFG, cond without);
- one branch more: the untouched denoiser on the rows of one branch, by itself;
- neutral: patched with a control of scale 0;
- waiting: patched with a control whose window has not come;
- softpag: patched with SoftPAG on all heads, and on one head per layer.

The ratios to read: neutral / stock, waiting / stock, and softpag / (stock + one branch more).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import attnctl

__all__ = ["MODELS", "Inputs", "measure", "moved_to"]

Inputs = dict[str, Any]


def _sd3(layers: int, heads: int, size: int) -> tuple[nn.Module, Callable[[int], Inputs]]:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=size, num_layers=layers, num_attention_heads=heads, caption_projection_dim=64
        * heads, pos_embed_max_size=192,
    )  # fmt: skip
    return model, lambda n: {
        "hidden_states": torch.randn(n, 16, size, size),
        "encoder_hidden_states": torch.randn(n, 333, 4096),
        "pooled_projections": torch.randn(n, 2048),
        "timestep": torch.full((n,), 500.0),
    }


def sd3_medium() -> tuple[nn.Module, Callable[[int], Inputs]]:
    """SD3-medium: 24 blocks, 24 heads of 64, 4096 image and 333 text tokens (1024 px)."""
    return _sd3(24, 24, 128)


def sd3_small() -> tuple[nn.Module, Callable[[int], Inputs]]:
    """A quarter of SD3-medium's blocks at 256 px, for a CPU."""
    return _sd3(6, 12, 32)


def _sd1(**config: Any) -> tuple[nn.Module, Callable[[int], Inputs]]:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(attention_head_dim=8, **config)
    side, width = model.config.sample_size, model.config.cross_attention_dim
    return model, lambda n: {
        "sample": torch.randn(n, 4, side, side),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(n, 77, width),
    }


def sd15() -> tuple[nn.Module, Callable[[int], Inputs]]:
    """Stable Diffusion 1.5's UNet at 512 px."""
    return _sd1(sample_size=64, cross_attention_dim=768)


def sd_small() -> tuple[nn.Module, Callable[[int], Inputs]]:
    """A UNet with Stable Diffusion 1.5's levels, half as deep and 1/20 as wide, for a CPU."""
    return _sd1(
        layers_per_block=1,
        sample_size=16,
        cross_attention_dim=32,
        block_out_channels=(16, 32, 64, 64),
        norm_num_groups=8,
    )


def sdxl() -> tuple[nn.Module, Callable[[int], Inputs]]:
    """SDXL's UNet at 1024 px."""
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=128,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    return model, lambda n: {
        "sample": torch.randn(n, 4, 128, 128),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(n, 77, 2048),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(n, 1280),
            "time_ids": torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]]).repeat(n, 1),
        },
    }


def flux() -> tuple[nn.Module, Callable[[int], Inputs]]:
    """FLUX.1-dev's shapes at 1024 px: 19 + 38 blocks, 24 heads of 128, 4096 + 512 tokens."""
    from diffusers import FluxTransformer2DModel

    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        model = FluxTransformer2DModel(guidance_embeds=True)
        torch.set_default_dtype(before)
    rows = torch.stack(torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij"), -1)
    ids = torch.cat([torch.zeros(4096, 1), rows.reshape(-1, 2)], 1)
    return model, lambda n: {
        "hidden_states": torch.randn(n, 4096, 64),
        "encoder_hidden_states": torch.randn(n, 512, 4096),
        "pooled_projections": torch.randn(n, 768),
        "timestep": torch.full((n,), 0.5),
        "img_ids": ids,
        "txt_ids": torch.zeros(512, 3),
        "guidance": torch.full((n,), 3.5),
    }


MODELS = {
    "sd3-medium": sd3_medium,
    "sd3-small": sd3_small,
    "sd1-5": sd15,
    "sd-small": sd_small,
    "sdxl": sdxl,
    "flux": flux,
}


def moved_to(value: Any, device: str, dtype: torch.dtype) -> Any:
    """Return the tensors of a tree on a device, floating-point ones in a dtype."""
    if isinstance(value, dict):
        return {k: moved_to(v, device, dtype) for k, v in value.items()}
    if isinstance(value, torch.Tensor):
        return value.to(device, dtype if value.is_floating_point() else value.dtype)
    return value


def _timed(run: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def _arms() -> dict[str, attnctl.Control | None]:
    return {
        "stock": None,
        "one branch more": None,
        "neutral": attnctl.SoftPAG(scale=0.0),
        "waiting": attnctl.SoftPAG(start=0.5),
        "softpag, all heads": attnctl.SoftPAG(u=0.5),
        "softpag, one head a layer": attnctl.SoftPAG(heads="H0", u=0.5),
        "softpag, passes=calls": attnctl.SoftPAG(u=0.5, passes="calls"),
    }


@torch.no_grad()
def measure(
    model: nn.Module,
    inputs: Callable[[int], Inputs],
    *,
    branches: int,
    rounds: int,
    device: str,
    dtype: torch.dtype,
    compiled: bool = False,
) -> dict[str, Any]:
    """Return milliseconds and peak memory per arm, and the ratios of the module docstring.

    Args:
        model: the denoiser, on the device.
        inputs: makes its arguments for n rows.
        branches: 2 with CFG (rows uncond and cond), 1 without.
        rounds: timed rounds after two warm ones.
        device: "cuda" or "cpu".
        dtype: of the floating-point inputs.
        compiled: whether the model runs under torch.compile(fullgraph=True).
    """
    full, one = (moved_to(inputs(n), device, dtype) for n in (branches, 1))
    rows = ("uncond", "cond")[-branches:]
    times: dict[str, list[float]] = {}
    peaks: dict[str, float] = {}
    arms = _arms()
    if compiled:
        model.compile(fullgraph=True)
    for turn in range(rounds + 2):
        for name, control in arms.items():
            call = one if name == "one branch more" else full
            patch = (
                contextlib.nullcontext()
                if control is None
                else attnctl.patch(model, control, rows=rows, steps=10)
            )
            with patch:
                if compiled:
                    model(**call)  # a change of hooks may compile anew
                if device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                spent = _timed(lambda call=call: model(**call), device)  # type: ignore[misc]
            if turn >= 2:
                times.setdefault(name, []).append(spent)
            if device == "cuda":
                peaks[name] = torch.cuda.max_memory_allocated() / 2**30
    return _figures(times, peaks)


def _figures(times: dict[str, list[float]], peaks: dict[str, float]) -> dict[str, Any]:
    middle = {k: statistics.median(v) for k, v in times.items()}
    spread = {k: statistics.quantiles(v, n=4) for k, v in times.items()}
    full = middle["stock"] + middle["one branch more"]
    ratios = {}
    for name, value in middle.items():
        if name in ("neutral", "waiting"):
            ratios[f"{name} / stock"] = value / middle["stock"]
        elif name.startswith("softpag"):
            ratios[f"{name} / (stock + one branch)"] = value / full
    return {
        "milliseconds": {k: round(v, 3) for k, v in middle.items()},
        "quartiles": {k: [round(v[0], 3), round(v[2], 3)] for k, v in spread.items()},
        "ratios": {k: round(v, 4) for k, v in ratios.items()},
        "peak_gib": {k: round(v, 3) for k, v in peaks.items()},
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="sd3-small")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model, inputs = MODELS[given.model]()
    model = model.to(device, dtype).eval()
    data: dict[str, Any] = {
        "model": given.model,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "compiled": given.compile,
    }
    for branches, title in ((2, "with CFG"), (1, "without CFG")):
        data[title] = measure(
            model, inputs, branches=branches, rounds=given.rounds, device=device, dtype=dtype,
            compiled=given.compile,
        )  # fmt: skip
    text = json.dumps(data, indent=1)
    print(text)
    if given.out:
        given.out.write_text(text)


if __name__ == "__main__":
    main()
