"""One update of the weights: eager on the CPU, a replayed CUDA graph on a GPU.

A small model's step is hundreds of short kernels; launching them one by one from Python takes
several times longer than running them. So after a few eager steps the whole update (forward,
backward, clipping, AdamW) is captured once and replayed. Only the batch is drawn outside. Where a
recipe goes over to batches of other shapes, the step is captured again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnctl.assets.train.recipe import Plan, Recipe

WARM = 3


def optimizer(weights: Sequence[Tensor], plan: Plan) -> torch.optim.AdamW:
    """AdamW, on a GPU in the form that can be captured (its rate is a tensor there)."""
    gpu = weights[0].is_cuda
    lr = torch.tensor(plan.lr, device=weights[0].device) if gpu else plan.lr
    return torch.optim.AdamW(
        weights, lr=lr, betas=(0.9, 0.98), weight_decay=plan.decay, fused=gpu, capturable=gpu
    )


def pace(steps: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate, in place where it is a tensor."""
    for group in steps.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


class Step:
    """Callable that trains on one batch and returns its loss, a scalar tensor."""

    def __init__(
        self,
        recipe: Recipe,
        weights: Sequence[Tensor],
        steps: torch.optim.Optimizer,
        clip: float,
    ) -> None:
        self.recipe, self.weights, self.optimizer, self.clip = recipe, weights, steps, clip
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.shapes: list[torch.Size] = []

    def __call__(self, batch: Sequence[Tensor]) -> Tensor:
        """Train on one batch."""
        shapes = [one.shape for one in batch]
        if shapes != self.shapes:
            self.shapes, self.calls, self.graph = shapes, 0, None
        self.calls += 1
        if self.recipe.run.device.type != "cuda":
            return self._eager(batch)
        if self.calls <= WARM:
            return self._aside(batch)
        if self.graph is None:
            self._capture(batch)
        torch._foreach_copy_(self.inputs, list(batch))
        assert self.graph is not None
        self.graph.replay()
        return self.loss

    def _eager(self, batch: Sequence[Tensor]) -> Tensor:
        device = self.recipe.run.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda", cache_enabled=False):
            loss = self.recipe.loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def _aside(self, batch: Sequence[Tensor]) -> Tensor:
        """An eager step on another stream, as captures need it beforehand."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            loss = self._eager(batch)
        torch.cuda.current_stream().wait_stream(aside)
        return loss

    def _capture(self, batch: Sequence[Tensor]) -> None:
        self.inputs = [one.clone() for one in batch]
        self.graph = torch.cuda.CUDAGraph()
        self.graph.register_generator_state(self.recipe.run.source)
        with torch.cuda.graph(self.graph):
            self.loss = self._eager(self.inputs)
