"""TPG at head level: image tokens of the chosen heads' outputs in a random order.

    O' = P O,   P a random permutation of the image tokens

The paper permutes the tokens that enter whole blocks, residual stream included, and never puts
them back. Blocks without positional terms are permutation-equivariant, so for those the paper's
method equals permuting what the block gives out. Here only what the chosen heads give out is
permuted; the residual stream, the MLP and the other heads stay in place.

References:
    Rajabi et al., "Token Perturbation Guidance for Diffusion Models", 2025 (arXiv 2506.10036).

Deviation: the official code draws from the global generator, so that a seed does not fix the
picture; here the permutation follows from `seed`, the step and the site.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnctl.control import register
from attnctl.errors import HostError
from attnctl.records import AttentionCall

from .perturbed import PerturbedGuidance

__all__ = ["TPG"]


@register
@dataclass(frozen=True)
class TPG(PerturbedGuidance):
    """Token-permutation guidance.

    Args:
        seed: fixes the permutations.
        heads, scale, u, start, stop, sigmas, adaptive, convention, passes: see
            `PerturbedGuidance`.
    """

    seed: int = 0

    name: ClassVar[str] = "tpg"

    def perturb(self, call: AttentionCall, out: Tensor) -> Tensor:
        """Return the outputs with their image tokens permuted."""
        image = call.spans.queries("image")
        if image is None:
            raise HostError(
                f"{call.site}: which tokens are image tokens is not known for this model"
            )
        order = torch.arange(out.shape[2])
        order[image] = order[image][self.permutation(call, image.stop - image.start)]
        return out[:, :, order.to(out.device)]

    def permutation(self, call: AttentionCall, n: int) -> Tensor:
        """Return a permutation of n tokens for this step and site."""
        mixed = zlib.crc32(f"{self.seed}/{call.step.index}/{call.site.index}".encode())
        return torch.randperm(n, generator=torch.Generator().manual_seed(mixed))
