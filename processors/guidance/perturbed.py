"""Guidance by a perturbed pass, for any perturbation of chosen heads.

The denoiser runs the positive prompt once more with damaged attention; the result is pushed
away from that weak prediction:

    e = e_u + g (e_c - e_u) + w (e_c - e_p)        with classifier-free guidance g
    e = e_c + w (e_c - e_p)                        without

Guided outputs are affine combinations whose weights sum to one. So the term w (e_c - e_p) is
added to every branch's output, and the pipeline's own mix gives the formula above, unchanged,
with CFG in one call, in two calls, or none, for noise, v and velocity predictions alike. For
the same reason several such controls add up, in any order.

References:
    Ahn et al., "Self-Rectifying Diffusion Sampling with Perturbed-Attention Guidance", 2024
    (arXiv 2403.17377), eq. 15; Ahn et al., "Where and How to Perturb", 2025 (arXiv
    2506.10978), section 3.

Deviation: with guidance_rescale, or Qwen-Image's norm-preserving CFG, the pipeline rescales
towards |e_c|; the conditional output it sees then already holds the term.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from attnctl.control import Control
from attnctl.errors import HostError, OptionError
from attnctl.records import AttentionCall, ForwardCall
from attnctl.schedule import Schedule, Window

from .heads import head_indices, is_added_branch, put

if TYPE_CHECKING:
    from attnctl.hosts.run import Run
    from attnctl.processors.headhunter.headset import HeadSet
    from attnctl.selectors import Selection

__all__ = ["PerturbedGuidance", "add_to_all", "soften"]

_LOG = logging.getLogger("attnctl")


def soften(out: Tensor, perturbed: Tensor, u: float | Tensor) -> Tensor:
    """Mix an attention output with a perturbed one: lerp(O, O', u).

    Attention is linear in its map, so this is exactly the output of the mixed map
    (1 - u) A + u A'. The end points are exact.

    Args:
        out: [B, H, N, D].
        perturbed: [B, H, N, D].
        u: strength in [0, 1], a number or one per head [H].
    """
    if isinstance(u, Tensor):
        u = u.to(out)[None, :, None, None]
    return torch.lerp(out, perturbed, u)


@dataclass
class _Guidance:
    """State of a run: the term of the current step, for CFG in two calls.

    Args:
        step: step whose conditional branch has run.
        term: what it added, None for nothing.
        uncond_first: step whose unconditional branch ran before the conditional one.
    """

    step: int = -1
    term: Tensor | None = None
    uncond_first: int = -1


@dataclass(frozen=True)
class PerturbedGuidance(Control):
    """Base of the perturbation guidances: subclasses say what happens to a head.

    Args:
        heads: selector of the perturbed heads: grammar of `attnctl.selectors`, or a list of
            (layer, head) pairs.
        scale: w, the weight of (e_c - e_p); 0 is off.
        u: strength of the perturbation, 0 (untouched) to 1 (the paper's perturbation).
        start: fraction of the run at which guidance begins.
        stop: fraction of the run at which it ends.
        sigmas: instead, the window of noise levels (high, low).
        adaptive: a >= 0, lowers the scale with time: max(0, w - a (1000 - t)), t from 1000 to
            0, no extra pass where that gives 0. 0 is off.
        convention: "pipeline" as above; "guider" counts like diffusers' guiders without CFG,
            e_p + w (e_c - e_p), where w = 1 is off.
        passes: "rows" appends the perturbed rows to the denoiser's batch (one call, fastest);
            "calls" runs them by themselves (least memory).
    """

    heads: Any = "all"
    scale: float = 3.0
    u: float = 1.0
    start: float = 0.0
    stop: float = 1.0
    sigmas: tuple[float, float] | None = None
    adaptive: float = 0.0
    convention: Literal["pipeline", "guider"] = "pipeline"
    passes: Literal["rows", "calls"] = "rows"

    kinds: ClassVar[tuple[str, ...]] = ("self", "joint")
    adds_rows: ClassVar[bool] = True
    own_rows_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.u <= 1:
            raise OptionError(f"{self.name}: u={self.u} is outside [0, 1]")
        if not math.isfinite(self.scale):
            raise OptionError(f"{self.name}: scale={self.scale} must be a finite number")
        if not 0 <= self.adaptive < math.inf:
            raise OptionError(f"{self.name}: adaptive={self.adaptive} must be finite, 0 or above")
        for key, known in (("convention", ("pipeline", "guider")), ("passes", ("rows", "calls"))):
            if getattr(self, key) not in known:
                raise OptionError(
                    f"{self.name}: {key}={getattr(self, key)!r} is not one of {', '.join(known)}"
                )
        _ = self.schedule  # checks start, stop and sigmas

    @classmethod
    def for_model(cls, target: Any, preset: str | None = None, **options: Any) -> Control:
        """Return the guidance with a searched head set, or with the preset that fits.

        Args:
            target: pipeline or denoiser.
            preset: name of a preset, None for the one that matches the model.
            **options: override the preset's. `heads` may also be a `HeadSet` or the path of one
                (.json or .txt): then its search's options are used instead of a preset's.

        Raises:
            OptionError: if the set was searched on a model with other sites, or no preset fits.
        """
        found = _head_set(options.get("heads"))
        if found is None:
            return super().for_model(target, preset, **options)
        from attnctl.sites import sites

        found.check(sites(target))
        searched = dict(found.options) if found.perturbation == cls.name else {}
        _LOG.info("%s: %d heads searched for %s", cls.name, len(found.heads), found.objective)
        return cls(**{**searched, **options, "heads": found.heads})

    @property
    def selector(self) -> Any:
        """The perturbed heads."""
        return self.heads

    @property
    def schedule(self) -> Schedule:
        """Steps with guidance."""
        if self.sigmas is not None:
            return Schedule((Window(*self.sigmas, unit="sigma"),))
        return Schedule((Window(self.start, self.stop),))

    @property
    def neutral(self) -> bool:
        """No term, or nothing perturbed."""
        off = self.scale == 0 and self.convention == "pipeline"
        return off or self.u == 0 or self.schedule.empty

    def begin(self, run: Run, selection: Selection) -> _Guidance:
        """Return the state of one run."""
        return _Guidance()

    def perturb(self, call: AttentionCall, out: Tensor) -> Tensor:
        """Return the fully perturbed output of some heads.

        Args:
            call: the perturbed rows and selected heads alone, q/k/v [b, h, N, D].
            out: their unperturbed output [b, h, N, D].

        Returns:
            [b, h, N, D].
        """
        raise NotImplementedError(f"{type(self).__name__} must say what it does to a head")

    def direction(self, cond: Tensor, weak: Tensor) -> Tensor:
        """Return e_c - e_p, both [n, ...]; placebos of the same strength override it."""
        return cond - weak

    def attend(self, call: AttentionCall) -> Tensor:
        """Perturb the selected heads of this control's own rows."""
        rows = call.slice(call.role)
        out = call.proceed()
        if rows is None or is_added_branch(call):
            return out
        heads = head_indices(call)
        mine = out[rows] if heads is None else out[rows][:, heads]
        new = soften(mine, self.perturb(call.take(rows, heads), mine), self.u)
        return put(out, new, rows, heads, call)

    def denoise(self, call: ForwardCall) -> Tensor:
        """Add w (e_c - e_p) to the output of every branch."""
        state: _Guidance = call.state
        if "cond" not in call.rows:
            return self._other_branch(call, state)
        weight = self.weight(call)
        if weight == 0:
            state.step, state.term = call.step.index, None
            return call.proceed()
        main, weak = self._both(call)
        wide = torch.promote_types(main.dtype, torch.float32)
        cond = main[call.rows.slice("cond")]
        term = weight * self.direction(cond.to(wide), weak.to(wide))
        if state.uncond_first == call.step.index:
            # too late for the unconditional branch: the pipeline multiplies ours by g
            term = term / self._scale_of(call)
        state.step, state.term = call.step.index, term
        return add_to_all(main, term, len(call.rows.groups))

    def _both(self, call: ForwardCall) -> tuple[Tensor, Tensor]:
        """Return the output of the call's own rows, and of the perturbed ones."""
        if self.passes == "calls" or call.cached:
            main = call.proceed()
            return main, call.only("cond", call.role).proceed()
        out = call.extend("cond", call.role).proceed()
        return out[: len(call.rows)], out[len(call.rows) :]

    def _other_branch(self, call: ForwardCall, state: _Guidance) -> Tensor:
        """CFG in two calls: the unconditional one gets the term of the conditional one."""
        out = call.proceed()
        if state.step == call.step.index:
            if state.term is None:
                return out
            return add_to_all(out, state.term, len(call.rows.groups))
        if "uncond" not in call.rows:
            raise HostError(f"{self.name}: no conditional rows among {call.rows}")
        state.uncond_first = call.step.index
        return out

    def weight(self, call: ForwardCall) -> float:
        """Return the weight of e_c - e_p at a call's step, after `convention` and `adaptive`."""
        guided = self.convention == "pipeline" or call.run.guided(call.rows)
        weight = self.scale if guided else self.scale - 1
        if not self.adaptive:
            return weight
        time = call.run.time
        if math.isnan(time):
            raise HostError(
                f"{self.name}: adaptive={self.adaptive} needs the scheduler's time, which is not "
                "known for a bare denoiser; patch the pipeline, or use adaptive=0"
            )
        return max(0.0, weight - self.adaptive * (1000 - time))

    def _scale_of(self, call: ForwardCall) -> float:
        scale = call.run.guidance_scale(call.denoiser)
        if scale == 0:
            raise HostError(
                f"{self.name}: this pipeline runs the unconditional branch first and mixes with "
                "guidance scale 0, so that nothing can be added; use another guidance scale"
            )
        return scale


def _head_set(heads: Any) -> HeadSet | None:
    """Return the head set that an option stands for, None for a plain selector."""
    from attnctl.processors.headhunter.headset import HeadSet

    if isinstance(heads, HeadSet):
        return heads
    if isinstance(heads, Path) or (isinstance(heads, str) and heads.endswith((".json", ".txt"))):
        return HeadSet.load(heads)
    return None


def add_to_all(out: Tensor, term: Tensor, groups: int) -> Tensor:
    """Add a term [n, ...] to every group of n rows of an output [groups * n, ...]."""
    wide = out.to(term.dtype).unflatten(0, (groups, -1)) + term
    return wide.flatten(0, 1).to(out.dtype)
