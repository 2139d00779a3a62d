"""Recorded gradient passes: a tape of operations stands in for CUDA graphs, which need a GPU."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import attnctl
from attnctl.errors import HostError, OptionError
from attnctl.processors.latent import recordable, recorded
from attnctl.processors.latent.recorded import Recorder
from attnctl.testing import zoo

WORDS = [[1], [2]]


class Tape(TorchDispatchMode):
    """Takes down operations on tensors, and repeats them in the same memory."""

    refused = ("_local_scalar_dense", "is_nonzero", "nonzero", "lift_fresh")
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


class Captures:
    """Stands in for CUDA graphs, their stream and their memory."""

    roomy = True

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def capture(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        with Tape() as tape:
            made = work()
        return made, tape.play

    def room(self) -> bool:
        return self.roomy


@pytest.fixture
def tape(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(recorded, "Captures", Captures)
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


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "flux"])
def test_replayed_passes_on_a_gpu(name: str) -> None:
    """Real graphs, by default; batches of two samples and of one."""
    family = zoo.FAMILIES[name]
    pipe = family.build().to("cuda")
    options: dict[str, Any] = {"words": WORDS, "scale": 0.05, "normalise": True, "shrink": 1.0}

    def run() -> Tensor:
        return pipe(**zoo.placed(family.call(pipe, batch=3, steps=8), "cuda"))[0]

    def drawn(replay: Any) -> tuple[Tensor, Any]:
        with attnctl.patch(pipe, attnctl.AStar(**options, replay=replay)) as handle:
            made = run()
        return made, handle.report().lines[0].account

    stock, (want, _) = run(), drawn(False)
    for replay in ("auto", True):
        got, account = drawn(replay)
        assert (account.all, account.replayed, account.why) == (16, 14, "")
        assert (got - want).norm() < 1e-2 * (want - stock).norm()


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
    with attnctl.patch(pipe, attnctl.AStar(WORDS, scale=300.0), maps) as handle:
        got = zoo.run(pipe)
    account = handle.report().lines[0].account
    assert account.replayed == 0 and "passes were replayed: another control" in str(account)
    with attnctl.patch(pipe, attnctl.AStar(WORDS, scale=300.0, replay=False)) as handle:
        assert torch.equal(got, zoo.run(pipe))
    assert handle.report().lines[0].account is None
    must = attnctl.AStar(WORDS, scale=300.0, replay=True)
    with (
        attnctl.patch(pipe, must, maps),
        pytest.raises(HostError, match=r"\(another control .*: give replay=False"),
    ):
        zoo.run(pipe)


def test_a_cpu_records_nothing_and_fails_if_it_must() -> None:
    pipe = zoo.FAMILIES["sd1"].build()
    with attnctl.patch(pipe, attnctl.AStar(WORDS, scale=300.0)) as handle:
        zoo.run(pipe)
    assert handle.report().lines[0].account is None
    must = attnctl.AStar(WORDS, scale=300.0, replay=True)
    with attnctl.patch(pipe, must), pytest.raises(HostError, match="not on CUDA"):
        zoo.run(pipe)


def _hook(pipe: Any) -> None:
    pipe.unet.mid_block.register_forward_hook(lambda *args: None)


def _subclass(pipe: Any) -> None:
    class Counted(torch.nn.SiLU):
        pass

    pipe.unet.conv_act = Counted()


def _processor(pipe: Any) -> None:
    class IPAdapterProcessor:
        __module__ = "diffusers.models.attention_processor"

    pipe.unet.conv_act.processor = IPAdapterProcessor()


def _compile(pipe: Any) -> None:
    pipe.unet.conv_act.compile(backend="eager")


def _forward(pipe: Any) -> None:
    pipe.unet.conv_act.forward = lambda x: x


def _method(pipe: Any) -> None:
    pipe.unet.get_time_embed = lambda sample, timestep: None


def _class(pipe: Any) -> None:
    """A class of a known library, whose forward is somebody else's."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return x

    pipe.unet.conv_act = type(
        "SiLU", (torch.nn.SiLU,), {"__module__": "torch", "forward": forward}
    )()


