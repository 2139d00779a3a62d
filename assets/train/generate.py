"""Pictures for many prompts, with noise that is the same on every device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def noise_for(n: int, shape: Sequence[int], seed: int) -> Tensor:
    """Starting noise ``[n, *shape]`` drawn on the CPU; row i depends on (seed, i) alone."""
    rows = [torch.Generator().manual_seed(seed * 1_000_003 + i) for i in range(n)]
    return torch.stack([torch.randn(*shape, generator=row) for row in rows])


@torch.no_grad()
def generate(
    pipe: Any, prompts: Sequence[str], *, seed: int = 0, batch: int = 500, **options: Any
) -> Tensor:
    """Pictures of a diffusers pipeline, one per prompt.

    Args:
        pipe: the pipeline.
        prompts: N prompts.
        seed: of the starting noise; the same prompt number gets the same noise.
        batch: prompts per call.
        options: passed to the pipeline (num_inference_steps, guidance_scale, ...).

    Returns:
        ``[N, 3, H, W]`` float32 on the CPU, RGB in 0 to 1.
    """
    pipe.set_progress_bar_config(disable=True)
    shape = (getattr(pipe, "unet", None) or pipe.transformer).config
    side = shape.sample_size
    noise = noise_for(len(prompts), (shape.in_channels, side, side), seed)
    noise = noise.to(pipe.device, pipe.dtype)
    parts = [
        pipe(
            list(prompts[i : i + batch]), latents=noise[i : i + batch], output_type="pt", **options
        )
        .images.float()
        .cpu()
        for i in range(0, len(prompts), batch)
    ]
    return torch.cat(parts)
