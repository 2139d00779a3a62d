"""Training of tiny-wan: a rectified flow over the video autoencoder's latents.

x_sigma = (1 - sigma) x + sigma n, and the model regresses the velocity n - x, as Wan does. The
times are logit-normal, shifted towards the noise for clips: a clip shows the same object many
times, so that little noise hides nothing. The training starts with first frames only: a picture
has a ninth of the tokens and teaches shapes, colours and words. One prompt in ten is empty, for
classifier-free guidance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanPipeline
from torch import Tensor

from attnctl.assets.train.clips import Pool, fill_pool
from attnctl.assets.train.film import film
from attnctl.assets.train.measure import judge_of
from attnctl.assets.train.measure_wan import measure
from attnctl.assets.train.numbers import figures_of
from attnctl.assets.train.recipe import Plan, Recipe, Run
from attnctl.assets.train.wan_card import write_card
from attnctl.assets.train.wan_folder import save_pipeline
from attnctl.assets.train.wan_parts import LAYERS, Filmer, scheduler, tokenizer, tokens
from attnctl.assets.world.motion import FRAMES
from attnctl.assets.world.moving import moving_prompts
from attnctl.assets.world.watch import moved


@dataclass(frozen=True)
class Tune:
    """What may be varied.

    Attributes:
        pool: encoded clips.
        objects: weights of one and two objects.
        empty: share of empty prompts.
        stills: share of the training, at its start, on first frames only.
        many: how many times more stills than clips are in a batch.
        shift: by which the times of clips are moved towards the noise; 1 leaves them.
        shift_stills: the same for stills.
        lengths: numbers of text tokens to which prompts are padded, drawn at random.
        layers: transformer blocks.
    """

    pool: int = 98_304
    objects: tuple[float, ...] = (2, 1)
    empty: float = 0.1
    stills: float = 0.2
    many: int = 8
    shift: float = 3.0
    shift_stills: float = 1.0
    lengths: tuple[int, ...] = (512, 512, 512, 256, 77, 32)
    layers: int = LAYERS


def recipe(run: Run) -> Recipe:
    """The recipe of tiny-wan."""
    return TinyWan(run)


class TinyWan(Recipe):
    """Text encoder and video transformer, trained together on latents of drawn clips."""

    name = "tiny-wan"
    plan = Plan(steps=18_000, batch=64, lr=1.2e-3, average=0.998)
    tune = Tune()

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.pool: Pool
        self.lengths = torch.tensor(self.tune.lengths, device=run.device)
        self.folder = run.out / self.name
        self.words = tokenizer(self.folder / "tokenizer")
        vae: Any = AutoencoderKLWan.from_pretrained(run.find("video-vae", "tiny-wan/vae"))
        self.vae = vae.requires_grad_(False)
        self.model = Filmer(self.words, vae.config.z_dim, self.tune.layers).to(run.device)
        self.model.fold()

    def prepare(self) -> None:
        """Encode the training clips."""
        n, frames = (16, 5) if self.run.smoke else (self.tune.pool, FRAMES)
        vae, source = self.vae.to(self.run.device), self.run.source
        self.pool = fill_pool(vae, self.words, n, self.tune.objects, source, frames)

    @cached_property
    def empty(self) -> Tensor:
        """Token ids ``[1, 23]`` of the empty prompt."""
        return tokens(self.words, [""]).to(self.run.device)

    def compile(self) -> None:
        """Compile block by block: the blocks share one compilation per shape."""
        for block in self.model.transformer.blocks:
            block.compile(dynamic=False)

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Latents ``[B, C, F, 16, 16]`` and token ids ``[B, 23]``; F is 1 for stills."""
        source, device = self.run.source, self.run.device
        still = self.done < self.tune.stills
        size = size * self.tune.many if still else size
        rows = torch.randint(len(self.pool.ids), (size,), generator=source, device=device)
        dropped = torch.rand(size, 1, generator=source, device=device) < self.tune.empty
        ids = torch.where(dropped, self.empty, self.pool.ids[rows])
        latents = self.pool.latents[:, :, :1] if still else self.pool.latents
        return latents[rows].float(), ids.long()

    def loss(self, batch: Sequence[Tensor]) -> Tensor:
        """Mean squared error of the velocity."""
        clean, ids = batch
        source, size = self.run.source, len(clean)
        noise = torch.randn(clean.shape, generator=source, device=clean.device)
        sigma = self.times(
            size, self.tune.shift_stills if clean.shape[2] == 1 else self.tune.shift
        )
        pick = torch.randint(len(self.lengths), (size,), generator=source, device=clean.device)
        noisy = torch.lerp(clean, noise, sigma[:, None, None, None, None])
        velocity = self.model(noisy, sigma, ids, self.lengths[pick])
        return (velocity.float() - (noise - clean)).square().mean()

    def times(self, size: int, shift: float) -> Tensor:
        """``[size]`` noise levels in 0 to 1."""
        source = self.run.source
        sigma = torch.randn(size, generator=source, device=source.device).sigmoid()
        return shift * sigma / (1 + (shift - 1) * sigma)

    def pipeline(self) -> WanPipeline:
        """The stock pipeline around the weights in training."""
        assert self.model.padding is not None
        self.model.padding.weigh(torch.ones(1, device=self.run.device))
        return WanPipeline(
            tokenizer=self.words,
            text_encoder=self.model.text_encoder,
            vae=self.vae.to(self.run.device),
            scheduler=scheduler(),
            transformer=self.model.transformer,
        )

    def probe(self) -> dict[str, float]:
        """Shares of right clips for 64 prompts of one object, 32 of two; 8 steps, guidance 3."""
        if self.run.smoke:
            return {}
        options: dict[str, Any] = {"num_inference_steps": 8, "guidance_scale": 3.0}
        options["max_sequence_length"] = 32
        found: dict[str, float] = {}
        for name, objects, n in (("one", 1, 64), ("two", 2, 32)):
            prompts = moving_prompts(n, objects, seed=3)
            with torch.autocast(self.run.device.type, torch.bfloat16):
                clips = film(self.pipeline(), prompts, seed=30, **options)
            seen = moved(clips, prompts, judge_of(self.run))
            for key in ("right", "objects", "direction"):
                share = getattr(seen, key).float().mean()
                found[f"{name} {key}"] = round(float(share), 3)
        return found

    def write(self) -> Path:
        """Folder ``tiny-wan``, as `WanPipeline` saves and loads it."""
        return save_pipeline(
            self.folder,
            transformer=self.model.transformer,
            vae=self.vae,
            text_encoder=self.model.text_encoder,
        )

    def figures(self, place: Path) -> dict[str, Any]:
        """Judged clips by prompts, guidance, steps and length; also the parts' figures."""
        return figures_of(self.run, "detector", "video-vae") | measure(place, self.run)

    def card(self, place: Path, figures: dict[str, Any]) -> None:
        """The folder's README.md."""
        write_card(place, figures, self.tune)
