"""Training of the autoencoder under tiny-wan: 17 frames of 64x64 to 9 latent frames of 16x16."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from attnctl.assets.train.numbers import proportion
from attnctl.assets.train.recipe import Plan, Recipe, Run
from attnctl.assets.train.weights import millions, rounded
from attnctl.assets.train.whole_clip import decode_whole, encode_whole
from attnctl.assets.world.detector import WEIGHTS, load
from attnctl.assets.world.motion import FRAMES
from attnctl.assets.world.moving import sample_moving
from attnctl.assets.world.watch import moved

CHANNELS = 8
WIDTHS = (24, 28)
SPATIAL, TEMPORAL = 4, 2
PATCH = 2
PART = 64
QUIET = -6.0


@dataclass(frozen=True)
class Tune:
    """What may be varied.

    Attributes:
        pool: drawn training clips.
        frames: their length, 4k + 1.
        stills: share of the training, at its start, on single frames only.
        many: how many times more stills than clips are in a batch.
        objects: weights of one and two objects.
        kl: weight of the divergence from a normal distribution.
        latents: channels of the latents.
        widths: narrowest layers of encoder and decoder.
        compiled: compile the residual blocks.
        channels_last: layout of the convolutions' weights and of the clips on a GPU.
    """

    pool: int = 16_384
    frames: int = FRAMES
    stills: float = 0.25
    many: int = 8
    objects: tuple[float, ...] = (1, 1)
    kl: float = 1e-4
    latents: int = CHANNELS
    widths: tuple[int, ...] = WIDTHS
    compiled: bool = True
    channels_last: bool = True


def recipe(run: Run) -> Recipe:
    """The video autoencoder's recipe."""
    return VideoVaeRecipe(run)


def build(latents: int = CHANNELS, widths: Sequence[int] = WIDTHS) -> Any:
    """Wan's autoencoder on patches of 2x2 pixels (as Wan 2.2's), with two levels.

    Patches and one halving make pictures 4 times smaller; the halving takes every second frame.
    """
    encoder, decoder = widths
    made = AutoencoderKLWan(
        base_dim=encoder,
        decoder_base_dim=decoder,
        z_dim=latents,
        dim_mult=[1, 2],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[True],
        latents_mean=[0.0] * latents,
        latents_std=[1.0] * latents,
        in_channels=3 * PATCH**2,
        out_channels=3 * PATCH**2,
        patch_size=PATCH,
        scale_factor_spatial=SPATIAL,
        scale_factor_temporal=TEMPORAL,
    )
    _even_start(made)
    return made


def _even_start(model: torch.nn.Module) -> None:
    """Let every convolution keep the size of its input, and every residual block begin as one.

    By default convolutions shrink it to a third of its variance; the norms divide by each pixel's
    own length, so that colours are then learned very late.
    """
    for weight in model.parameters():
        if weight.ndim >= 4:
            torch.nn.init.kaiming_normal_(weight, nonlinearity="linear")
    for block in residual_blocks(model):
        torch.nn.init.zeros_(block.conv2.weight)  # type: ignore[union-attr, arg-type]
    with torch.no_grad():  # nearly noiseless latents, or the noise hides the colours at first
        spread = model.quant_conv.bias.chunk(2)[1]  # type: ignore[operator, union-attr]
        spread.fill_(QUIET)


