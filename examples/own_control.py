"""A control of one's own, on the attention plane: sharper or flatter attention of chosen heads.

It changes the main pass itself, unlike `attnctl.TemperatureGuidance`, which steers away from it.
"""

import sys
from dataclasses import dataclass

import torch

import attnctl
from attnctl.apps.generate import Settings, generate


@attnctl.register
@dataclass(frozen=True)
class Sharpen(attnctl.Control):
    """Multiply the logits of chosen heads.

    Args:
        heads: selector.
        factor: above 1 sharper, below 1 flatter, 1 is off.
    """

    heads: str = "all"
    factor: float = 1.5
    name = "sharpen"
    selector = property(lambda self: self.heads)
    neutral = property(lambda self: self.factor == 1)

    def attend(self, call: attnctl.AttentionCall) -> torch.Tensor:
        scale = call.scale or call.q.shape[-1] ** -0.5
        sharp = call.proceed(scale=self.factor * scale)
        chosen = call.heads.to(sharp.device)[None, :, None, None]
        return torch.where(chosen, sharp, call.proceed())


if __name__ == "__main__":
    result = generate(
        "a red circle and a blue square",
        Sharpen(heads="L2-3", factor=2.0),  # or, by name, "sharpen:heads=L2-3,factor=2"
        settings=Settings(seed=0, steps=12),
        compare=True,
    )
    print(result.report)
    result.save(sys.argv[1] if len(sys.argv) > 1 else "own_control.png")
