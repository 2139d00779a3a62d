"""Clips for many prompts by a stock `WanPipeline`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnctl.assets.train.generate import noise_for
from attnctl.assets.world.draw import SIZE
from attnctl.assets.world.motion import FRAMES


@torch.no_grad()
def film(
    pipe: Any,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    frames: int = FRAMES,
    batch: int = 64,
    **options: Any,
) -> Tensor:
    """Clips of a pipeline, one per prompt.

    Args:
        pipe: the pipeline.
        prompts: N prompts.
        seed: of the starting noise; the same prompt number gets the same noise.
        frames: F, odd.
        batch: prompts per call.
        options: passed to the pipeline (num_inference_steps, guidance_scale, ...).

    Returns:
        ``[N, F, 3, 64, 64]`` float32 on the pipeline's device, RGB in 0 to 1.
    """
    pipe.set_progress_bar_config(disable=True)
    side = SIZE // pipe.vae_scale_factor_spatial
    depth = (frames - 1) // pipe.vae_scale_factor_temporal + 1
    shape = (pipe.transformer.config.in_channels, depth, side, side)
    noise = noise_for(len(prompts), shape, seed).to(pipe.device)
    fixed = {"height": SIZE, "width": SIZE, "num_frames": frames, "output_type": "pt"}
    parts = [
        pipe(
            list(prompts[i : i + batch]), latents=noise[i : i + batch], **fixed, **options
        ).frames.float()
        for i in range(0, len(prompts), batch)
    ]
    return torch.cat(parts)
