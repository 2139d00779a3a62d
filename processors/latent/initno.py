"""InitNO: before the first step, a search for noise in which every object has a place of its own.

The initial noise becomes mu + sigma z, z being what was drawn. With p_k the peak of object k's
map (as in Attend-and-Excite), S_k the self-attention of the token at that peak, blurred,

    L = L_cross + L_self + L_clean
    L_cross = max_k (1 - p_k)
    L_self  = mean over pairs of  sum min(S_k, S_l) / sum (S_k + S_l),  0 while L_cross > 1/2
    L_clean = sum over k of the largest value of map k outside the blob that holds its peak

Adam lowers L in mu and log sigma^2, with KL(N(mu, sigma^2) | N(0, 1)) kept within a bound. A round
ends well when L_cross < tau_cross and L_self < tau_self; one that does not is followed by another
with new noise, and after the last of them the best noise is optimised for longer. The steps of
the run then go on as in Attend-and-Excite, with L in the refinement.

References:
    Guo et al., "InitNO: Boosting Text-to-Image Diffusion Models via Initial Noise
    Optimization", CVPR 2024 (arXiv 2404.04650); official code xiefan-guo/initno, whose details
    these are.

Deviations: see docs/controls/initno.md. The bound on the KL divergence is kept by scaling mu and
log sigma^2 (official: steps of Adam on the divergence alone, until it is within the bound). In
refinement the official loss has one more term, 0.1 times the distance of the maps from their
running mean. Self-attention is computed in the rows of the peaks only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from attnctl.control import register
from attnctl.errors import HostError, OptionError
from attnctl.hosts.latents import noise_size
from attnctl.schedule import Schedule, Window

from .a_star import segregation
from .attend_and_excite import excite
from .engine import LatentControl, Look, Maps, Pass
from .maps import smoothed

if TYPE_CHECKING:
    from attnctl.hosts.run import Run

__all__ = ["InitNO", "SearchAccount", "blob", "divergence_from_normal", "otsu", "stray", "within"]

_EPS = 1e-3
"""Added to Adam's root mean square, as in the official code: small gradients make small moves."""
_LATER = 0.1
"""Weight of L_clean in refinement, as a part of that in the search."""
_LOUD = 0.5
"""L_cross above which L_self does not count in the search: its peaks mean nothing yet."""


# -- the bound on the divergence --------------------------------------------------------------


def divergence_from_normal(mu: Tensor, log_var: Tensor) -> Tensor:
    """Return KL(N(mu, exp(log_var)) | N(0, 1)) of each sample [n, ...], the mean over elements."""
    each = (mu.square() + log_var.exp() - 1 - log_var) / 2
    return each.flatten(1).mean(1)