class VideoVaeRecipe(Recipe):
    """Absolute and squared error of the clip plus a little of the usual KL term."""

    name = "video-vae"
    plan = Plan(steps=6000, batch=16, lr=3e-3)
    tune = Tune()

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.pool: Tensor
        self.model = build(self.tune.latents, self.tune.widths).to(run.device)
        self.layout = torch.contiguous_format
        if run.device.type == "cuda" and self.tune.channels_last:
            self.layout = torch.channels_last_3d
            relaid(self.model)

    def compile(self) -> None:
        """Compile the residual blocks, where norms and activations take most of the time."""
        for block in residual_blocks(self.model) if self.tune.compiled else ():
            block.compile(dynamic=False)

    def prepare(self) -> None:
        """Draw the training clips: drawn step by step they would take longer than the step."""
        n = 4 if self.run.smoke else self.tune.pool
        part = min(PART, n)
        self.pool = torch.cat([self.drawn(part) for _ in range(0, n, part)])

    def drawn(self, size: int) -> Tensor:
        """Fresh clips ``[B, 3, F, 64, 64]``, RGB as uint8."""
        frames = 5 if self.run.smoke else self.tune.frames
        moving = sample_moving(
            size, objects=self.tune.objects, split="train", seed=self.run.source, frames=frames
        )
        return (moving.draw().transpose(1, 2) * 255).round().byte()

    def batch(self, size: int) -> tuple[Tensor]:
        """Clips ``[B, 3, F, 64, 64]``, RGB in -1 to 1; F is 1 for stills."""
        still, source = self.done < self.tune.stills, self.run.source
        size = size * self.tune.many if still else size
        rows = torch.randint(len(self.pool), (size,), generator=source, device=source.device)
        pool = self.pool[:, :, :1] if still else self.pool
        clips = pool[rows].float() / 127.5 - 1
        return (clips.contiguous(memory_format=self.layout),)

    def loss(self, batch: Sequence[Tensor]) -> Tensor:
        """Reconstruction error plus ``kl`` times the mean divergence of the latents."""
        (clips,) = batch
        mean, log_variance = (one.float() for one in encode_whole(self.model, clips))
        log_variance = log_variance.clamp(-20, 10)
        noise = torch.randn(mean.shape, generator=self.run.source, device=mean.device)
        latents = mean + noise * (0.5 * log_variance).exp()
        off = decode_whole(self.model, latents).float() - clips
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return 0.3 * off.abs().mean() + 2 * off.square().mean() + self.tune.kl * divergence

    def probe(self) -> dict[str, float]:
        """Mean PSNR of 64 clips."""
        moving = sample_moving(64, seed=92)
        clips = moving.draw().to(self.run.device)
        return {"psnr": round(float(psnr(round_trip(self.model, clips), clips).mean()), 2)}

    def write(self) -> Path:
        """Folder ``video-vae``, with the latents' mean and spread in its configuration."""
        place = self.run.out / self.name
        with torch.compiler.set_stance("force_eager"):
            clips = self.pool[: 4 if self.run.smoke else 256].float() / 127.5 - 1
            mean, std = spread(self.model, clips)
        self.model.register_to_config(latents_mean=mean, latents_std=std)
        saved: Any = rounded(self.model)
        saved.save_pretrained(place)
        return place

    def figures(self, place: Path) -> dict[str, Any]:
        """PSNR, and how many clips are still judged right after a round trip."""
        vae: Any = AutoencoderKLWan.from_pretrained(place).to(self.run.device)
        moving = sample_moving(self.run.prompts, objects=self.tune.objects, seed=91)
        clips = moving.draw().to(self.run.device)
        again = round_trip(vae, clips)
        judge = load(self.run.find(WEIGHTS)).to(self.run.device)
        seen = moved(again, moving.captions(), judge)
        return {
            "millions": millions(vae),
            "psnr": round(float(psnr(again, clips).mean()), 2),
            "right": proportion(seen.right.cpu()),
            "latents_mean": vae.config.latents_mean,
            "latents_std": vae.config.latents_std,
        }


def relaid(model: torch.nn.Module) -> None:
    """Lay the weights of all convolutions out as channels last, in place."""
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    for weight in model.parameters():
        if weight.ndim in layouts and weight.shape[1] > 1:
            weight.data = weight.data.contiguous(memory_format=layouts[weight.ndim])


def residual_blocks(vae: Any) -> list[torch.nn.Module]:
    """The autoencoder's residual blocks, encoder and decoder."""
    return [one for one in vae.modules() if type(one).__name__ == "WanResidualBlock"]


@torch.no_grad()
def spread(vae: Any, clips: Tensor, part: int = 32) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of every latent channel, of clips ``[B, 3, F, H, W]``."""
    latents = torch.cat([encode_whole(vae, one)[0].float() for one in clips.split(part)])
    by_channel = latents.transpose(0, 1).flatten(1)
    mean, std = by_channel.mean(1).tolist(), by_channel.std(1).tolist()
    return [round(one, 5) for one in mean], [round(one, 5) for one in std]


@torch.no_grad()
def round_trip(vae: Any, clips: Tensor, part: int = 32) -> Tensor:
    """Clips ``[B, F, 3, H, W]`` in 0 to 1 after encoding and decoding by the stock methods."""
    parts = [
        vae.decode(vae.encode(one.transpose(1, 2) * 2 - 1).latent_dist.mode()).sample
        for one in clips.split(part)
    ]
    return (torch.cat(parts).transpose(1, 2).float() / 2 + 0.5).clamp(0, 1)


def psnr(clips: Tensor, truth: Tensor) -> Tensor:
    """``[B]`` peak signal-to-noise ratio in dB of clips ``[B, F, 3, H, W]`` in 0 to 1."""
    return -10 * (clips - truth).square().mean((1, 2, 3, 4)).clamp(min=1e-10).log10()
