"""Draw pictures for candidate head sets and score them."""

from __future__ import annotations

import contextlib
import functools
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
from .forecast import Enough, Forecast
from .headset import Head
from .journal import Journal
from .objective import Objective
from .rows import RowStrengths, Strengths, strengths

__all__ = ["Candidate", "Trials", "passes_per_step"]

Candidate = tuple[Head, ...]
T = TypeVar("T")
BACKWARD = 3
"""Passes that a look with its backward counts as."""


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

    def slopes(self, heads: Candidate, pictures: Sequence[int], at: Sequence[int]) -> Tensor:
        """Return d score / d u of every head on top of a head set, from one-step predictions.

        Args:
            heads: the set that guides the runs and at which slopes are taken.
            pictures: indices of the pictures, m of them.
            at: indices of the steps with a look, T of them.

        Returns:
            [T, m, P] float64 on the CPU, heads in the order of `pool`.

        Raises:
            OptionError: if the objective has no gradients.
        """
        if not self.objective.differentiable:
            raise OptionError(
                f"objective {self.objective} has no gradients: use the strategy halving or greedy"
            )
        keys = {i: f"slopes {Job(heads, i, self.steps).key} {list(at)}" for i in pictures}
        known = self.journal.values
        wanted = [i for i in pictures if keys[i] not in known]
        with _without_weight_gradients(self.pipe):
            for drawn, found in self._shared(wanted, functools.partial(self._slopes, heads, at)):
                new = {keys[i]: row for i, row in zip(drawn, found, strict=True)}
                self._note(new, len(drawn) * self.slope_cost(bool(heads), at))
        rows = [known[keys[i]] for i in pictures]
        return torch.tensor(rows, dtype=torch.float64).transpose(0, 1)

    def slope_cost(self, guided: bool, at: Sequence[int]) -> int:
        """Return the denoiser passes of one picture with slopes; a backward counts as two."""
        plain = self.passes - 1
        steps = max(at) + 1
        # the last look ends the run before it is guided
        return steps * plain + (steps - 1) * guided + len(at) * BACKWARD

    def _shared(self, things: Sequence[T], work: Any) -> Iterator[tuple[list[T], Any]]:
        """Do batches together with the crew; yield each with its result."""
        parts = [list(things[k : k + self.batch]) for k in range(0, len(things), self.batch)]
        with encoded_once(self.pipe):
            for k in range(0, len(parts), self.crew.size):
                wave = parts[k : k + self.crew.size]
                yield from zip(wave, self.crew.share(wave, work), strict=True)

    def _slopes(
        self, heads: Candidate, at: Sequence[int], part: list[int]
    ) -> list[list[list[float]]]:
        """Slopes [m][T][P]."""
        shapes = {s.index: s.heads for s in self.sites}
        prompts = [self.prompts[i] for i in part]
        table = self._table([heads] * len(part)) if heads else {}
        judge = functools.partial(_judge, self.objective, prompts)
        look = Forecast(self.guidance, table, at, judge, shapes)
        noise = [torch.Generator().manual_seed(self.seeds[i]) for i in part]
        with patch(self.pipe, look), contextlib.suppress(Enough):
            self._run(prompts, noise, {**self.call, "output_type": "latent"})
        if len(look.slopes) < len(at):
            raise OptionError(f"no looks at steps {list(at)} of {self.steps}: no such steps")
        steps = [torch.cat([look.slopes[t][i] for i in sorted(shapes)], dim=1) for t in at]
        rows: list[list[list[float]]] = torch.stack(steps, dim=1).double().cpu().tolist()
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
            RGB [n, 3, H, W] in 0 to 1, on the pipeline's device.
        """
        call = {**self.call, "num_inference_steps": steps or self.steps}
        noise = [torch.Generator().manual_seed(self.seeds[i]) for i in pictures]
        prompts = [self.prompts[i] for i in pictures]
        table = self._table(sets)
        if table:
            with patch(self.pipe, RowStrengths(self.guidance, table)):
                out = self._run(prompts, noise, call)
        else:
            out = self._run(prompts, noise, call)
        return out

    def _run(self, prompts: list[str], noise: list[torch.Generator], call: Any) -> Tensor:
        call = {"output_type": "pt", **call}
        images: Tensor = self.pipe(prompts, generator=noise, **call).images
        return images


def _judge(objective: Objective, prompts: list[str], images: Tensor) -> Tensor:
    return objective.score(images, prompts)


@contextlib.contextmanager
def _without_weight_gradients(pipe: Any) -> Iterator[None]:
    """Keep autograd from remembering what only gradients of the weights need."""
    parts = [m for m in pipe.components.values() if isinstance(m, torch.nn.Module)]
    frozen = [p for part in parts for p in part.parameters() if p.requires_grad]
    for weight in frozen:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in frozen:
            weight.requires_grad_(True)


def passes_per_step(pipe: Any, call: dict[str, Any]) -> int:
    """Return the denoiser passes of one guided picture in one step, perturbed one included."""
    config: Any = next(iter(targets(pipe).values())).config
    scale = call.get("true_cfg_scale")
    if scale is None and not config.get("guidance_embeds", False):
        scale = call.get("guidance_scale")
    return 3 if scale is not None and scale > 1 else 2
