"""A pool of encoded scenes with tokenized captions: the training set of the image models."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm import trange
from transformers import CLIPTokenizer

from attnctl.assets.world.captions import FRAMES, caption
from attnctl.assets.world.draw import draw
from attnctl.assets.world.sampling import sample
from attnctl.assets.world.scenes import Scenes

OBJECTS = (1, 2, 2)
PLAIN = 12


class Pool(NamedTuple):
    """Normalised latents ``[N, 4, 16, 16]`` (float16) and token ids ``[N, 20]`` (int16)."""

    latents: Tensor
    ids: Tensor

    def batch(
        self, size: int, source: torch.Generator, empty: Tensor, share: float
    ) -> tuple[Tensor, Tensor]:
        """Random latents ``[B, 4, 16, 16]`` and token ids ``[B, 20]``, some of them empty.

        Args:
            size: B.
            source: random numbers.
            empty: ``[1, 20]`` token ids of the empty prompt.
            share: of empty prompts.
        """
        device = source.device
        rows = torch.randint(len(self.ids), (size,), generator=source, device=device)
        dropped = torch.rand(size, 1, generator=source, device=device) < share
        ids = torch.where(dropped, empty, self.ids[rows])
        return self.latents[rows].float(), ids.long()


@torch.no_grad()
def fill_pool(
    vae: AutoencoderKL,
    words: CLIPTokenizer,
    n: int,
    source: torch.Generator,
    *,
    objects: Sequence[float] = OBJECTS,
    part: int = 4096,
) -> Pool:
    """Draw, encode and caption ``n`` scenes of the training split.

    Args:
        vae: the autoencoder, on the generator's device.
        words: the tokenizer.
        n: how many.
        source: random numbers.
        objects: weights of one, two, three, ... objects.
        part: scenes at a time.
    """
    latents: list[Tensor] = []
    ids: list[Tensor] = []
    part = min(part, n)
    for _ in trange(0, n, part, desc="pool", mininterval=2.0):
        scenes = sample(part, objects=objects, split="train", seed=source)
        latents.append(encode(vae, scenes))
        ids.append(tokens(words, captions(scenes, random.Random(len(ids)))).to(source.device))
    return Pool(torch.cat(latents), torch.cat(ids))


def encode(vae: AutoencoderKL, scenes: Scenes) -> Tensor:
    """Normalised latents of drawn scenes, as the pipeline's decoder expects them."""
    pictures = draw(scenes) * 2 - 1
    with torch.autocast(pictures.device.type, torch.bfloat16, enabled=pictures.is_cuda):
        mean = vae.encode(pictures).latent_dist.mode().float()
    shift = vae.config.shift_factor or 0.0
    return ((mean - shift) * vae.config.scaling_factor).half()


def captions(scenes: Scenes, chance: random.Random) -> list[str]:
    """One caption per scene, mostly the bare list of objects."""
    frames = (FRAMES[0],) * PLAIN + FRAMES[1:]
    return [caption(pairs, chance.choice(frames)) for pairs in scenes.pairs()]


def tokens(words: CLIPTokenizer, prompts: list[str]) -> Tensor:
    """Token ids ``[B, length]`` padded as the pipeline pads them."""
    made = words(prompts, padding="max_length", truncation=True, return_tensors="pt")
    ids: Tensor = made.input_ids.to(torch.int16)
    return ids
