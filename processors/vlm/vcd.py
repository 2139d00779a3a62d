"""VCD: the logits against those of a pass that sees a noisy image.

    out = (1 + alpha) z - alpha z-

z- comes from the same prompt with the normalised pixels x replaced by the t-th step of a
diffusion, x' = sqrt(abar_t) x + sqrt(1 - abar_t) eps.

References:
    Leng et al., "Mitigating Object Hallucinations in Large Vision-Language Models through Visual
    Contrastive Decoding", CVPR 2024 (arXiv 2311.16922), equations 2 to 5.

Defaults: alpha 1, beta 0.1, noise step 500, as the official command line; its script for POPE
takes beta 0.2. Deviations: the noise is drawn from `seed`, the same for every image, so that an
image's answer depends neither on its batch nor on earlier calls (the official code draws from the
global generator); the second pass has a cache of its own throughout (the official code before
July 2024 shared the first one's).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnctl.control import register
from attnctl.errors import HostError
from attnctl.records import LogitsCall

from .contrast import Contrast

__all__ = ["VCD", "noised", "signal_and_noise"]

STEPS = 1000
PIXELS = {"pixel_values": "image_grid_thw", "pixel_values_videos": "video_grid_thw"}
"""Names of pixel tensors, and of their grids where those of all images lie in one row."""


def signal_and_noise(step: int) -> tuple[float, float]:
    """Return (sqrt(abar_t), sqrt(1 - abar_t)) of step t of the schedule.

    beta_i = sigmoid(linspace(-6, 6, 1000))_i (0.005 - 1e-5) + 1e-5, abar_t = prod (1 - beta_i).
    """
    betas = torch.linspace(-6, 6, STEPS, dtype=torch.float64).sigmoid() * (5e-3 - 1e-5) + 1e-5
    kept = float((1 - betas).cumprod(dim=0)[step])
    return kept**0.5, (1 - kept) ** 0.5


def noised(pixels: Tensor, noise: Tensor, step: int) -> Tensor:
    """Return sqrt(abar_t) x + sqrt(1 - abar_t) eps.

    Args:
        pixels: normalised pixels.
        noise: standard normal, broadcastable to them.
        step: t, from 0 to 999.
    """
    signal, share = signal_and_noise(step)
    return signal * pixels + share * noise.to(pixels)


@register
@dataclass(frozen=True)
class VCD(Contrast):
    """Contrast with a pass that sees a noisy image (VCD).

    Args:
        beta: cut-off, in [0, 1]; 0 is none.
        both: whether attention controls of the stack act in the second pass too.
        alpha: weight of the contrast, alpha >= 0. With 0 the cut-off alone is left.
        noise_step: t of the diffusion, from 0 (hardly any noise) to 999.
        seed: of the noise.
    """

    alpha: float = 1.0
    noise_step: int = 500
    seed: int = 0

    name: ClassVar[str] = "vcd"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least("alpha", 0)
        self._at_least("noise_step", 0, STEPS - 1)

    @property
    def cuts_only(self) -> bool:
        """alpha = 0."""
        return self.alpha == 0

    def rewrite(self, call: LogitsCall) -> dict[str, Any]:
        """Return the same inputs with noise on the pixels.

        Raises:
            HostError: if a prompt has images and no pixels are among the inputs.
        """
        inputs, ids = call.inputs, call.inputs["input_ids"]
        found = {name: inputs[name] for name in PIXELS if name in inputs}
        if not found and call.past == 0 and any(bool((ids == one).any()) for one in call.images):
            raise HostError(
                f"{self.name}: the prompt has image tokens and the inputs have none of "
                f"{', '.join(PIXELS)}; give the images as pixels"
            )
        new = {
            name: noised(pixels, self._noise(pixels, inputs.get(PIXELS[name])), self.noise_step)
            for name, pixels in found.items()
        }
        return {**inputs, **new}

    def _noise(self, pixels: Tensor, grid: Tensor | None) -> Tensor:
        """Return the noise of each image (each tile, each frame of patches): the same for all."""
        draw = torch.Generator().manual_seed(self.seed)
        if grid is None:
            return torch.randn(pixels.shape[1:], generator=draw).to(pixels.device)
        sizes = grid.prod(dim=1).tolist()
        most = torch.randn(max(sizes), pixels.shape[1], generator=draw)
        return torch.cat([most[:n] for n in sizes]).to(pixels.device)

    def fuse(self, z: Tensor, weak: Tensor, t: int) -> Tensor:
        """Return (1 + alpha) z - alpha z-."""
        return (1 + self.alpha) * z - self.alpha * weak
