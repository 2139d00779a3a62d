"""Draw pictures for candidate head sets and score them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from attnctl.errors import OptionError
from attnctl.hosts import targets
from attnctl.patch import patch
from attnctl.processors.guidance.perturbed import PerturbedGuidance
from attnctl.sites import Sites, sites

from .crew import Crew
from .encoded import encoded_once
from .headset import Head
from .journal import Journal
from .objective import Objective
from .rows import RowStrengths, Strengths, strengths
from .through import with_gradients

__all__ = ["Candidate", "Trials", "passes_per_step"]

Candidate = tuple[Head, ...]
T = TypeVar("T")
BACKWARD = 2
"""Passes that the backward of a pass counts as."""


class Job(NamedTuple):
    """One picture to draw: a head set, the picture's number, the number of steps."""

    heads: Candidate
    picture: int
    steps: int

    @property
    def key(self) -> str:
        """Name in the journal; the order of the heads does not matter."""
        heads = "".join(f"L{layer}H{head}" for layer, head in sorted(self.heads))
        return f"{heads} {self.picture} {self.steps}"

    @property
    def slopes_key(self) -> str:
        """Name of its slopes."""
        return f"slopes {self.key}"


@dataclass
class Trials:
    """A pipeline, the pictures of a search, and what they are judged by.

    Args:
        pipe: diffusers pipeline.
        guidance: the perturbation guidance; its heads are replaced by the candidates'.
        objective: the judge.
        prompts: M prompts.
        seeds: M seeds; picture i starts from CPU noise of seed i, whatever the batch.
        batch: rows per pipeline call; candidates and pictures fill it together.
        call: further arguments of the pipeline call, num_inference_steps among them.
        journal: the memory of scores.
        crew: the processes that share the drawing.
        tick: called after every batch with the forwards so far.
    """

    pipe: Any
    guidance: PerturbedGuidance
    objective: Objective
    prompts: Sequence[str]
    seeds: Sequence[int]
    batch: int = 8
    call: dict[str, Any] = field(default_factory=dict)
    journal: Journal = field(default_factory=lambda: Journal(None, {}))
    crew: Crew = field(default_factory=Crew)
    tick: Callable[[int], None] | None = None

    def __post_init__(self) -> None:
        if not self.prompts:
            raise OptionError("a head search needs at least one prompt")
        if len(self.prompts) != len(self.seeds):
            raise OptionError(f"{len(self.prompts)} prompts but {len(self.seeds)} seeds")
        if self.batch < 1:
            raise OptionError(f"batch={self.batch}: expected 1 or more")

    @property
    def sites(self) -> Sites:
        """The sites that the perturbation admits and that have a number."""
        admitted = (s for s in sites(self.pipe) if s.kind in self.guidance.kinds)
        return Sites(s for s in admitted if s.layer is not None)

    @property
    def steps(self) -> int:
        """Steps of a full picture."""
        return int(self.call["num_inference_steps"])

    @property
    def passes(self) -> int:
        """Denoiser passes of one picture in one step: cond, perturbed, and uncond with CFG."""
        return passes_per_step(self.pipe, self.call)

    def score(
        self,
        candidates: Sequence[Candidate],
        pictures: Iterable[int] | None = None,
        steps: int | None = None,
    ) -> Tensor:
        """Score head sets; what the journal knows is not drawn again.

        Args:
            candidates: C head sets; an empty one is the unguided model.
            pictures: indices of the pictures to draw for each; None for all.
            steps: number of steps instead of the full one.

        Returns:
            [C, m] float64 scores on the CPU.
        """
        chosen = list(range(len(self.prompts)) if pictures is None else pictures)
        jobs = [Job(heads, i, steps or self.steps) for heads in candidates for i in chosen]
        return self._scores(jobs).view(len(candidates), len(chosen))

    def each(self, candidates: Sequence[Candidate], pictures: Iterable[int], steps: int) -> Tensor:
        """Score head sets on a picture each, as `score` does.

        Args:
            candidates: C head sets.
            pictures: C indices of pictures.
            steps: number of steps.

        Returns:
            [C] float64 scores on the CPU.
        """
        pairs = zip(candidates, pictures, strict=True)
        return self._scores([Job(heads, i, steps) for heads, i in pairs])

    def _scores(self, jobs: Sequence[Job]) -> Tensor:
        known = self.journal.values
        wanted = [job for job in dict.fromkeys(jobs) if job.key not in known]
        for part, scores in self._shared(wanted, self._draw_and_score):
            new = {job.key: x for job, x in zip(part, scores, strict=True)}
            self._note(new, sum(job.steps * self.passes for job in part))
        return torch.tensor([known[job.key] for job in jobs], dtype=torch.float64)

    def _draw_and_score(self, part: Sequence[Job]) -> list[float]:
        images = self.draw([j.heads for j in part], [j.picture for j in part], part[0].steps)
        with torch.no_grad():
            scores = self.objective.score(images, [self.prompts[j.picture] for j in part])
        if not bool(scores.isfinite().all()):
            raise OptionError(f"objective {self.objective} gave a score that is not finite")
        return [float(x) for x in scores.float().cpu()]

    def slopes(
        self, candidates: Sequence[Candidate], pictures: Iterable[int], steps: int
    ) -> Tensor:
        """Return d score / d u of every head where each picture has a set of its own.

        One backward goes through the whole run. Memory grows with steps and rows; gradient
        checkpointing (`enable_gradient_checkpointing()` of the denoiser) saves most of it.

        Args:
            candidates: C head sets.
            pictures: C indices of pictures.
            steps: number of steps.

        Returns:
            [C, P] float64 on the CPU, heads in the order of `pool`.

        Raises:
            OptionError: if the objective has no gradients.
        """
        if self.objective.differentiable is False:
            raise OptionError(
                f"objective {self.objective} has no gradients: use the strategy halving or greedy"
            )
        pairs = zip(candidates, pictures, strict=True)
        jobs = [Job(heads, i, steps) for heads, i in pairs]
        known = self.journal.values
        wanted = [job for job in dict.fromkeys(jobs) if job.slopes_key not in known]
        for part, found in self._shared(wanted, self._slopes):
            new = {job.slopes_key: row for job, row in zip(part, found, strict=True)}
            self._note(new, len(part) * steps * self.slope_passes)
        return torch.tensor([known[job.slopes_key] for job in jobs], dtype=torch.float64)

    @property
    def slope_passes(self) -> int:
        """Passes of one picture in one step with its backward, which counts as two more.

        A third where gradient checkpointing runs every block again.
        """
        denoisers = targets(self.pipe).values()
        again = any(getattr(one, "is_gradient_checkpointing", False) for one in denoisers)
        return self.passes * (1 + BACKWARD + again)

    def _shared(self, things: Sequence[T], work: Any) -> Iterator[tuple[list[T], Any]]:
        """Do batches together with the crew; yield each with its result."""
        parts = [list(things[k : k + self.batch]) for k in range(0, len(things), self.batch)]
        with encoded_once(self.pipe):
            for k in range(0, len(parts), self.crew.size):
                wave = parts[k : k + self.crew.size]
                yield from zip(wave, self.crew.share(wave, work), strict=True)

    def _slopes(self, part: list[Job]) -> list[list[float]]:
        """Slopes [m][P]."""
        sites, drawn = self.sites, [job.picture for job in part]
        start = self._table([job.heads for job in part])
        place = self.pipe.device
        none = {s.index: torch.zeros(len(part), s.heads, device=place) for s in sites}
        leaves = {index: u.requires_grad_() for index, u in {**none, **start}.items()}
        prompts = [self.prompts[i] for i in drawn]
        with with_gradients(self.pipe), patch(self.pipe, RowStrengths(self.guidance, leaves)):
            images = self._run(prompts, self._noise(drawn), self._call(part[0].steps))
            total = self.objective.score(images, prompts).sum()
            if not total.requires_grad:
                raise OptionError(
                    f"no gradients come through {type(self.pipe).__name__} and the objective "
                    f"{self.objective}: use the strategy greedy, or halving with slopes=0"
                )
            # inside the patch: checkpointed blocks run again now
            found = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
        rows: list[list[float]] = torch.cat(found, dim=1).double().cpu().tolist()
        return rows

    def _table(self, sets: Sequence[Candidate]) -> Strengths:
        made = strengths(sets, self.guidance.u, self.sites)
        return {index: u.to(self.pipe.device) for index, u in made.items()}

    def _note(self, new: dict[str, Any], forwards: int) -> None:
        self.journal.add(new, forwards)
        if self.tick is not None:
            self.tick(self.forwards)

    @property
    def forwards(self) -> int:
        """Denoiser passes of single pictures so far, those of an earlier run included."""
        return self.journal.forwards

    @property
    def pool(self) -> list[Head]:
        """Every head that can be perturbed, by layer and head."""
        return [(s.layer, h) for s in self.sites for h in range(s.heads) if s.layer is not None]

    def draw(
        self, sets: Sequence[Candidate], pictures: Sequence[int], steps: int | None = None
    ) -> Tensor:
        """Draw picture `pictures[r]` with head set `sets[r]` for each row r.

        Returns:
            RGB [n, 3, H, W] in 0 to 1, of videos [n, F, 3, H, W], on the pipeline's device.
        """
        call, noise = self._call(steps or self.steps), self._noise(pictures)
        prompts = [self.prompts[i] for i in pictures]
        table = self._table(sets)
        if table:
            with patch(self.pipe, RowStrengths(self.guidance, table)):
                out = self._run(prompts, noise, call)
        else:
            out = self._run(prompts, noise, call)
        return out

    def _call(self, steps: int) -> dict[str, Any]:
        return {**self.call, "num_inference_steps": steps}

    def _noise(self, pictures: Sequence[int]) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(self.seeds[i]) for i in pictures]

    def _run(self, prompts: list[str], noise: list[torch.Generator], call: Any) -> Tensor:
        call = {"output_type": "pt", **call}
        images: Tensor = self.pipe(prompts, generator=noise, **call)[0]
        return images


def passes_per_step(pipe: Any, call: dict[str, Any]) -> int:
    """Return the denoiser passes of one guided picture in one step, perturbed one included."""
    config: Any = next(iter(targets(pipe).values())).config
    scale = call.get("true_cfg_scale")
    if scale is None and not config.get("guidance_embeds", False):
        scale = call.get("guidance_scale")
    return 3 if scale is not None and scale > 1 else 2