def _parallel(pipe: Any) -> None:
    made = type("FSDP", (torch.nn.SiLU,), {"__module__": "torch.distributed.fsdp"})
    pipe.unet.conv_act = made()


def _dropout(pipe: Any) -> None:
    pipe.unet.conv_act = torch.nn.Dropout(0.1)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_forward, "conv_act has another forward than its class"),
        (_method, "the denoiser has another get_time_embed than its class"),
        (_class, "conv_act has code of its own, .*_class.*forward"),
        (_parallel, "conv_act is spread over processes"),
        (_dropout, "conv_act draws random numbers"),
        (_hook, "mid_block has a hook"),
        (_subclass, "conv_act has code of its own, .*Counted"),
        (_processor, "conv_act has an IP-Adapter, .*"),
        (_compile, "conv_act is compiled"),
    ],
)
def test_unknown_models_are_recorded_only_if_told(
    change: Callable[[Any], None], why: str, tape: None
) -> None:
    pipe = zoo.FAMILIES["sd1"].build()
    assert not recordable.unknown({"callback_on_step_end": None}, pipe.unet)
    change(pipe)
    assert re.fullmatch(why, recordable.unknown({}, pipe.unet))


def test_unasked_only_what_is_known_and_pays_is_recorded(tape: None) -> None:
    """What would stay unseen: a callback between steps; what a recording would not save."""
    pipe, control = zoo.FAMILIES["sd1"].build(), attnctl.AStar(WORDS, scale=300.0)

    def account(**options: Any) -> str:
        with attnctl.patch(pipe, control) as handle:
            zoo.run(pipe, **options)
        return str(handle.report().lines[0].account)

    assert account(steps=7) == "6 of 7 gradient passes were replayed"
    assert account(steps=6) == "0 of 6 gradient passes were replayed: too few were to come"
    same = {"callback_on_step_end": lambda pipe, index, time, tensors: tensors}
    assert "0 of 7 gradient passes were replayed: a callback" in account(steps=7, **same)
    pipe.unet.mid_block.register_forward_hook(lambda *args: None)
    assert "0 of 7 gradient passes were replayed: mid_block has a hook" in account(steps=7)


