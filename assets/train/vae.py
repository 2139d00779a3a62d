"""Training of the autoencoder under tiny-sd3: 64x64 pictures to 16x16x4 latents and back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from attnctl.assets.train.numbers import proportion
from attnctl.assets.train.recipe import Plan, Recipe, Run
from attnctl.assets.train.weights import millions, on_device, rounded
from attnctl.assets.world.captions import caption
from attnctl.assets.world.detector import WEIGHTS, exact, load
from attnctl.assets.world.draw import SIZE, draw
from attnctl.assets.world.sampling import sample

OBJECTS = (1, 1, 2)
KL = 1e-4
WIDTHS = (32, 64, 64)


def recipe(run: Run) -> Recipe:
    """The autoencoder's recipe."""
    return VaeRecipe(run)


def build() -> Any:
    """Three levels, four times smaller, four latent channels, convolutions only."""
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * len(WIDTHS),
        up_block_types=["UpDecoderBlock2D"] * len(WIDTHS),
        block_out_channels=list(WIDTHS),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
    )


class VaeRecipe(Recipe):
    """Absolute and squared error of the picture plus a little of the usual KL term."""

    name = "vae"
    plan = Plan(steps=1900, batch=128, lr=1.5e-3)

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.model = on_device(build(), run.device)

    def batch(self, size: int) -> tuple[Tensor]:
        """Pictures ``[B, 3, 64, 64]``, RGB in -1 to 1."""
        scenes = sample(size, objects=OBJECTS, split="train", seed=self.run.source)
        return (draw(scenes) * 2 - 1,)

    def loss(self, batch: Sequence[Tensor]) -> Tensor:
        """Reconstruction error plus `KL` times the mean divergence of the latents."""
        (pictures,) = batch
        mean, log_variance = self.model.encoder(pictures).float().chunk(2, dim=1)
        log_variance = log_variance.clamp(-20, 10)
        noise = torch.randn(mean.shape, generator=self.run.source, device=mean.device)
        off = self.model.decoder(mean + noise * (0.5 * log_variance).exp()).float() - pictures
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return off.abs().mean() + off.square().mean() + KL * divergence

    def write(self) -> Path:
        """Folder ``vae``, with the latents' mean and spread in its configuration."""
        place = self.run.out / "vae"
        shift, scale = spread(self.model, *self.batch(2 if self.run.smoke else 1024))
        self.model.register_to_config(shift_factor=shift, scaling_factor=scale)
        saved: Any = rounded(self.model)
        saved.save_pretrained(place)
        return place

    def figures(self, place: Path) -> dict[str, Any]:
        """PSNR, and how many pictures are still judged exact after a round trip."""
        vae: Any = AutoencoderKL.from_pretrained(place).to(self.run.device)
        scenes = sample(2 * self.run.prompts, objects=OBJECTS, seed=91)
        images = draw(scenes)
        again = round_trip(vae, images.to(self.run.device)).cpu()
        prompts = [caption(pairs) for pairs in scenes.pairs()]
        error = (again - images).square().mean((1, 2, 3))
        return {
            "millions": millions(vae),
            "psnr": round(float((-10 * error.log10()).mean()), 2),
            "exact": proportion(exact(again, prompts, load(self.run.find(WEIGHTS)))),
            "shift_factor": vae.config.shift_factor,
            "scaling_factor": vae.config.scaling_factor,
        }


@torch.no_grad()
def spread(vae: Any, batch: Tensor) -> tuple[float, float]:
    """Mean of the latents and one over their standard deviation."""
    latents = vae.encode(batch).latent_dist.mode()
    return round(float(latents.mean()), 5), round(1 / float(latents.std()), 5)


@torch.no_grad()
def round_trip(vae: Any, images: Tensor, batch: int = 250) -> Tensor:
    """Pictures in 0 to 1 after encoding and decoding."""
    parts = [
        vae.decode(vae.encode(part * 2 - 1).latent_dist.mode()).sample
        for part in images.split(batch)
    ]
    return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)
