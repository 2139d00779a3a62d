"""Sampled answers that are the same in whatever batch, and after whatever stop, an item is asked.

`generate` would draw a batch's tokens from one stream of random numbers, so that an answer would
depend on the others. Here every item has its own, and the token with the largest sum of logit and
Gumbel noise is taken, which is a draw from their softmax. A method and its baseline get the same
noise: their answers differ by what the method does to the logits alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .bad_data import EvalError

__all__ = ["Draw", "Sampling"]


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn: from all tokens, or from the likeliest that hold `top_p`.

    Attributes:
        temperature: what logits are divided by.
        top_p: least probability of the tokens that are drawn from; 1 for all.
        seed: of the draws, with each item's name.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __str__(self) -> str:
        top = "" if self.top_p == 1 else f", top-p {self.top_p}"
        return f"sampled at temperature {self.temperature}{top}, seed {self.seed}"

    def check(self) -> None:
        """Refuse what cannot be drawn.

        Raises:
            EvalError: if a value is out of range.
        """
        if not 0 < self.temperature < float("inf"):
            raise EvalError(f"--temperature {self.temperature} must be above 0")
        if not 0 < self.top_p <= 1:
            raise EvalError(f"--top-p {self.top_p} must be above 0, and 1 at most")

    def options(self, names: Sequence[str]) -> dict[str, Any]:
        """Return options of a greedy `generate` that draw the answers of items, one a row."""
        from transformers import (
            LogitsProcessorList,
            TemperatureLogitsWarper,
            TopPLogitsWarper,
        )

        steps: list[Any] = [TemperatureLogitsWarper(float(self.temperature))]
        if self.top_p < 1:
            steps.append(TopPLogitsWarper(self.top_p))
        draw = Draw([f"{self.seed}/{name}" for name in names])
        return {"logits_processor": LogitsProcessorList([*steps, draw])}


class Draw:
    """Adds Gumbel noise to logits, of each row from its own stream.

    Args:
        names: what each row's stream begins with.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.streams = [torch.Generator().manual_seed(_number(name)) for name in names]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return `scores` (rows, vocabulary) with the noise of the next token."""
        drawn = [
            torch.rand(scores.shape[-1], generator=one, dtype=torch.float64)
            for one in self.streams
        ]
        noise = torch.stack(drawn).to(scores.device)
        return scores.double() - torch.log(-torch.log(noise))


def _number(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
