"""HeadHunter: the search as users call it.

    hunter = attnctl.HeadHunter(objective="world", rounds=2, top_k=4, strategy="gradient")
    found = hunter.search(pipe, prompts, num_inference_steps=20, guidance_scale=1.0)
    attnctl.patch(pipe, found.control(u=0.5))

Reference:
    Ahn et al., "Where and How to Perturb: On the Design of Perturbation Guidance in Diffusion
    and Flow Models", NeurIPS 2025 (arXiv 2506.10978), section 4 and algorithm 1.

Defaults are the paper's for styles: u = 1, scale 3, 5 rounds of 3 heads, every step, no CFG.
For general quality it uses u = 0.25, one round, 24 heads, 20 pictures.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from attnctl.errors import OptionError
from attnctl.processors.guidance.perturbed import PerturbedGuidance
from attnctl.processors.guidance.softpag import SoftPAG

from .crew import Crew
from .gradient import gradient, screening
from .greedy import greedy
from .halving import brief, halving
from .headset import Head, HeadSet, Round, site_table_hash
from .journal import Journal
from .objective import Objective, objective
from .trials import Trials

__all__ = ["HeadHunter", "Plan"]


@dataclass(frozen=True)
class Plan:
    """What a search will take.

    Args:
        heads: heads in the pool.
        pictures: pictures of a full evaluation.
        forwards: denoiser passes of single pictures; a backward counts as two.
        greedy: the same for the paper's search with these settings.
    """

    heads: int
    pictures: int
    forwards: int
    greedy: int

    def __str__(self) -> str:
        share = 100 * self.forwards / self.greedy
        return (
            f"{self.heads} heads, {self.pictures} pictures: {self.forwards:,} forwards "
            f"({share:.1f} % of the {self.greedy:,} of the greedy search)"
        )


@dataclass(frozen=True)
class HeadHunter:
    """Search for the heads whose perturbation serves an objective best.

    Args:
        objective: a name (see `attnctl.processors.headhunter.objective`), a function
            `f(images, prompts) -> scores`, or an `Objective`.
        guidance: the perturbation, its strength u and its scale.
        strategy: "greedy" is the paper's; "halving" draws short pictures with sets of heads,
            every turn among fewer, after a screening by slopes where the objective has
            gradients; "gradient" takes slopes through such runs only.
        rounds: R.
        top_k: k, heads added per round.
        pool: selector of the heads that may be chosen.
        style: put in front of every prompt, "style, prompt".
        budget: part of the greedy search's forwards that the other strategies may take.
        batch: rows per pipeline call.
        slopes: of halving's forwards, the part of the screening; 0 for scores alone. Only where
            the objective is known to have gradients.
    """

    objective: str | Objective | Callable[..., Any]
    guidance: PerturbedGuidance = field(default_factory=lambda: SoftPAG(scale=3.0, u=1.0))
    strategy: Literal["greedy", "gradient", "halving"] = "greedy"
    rounds: int = 5
    top_k: int = 3
    pool: Any = "all"
    style: str = ""
    budget: float = 0.05
    batch: int = 8
    slopes: float = 0.75

    def __post_init__(self) -> None:
        for name in ("rounds", "top_k", "batch"):
            if getattr(self, name) < 1:
                raise OptionError(f"HeadHunter: {name}={getattr(self, name)}: expected 1 or more")
        if self.strategy not in ("greedy", "gradient", "halving"):
            raise OptionError(
                f"HeadHunter: strategy={self.strategy!r} is not greedy, gradient or halving"
            )
        if not 0 < self.budget <= 1:
            raise OptionError(f"HeadHunter: budget={self.budget} is outside (0, 1]")
        if not 0 <= self.slopes < 1:
            raise OptionError(f"HeadHunter: slopes={self.slopes} is outside [0, 1)")
        if self.guidance.u == 0 or self.guidance.scale == 0:
            raise OptionError(f"HeadHunter: {self.guidance} perturbs nothing")

    # -- what it takes -------------------------------------------------------------------

    def plan(self, pipe: Any, prompts: Sequence[str], **call: Any) -> Plan:
        """Return the number of forwards without drawing anything; options as for `search`."""
        return self._plan(self.trials(pipe, prompts, **call))

    def trials(self, pipe: Any, prompts: Sequence[str], **call: Any) -> Trials:
        """Return what draws and scores pictures for this search, without a journal."""
        return self._trials(pipe, prompts, None, None, call)

    def _plan(self, trials: Trials) -> Plan:
        pool, pictures = self._pool(trials), len(trials.prompts)
        sizes = [len(pool) - r * self.top_k for r in range(self.rounds)]
        full = sum(sizes) * pictures * trials.steps * trials.passes
        if self.strategy == "greedy":
            return Plan(len(pool), pictures, full, full)
        slopes, scores = self._counts(trials)
        stock = pictures if scores else 0
        passes = slopes * trials.slope_passes + (scores + stock) * trials.passes
        return Plan(len(pool), pictures, passes * brief(trials.steps), full)

    def _counts(self, trials: Trials) -> tuple[int, int]:
        """The pictures with head sets that the budget allows: with slopes, with scores alone."""
        heads = len(self._pool(trials))
        sizes = sum(heads - r * self.top_k for r in range(self.rounds))
        allowed = int(self.budget * sizes * len(trials.prompts) * trials.steps) * trials.passes
        steps = brief(trials.steps)
        slope, score = steps * trials.slope_passes, steps * trials.passes
        if self.strategy == "gradient":
            return max(1, allowed // slope), 0
        part = self.slopes if trials.objective.differentiable else 0.0
        # what is left is for every picture without heads, and for one with
        room = allowed - (len(trials.prompts) + 1) * score
        slopes = max(0, min(int(part * allowed), room)) // slope
        return slopes, max(1, (allowed - slopes * slope) // score - len(trials.prompts))

    def _pool(self, trials: Trials) -> list[Head]:
        selection = trials.sites.select(self.pool, self.guidance.kinds)
        layers = {s.index: s.layer for s in trials.sites}
        pool = [
            (layers[index] or 0, head)
            for index, mask in selection.items()
            for head, on in enumerate(mask.tolist())
            if on
        ]
        if len(pool) < self.rounds * self.top_k:
            raise OptionError(
                f"HeadHunter: {self.rounds} rounds of {self.top_k} heads need "
                f"{self.rounds * self.top_k} heads, the pool has {len(pool)}"
            )
        return sorted(pool)

    # -- the search ----------------------------------------------------------------------

    def search(
        self,
        pipe: Any,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int] | None = None,
        journal: str | os.PathLike[str] | None = None,
        progress: bool = True,
        **call: Any,
    ) -> HeadSet:
        """Search on a diffusers pipeline.

        Args:
            pipe: the pipeline.
            prompts: M prompts; with seeds i = 0, 1, ... they are the pictures of the search.
            seeds: M seeds of CPU generators; None for 0 to M - 1.
            journal: file that keeps every score, so that a search that was stopped goes on
                where it was; None for none.
            progress: show a bar on stderr.
            **call: arguments of the pipeline call; `num_inference_steps` is 20 unless given,
                `guidance_scale` 1 (no CFG).

        Returns:
            The heads with everything that led to them.

        Raises:
            OptionError: on wrong settings, a journal of another search, or an objective that
                fails or has no gradients where they are needed.
        """
        from tqdm import tqdm

        path = None if journal is None else Path(journal)
        trials = self._trials(pipe, prompts, seeds, path, call)
        plan = self._plan(trials)
        bar = tqdm(
            total=plan.forwards, unit="fwd", desc=f"{self.strategy} search", mininterval=0.5,
            disable=not (progress and trials.crew.leads), smoothing=0.05,
        )  # fmt: skip
        quiet = getattr(pipe, "_progress_bar_config", {})
        pipe.set_progress_bar_config(**{**quiet, "disable": True})
        trials.tick = lambda done: bar.update(done - bar.n)
        try:
            rounds = self._search(trials, self._pool(trials))
        finally:
            bar.close()
            pipe._progress_bar_config = quiet
        return self._result(trials, rounds)

    def _search(self, trials: Trials, pool: list[Head]) -> list[Round]:
        common = (pool, self.rounds, self.top_k)
        if self.strategy == "greedy":
            return greedy(trials.score, *common)
        pictures, steps = len(trials.prompts), brief(trials.steps)
        sloped, scored = self._counts(trials)

        def slopes(sets: Sequence[tuple[Head, ...]], drawn: Sequence[int]) -> Tensor:
            # what switching a head on gains, to first order
            return self.guidance.u * trials.slopes(sets, drawn, steps)

        by_slopes: Any = {"every": trials.pool, "count": sloped, "pictures": pictures}
        if self.strategy == "gradient":
            return gradient(slopes, *common, **by_slopes)
        keep = self.rounds * self.top_k
        known = screening(slopes, pool, keep, **by_slopes) if sloped else None
        return halving(
            trials.each, *common, count=scored, pictures=pictures, steps=steps, screened=known
        )

    def _trials(
        self,
        pipe: Any,
        prompts: Sequence[str],
        seeds: Sequence[int] | None,
        path: Path | None,
        call: dict[str, Any],
    ) -> Trials:
        prompts = [f"{self.style}, {p}" if self.style else p for p in prompts]
        seeds = list(range(len(prompts))) if seeds is None else list(seeds)
        call = {"num_inference_steps": 20, "guidance_scale": 1.0, **call}
        judge, crew = objective(self.objective), Crew.current()
        trials = Trials(pipe, self.guidance, judge, prompts, seeds, self.batch, call, crew=crew)
        settings = self._facts(trials)
        trials.journal = Journal(path if crew.leads else None, settings)
        known = (trials.journal.values, trials.journal.forwards)
        trials.journal.values, trials.journal.forwards = crew.same(known)
        return trials

    def _facts(self, trials: Trials) -> dict[str, Any]:
        """What a score depends on, beside heads, picture and steps."""
        from attnctl.sites import sites

        options = {
            f.name: getattr(self.guidance, f.name)
            for f in dataclasses.fields(self.guidance)
            if f.name != "heads"
        }
        config = getattr(trials.pipe, "config", {})
        return {
            "model": str(config.get("_name_or_path") or type(trials.pipe).__name__),
            "table": site_table_hash(sites(trials.pipe)),
            "perturbation": self.guidance.name,
            "options": options,
            "objective": str(trials.objective),
            "prompts": list(trials.prompts),
            "seeds": list(trials.seeds),
            "call": {k: v for k, v in trials.call.items() if _plain(v)},
        }

    def _result(self, trials: Trials, rounds: list[Round]) -> HeadSet:
        facts = self._facts(trials)
        facts["prompts"], facts["seeds"] = tuple(facts["prompts"]), tuple(facts["seeds"])
        return HeadSet(
            heads=tuple(head for one in rounds for head in one.chosen),
            strategy=self.strategy,
            forwards=trials.forwards,
            rounds=tuple(rounds),
            **facts,
        )


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))
