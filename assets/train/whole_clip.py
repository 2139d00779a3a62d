"""AutoencoderKLWan on a whole clip at once, for training.

`encode` and `decode` of diffusers walk through a clip in chunks of four frames, or frame by
frame, and hand the last frames of every layer on in a cache. All convolutions are causal and the
cache only stands for the frames before, so the same numbers come out of one pass over the whole
clip. Two places are special: the first frame passes both temporal resamplings by, and the
temporal upsampling sees zeros in its place.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, patchify, unpatchify
from torch import Tensor, nn


def encode_whole(vae: AutoencoderKLWan, clips: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance ``[B, z, 1 + (F - 1) / 2, h, w]`` of clips ``[B, 3, F, H, W]``.

    Args:
        vae: autoencoder without residual shortcuts; pixels may be gathered in patches.
        clips: RGB in -1 to 1; F is 1 or 4k + 1, as the pipeline encodes no other frames.
    """
    encoder: Any = vae.encoder
    states = encoder.conv_in(patchify(clips, vae.config.patch_size or 1))
    for layer in encoder.down_blocks:
        states = shrink(layer, states) if isinstance(layer, WanResample) else layer(states)
    states = _head(encoder, encoder.mid_block(states))
    mean, log_variance = vae.quant_conv(states).chunk(2, dim=1)
    return mean, log_variance


def decode_whole(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Clips ``[B, 3, F, H, W]`` of latents, not yet clamped to -1 to 1 as `decode` clamps them."""
    decoder: Any = vae.decoder
    states = decoder.mid_block(decoder.conv_in(vae.post_quant_conv(latents)))
    for block in decoder.up_blocks:
        for layer in block.resnets:
            states = layer(states)
        for layer in block.upsamplers or ():
            states = grow(layer, states)
    return unpatchify(_head(decoder, states), vae.config.patch_size or 1)


def _head(part: Any, states: Tensor) -> Tensor:
    out: Tensor = part.conv_out(part.nonlinearity(part.norm_out(states)))
    return out


def shrink(layer: WanResample, states: Tensor) -> Tensor:
    """Half the height and width; half the frames after the first, if the layer does that."""
    states = _by_frame(layer.resample, states)
    if layer.mode != "downsample3d" or states.shape[2] == 1:
        return states
    return torch.cat([states[:, :, :1], layer.time_conv(states)], dim=2)


def grow(layer: WanResample, states: Tensor) -> Tensor:
    """Twice the height and width; twice the frames after the first, if the layer does that."""
    if layer.mode == "upsample3d" and states.shape[2] > 1:
        rest = layer.time_conv(states[:, :, 1:]).unflatten(1, (2, -1))
        rest = rest.movedim(1, 3).flatten(2, 3)
        states = torch.cat([states[:, :, :1], rest], dim=2)
    return _by_frame(layer.resample, states)


def _by_frame(layer: nn.Module, states: Tensor) -> Tensor:
    batch = len(states)
    flat = layer(states.transpose(1, 2).flatten(0, 1))
    return flat.unflatten(0, (batch, -1)).transpose(1, 2)
