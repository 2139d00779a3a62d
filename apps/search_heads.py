"""The work of `attnctl search-heads`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from attnctl.control import control
from attnctl.errors import OptionError
from attnctl.processors.guidance.perturbed import PerturbedGuidance
from attnctl.processors.headhunter.headset import HeadSet
from attnctl.processors.headhunter.hunter import HeadHunter

from .control_syntax import split_control
from .models import load, local_device

__all__ = ["Order", "search_heads"]


@dataclass(frozen=True)
class Order:
    """What was asked for; see the command's help."""

    model: str
    objective: str
    prompts: Path
    out: Path = Path("heads.json")
    style: str = ""
    rounds: int = 5
    top_k: int = 3
    images: int | None = None
    seed: int = 0
    perturbation: str = "softpag"
    u: float = 1.0
    scale: float = 3.0
    strategy: Literal["greedy", "gradient", "halving"] = "greedy"
    budget: float = 0.05
    pool: str = "all"
    batch: int = 8
    slopes: float = 0.75
    call: dict[str, Any] = field(default_factory=dict)
    device: str = "auto"
    dtype: str = "auto"
    journal: Path | None = None
    dry_run: bool = False

    @property
    def hunter(self) -> HeadHunter:
        """The search."""
        return HeadHunter(
            self.objective,
            self._guidance(),
            self.strategy,
            self.rounds,
            self.top_k,
            self.pool,
            self.style,
            self.budget,
            self.batch,
            self.slopes,
        )

    def _guidance(self) -> PerturbedGuidance:
        name, options = split_control(self.perturbation)
        made = control(name, **{"u": self.u, "scale": self.scale, **options})
        if not isinstance(made, PerturbedGuidance):
            raise OptionError(f"{name} is no perturbation guidance; such as softpag, seg, uniform")
        return made

    def pictures(self) -> tuple[list[str], list[int]]:
        """Return the prompt and the seed of every picture of the search.

        Raises:
            OptionError: the file holds no prompt, or fewer than one picture is asked for.
            OSError: it cannot be read.
        """
        lines = self.prompts.read_text(encoding="utf-8").splitlines()
        known = [line.strip() for line in lines if line.strip()]
        if not known:
            raise OptionError(f"{self.prompts} holds no prompt; write one per line")
        n = len(known) if self.images is None else self.images
        if n < 1:
            raise OptionError(f"images={n}: expected 1 or more")
        return [known[i % len(known)] for i in range(n)], [self.seed + i for i in range(n)]


def search_heads(order: Order, say: Callable[[str], None]) -> HeadSet | None:
    """Search and write the head set; or with a dry run only say what it would take.

    Args:
        order: what was asked for.
        say: writes a line for the user.
    """
    hunter = order.hunter
    prompts, seeds = order.pictures()
    if not order.dry_run:
        check_output(order.out)
    pipe = load(order.model, local_device(order.device), order.dtype)
    plan = hunter.plan(pipe, prompts, **order.call)
    say(str(plan))
    if order.dry_run:
        speed = forwards_per_second(hunter, pipe, prompts, order.call)
        say(f"about {duration(plan.forwards / speed)} here, at {speed:.1f} forwards/s")
        return None
    journal = order.journal or order.out.with_suffix(".journal.jsonl")
    found = hunter.search(pipe, prompts, seeds=seeds, journal=journal, **order.call)
    if int(os.environ.get("RANK", "0")) == 0:
        found.save(order.out)
        say(f"{', '.join(f'L{a}H{b}' for a, b in found.heads)}")
        say(f"written to {order.out}")
        say(f"every score is in {journal}")
    return found


def check_output(path: Path) -> None:
    """Refuse before hours of search what could not be written after them.

    Raises:
        OptionError: if the folder does not exist, or the name is neither .json nor .txt.
    """
    if path.suffix not in (".json", ".txt"):
        raise OptionError(f"the output {path} must end in .json or .txt")
    if not path.parent.is_dir():
        raise OptionError(f"the output folder {path.parent} does not exist")


def forwards_per_second(hunter: HeadHunter, pipe: Any, prompts: Any, call: Any) -> float:
    """Time one batch of two steps, after one to warm up."""
    import torch

    few = [prompts[i % len(prompts)] for i in range(hunter.batch)]
    short = {**call, "num_inference_steps": 2}
    trials = hunter.trials(pipe, few, **short)
    head = trials.pool[0]
    for _ in range(2):
        start, before = time.perf_counter(), trials.forwards
        trials.journal.values.clear()
        trials.score([(head,)])
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return (trials.forwards - before) / (time.perf_counter() - start)


def duration(seconds: float) -> str:
    """Return a time in words: "45 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
