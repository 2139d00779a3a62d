"""What a run with Radial Attention computes, told before it starts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnctl.kernels import BlockMask

__all__ = ["RadialPlan", "attention_share", "plan_for", "speedup"]


def speedup(share: float, dense: float, density: float) -> float:
    """Return 1 / (1 - a (1 - dw - (1 - dw) density)), what the saved blocks are worth at best.

    Args:
        share: a, the part of a dense step's time that goes into self-attention.
        dense: dw, the part of all layers and steps that stays dense.
        density: kept part of the blocks in the others.
    """
    return 1 / (1 - share * (1 - dense) * (1 - density))


def attention_share(tokens: int, width: int) -> float:
    """Return the part of a dense step's time in self-attention, estimated by operations.

    N tokens cost 4 N^2 width in attention and 24 N width^2 in the projections and the MLP of a
    usual block.

    Args:
        tokens: N.
        width: of the model, heads times head dim.
    """
    return tokens / (tokens + 6 * width)


@dataclass(frozen=True)
class RadialPlan:
    """What is computed in a run.

    Args:
        mask: the mask of the video tokens.
        density: kept part of the blocks, float64 [steps, layers]; 1 where dense.
        attention_share: part of a dense step's time that goes into self-attention.
    """

    mask: BlockMask
    density: Tensor
    attention_share: float

    @property
    def dense(self) -> float:
        """Part of all layers and steps that stays dense."""
        return float((self.density == 1).double().mean())

    @property
    def speedup(self) -> float:
        """Expected speedup of the whole run, if a kept block costs as much as in dense attention.

        An upper bound: measured kernels reach less.
        """
        return speedup(self.attention_share, self.dense, self.mask.density)

    def __str__(self) -> str:
        steps, layers = self.density.shape
        sparse = (self.density < 1).any(1).nonzero()[:, 0].tolist()
        first = int((self.density < 1).any(0).int().argmax()) if sparse else layers
        return (
            f"{self.mask}\n"
            f"sparse in {len(sparse)} of {steps} steps, in {layers - first} of {layers} layers; "
            f"{self.dense:.0%} of all attention stays dense\n"
            f"speedup at most {self.speedup:.2f}, with {self.attention_share:.0%} of a dense "
            "step in self-attention"
        )


def plan_for(
    mask: BlockMask,
    layers: int,
    dense_layers: int,
    dense_steps: list[bool],
    width: int,
    share: float | None,
) -> RadialPlan:
    """Return the plan of a run.

    Args:
        mask: the mask of the video tokens.
        layers: blocks of the model.
        dense_layers: how many of the first ones stay dense.
        dense_steps: for each step, whether it is dense.
        width: width of the model, heads times head dim.
        share: part of a dense step's time in self-attention, None for `attention_share`.
    """
    density = torch.full((len(dense_steps), layers), mask.density, dtype=torch.float64)
    density[torch.tensor(dense_steps, dtype=torch.bool)] = 1
    density[:, :dense_layers] = 1
    share = attention_share(mask.nq, width) if share is None else share
    return RadialPlan(mask, density, share)
