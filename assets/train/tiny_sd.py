"""Training of tiny-sd: a latent diffusion after Rombach et al. 2022, with SD1's noise levels.

x_t = sqrt(a_t) x + sqrt(1 - a_t) n with t uniform over the 1000 levels, and the model regresses
the noise n. One prompt in ten is empty, for classifier-free guidance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from attnctl.assets.train.clip_text import tokenizer
from attnctl.assets.train.latents import Pool, fill_pool, tokens
from attnctl.assets.train.measure import probe
from attnctl.assets.train.measure_sd import measure, pictures
from attnctl.assets.train.numbers import figures_of
from attnctl.assets.train.recipe import Plan, Recipe, Run
from attnctl.assets.train.sd_card import write_card
from attnctl.assets.train.sd_folder import pipeline, save_pipeline
from attnctl.assets.train.sd_parts import Denoiser, scheduler
from attnctl.assets.train.weights import on_device
from attnctl.assets.world.heldout import heldout_combinations


@dataclass(frozen=True)
class Tune:
    """What decides how well it draws, beside the plan.

    Attributes:
        objects: weights of training scenes of one, two and three objects.
        channels: of the UNet's two levels (16x16 and 8x8); multiples of 16.
        layers: blocks per level.
        text_width: of the text encoder's states; a multiple of 32.
        text_layers: of the text encoder.
        empty: share of empty prompts.
        pool: encoded training scenes.
        compiled: compile the UNet's blocks on a GPU.
        probe_prompts: prompts of each kind in a probe.
        probe_guidance: guidance scale of a probe, which takes 20 steps.
    """

    objects: tuple[float, ...] = (8, 1, 0.1)
    channels: tuple[int, ...] = (64, 112)
    layers: int = 1
    text_width: int = 96
    text_layers: int = 3
    empty: float = 0.1
    pool: int = 131_072
    compiled: bool = True
    probe_prompts: int = 250
    probe_guidance: float = 5.0


def recipe(run: Run) -> Recipe:
    """The recipe of tiny-sd."""
    return TinySd(run)


class TinySd(Recipe):
    """Text encoder and UNet, trained together on latents of drawn scenes."""

    name = "tiny-sd"
    plan = Plan(steps=4000, batch=256, lr=1e-3, average=0.998, fall=0.3)
    tune = Tune()
    model: Any

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        tune: Tune = self.tune
        self.pool: Pool
        self.folder = run.out / self.name
        self.words = tokenizer(self.folder / "tokenizer")
        self.vae: Any = AutoencoderKL.from_pretrained(run.find("vae", "tiny-sd3/vae"))
        self.vae.register_to_config(shift_factor=None)  # this pipeline knows a scale only
        self.vae.to(run.device)
        self.kept = scheduler().alphas_cumprod.to(run.device)
        denoiser = Denoiser(
            self.words,
            channels=tune.channels,
            layers=tune.layers,
            text_width=tune.text_width,
            text_layers=tune.text_layers,
        )
        self.model = on_device(denoiser, run.device)

    def prepare(self) -> None:
        """Encode the training scenes."""
        n = 16 if self.run.smoke else self.tune.pool
        self.pool = fill_pool(self.vae, self.words, n, self.run.source, objects=self.tune.objects)

    @cached_property
    def empty(self) -> Tensor:
        """Token ids ``[1, 20]`` of the empty prompt."""
        return tokens(self.words, [""]).to(self.run.device)

    def compile(self) -> None:
        """Compile level by level, each for its own fixed shapes."""
        unet = self.model.unet
        for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
            if self.tune.compiled:
                block.compile(dynamic=False)

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Latents ``[B, 4, 16, 16]`` and token ids ``[B, 20]``, one in ten empty."""
        return self.pool.batch(size, self.run.source, self.empty, self.tune.empty)

    def loss(self, batch: Sequence[Tensor]) -> Tensor:
        """Mean squared error of the noise."""
        clean, ids = batch
        source, device = self.run.source, clean.device
        noise = torch.randn(clean.shape, generator=source, device=device)
        time = torch.randint(len(self.kept), (len(clean),), generator=source, device=device)
        kept = self.kept[time][:, None, None, None]
        seen = self.model(kept.sqrt() * clean + (1 - kept).sqrt() * noise, time, ids)
        return (seen.float() - noise).square().mean()

    def probe(self) -> dict[str, float]:
        """Exactness for one and two objects, with the stock pipeline."""
        pipe = pipeline(vae=self.vae, tokenizer=self.words, **dict(self.model.named_children()))
        n = 2 if self.run.smoke else self.tune.probe_prompts
        steps = 2 if self.run.smoke else 20

        def paint(prompts: Sequence[str], seed: int) -> Tensor:
            guidance = self.tune.probe_guidance
            return pictures(
                pipe, prompts, seed, guidance_scale=guidance, num_inference_steps=steps
            )

        return probe(paint, self.run, n)

    def write(self) -> Path:
        """Folder ``tiny-sd``, as `StableDiffusionPipeline` saves and loads it."""
        return save_pipeline(self.folder, vae=self.vae, **dict(self.model.named_children()))

    def figures(self, place: Path) -> dict[str, Any]:
        """Exactness by number of objects, guidance and steps; also the parts' figures."""
        return figures_of(self.run, "detector", "vae") | measure(place, self.run)

    def card(self, place: Path, figures: dict[str, Any]) -> None:
        """The folder's README.md."""
        weights = " to ".join(f"{weight:g}" for weight in self.tune.objects)
        write_card(place, figures, len(heldout_combinations()), weights, self.tune)
