"""A gradient pass as CUDA graphs: Python runs it once, and the GPU repeats what it did.

With one picture on a fast GPU a pass takes as long as Python needs to launch its thousands of
operations. A replay is two launches, one for the forward and one for the backward. What changes
from step to step (latents, time, text) goes into the graphs' own memory first; all else has to
be as it was, which the caller sees to.

A capture that CUDA breaks off leaves allocator and random numbers in a state that nothing is
said about. So a pass is run once more before it, watched for what no graph can hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from attnctl.errors import HostError

from .recordable import Watch

__all__ = ["Recorder", "possible"]

T = TypeVar("T")
Forward = Callable[[Tensor, Any], Tensor]
_FORMS = 4
"""Most forms of inputs that are recorded."""
_WORTH = 6
"""Fewest passes to come for which a recording pays: it takes as long as two or three passes."""


class Captures:
    """Where the CUDA graphs of one run are captured.

    They share a stream and memory: the backward of one is replayed before the forward of the
    next, as they were captured.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream: Any = torch.cuda.Stream(device)
        self.pool: Any = None

    def capture(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """Return what some work makes in the graph's memory, and what makes it anew there."""
        graph: Any = torch.cuda.CUDAGraph()
        # other threads may go on allocating meanwhile
        how: Any = {"pool": self.pool, "stream": self.stream, "capture_error_mode": "thread_local"}
        with torch.cuda.device(self.device), torch.cuda.graph(graph, **how):
            made = work()
        self.pool = graph.pool()
        return made, graph.replay

    def room(self) -> bool:
        """Whether graphs and the rest of a run fit the GPU side by side; empties the cache.

        Both together take no more than twice what the run has taken so far.
        """
        reserved = torch.cuda.memory_reserved(self.device)
        taken = reserved - torch.cuda.memory_allocated(self.device)
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0] >= 2 * taken


@dataclass(eq=False)
class Recorder:
    """Passes of one run, recorded by the form of their inputs, when a form comes again.

    Args:
        must: what cannot be recorded is an error, else it is run.
        replayed: passes that were replayed so far.
        why: why passes were not recorded, "" if nothing stood against it.
    """

    must: bool = False
    replayed: int = 0
    why: str = ""
    _known: list[Any] = field(default_factory=list)
    _made: list[tuple[Any, _Replay]] = field(default_factory=list)
    _captures: Captures | None = None

    def run(
        self, forward: Forward, x: Tensor, inputs: Any, left: Callable[[], int] | None
    ) -> Tensor:
        """Return forward(x, inputs), with gradients to x; replayed if it can be.

        Args:
            forward: what to record.
            x: latents, of which the gradient is wanted.
            inputs: nested dicts, lists and tuples of tensors and plain values. Tensors may have
                other values at every call.
            left: returns how many passes are to come, this one included; None where the pass is
                not yet what it will be.

        Raises:
            HostError: if recording fails, and `must` is set or CUDA itself broke it off.
        """
        leaves, shape = tree_flatten(inputs)
        # what stays on the CPU, as the time of some schedulers, is moved outside of the graph
        tensors = [x, *(one.to(x.device) for one in leaves if isinstance(one, Tensor))]
        rest = [Tensor if isinstance(one, Tensor) else one for one in leaves]
        plain = (bool, int, float, str)
        if not all(one is None or one is Tensor or isinstance(one, plain) for one in rest):
            self.refuse("an argument of the denoiser is no tensor, number or text")
            return forward(x, inputs)
        form = shape, [(one.shape, one.dtype) for one in tensors], rest
        replay = next((made for other, made in self._made if other == form), None)
        if replay is None and left is not None and self._may_record(form, left):
            replay = self._record(
                lambda x, *new: forward(x, _filled(leaves, new, shape)), tensors, form
            )
        if replay is None:
            if form not in self._known:
                self._known.append(form)
                if len(self._known) > 2 * _FORMS:
                    self.refuse("plain values among the denoiser's inputs change all the time")
            return forward(x, inputs)
        self.replayed += 1
        made: Tensor = _Replayed.apply(replay, *tensors)
        return made

    def refuse(self, why: str) -> None:
        """Note why passes are run; the first reason counts.

        Raises:
            HostError: if they must be replayed.
        """
        self.why = self.why or why
        if self.must:
            self._fail(why)

    def forget(self) -> None:
        """Give the graphs' memory back."""
        if self._made:
            self._made.clear()
            self._captures = None
            torch.cuda.empty_cache()

    def _may_record(self, form: Any, left: Callable[[], int]) -> bool:
        """Whether to record this form now: values that change all the time make it a new one."""
        if form not in self._known or len(self._made) == _FORMS or self.why:
            return False
        if not self.must and left() < _WORTH:
            self.why = "too few were to come"
        return not self.why

    def _record(
        self, forward: Callable[..., Tensor], tensors: list[Tensor], form: Any
    ) -> _Replay | None:
        """Return the recorded pass, None if it cannot be recorded and need not be."""
        own = [one.detach().clone().requires_grad_(one.requires_grad) for one in tensors]
        # what is read from new tensors once and kept, as positions of tokens, is read no more
        found = _watched(forward, own) and _watched(forward, own)
        if found:
            self.refuse(found)
            return None
        self._captures = self._captures or Captures(tensors[0].device)
        if not self._captures.room() and not self.must:
            self.refuse("the GPU has no room for a recording")
            return None
        try:
            made = _captured(forward, own, self._captures)
        except RuntimeError as error:
            if self.must or "CUDA error" in str(error):
                self._fail(str(error), error)
            self.refuse(str(error))
            return None
        self._made.append((form, made))
        return made

    def _fail(self, why: str, error: Exception | None = None) -> NoReturn:
        raise HostError(
            f"the gradient pass cannot be recorded as CUDA graphs ({why}): give replay=False"
        ) from error


