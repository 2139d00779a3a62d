"""The training loop every model shares."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm

from attnctl.assets.train.recipe import Plan, Recipe
from attnctl.assets.train.step import Step, optimizer, pace

SAVE_SECONDS = 120.0
REPORT_STEPS = 100
AVERAGE_STEPS = 10


class State:
    """Everything that changes during a training, so that it can be saved and taken up again."""

    def __init__(self, recipe: Recipe, plan: Plan) -> None:
        self.step, self.seconds = 0, 0.0
        self.losses: list[float] = []
        self.probes: list[dict[str, float]] = []
        self.weights = [p for p in recipe.model.parameters() if p.requires_grad]
        self.average = [p.detach().clone() for p in self.weights]
        self.optimizer = optimizer(self.weights, plan)
        self.path = recipe.run.out / f"{recipe.name}.checkpoint.pt"
        self.source = recipe.run.source

    def save(self) -> None:
        """Write a checkpoint, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        half = self.path.with_suffix(".half")
        torch.save(
            {
                "step": self.step,
                "seconds": self.seconds,
                "losses": self.losses,
                "probes": self.probes,
                "weights": [p.detach() for p in self.weights],
                "average": self.average,
                "optimizer": self.optimizer.state_dict(),
                "random": self.source.get_state(),
            },
            half,
        )
        half.replace(self.path)

    @torch.no_grad()
    def load(self) -> None:
        """Take up the checkpoint, if there is one."""
        if not self.path.exists():
            return
        saved = torch.load(self.path, map_location=self.weights[0].device, weights_only=True)
        self.step, self.seconds = saved["step"], saved["seconds"]
        self.losses, self.probes = saved["losses"], saved["probes"]
        torch._foreach_copy_(self.weights, saved["weights"])
        torch._foreach_copy_(self.average, saved["average"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.source.set_state(saved["random"].cpu())


def train(recipe: Recipe, resume: bool = False) -> dict[str, Any]:
    """Train to the end of the plan; leaves the averaged weights in ``recipe.model``.

    Args:
        recipe: the model.
        resume: take up the checkpoint in ``run.out`` if there is one.

    Returns:
        steps, batch, seconds and the mean loss of the last tenth; with `Run.probe`, the probes.
    """
    plan = recipe.plan.short() if recipe.run.smoke else recipe.plan
    state = State(recipe, plan)
    if resume:
        state.load()
    recipe.prepare()
    if recipe.run.device.type == "cuda":
        recipe.compile()
    _run(recipe, plan, state)
    with torch.no_grad():
        torch._foreach_copy_(state.weights, state.average)
    state.path.unlink(missing_ok=True)
    return _summary(plan, state)


def _summary(plan: Plan, state: State) -> dict[str, Any]:
    last = state.losses[-max(1, len(state.losses) // 10) :]
    return {
        "steps": state.step,
        "batch": plan.batch,
        "seconds": round(state.seconds, 1),
        "loss": round(sum(last) / len(last), 5),
    } | ({"probes": state.probes} if state.probes else {})


def _run(recipe: Recipe, plan: Plan, state: State) -> None:
    clock, step = _Clock(state.seconds), Step(recipe, state.weights, state.optimizer, plan.clip)
    saved = probed = state.seconds
    recipe.model.train()
    with tqdm(total=1.0, desc=recipe.name, mininterval=2.0, bar_format=_BAR) as bar:
        while (done := progress(plan, state, recipe.run.minutes)) < 1:
            recipe.done = done
            pace(state.optimizer, rate(plan, state.step, done))
            loss = step(recipe.batch(plan.batch))
            state.step += 1
            if state.step % AVERAGE_STEPS == 0 or state.step < AVERAGE_STEPS:
                follow(state, plan)
            state.seconds = clock.seconds()
            if state.step % REPORT_STEPS == 1:
                state.losses.append(loss.item())
                bar.set_postfix(step=state.step, loss=f"{state.losses[-1]:.4f}")
            bar.update(min(1.0, done) - bar.n)
            if state.seconds - saved > SAVE_SECONDS:
                state.save()
                saved = state.seconds
            if recipe.run.probe is not None and state.seconds - probed >= recipe.run.probe:
                with clock.stopped():
                    probe(recipe, state)
                probed = state.seconds
    recipe.model.eval()


_BAR = "{desc}: {percentage:3.0f}%|{bar:20}| {elapsed}<{remaining} {postfix}"


class _Clock:
    """Seconds of training, counted on from an earlier run."""

    def __init__(self, before: float) -> None:
        self._start = time.monotonic() - before

    def seconds(self) -> float:
        return time.monotonic() - self._start

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Don't count what happens inside."""
        before = time.monotonic()
        yield
        self._start += time.monotonic() - before


@torch.no_grad()
def probe(recipe: Recipe, state: State) -> None:
    """Print and keep the recipe's quick figures of the averaged weights.

    The average is copied into the weights in place and they are put back afterwards, so a
    captured step goes on with the memory it knows.
    """
    own = [weight.clone() for weight in state.weights]
    torch._foreach_copy_(state.weights, state.average)
    recipe.model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            found = recipe.probe()
    finally:
        torch._foreach_copy_(state.weights, own)
        recipe.model.train()
    if found:
        state.probes.append({"step": state.step, "seconds": round(state.seconds, 1)} | found)
        tqdm.write(f"{recipe.name} {state.probes[-1]}", file=sys.stderr)


def progress(plan: Plan, state: State, minutes: float | None) -> float:
    """Share of the training that is done: by steps or by time, whichever is further."""
    by_time = state.seconds / (60 * minutes) if minutes else 0.0
    return max(state.step / plan.steps, by_time)


def rate(plan: Plan, step: int, done: float) -> float:
    """Learning rate: a linear warm-up, then level, then down to 0 by half a cosine."""
    fallen = max(0.0, done - 1 + plan.fall) / plan.fall if plan.fall else 0.0
    return plan.lr * min(1.0, (step + 1) / plan.warmup) * 0.5 * (1 + math.cos(math.pi * fallen))


@torch.no_grad()
def follow(state: State, plan: Plan) -> None:
    """Move the running average of the weights on; sooner at the start of a training."""
    keep = min(plan.average**AVERAGE_STEPS, state.step / (state.step + 10 * AVERAGE_STEPS))
    torch._foreach_lerp_(state.average, state.weights, 1 - keep)
