"""Training of tiny-sd3: a rectified flow over the autoencoder's latents, after Esser et al. 2024.

x_sigma = (1 - sigma) x + sigma n with sigma = logistic(N(0, 1)), and the model regresses the
velocity n - x. One prompt in ten is empty, for classifier-free guidance.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from attnctl.assets.train.clip_text import tokenizer
from attnctl.assets.train.latents import OBJECTS, Pool, fill_pool, tokens
from attnctl.assets.train.measure_sd3 import measure
from attnctl.assets.train.numbers import figures_of
from attnctl.assets.train.recipe import Plan, Recipe, Run
from attnctl.assets.train.sd3_card import write_card
from attnctl.assets.train.sd3_folder import save_pipeline
from attnctl.assets.train.sd3_parts import Painter
from attnctl.assets.world.heldout import heldout_combinations

POOL = 131_072
EMPTY = 0.1
ZEROS = (256, 256, 256, 256, 0, 1, 16, 77)


def recipe(run: Run) -> Recipe:
    """The recipe of tiny-sd3."""
    return TinySd3(run)


class TinySd3(Recipe):
    """Text encoders and MM-DiT, trained together on latents of drawn scenes."""

    name = "tiny-sd3"
    plan = Plan(steps=2000, batch=256, lr=1.5e-3, average=0.998, fall=0.0)

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.pool: Pool
        self.zeros = torch.tensor(ZEROS, device=run.device)
        self.folder = run.out / self.name
        self.words = tokenizer(self.folder / "tokenizer")
        self.vae = AutoencoderKL.from_pretrained(run.find("vae", "tiny-sd3/vae"))
        self.model = Painter(self.words).to(run.device)
        self.model.fold_zeros()

    def prepare(self) -> None:
        """Encode the training scenes."""
        n = 16 if self.run.smoke else POOL
        self.pool = fill_pool(self.vae.to(self.run.device), self.words, n, self.run.source)

    @cached_property
    def empty(self) -> Tensor:
        """Token ids ``[1, 20]`` of the empty prompt."""
        return tokens(self.words, [""]).to(self.run.device)

    def compile(self) -> None:
        """Compile block by block: the blocks share one compilation."""
        for block in self.model.transformer.transformer_blocks:
            block.compile()

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Latents ``[B, 4, 16, 16]`` and token ids ``[B, 20]``, one in ten empty."""
        return self.pool.batch(size, self.run.source, self.empty, EMPTY)

    def loss(self, batch: Sequence[Tensor]) -> Tensor:
        """Mean squared error of the velocity."""
        clean, ids = batch
        source, size = self.run.source, len(clean)
        noise = torch.randn(clean.shape, generator=source, device=clean.device)
        sigma = torch.randn(size, generator=source, device=clean.device).sigmoid()
        pick = torch.randint(len(ZEROS), (size,), generator=source, device=clean.device)
        noisy = torch.lerp(clean, noise, sigma[:, None, None, None])
        velocity = self.model(noisy, sigma, ids, self.zeros[pick])
        return (velocity.float() - (noise - clean)).square().mean()

    def write(self) -> Path:
        """Folder ``tiny-sd3``, as `StableDiffusion3Pipeline` saves and loads it."""
        painter = self.model
        return save_pipeline(
            self.folder,
            transformer=painter.transformer,
            vae=self.vae,
            text_encoder=painter.text_encoder,
            text_encoder_2=painter.text_encoder_2,
        )

    def figures(self, place: Path) -> dict[str, Any]:
        """Exactness by number of objects, guidance and steps; also the parts' figures."""
        return figures_of(self.run, "detector", "vae") | measure(place, self.run)

    def card(self, place: Path, figures: dict[str, Any]) -> None:
        """The folder's README.md."""
        weights = " to ".join(map(str, OBJECTS))
        objects = f"one, two and three objects as {weights}"
        write_card(place, figures, len(heldout_combinations()), objects)