def possible(x: Tensor) -> bool:
    """Whether passes with these latents can be recorded."""
    if not x.is_cuda or torch.is_autocast_enabled(x.device.type):
        return False
    return not torch.cuda.is_current_stream_capturing()


@dataclass(eq=False)
class _Replay:
    """A recorded pass: where its inputs go, and what its graphs make of them.

    `turn` counts forwards and backwards: each overwrites the activations of those before.
    """

    inputs: list[Tensor]
    output: Tensor
    forward: Callable[[], None]
    seed: Tensor
    grad: Tensor
    backward: Callable[[], None]
    turn: int = 0


class _Replayed(torch.autograd.Function):
    """Replays a pass; what it returns are copies, as graphs overwrite theirs the next time."""

    @staticmethod
    def forward(ctx: Any, replay: _Replay, *tensors: Tensor) -> Tensor:
        for mine, one in zip(replay.inputs, tensors, strict=True):
            mine.copy_(one)
        replay.forward()
        replay.turn += 1
        ctx.replay, ctx.turn = replay, replay.turn
        return replay.output.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        replay: _Replay = ctx.replay
        if ctx.turn != replay.turn:
            raise HostError(
                "a replayed gradient pass keeps its activations until its gradient is taken or "
                "the next pass runs: take it once and before that, or give replay=False"
            )
        replay.turn += 1
        replay.seed.copy_(grads[0])
        replay.backward()
        return None, replay.grad.clone(), *[None] * (len(replay.inputs) - 1)


def _watched(forward: Callable[..., Tensor], own: list[Tensor]) -> str:
    """Run a pass and return what no graph can hold of it, "" if all can be held."""
    with Watch(own[0].device) as watch:
        out = forward(*own)
        _gradient(out, own[0], torch.ones_like(out))
    return watch.found


def _captured(forward: Callable[..., Tensor], own: list[Tensor], captures: Captures) -> _Replay:
    out, there = captures.capture(lambda: forward(*own))
    seed = torch.empty_like(out)
    grad, back = captures.capture(lambda: _gradient(out, own[0], seed))
    return _Replay([one.detach() for one in own], out.detach(), there, seed, grad, back)


def _gradient(out: Tensor, x: Tensor, seed: Tensor) -> Tensor:
    return torch.autograd.grad(out, x, seed)[0]


def _filled(leaves: list[Any], tensors: tuple[Tensor, ...], shape: Any) -> Any:
    """Return nested inputs with other tensors."""
    new = iter(tensors)
    return tree_unflatten([next(new) if isinstance(one, Tensor) else one for one in leaves], shape)
