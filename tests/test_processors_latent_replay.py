"""Recorded gradient passes: a tape of operations stands in for CUDA graphs, which need a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import attnctl
from attnctl.errors import HostError, OptionError
from attnctl.processors.latent import recorded
from attnctl.processors.latent.recorded import Recorder
from attnctl.testing import zoo

WORDS = [[1], [2]]


class Tape(TorchDispatchMode):
    """Takes down operations on tensors, and repeats them in the same memory."""

    refused = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "lift_fresh")
    """What reads the device's memory or copies to it, which no CUDA graph can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in self.refused:
            raise RuntimeError(f"{name} is not permitted while recording")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def play(self) -> None:
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def taped(
    forward: Callable[..., Tensor], own: tuple[Tensor, ...], num_warmup_iters: int
) -> Callable[..., Tensor]:
    """Stand in for torch.cuda.make_graphed_callables, for one output."""
    for _ in range(num_warmup_iters):
        forward(*own)
    there, back = Tape(), Tape()
    with there:
        out = forward(*own)
    seed = torch.empty_like(out)
    with back:
        (grad,) = torch.autograd.grad(out, [one for one in own if one.requires_grad], seed)

    class Graphed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *new: Tensor) -> Tensor:
            for mine, one in zip(own, new, strict=True):
                mine.detach().copy_(one)
            there.play()
            return out.detach()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            seed.copy_(grads[0])
            back.play()
            return tuple(grad.detach() if one.requires_grad else None for one in own)

    return Graphed.apply


@pytest.fixture
def tape(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", taped)
    monkeypatch.setattr(recorded, "possible", lambda x: True)
    return


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "flux"])
def test_replayed_passes_change_nothing(name: str, tape: None) -> None:
    """Losses with a memory and refinement, at every step another time and other latents."""
    pipe = zoo.FAMILIES[name].build()
    options: dict[str, Any] = {"words": WORDS, "scale": 300.0, "updates": 2, "shrink": 1.0}
    with attnctl.patch(pipe, attnctl.AStar(**options)):
        want = zoo.run(pipe, steps=4)
    with attnctl.patch(pipe, attnctl.AStar(**options, replay=True)) as handle:
        got = zoo.run(pipe, steps=4)
        again = zoo.run(pipe, steps=4)
    assert torch.equal(got, want) and torch.equal(again, want)
    assert not torch.equal(want, zoo.run(pipe, steps=4))
    account = handle.report().lines[0].account
    assert account.replayed == account.all - 1 >= 3
    assert f"{account.replayed} of {account.all} gradient passes" in str(handle.report())


def test_parts_of_a_batch_are_recorded_by_their_size(tape: None) -> None:
    pipe = zoo.FAMILIES["sd1"].build()
    options: dict[str, Any] = {"words": WORDS, "scale": 300.0}
    with attnctl.patch(pipe, attnctl.AStar(**options)):
        want = zoo.run(pipe, batch=3, steps=3)
    with attnctl.patch(pipe, attnctl.AStar(**options, replay=True)) as handle:
        got = zoo.run(pipe, batch=3, steps=3)
    assert torch.equal(got, want)
    account = handle.report().lines[0].account
    # of two samples and of one, in three steps; the first pass of each finds where it may end
    assert account.all == 6 and account.replayed == 4


def test_passes_in_which_something_else_acts_are_run(tape: None) -> None:
    pipe, maps = zoo.FAMILIES["sd1"].build(), attnctl.HeatMap(WORDS, sink=lambda maps: None)
    control = attnctl.AStar(WORDS, scale=300.0, replay=True)
    with attnctl.patch(pipe, control, maps) as handle:
        got = zoo.run(pipe)
    assert handle.report().lines[0].account.replayed == 0
    with attnctl.patch(pipe, attnctl.AStar(WORDS, scale=300.0)):
        assert torch.equal(got, zoo.run(pipe))


def test_a_result_outlives_the_next_replay(tape: None) -> None:
    recorder, made = Recorder(), []
    for value in (1.0, 2.0, 3.0):
        x = torch.full((2,), value).requires_grad_()
        made.append(recorder.run(lambda x, inputs: x * inputs["by"], x, {"by": torch.ones(2)}))
    assert [one.tolist()[0] for one in made] == [1, 2, 3] and recorder.replayed == 3


def test_what_cannot_be_recorded(tape: None) -> None:
    """A copy to the device, as `torch.tensor` makes, is one of the things."""
    with pytest.raises(HostError, match=r"recorded .*lift_fresh.*give replay=False"):
        Recorder().run(lambda x, inputs: x * torch.tensor(2.0), torch.ones(2).requires_grad_(), {})
    with pytest.raises(OptionError, match="a checkpointed pass cannot be recorded"):
        attnctl.AStar(WORDS, replay=True, checkpoint=True)


def test_inputs_of_another_form_are_recorded_anew(tape: None) -> None:
    ran: list[int] = []

    def forward(x: Tensor, inputs: Any) -> Tensor:
        ran.append(len(x))
        scale = inputs["more"]["scale"]
        return x * inputs["t"] if scale is None else x * inputs["t"] * scale

    recorder, x = Recorder(), torch.ones(2).requires_grad_()

    def look(t: float, scale: Any, x: Tensor = x) -> tuple[float, float, int]:
        ran.clear()
        out = recorder.run(forward, x, {"t": torch.tensor(t), "more": {"scale": scale}})
        (grad,) = torch.autograd.grad(out.sum(), x)
        return float(out.sum()), float(grad.sum()), len(ran)

    assert look(2.0, None) == (4, 4, 2)  # to warm up, and to record
    assert look(3.0, None) == (6, 6, 0)
    assert look(3.0, 2.0) == (12, 12, 2) and look(1.0, 2.0) == (4, 4, 0)
    assert look(1.0, None, torch.ones(3).requires_grad_()) == (3, 3, 2)
    assert look(2.0, None) == (4, 4, 0) and recorder.replayed == 6
    assert look(1.0, 3.0)[2] == 2 and look(1.0, 4.0)[2] == 1  # as many forms as there may be
    recorder.forget()
    assert look(2.0, None)[2] == 2