def within(mu: Tensor, log_var: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """Return both scaled by one factor a sample, where their divergence is above the bound.

    It is at the bound then.
    """
    above = divergence_from_normal(mu, log_var) > bound
    for _ in range(4):  # it is nearly a square of the factor, so that few repetitions do
        ratio = bound / divergence_from_normal(mu, log_var)
        factor = _wide(ratio.sqrt().where(above, 1), mu)
        mu, log_var = factor * mu, factor * log_var
    return mu, log_var


# -- what is outside the main blob of a map ---------------------------------------------------


def otsu(values: Tensor) -> Tensor:
    """Return Otsu's threshold of values in [0, 1], of 256 levels: a scalar.

    The largest level such that the values up to it and those above it differ most.
    """
    levels = (values.flatten().nan_to_num() * 255).long()
    counts = torch.bincount(levels, minlength=256).double() / levels.numel()
    below = counts.cumsum(0)
    first = (counts * torch.arange(256, device=counts.device)).cumsum(0)
    weight = below * (1 - below)
    apart = (first[-1] * below - first).square() / weight.clamp_min(1e-30)
    return apart.where(weight > 1e-7, 0).argmax() / 255


def blob(mask: Tensor, place: Tensor | int) -> Tensor:
    """Return the part of a mask [frames, height, width] that hangs together with a place.

    Args:
        mask: bool.
        place: number of a token on the flattened grid, inside the mask.
    """
    grown = torch.zeros_like(mask)
    grown.view(-1)[place] = True
    while True:
        wider = grown.clone()
        for dim, size in enumerate(mask.shape):
            wider.narrow(dim, 1, size - 1).logical_or_(grown.narrow(dim, 0, size - 1))
            wider.narrow(dim, 0, size - 1).logical_or_(grown.narrow(dim, 1, size - 1))
        wider &= mask
        if torch.equal(wider, grown):
            return grown
        grown = wider


def stray(one: Tensor) -> Tensor:
    """Return the largest value of a map outside the blob around its peak, a scalar.

    0 where nothing outside is above the lowest value inside.

    Args:
        one: [frames, height, width], values in [0, 1].
    """
    seen = one.detach().cpu()  # a blob is grown step by step, too small for a GPU
    inside = blob(seen >= otsu(seen).to(seen), seen.argmax()).to(one.device)
    outside = one.masked_fill(inside, 0).max()
    return outside * (outside > one.masked_fill(~inside, 1).min())


# -- the control ------------------------------------------------------------------------------


@dataclass(frozen=True)
class SearchAccount:
    """How the search went, by sample.

    Args:
        met: whether both thresholds were met.
        score: L_cross + L_self at the end.
        rounds: draws of noise.
    """

    met: tuple[bool, ...]
    score: tuple[float, ...]
    rounds: tuple[int, ...]

    def __str__(self) -> str:
        scores = ", ".join(f"{one:.2f}" for one in self.score)
        return (
            f"search: {sum(self.met)} of {len(self.met)} samples met both thresholds; rounds "
            f"{', '.join(map(str, self.rounds))}; L_cross + L_self {scores}"
        )


@dataclass(frozen=True)
class _Found:
    """Outcome of one round: noise it began with, latents at its end [n, ...], scores [n]."""

    noise: Tensor
    x: Tensor
    score: Tensor
    met: Tensor

    def where(self, mine: Tensor, other: _Found) -> _Found:
        """Return this one for the samples of a mask [n], the other one elsewhere."""
        wide = _wide(mine, self.x)
        return _Found(
            torch.where(wide, self.noise, other.noise),
            torch.where(wide, self.x, other.x),
            torch.where(mine, self.score, other.score),
            torch.where(mine, self.met, other.met),
        )


@register
@dataclass(frozen=True)
class InitNO(LatentControl):
    """A search for the initial noise; further options as in `LatentControl`.

    By default as in the paper's code: the search, then moves in the first half of the run,
    refined at a fifth and at two fifths of it. With scale=0 it is the search alone, with
    rounds=0 the moves alone.

    Args:
        rounds: most draws of noise, the run's own being the first; 0 for no search.
        round_steps: most steps of Adam in a round.
        last_steps: most steps for the best noise, where no round ended well.
        rate: Adam's learning rate.
        tau_cross: L_cross below which a round may end.
        tau_self: L_self below which a round may end.
        bound: on the KL divergence, the mean over the elements; above 0.
        conflict: weight of L_self; 0 needs no attention among image tokens.
        clean: weight of L_clean.
    """

    stop: float = 0.5
    refine_at: tuple[float, float, float] = (0.2, 0.4, 0.4)
    reach: tuple[float, float, float] = (0.8, 0.8, 0.8)
    updates: int = 20
    rounds: int = 5
    round_steps: int = 10
    last_steps: int = 50
    rate: float = 0.01
    tau_cross: float = 0.2
    tau_self: float = 0.3
    bound: float = 1e-3
    conflict: float = 1.0
    clean: float = 1.0

    name: ClassVar[str] = "initno"
    kinds: ClassVar[tuple[str, ...]] = ("cross", "joint", "self")
    extra: ClassVar[str] = (
        "before the first step, up to rounds x round_steps + last_steps forwards and backwards of "
        "the conditional rows, up to the last site that is needed; then one at each step of its "
        "window"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rounds", "round_steps", "last_steps", "conflict", "clean"):
            if getattr(self, name) < 0:
                raise OptionError(f"{self.name}: {name}={getattr(self, name)} must be 0 or above")
        for name in ("rate", "tau_cross", "tau_self", "bound"):
            if not getattr(self, name) > 0:
                raise OptionError(f"{self.name}: {name}={getattr(self, name)} must be above 0")
        if self.searches and self.start > 0:
            raise OptionError(
                f"{self.name}: the search is made before the first step, which start={self.start} "
                "leaves out: give start=0, or rounds=0 for the moves alone"
            )

    @property
    def searches(self) -> bool:
        """Whether there is a search."""
        return self.rounds > 0 and self.round_steps > 0

    @property
    def schedule(self) -> Schedule:
        """The moves' window; the first step alone where nothing moves after the search."""
        moves = super().schedule
        return moves if self.scale or moves.empty else Schedule((Window(0, 1, "step"),))

    @property
    def neutral(self) -> bool:
        """Neither search nor moves."""
        return self.schedule.empty or not (self.scale or self.searches)

    @property
    def image_rows(self) -> bool:  # type: ignore[override]
        """Only where the self-attention has a weight."""
        return self.conflict > 0

    # -- losses ------------------------------------------------------------------------------

    def loss(self, maps: Maps, memory: dict[str, Any]) -> Tensor:
        """Return L_cross, which the moves between refinements go down."""
        return excite(maps.smooth)

    def shortfall(self, maps: Maps, loss: Tensor) -> Tensor:
        """Return the larger of L_cross and L_self, the latter in units of its own threshold."""
        unit = self.tau_cross / self.tau_self
        return torch.maximum(loss, unit * self._conflict(maps, maps.smooth))

    def refining(self, maps: Maps, loss: Tensor) -> Tensor:
        """Return L with a small weight of L_clean."""
        objects = maps.smooth
        apart = self.conflict * self._conflict(maps, objects)
        return loss + apart + _LATER * self._strays(objects)

    def _joint(self, maps: Maps) -> tuple[Tensor, Tensor, Tensor]:
        """Return L, L_cross and L_self."""
        objects = maps.smooth
        cross, apart = excite(objects), self._conflict(maps, objects)
        total = cross + (cross <= _LOUD) * self.conflict * apart + self._strays(objects)
        return total, cross, apart

    def _conflict(self, maps: Maps, objects: Tensor) -> Tensor:
        """Return L_self."""
        pairs = math.comb(len(objects), 2)
        if not (pairs and self.conflict):
            return objects.sum() * 0
        if not maps.image:
            raise HostError(
                f"{self.name}: no selected site with the grid of the words' maps has attention "
                "among image tokens: select such sites too, or give conflict=0"
            )
        return segregation(smoothed(maps.rows(objects.flatten(1).argmax(1)))) / pairs

    def _strays(self, objects: Tensor) -> Tensor:
        """Return L_clean times its weight."""
        if not self.clean:
            return objects.sum() * 0
        return self.clean * torch.stack([stray(one) for one in objects]).sum()

    # -- the search --------------------------------------------------------------------------

    def _move(self, run: Pass, x: Tensor) -> Tensor:
        """Search before the first step, all samples at once; then move, if there is a size."""
        if self.searches and run.call.step.index == 0:
            x = self._search(run, x)
        return super()._move(run, x) if self.scale else x

    def _search(self, run: Pass, x: Tensor) -> Tensor:
        size = noise_size(run.call.run)
        best = self._round(run, x, size, self.round_steps)
        rounds = torch.ones_like(best.score)
        for _ in range(1, self.rounds):
            if best.met.all():
                break
            rounds += ~best.met
            noise = torch.where(_wide(best.met, x), x, size * _drawn(run.call.run, x, ~best.met))
            found = self._round(run, noise, size, self.round_steps)
            better = found.met | (found.score < best.score)
            best = found.where(better & ~best.met, best)
        if self.last_steps and not best.met.all():
            best = best.where(best.met, self._round(run, best.noise, size, self.last_steps))
        run.state.account = SearchAccount(
            tuple(best.met.tolist()),
            tuple(best.score.tolist()),
            tuple(int(r) for r in rounds.tolist()),
        )
        return best.x

    def _round(self, run: Pass, noise: Tensor, size: Tensor | float, steps: int) -> _Found:
        """Return what Adam makes of some noise; samples stay where they end well."""
        mu, log_var = torch.zeros_like(noise), torch.zeros_like(noise)
        adam = torch.optim.Adam([log_var, mu], lr=self.rate, eps=_EPS)
        x, spread = noise, noise
        score = noise.new_full((len(noise),), torch.inf)
        met = torch.zeros_like(score, dtype=torch.bool)
        for _ in range(steps):
            look, now, ended = self._look(run, x)
            score, met = torch.where(met, score, now), met | ended
            if met.all():
                break
            grad, finite = run.gradient(look.losses, look.x)
            grad = grad.where(_wide(finite, grad), 0)
            mu.grad, log_var.grad = size * grad, grad * spread / 2
            adam.step()
            for old, new in zip((mu, log_var), within(mu, log_var, self.bound), strict=True):
                old.copy_(new)
            spread = noise * (log_var / 2).exp()
            x = torch.where(_wide(met, x), x, size * mu + spread)
        return _Found(noise, x, score, met)

    def _look(self, run: Pass, x: Tensor) -> tuple[Look, Tensor, Tensor]:
        """Return a look with L, and of each sample L_cross + L_self, 1 for an L_self that does
        not count, and whether both are below their thresholds."""
        parts: list[tuple[Tensor, Tensor]] = []

        def loss(maps: Maps) -> Tensor:
            total, *both = self._joint(maps)
            parts.append((both[0].detach(), both[1].detach()))
            return total

        look = run.look(x, loss)
        cross, apart = (torch.stack(part) for part in zip(*parts, strict=True))
        met = (cross < self.tau_cross) & (apart < self.tau_self)
        return look, cross + torch.where(cross > _LOUD, 1.0, apart), met


def _wide(mask: Tensor, x: Tensor) -> Tensor:
    """Return a mask [n] shaped to go with [n, ...]."""
    return mask.view(-1, *[1] * (x.ndim - 1))


def _drawn(run: Run, x: Tensor, who: Tensor) -> Tensor:
    """Return standard noise in the shape of x [n, ...], by the generator that the run was given.

    Where each sample has its own, only those of `who` [n] draw, so that a sample gets what it
    would get alone.
    """
    from diffusers.utils.torch_utils import randn_tensor

    generator = run.args.get("generator")
    if not isinstance(generator, list):
        return randn_tensor(x.shape, generator, x.device, x.dtype)
    drawn = torch.zeros_like(x)
    for i in who.nonzero().flatten().tolist():
        drawn[i] = randn_tensor(x.shape[1:], generator[i], x.device, x.dtype)
    return drawn