def test_graphs_go_with_the_window(tape: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the latents are decoded, and before the steps that are not in it."""
    pipe, control = zoo.FAMILIES["sd1"].build(), attnctl.AStar(WORDS, replay=True, stop=0.5)
    told: list[tuple[int, int]] = []
    forget = Recorder.forget

    def forgets(self: Recorder) -> None:
        told.append((len(self._made), self.replayed))
        forget(self)
        assert not self._made

    monkeypatch.setattr(Recorder, "forget", forgets)
    with attnctl.patch(pipe, control):
        zoo.run(pipe, steps=6)
    assert told == [(1, 2), (0, 2)]  # after the third step, and at the end of the run


def recorded_by(
    recorder: Recorder, forward: Callable[..., Tensor], x: Tensor, inputs: Any, left: int = 9
) -> Tensor:
    """Return what a pass gives that has come before, the first time to find where it ends."""
    recorder.run(forward, x, inputs, None)
    return recorder.run(forward, x, inputs, lambda: left)


def test_a_result_outlives_the_next_replay(tape: None) -> None:
    recorder, made, grads = Recorder(), [], []
    for value in (1.0, 2.0, 3.0):
        x = torch.full((2,), value).requires_grad_()
        by = {"by": torch.full((2,), value)}
        made.append(recorded_by(recorder, lambda x, inputs: x * inputs["by"], x, by))
        grads.append(torch.autograd.grad(made[-1].sum(), x)[0])
    assert [one.tolist()[0] for one in made] == [1, 4, 9]
    # the one before the first recording is run
    assert [one.tolist()[0] for one in grads] == [1, 2, 3] and recorder.replayed == 5


def test_a_gradient_is_taken_once_and_before_the_next_pass(tape: None) -> None:
    """Later the graphs' memory holds something else, of which nothing else would tell."""
    recorder, x = Recorder(), torch.ones(2).requires_grad_()
    first = recorded_by(recorder, lambda x, inputs: x * x, x, {})
    second = recorded_by(recorder, lambda x, inputs: x * x, x, {})
    assert recorder.replayed == 3
    with pytest.raises(HostError, match="until its gradient is taken or the next pass runs"):
        torch.autograd.grad(first.sum(), x)
    assert torch.autograd.grad(second.sum(), x, retain_graph=True)[0].tolist() == [2, 2]
    with pytest.raises(HostError, match="take it once"):
        torch.autograd.grad(second.sum(), x)


def test_values_that_change_all_the_time_are_said(tape: None) -> None:
    def runs(recorder: Recorder) -> None:
        x = torch.ones(2).requires_grad_()
        for value in range(9):
            recorder.run(lambda x, inputs: x * inputs["by"], x, {"by": float(value)}, lambda: 9)

    recorder = Recorder()
    runs(recorder)
    assert recorder.replayed == 0 and recorder.why.endswith("inputs change all the time")
    with pytest.raises(HostError, match=r"recorded .*change all the time.*give replay=False"):
        runs(Recorder(must=True))


def test_inputs_that_change_places_are_another_form(tape: None) -> None:
    recorder, x, by = Recorder(), torch.ones(2).requires_grad_(), torch.tensor(3.0)

    def forward(x: Tensor, inputs: Any) -> Tensor:
        return x * inputs["a"] if inputs["b"] is None else x + inputs["b"]

    assert recorded_by(recorder, forward, x, {"a": by, "b": None}).tolist() == [3, 3]
    assert recorder.run(forward, x, {"a": None, "b": by}, lambda: 9).tolist() == [4, 4]


def _reads(x: Tensor, inputs: Any) -> Tensor:
    return x * float(x.sum())


def _breaks(x: Tensor, inputs: Any) -> Tensor:
    """A copy within an operator, which the watch does not see."""
    return x * torch.tensor(2.0)


@pytest.mark.parametrize(
    ("forward", "why"), [(_reads, "_local_scalar_dense reads"), (_breaks, "lift_fresh is not")]
)
def test_what_cannot_be_recorded(forward: Any, why: str, tape: None) -> None:
    """It is run, or an error where it must be replayed."""
    x = torch.ones(2).requires_grad_()
    recorder = Recorder()
    made = recorded_by(recorder, forward, x, {})
    assert why in recorder.why and recorder.replayed == 0
    assert torch.equal(torch.autograd.grad(made.sum(), x)[0], torch.full((2,), 2.0))
    with pytest.raises(HostError, match=f"recorded .*{why}.*give replay=False"):
        recorded_by(Recorder(must=True), forward, x, {})


def test_a_capture_that_cuda_breaks_off_is_an_error(
    tape: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def capture(self: Captures, work: Callable[[], Any]) -> Any:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    monkeypatch.setattr(Captures, "capture", capture)
    with pytest.raises(HostError, match=r"CUDA error.*give replay=False"):
        recorded_by(Recorder(), lambda x, inputs: 2 * x, torch.ones(2).requires_grad_(), {})


def test_without_room_passes_are_run(tape: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Captures, "roomy", False)
    x = torch.ones(2).requires_grad_()
    recorder = Recorder()
    recorded_by(recorder, lambda x, inputs: 2 * x, x, {})
    assert recorder.replayed == 0 and "no room" in recorder.why
    recorder = Recorder(must=True)
    recorded_by(recorder, lambda x, inputs: 2 * x, x, {})
    assert recorder.replayed == 1


def test_inputs_on_the_cpu_are_moved_before(tape: None) -> None:
    """As the time of some schedulers is; a copy to the device could not be recorded."""
    x = torch.ones(2, device="meta").requires_grad_()
    inputs = {"time": torch.tensor([5.0])}
    recorder = Recorder()
    recorded_by(recorder, lambda x, inputs: x * inputs["time"].to(x.device), x, inputs)
    assert recorder.replayed == 1 and not recorder.why


def test_what_is_read_once_and_kept_can_be_recorded(tape: None) -> None:
    """As the positions of FLUX's tokens."""
    known: dict[int, float] = {}

    def forward(x: Tensor, inputs: Any) -> Tensor:
        by = inputs["by"]
        if id(by) not in known:
            known[id(by)] = float(by)
        return x * known[id(by)]

    x, recorder = torch.ones(2).requires_grad_(), Recorder()
    recorded_by(recorder, forward, x, {"by": torch.tensor(3.0)})
    assert recorder.replayed == 1 and not recorder.why


def test_options() -> None:
    with pytest.raises(OptionError, match="a checkpointed pass cannot be recorded"):
        attnctl.AStar(WORDS, replay=True, checkpoint=True)
    with pytest.raises(OptionError, match="replay='on' is not one of"):
        attnctl.AStar(WORDS, replay="on")  # type: ignore[arg-type]
    for text, want in (("auto", "auto"), ("true", True), ("off", False)):
        assert attnctl.control("a-star", words="a, b", replay=text).replay is want


@pytest.mark.parametrize(
    ("work", "why"),
    [
        (lambda x, here: x * here.sum(), ""),  # a number on the CPU
        (lambda x, here: x + here.to(x.device), "copies between devices"),
        (lambda x, here: x.copy_(here[0]), "copies between devices"),
        (lambda x, here: x[torch.tensor([0, 1])], "index copies between devices"),
        (lambda x, here: torch.ops.aten.lift_fresh(x), "torch.tensor copies"),
        (lambda x, here: x[x.new_empty(2, dtype=torch.long)], ""),
    ],
)
def test_the_watch_over_devices(work: Callable[..., Any], why: str) -> None:
    x = torch.ones(2, device="meta")
    with recordable.Watch(x.device) as watch, contextlib.suppress(RuntimeError):
        work(x, torch.ones(2))
    assert why in watch.found and bool(why) == bool(watch.found)


@pytest.mark.parametrize(
    ("work", "why"),
    [
        (lambda x: x.nonzero(), "size that depends"),
        (lambda x: x[x > 0], "size that depends"),
        (lambda x: torch.equal(x, x), "reads what"),
        (lambda x: x[0].item(), "reads what"),
        (lambda x: torch.where(x > 0, x, 0.0), ""),
    ],
)
def test_the_watch_over_values(work: Callable[[Tensor], Any], why: str) -> None:
    x = torch.ones(2)
    with recordable.Watch(x.device) as watch:
        work(x)
    assert why in watch.found and bool(why) == bool(watch.found)
    with recordable.Watch(torch.device("meta")) as watch:
        work(x)  # on the CPU, no matter for the graph
    assert not watch.found


def test_inputs_of_another_form_are_recorded_anew(tape: None) -> None:
    ran: list[int] = []

    def forward(x: Tensor, inputs: Any) -> Tensor:
        ran.append(len(x))
        scale = inputs["more"]["scale"]
        return x * inputs["t"] if scale is None else x * inputs["t"] * scale

    recorder, x = Recorder(), torch.ones(2).requires_grad_()

    def look(t: float, scale: Any, x: Tensor = x) -> tuple[float, float, int]:
        ran.clear()
        inputs = {"t": torch.tensor(t), "more": {"scale": scale}}
        out = recorder.run(forward, x, inputs, lambda: 9)
        (grad,) = torch.autograd.grad(out.sum(), x)
        return float(out.sum()), float(grad.sum()), len(ran)

    assert look(2.0, None) == (4, 4, 1)  # run, and remembered
    assert look(3.0, None) == (6, 6, 2)  # watched, and recorded
    assert look(4.0, None) == (8, 8, 0)
    # numbers that change all the time are run all the time
    assert [look(1.0, by)[2] for by in (2.0, 3.0, 4.0, 5.0)] == [1, 1, 1, 1]
    assert look(3.0, 2.0) == (12, 12, 2) and look(1.0, 2.0) == (4, 4, 0)
    three = torch.ones(3).requires_grad_()
    assert [look(1.0, None, three) for _ in range(3)] == [(3, 3, n) for n in (1, 2, 0)]
    assert look(2.0, None) == (4, 4, 0) and recorder.replayed == 7
    assert look(1.0, 3.0)[2] == 2 and look(1.0, 4.0)[2] == 1  # as many forms as there may be
    recorder.forget()
    assert look(2.0, None)[2] == 2
