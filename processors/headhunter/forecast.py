"""Forecasts: what heads do to the picture that a running denoiser is heading for.

At some steps of an ordinary run the perturbed pass is made once more with gradients, the guided
output is turned into the picture it stands for (one-step prediction), that picture is judged,
and one backward gives the slope of the score with respect to every head's u at once. Between
the looks the run goes on as if nothing had happened; after the last one it ends.

Slopes are exact only for small u and scale: the attention is linear in u, but the layers after
it are not. The objective must be differentiable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from attnctl.errors import HostError
from attnctl.hosts.clean import clean_latents, pixels
from attnctl.processors.guidance.perturbed import add_to_all
from attnctl.records import AttentionCall, ForwardCall

from .rows import RowStrengths, Strengths

if TYPE_CHECKING:
    from attnctl.hosts.run import Run
    from attnctl.selectors import Selection

__all__ = ["Enough", "Forecast"]

Judge = Callable[[Tensor], Tensor]
"""Scores [n] of pictures [n, 3, H, W]."""


class Enough(BaseException):
    """Ends a run whose last look has been taken; no error."""


@dataclass
class _State:
    """The guidance's own state, and the strengths of the look under way."""

    inner: Any
    looking: Strengths | None = None


@dataclass(frozen=True)
class Forecast(RowStrengths):
    """Takes looks during a run that is guided by `table`.

    Args:
        guidance: the guidance whose term is judged, with its scale.
        table: strengths u [n, H] by site that guide the run.
        at: indices of the steps with a look.
        judge: scores [n] of pictures [n, 3, H, W].
        slopes_at: heads by site index, for the sites whose slopes are wanted.
        slopes: filled: slopes [n, H] by site, by step.
    """

    at: Sequence[int] = ()
    judge: Judge = lambda images: images.mean((1, 2, 3))
    slopes_at: Mapping[int, int] = field(default_factory=dict)
    slopes: dict[int, dict[int, Tensor]] = field(default_factory=dict)

    name: ClassVar[str] = "forecast"

    def begin(self, run: Run, selection: Selection) -> _State:
        """Return the state of one run."""
        return _State(self.guidance.begin(run, selection))

    def strength(self, call: AttentionCall) -> Tensor | None:
        """Those of the look under way, else the table's."""
        looking = call.state.looking
        return super().strength(call) if looking is None else looking.get(call.site.index)

    def denoise(self, call: ForwardCall) -> Tensor:
        """Run guided by the table; look where asked."""
        if "cond" in call.rows and call.step.index in self.at:
            return self._look(call)
        if not any(bool(u.any()) for u in self.table.values()):
            return call.proceed()
        call.state = call.state.inner
        return self.guidance.denoise(call)

    def _look(self, call: ForwardCall) -> Tensor:
        state: _State = call.state
        with torch.no_grad():
            main = call.proceed()
        self.slopes[call.step.index] = self._slopes(call, state, main)
        if call.step.index == max(self.at):
            raise Enough
        if not self.table:
            return main
        with torch.no_grad():
            term = self._term(call, main, self._weak(call, state, None))
        return add_to_all(main, term, len(call.rows.groups))

    def _term(self, call: ForwardCall, main: Tensor, weak: Tensor) -> Tensor:
        """What the guidance adds, w (e_c - e_p)."""
        cond = main[call.rows.slice("cond")].float()
        return self.guidance.weight(call) * self.guidance.direction(cond, weak.float())

    def _weak(self, call: ForwardCall, state: _State, looking: Strengths | None) -> Tensor:
        state.looking = looking
        try:
            return call.only("cond", call.role).proceed()
        finally:
            state.looking = None

    def _score(self, call: ForwardCall, state: _State, main: Tensor, looking: Strengths) -> Tensor:
        term = self._term(call, main, self._weak(call, state, looking))
        guided = self._mixed(call, main) + term
        sample = next(iter(call.inputs.values()))[call.rows.slice("cond")].float()
        return self.judge(pixels(call.run, clean_latents(call.run, sample, guided))).float()

    def _slopes(self, call: ForwardCall, state: _State, main: Tensor) -> dict[int, Tensor]:
        with torch.enable_grad():
            leaves = self._leaves(call.rows.n, main.device)
            total = self._score(call, state, main, leaves).sum()
            found = torch.autograd.grad(total, list(leaves.values()))
        return dict(zip(leaves, found, strict=True))

    def _leaves(self, n: int, device: torch.device) -> Strengths:
        leaves = {}
        for index, heads in self.slopes_at.items():
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
                "a forecast needs both branches in one denoiser call; this pipeline makes two: "
                "search with guidance_scale=1, as the paper does"
            )
        return cond
