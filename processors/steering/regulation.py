"""Attention Regulation: the maps of chosen tokens made to peak, and to cover equal areas.

At every step and site, with z the logits and k the targets' columns,

    A' = softmax(z + S),   S_k = sum_c w_ck G_c at the targets, 0 elsewhere

with Gaussians G_c on the image's grid. The weights w descend, from 0, the loss

    mean_k (Q_0.9(A'_k) - peak)^2 + lam_area mean_k (mean A'_k - area)^2 + lam_reg mean w^2

and the best of all iterations is kept. Then S_t = (1 - smoothing) S*_t + smoothing S*_(t-1)
is added to the logits, times decay^t, and the columns of the tokens that begin and end the
prompt are put back to their stock values. Nothing is differentiated through the model.

References:
    Zhang et al., "Enhancing Semantic Fidelity in Text-to-Image Synthesis: Attention Regulation
    in Diffusion Models", ECCV 2024 (arXiv 2403.06381); defaults of the released code.

Deviations from the released code: w starts at 0, not at random numbers of the global
generator, and S before the first step is 0, not random; the best iteration is chosen for each
sample, not for the whole batch; prompts of a batch may differ; sides below 16 get sigma 1;
grids need not be square; the step of the descent is in proportion to the tokens per sigma^2,
which is the released one on square grids with sides 16, 32, 48 and so on. Joint attention is
ours: there A' is the softmax over the text keys alone, which is what the paper's cross-attention
has, while S is added to the joint logits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from attnctl.control import register
from attnctl.errors import HostError, OptionError
from attnctl.processors.analysis.placing import Placing, has_text, place, text_keys
from attnctl.processors.guidance.heads import head_indices, put
from attnctl.processors.windowed import Windowed
from attnctl.records import AttentionCall
from attnctl.words import concepts
from attnctl.words.prompts import Prompt, prompts_of

from .regulation_loss import Aim, Basis, Optimum, optimise, shares, upper_quantile
from .token_groups import Groups, Parts, columns, split, taken

if TYPE_CHECKING:
    from attnctl.hosts.run import Run
    from attnctl.selectors import Selection

__all__ = ["Regulated", "Regulation"]


@dataclass(frozen=True)
class Regulated:
    """What was done at one site and step, for `Regulation.sink`.

    Args:
        site: name of the site.
        step: index of the step.
        optimum: losses [b] and weights.
        area: mean of each target's map before and after, [2, b, n], mean over heads.
        peak: its 90 % quantile before and after, [2, b, n].
    """

    site: str
    step: int
    optimum: Optimum
    area: Tensor
    peak: Tensor


@dataclass(eq=False)
class Memory:
    """State of one run.

    Args:
        groups: token positions by prompt and target.
        borders: positions to put back, by prompt, each a group of its own.
        made: both as keys of a call, on its device.
        kept: the optima of the last two steps by site and first sample.
    """

    groups: list[list[list[int]]]
    borders: list[list[list[int]]]
    made: dict[Any, tuple[Groups, ...]] = field(default_factory=dict)
    kept: dict[Any, list[tuple[int, Tensor]]] = field(default_factory=dict)

    def at(self, where: Placing, device: torch.device, site: str) -> tuple[Groups, ...]:
        """Return the targets, and the columns to put back, as keys of a call."""
        rows, text = where.rows, where.text
        key = (where.first, rows.start, rows.stop, text.start, text.stop, device)
        if key not in self.made:
            count, many = rows.stop - rows.start, len(self.groups)
            prompts = [(where.first + i) * many // where.samples for i in range(count)]
            self.made[key] = tuple(
                Groups.make([text_keys(one[i], text, site) for i in prompts], device)
                for one in (self.groups, self.borders)
            )
        return self.made[key]

    def before(self, key: Any, step: int, like: Tensor) -> Tensor:
        """Return the optimum of the step before this one, 0 if there was none."""
        older = [w for at, w in self.kept.get(key, ()) if at < step and w.shape == like.shape]
        return older[-1] if older else torch.zeros_like(like)

    def keep(self, key: Any, step: int, weights: Tensor) -> None:
        """Note the optimum of a step."""
        older = [one for one in self.kept.get(key, ()) if one[0] < step]
        self.kept[key] = [*older[-1:], (step, weights)]


@register
@dataclass(frozen=True)
class Regulation(Windowed):
    """Attention Regulation.

    Args:
        targets: what is to be seen: words as in `attnctl.find_words` (a string may hold several
            between commas), "nouns" for the nouns of each prompt, None for all words of its
            concepts (`attnctl.concepts`).
        heads: selector; cross- and joint-attention sites.
        unit: "token" makes every token of the words a target of its own, as published; "phrase"
            makes one target of each entry of `targets`.
        strength: factor on S, at least 0; 0 is off.
        peak: value that the 90 % quantile of a target's map is to have, in (0, 1].
        area: mean that it is to have, in (0, 1], for up to 1 / area targets.
        lam_area: weight of the areas' term, at least 0.
        lam_reg: weight of the squared weights, at least 0.
        iterations: of the descent, at least 0; 0 is off.
        rate: its step on a square grid of 16, above 0; other grids' is made to match.
        smoothing: share of the step before, in [0, 1).
        decay: factor on S per step, in (0, 1].
        restore: "borders" puts the columns of the tokens that begin and end the prompt back;
            positions do it for those; None for no column.
        start: fraction of the run at which it begins.
        stop: fraction of the run at which it ends.
        sink: is called with what was done at each site and step.
    """

    # text is read as the first type that takes it, and "none" is to be None
    targets: None | str | Mapping[str, Any] | Sequence[Any] = None  # noqa: RUF036
    heads: Any = "all"
    unit: Literal["token", "phrase"] = "token"
    strength: float = 1.0
    peak: float = 0.9
    area: float = 0.2
    lam_area: float = 80.0
    lam_reg: float = 0.09
    iterations: int = 20
    rate: float = 100.0
    smoothing: float = 0.25
    decay: float = 0.99
    restore: Any = "borders"
    start: float = 0.0
    stop: float = 0.5
    sink: Callable[[Regulated], Any] | None = None

    name: ClassVar[str] = "regulation"
    kinds: ClassVar[tuple[str, ...]] = ("cross", "joint")

    def __post_init__(self) -> None:
        for key, ok, want in (
            ("strength", 0 <= self.strength < math.inf, "finite, 0 or above"),
            ("peak", 0 < self.peak <= 1, "in (0, 1]"),
            ("area", 0 < self.area <= 1, "in (0, 1]"),
            ("lam_area", 0 <= self.lam_area < math.inf, "finite, 0 or above"),
            ("lam_reg", 0 <= self.lam_reg < math.inf, "finite, 0 or above"),
            ("iterations", self.iterations >= 0, "0 or above"),
            ("rate", 0 < self.rate < math.inf, "finite, above 0"),
            ("smoothing", 0 <= self.smoothing < 1, "in [0, 1)"),
            ("decay", 0 < self.decay <= 1, "in (0, 1]"),
            ("unit", self.unit in ("token", "phrase"), "token or phrase"),
        ):
            if not ok:
                raise OptionError(f"{self.name}: {key}={getattr(self, key)} must be {want}")
        _ = self.schedule, self._restored(None)

    @property
    def neutral(self) -> bool:
        """No strength, no iteration or no step."""
        return self.strength == 0 or self.iterations == 0 or self.schedule.empty

    def __str__(self) -> str:
        return super().__str__() if self.sink is None else str(replace(self, sink=None))

    def begin(self, run: Run, selection: Selection) -> Memory:
        """Find the targets in the run's prompts."""
        prompts = prompts_of(run)
        groups = [self.groups(prompt) for prompt in prompts]
        borders = []
        for prompt, one in zip(prompts, groups, strict=True):
            targets = {p for positions in one for p in positions}
            borders.append([[p] for p in self._restored(prompt) if p not in targets])
        return Memory(groups, borders)

    def groups(self, prompt: Prompt) -> list[list[int]]:
        """Return the token positions of each target of a prompt.

        Raises:
            OptionError: if a token would belong to two targets.
        """
        found = prompt.find(self._words(prompt))
        every = [p for word in found for p in word.positions]
        if self.unit == "token":
            return [[p] for p in sorted(set(every))]
        for word in found:
            twice = [p for p in word.positions if every.count(p) > 1]
            if twice:
                raise OptionError(
                    f"{self.name}: the token at {twice[0]} belongs to {word.text!r} and to "
                    "another target; with unit='phrase' targets must not overlap"
                )
        return [list(word.positions) for word in found]

    def _words(self, prompt: Prompt) -> Any:
        if isinstance(self.targets, str):
            if self.targets != "nouns":
                return [word.strip() for word in self.targets.split(",")]
            return [concept.noun for concept in concepts(prompt.text or "")]
        return self.targets

    def _restored(self, prompt: Prompt | None) -> list[int]:
        """Return the positions to put back; without a prompt, only check the option."""
        given = self.restore
        if isinstance(given, str) and re.fullmatch(r"\d+([-, ]+\d+)*", given):
            given = [int(p) for p in re.findall(r"\d+", given)]
        if given in (None, "none"):
            return []
        if given == "borders":
            if prompt is not None and prompt.text is None:
                raise HostError(
                    f"{self.name}: where the prompt begins and ends is read from its text, but "
                    "this run got embeddings: give restore=[0, ...] (token positions), or None"
                )
            return [] if prompt is None else list(prompt.borders())
        try:
            positions = [int(p) for p in given]
        except (TypeError, ValueError):
            positions = [-1]
        if any(p < 0 for p in positions):
            raise OptionError(
                f"{self.name}: restore={self.restore!r} must be 'borders', None, or token "
                "positions, each 0 or more"
            )
        return positions

    def attend(self, call: AttentionCall) -> Tensor:
        """Return attention with regulated maps in the conditional rows, for image queries."""
        out = call.proceed()
        where = place(call, "cond", self.name) if has_text(call) else None
        if where is None:
            return out
        heads = head_indices(call)
        part = call.take(where.rows, heads)
        new = self._regulated(call, part, where)
        mine = out[where.rows] if heads is None else out[where.rows][:, heads]
        if call.rest:  # what controls further in did is kept; only the softmax part changes
            new = mine[:, :, where.image] + new - part.primitive()[:, :, where.image]
        image = where.image
        mine = torch.cat([mine[:, :, : image.start], new, mine[:, :, image.stop :]], dim=2)
        return put(out, mine, where.rows, heads, call)

    def _regulated(self, call: AttentionCall, part: AttentionCall, where: Placing) -> Tensor:
        memory: Memory = call.state
        targets, borders = memory.at(where, call.q.device, call.site.name)
        parts = split(part, where.image, targets)
        with torch.no_grad():
            weights = self._optimum(call, part, where, parts, targets)
            key, step = (call.site.index, where.first), call.step.index
            before = memory.before(key, step, weights)
            memory.keep(key, step, weights)
            mixed = torch.lerp(weights, before, self.smoothing)
            factor = self.strength * self.decay**step
            bias = targets.spread(Basis.of(where.grid, parts.rest).spread(factor * mixed))
        out = parts.merged(bias)
        if not borders.empty:
            out = out + _lost(parts, bias, part, where.image, borders)
        return out.to(part.q.dtype)

    def _optimum(
        self,
        call: AttentionCall,
        part: AttentionCall,
        where: Placing,
        parts: Parts,
        targets: Groups,
    ) -> Tensor:
        aim = Aim(self.peak, self.area, self.lam_area, self.lam_reg)
        rest = parts.rest
        if call.site.kind == "joint":
            rest = _text_rest(part, where, targets)
        logits, basis = targets.gathered(parts.logits), Basis.of(where.grid, rest)
        found = optimise(
            rest, logits, targets.valid, basis, aim, iterations=self.iterations, rate=self.rate
        )
        if self.sink is not None:
            maps = [shares(rest, logits), shares(rest, logits + basis.spread(found.weights))]
            area = torch.stack([one.mean((1, 3)) for one in maps])
            peak = torch.stack([upper_quantile(one, aim.quantile)[0].mean(1) for one in maps])
            self.sink(Regulated(call.site.name, call.step.index, found, area, peak))
        return found.weights


def _text_rest(part: AttentionCall, where: Placing, targets: Groups) -> Tensor:
    """Return the log-sum-exp [b, h, m] of the text keys that are no targets."""
    text = torch.arange(where.text.start, where.text.stop, device=part.q.device)
    text = text.expand(len(targets.keys), -1)
    logits = columns(part, where.image, text)
    chosen = (text[:, :, None] == targets.keys[:, None]) & targets.real[:, None]
    return logits.masked_fill(chosen.any(-1)[:, None, :, None], -torch.inf).logsumexp(2)


def _lost(
    parts: Parts, bias: Tensor, part: AttentionCall, queries: slice, borders: Groups
) -> Tensor:
    """Return what the columns to put back had before and have not now, times their values."""
    logits = columns(part, queries, borders.keys)
    logits = logits.masked_fill(~borders.real[:, None, :, None], -torch.inf)
    before, after = (
        torch.exp(logits - total.clamp_min(torch.finfo(total.dtype).min)[:, :, None])
        for total in (parts.total(), parts.total(bias))
    )
    values = taken(part.repeat_kv(part.v), borders.keys).to(before.dtype)
    return (before - after).transpose(-1, -2) @ values
