"""Slopes: how an objective changes with every head's u, from one backward pass.

At some steps of an ordinary run the perturbed pass is made once more with gradients, the guided
output e = e_main + w (e_c - e_p(u)) is turned into the picture it stands for (one-step
prediction), judged, and d objective / d u is read off for every head of every row at once. The
run itself goes on as if nothing had happened.

One such probe costs a forward and a backward of the denoiser and of the decoder, whatever the
number of heads. The objective must be differentiable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from attnctl.errors import HostError
from attnctl.hosts.clean import clean_latents, pixels
from attnctl.records import AttentionCall, ForwardCall

from .rows import RowStrengths

if TYPE_CHECKING:
    from attnctl.hosts.run import Run
    from attnctl.selectors import Selection

__all__ = ["SlopeProbe"]


@dataclass
class _State:
    """The guidance's own state, and the leaf tensors of the probe under way."""

    inner: Any
    leaves: dict[int, Tensor] | None = None


@dataclass(frozen=True)
class SlopeProbe(RowStrengths):
    """Measures slopes during a run that is guided by `table`.

    Args:
        guidance: the guidance whose term is judged, with its scale.
        table: strengths u [n, H] by site that guide the run and at which slopes are taken.
        shapes: heads by site index, for every site that is probed.
        at: indices of the probed steps.
        judge: scores [n] of pictures [n, 3, H, W].
        found: the slopes d score_row / d u [n, H] by site, for each probed step.
    """

    shapes: Mapping[int, int] = field(default_factory=dict)
    at: Sequence[int] = ()
    judge: Callable[[Tensor], Tensor] = lambda images: images.mean((1, 2, 3))
    found: dict[int, dict[int, Tensor]] = field(default_factory=dict)

    name: ClassVar[str] = "slope-probe"

    def begin(self, run: Run, selection: Selection) -> _State:
        """Return the state of one run."""
        return _State(self.guidance.begin(run, selection))

    def strength(self, call: AttentionCall) -> Tensor | None:
        """The leaves during a probe, the table else."""
        leaves = call.state.leaves
        return super().strength(call) if leaves is None else leaves.get(call.site.index)

    def denoise(self, call: ForwardCall) -> Tensor:
        """Run guided by the table; probe where asked."""
        state: _State = call.state
        if "cond" in call.rows and call.step.index in self.at:
            self._probe(call)
        if not any(bool(u.any()) for u in self.table.values()):
            return call.proceed()
        call.state = state.inner
        return self.guidance.denoise(call)

    def _probe(self, call: ForwardCall) -> None:
        state: _State = call.state
        with torch.no_grad():
            main = call.proceed()
        n = call.rows.n
        with torch.enable_grad():
            state.leaves = self._leaves(n, main.device)
            try:
                weak = call.only("cond", call.role).proceed()
            finally:
                leaves, state.leaves = state.leaves, None
            cond = main[call.rows.slice("cond")].float()
            guided = self._mixed(call, main) + self.guidance.scale * (cond - weak.float())
            sample = next(iter(call.inputs.values()))[call.rows.slice("cond")].float()
            images = pixels(call.run, clean_latents(call.run, sample, guided))
            scores = self.judge(images)
            slopes = torch.autograd.grad(scores.sum(), list(leaves.values()))
        self.found[call.step.index] = dict(zip(leaves, slopes, strict=True))

    def _leaves(self, n: int, device: torch.device) -> dict[int, Tensor]:
        leaves = {}
        for index, heads in self.shapes.items():
            start = self.table.get(index, torch.zeros(n, heads))
            leaves[index] = start.to(device, torch.float32).clone().requires_grad_()
        return leaves

    def _mixed(self, call: ForwardCall, main: Tensor) -> Tensor:
        """The pipeline's own mix of the branches, e_u + g (e_c - e_u)."""
        cond = main[call.rows.slice("cond")].float()
        if "uncond" in call.rows:
            uncond = main[call.rows.slice("uncond")].float()
            return uncond + call.run.guidance_scale(call.denoiser) * (cond - uncond)
        if call.run.guided(call.rows):
            raise HostError(
                "slopes need both branches in one denoiser call; this pipeline makes two: search "
                "with guidance_scale=1, as the paper does"
            )
        return cond
