"""A pool of encoded clips with tokenized captions: the training set of tiny-wan."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import trange
from transformers import T5TokenizerFast

from attnctl.assets.train.wan_parts import tokens
from attnctl.assets.train.whole_clip import encode_whole
from attnctl.assets.world.motion import FRAMES, SENTENCES, motion_caption
from attnctl.assets.world.moving import Moving, sample_moving

PLAIN = 12
PART = 256


class Pool(NamedTuple):
    """Normalised latents ``[N, C, F, 16, 16]`` (float16) and token ids ``[N, 23]`` (int16)."""

    latents: Tensor
    ids: Tensor


@torch.no_grad()
def fill_pool(
    vae: Any,
    words: T5TokenizerFast,
    n: int,
    objects: Sequence[float],
    source: torch.Generator,
    frames: int = FRAMES,
    part: int = PART,
) -> Pool:
    """Draw, encode and caption ``n`` moving scenes of the training split."""
    part = min(part, n)
    latents: list[Tensor] = []
    ids: list[Tensor] = []
    for _ in trange(0, n, part, desc="pool", mininterval=2.0):
        moving = sample_moving(part, objects=objects, split="train", seed=source, frames=frames)
        latents.append(encode(vae, moving.draw()))
        ids.append(tokens(words, captions(moving, random.Random(len(ids)))))
    return Pool(torch.cat(latents), torch.cat(ids).to(source.device))


def encode(vae: Any, clips: Tensor) -> Tensor:
    """Normalised latents of clips ``[B, F, 3, H, W]``, as the pipeline's decoder expects them."""
    with torch.autocast(clips.device.type, torch.bfloat16, enabled=clips.is_cuda):
        mean = encode_whole(vae, clips.transpose(1, 2) * 2 - 1)[0].float()
    shift, scale = (
        torch.tensor(one, device=mean.device).view(1, -1, 1, 1, 1)
        for one in (vae.config.latents_mean, vae.config.latents_std)
    )
    return ((mean - shift) / scale).half()


def captions(moving: Moving, chance: random.Random) -> list[str]:
    """One caption per clip, mostly bare, with the objects in random order."""
    sentences = (SENTENCES[0],) * PLAIN + SENTENCES[1:]
    rows = (chance.sample(row, len(row)) for row in moving.moved())
    return [motion_caption(row, chance.choice(sentences)) for row in rows]
