"""One layer after another edited with what they share looked up once, against each by itself.

A launch that is started again gets bare addresses. In Triton's interpreter a stand-in for the
compiled kernel makes tensors of these, so that whole models run this way on a CPU.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import attnctl
from attnctl.kernels.group_attention import Edit, Rows, Shared, codes_call, edit_rows, edited_row
from attnctl.testing.alone import INTERPRETED as INSIDE
from attnctl.testing.alone import run_alone, set_up_interpreter
from attnctl.testing.calls import tensors
from attnctl.testing.vlms import VLMS, generate
from attnctl.testing.vlms.models import TEXT

pytest.importorskip("triton")
from attnctl.kernels.group_attention import again as again_module
from attnctl.kernels.group_attention import launch, spikes
from attnctl.kernels.group_attention import triton as kernel
from attnctl.kernels.group_attention.again import RowsAgain
from attnctl.kernels.group_attention.launch import Launch

torch.set_num_threads(1)
inside = pytest.mark.skipif(not INSIDE, reason="run by test_in_the_interpreter")

if INSIDE:
    set_up_interpreter()

CONTROLS: dict[str, dict[str, Any]] = {
    "pai": {"alpha": 1.0, "first_layer": 0, "rows": "text"},
    "var": {"sink_dims": (3, 17), "tau": 1.3, "rho_nonsink": 0.4, "image_mass": 0.1},
}
MODELS = [
    ("llava", "pai", {}),
    ("llava", "pai", {"heads": "H1-3"}),
    ("llava", "var", {"protect": (1,)}),
    ("qwen2.5-vl", "pai", {}),
    ("qwen2.5-vl", "var", {"heads": "H0 H3"}),
    ("gemma3", "pai", {}),
    ("gemma3", "var", {"skip_last": False}),
]


@pytest.mark.skipif(INSIDE, reason="this is the interpreter")
def test_in_the_interpreter() -> None:
    run_alone(__file__, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


def by_address(start: Launch, *args: Any) -> None:
    """Run a kernel as the compiled one is run: grid, stream, five for Triton, arguments."""
    dtype, other = start.key[2]  # type: ignore[index]
    fixed = [torch.float32, torch.int32, torch.int32, torch.uint8, torch.uint8]
    dtypes = [dtype, other, torch.uint8, torch.uint8]
    if start.kernel is kernel.edited_rows_kernel:
        dtypes = [dtype] * 4 + [*fixed, other or torch.uint8]
    grid, values = args[:3], args[9:]
    ends = zip(values[: len(dtypes)], dtypes, strict=True)
    given = [_at(address, dtype) for address, dtype in ends]
    start.kernel[grid](*given, *values[len(dtypes) :])


def _at(address: int, dtype: torch.dtype) -> Tensor:
    """Return a small tensor there; the kernel reads what is around it."""
    memory = (ctypes.c_byte * 8).from_address(address)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype)


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> Counter[Any]:
    """Let launches be started by address; counts who was, and who was not."""

    def known(self: Launch, compiled: Any) -> None:
        self.run = None if self.key is None else lambda *args: by_address(self, *args)  # type: ignore[assignment]
        self.head = (None,) * 5  # type: ignore[assignment]

    monkeypatch.setattr(Launch, "_known", known)
    for module in (launch, again_module, spikes):  # the models are tiny
        monkeypatch.setattr(module, "UNIT", 1)
    monkeypatch.setattr(kernel, "_KNOWN", {})
    return counted(monkeypatch)


def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[Any]:
    """Count the layers that are taken, and those that are not."""
    found: Counter[Any] = Counter()

    def count(owner: Any, name: str, what: str) -> None:
        stock: Callable[..., Any] = getattr(owner, name)

        def call(self: Any, *args: Any) -> Any:
            out = stock(self, *args)
            found[what, out is not None] += 1
            return out

        monkeypatch.setattr(owner, name, call)

    count(RowsAgain, "__call__", "rows")
    count(spikes.CodesCall, "next", "codes")
    return found


def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every layer be looked at by itself."""
    monkeypatch.setattr(Launch, "again", lambda *_: None)


@inside
@pytest.mark.parametrize(("family", "control", "options"), MODELS)
def test_whole_models(
    family: str,
    control: str,
    options: dict[str, Any],
    starts: Counter[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prompt and written tokens, padding, windows, chosen heads: to the bit as one by one."""
    model, inputs = VLMS[family].build(), VLMS[family].inputs((0, 1))
    made = attnctl.control(control, **{**CONTROLS[control], **options})
    with attnctl.patch(model, made):
        found = [generate(model, inputs, 3), generate(model, inputs, 3)]
    assert starts["rows", True] >= 4  # two prompts, two tokens; the first layer tells the next
    assert control == "pai" or starts["codes", True] >= 2
    one_by_one(monkeypatch)
    starts.clear()
    with attnctl.patch(model, made):
        plain = generate(model, inputs, 3)
    assert not starts["rows", True] and not starts["codes", True]
    for logits in found:
        assert torch.equal(logits, plain)
    assert (plain - generate(model, inputs, 3)).abs().max() > 1e-3


@inside
def test_prompts_of_other_lengths_and_batches(
    starts: Counter[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of one prompt is left for the next."""
    model, family = VLMS["llava"].build(), VLMS["llava"]
    made = attnctl.control("var", **CONTROLS["var"])
    prompts = [family.inputs(rows) for rows in ((0,), (0, 1), (1,), (1, 0))]
    with attnctl.patch(model, made):
        found = [generate(model, prompt, 3) for prompt in prompts]
    assert starts["rows", True]
    one_by_one(monkeypatch)
    with attnctl.patch(model, made):
        for logits, prompt in zip(found, prompts, strict=True):
            assert torch.equal(logits, generate(model, prompt, 3))


class Started:
    """A launch that notes what it is started with."""

    def __init__(self) -> None:
        self.stream, self.now, self.calls = 5, 5, list[Any]()
        self.front, self.fixed, self.rest = ("front",), ("fixed",), ("rest",)

    def stream_now(self) -> int:
        return self.now

    def run(self, *args: Any) -> None:
        self.calls.append(args)


MASK = torch.ones(1, 1, 48, 48, dtype=torch.bool)


def layer(**changes: Any) -> dict[str, Any]:
    """Return what one layer is edited with."""
    q, k, v = tensors(2, 4, 48, 16, kv_heads=2, dtype=torch.float32)
    codes, heads = torch.zeros(2, 40, dtype=torch.uint8), torch.ones(4, dtype=torch.uint8)
    out = torch.empty(2, 48, 4, 16)
    given = {"q": q, "k": k, "v": v, "out": out, "codes": codes, "heads": heads, "mask": MASK}
    return {**given, "scale": 0.5, "causal": True, "total": 48, **changes}


def again_after(given: dict[str, Any]) -> RowsAgain:
    keys = ("q", "k", "v", "mask", "scale", "causal", "total")
    q, k, v, *rest = (given[key] for key in keys)
    started: Any = Started()
    return RowsAgain(started, q, k, v, Edit(given["codes"], 0.5, heads=given["heads"]), *rest)


def start(again: RowsAgain, given: dict[str, Any]) -> Tensor | None:
    with torch.no_grad():
        return again(*given.values())


def test_another_layer_is_started_with_its_own_addresses() -> None:
    again, other = again_after(layer()), layer()
    calls: Any = again.launch
    assert start(again, other) is other["out"]
    names = ("q", "k", "v", "out", "codes", "heads", "mask")
    own = [other[name].data_ptr() for name in names]
    assert calls.calls == [("front", *own[:4], "fixed", *own[4:], "rest")]
    single = layer(out=None, heads=None, mask=None)
    again = again_after(single)
    calls, found = again.launch, start(again, single)
    assert found is not None and found.shape == (2, 1, 4, 16)
    code = single["codes"].data_ptr()
    assert calls.calls[0][4:] == (found.data_ptr(), "fixed", code, code, code, "rest")


def wider(x: Tensor) -> Tensor:
    """Return the same numbers with room between the heads."""
    return torch.empty(*x.shape[:2], 2 * x.shape[2], x.shape[3])[:, :, : x.shape[2]].copy_(x)


def off(x: Tensor) -> Tensor:
    """Return the same numbers at an address that is no multiple of 16."""
    return torch.empty(x.numel() + 1)[1:].view_as(x).copy_(x)


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize(
    "change",
    [
        wider,
        off,
        lambda x: x.half(),
        lambda x: x[:, :, :32],
        lambda x: x[:1],
        lambda x: x[..., :8],
    ],
)
def test_tensors_laid_out_in_another_way(name: str, change: Callable[[Tensor], Tensor]) -> None:
    check_declined(layer(**{name: change(layer()[name])}))


@pytest.mark.parametrize(
    "changes",
    [
        {"codes": torch.zeros(2, 41, dtype=torch.uint8)},
        {"codes": torch.zeros(1, 40, dtype=torch.uint8).expand(2, -1)},
        {"heads": None},
        {"mask": MASK.clone()},
        {"mask": None},
        {"scale": None},
        {"causal": False},
        {"total": 49},
        {"out": off(torch.empty(2, 48, 4, 16))},
    ],
)
def test_layers_of_another_kind(changes: dict[str, Any]) -> None:
    check_declined(layer(**changes))


def check_declined(given: dict[str, Any]) -> None:
    again = again_after(layer())
    calls: Any = again.launch
    assert start(again, given) is None and not calls.calls
    assert start(again, layer()) is not None


def test_another_stream_and_a_gradient() -> None:
    again = again_after(layer())
    calls: Any = again.launch
    assert again(*layer().values()) is None  # a gradient could be wanted
    for now in (6, None):
        calls.now = now
        assert start(again, layer()) is None
    assert not calls.calls


def test_the_device_counts() -> None:
    again = again_after(layer())
    assert start(again, layer(q=layer()["q"].to("meta"))) is None


def test_a_launch_that_triton_must_be_asked_for_is_not_started_again() -> None:
    """In the interpreter, before a kernel is compiled, and where sizes are unusual."""
    assert made(None).again((torch.zeros(16),), 1) is None
    known = made("run")
    found = known.again((torch.zeros(16),), 1, 0.25)
    assert found is not None and found.stream == found.stream_now() == 0
    assert found.front == (2, 1, 1, 0, "head") and found.rest == (1, 0.25, 32, 7, True)
    assert found.fixed == (found.kept[0].data_ptr(),)


def test_a_profiler_hears_of_every_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.knobs.runtime, "launch_enter_hook", lambda metadata: None)
    assert made("run").again((torch.zeros(16),), 1) is None


class CudaLauncher:
    """As Triton 3.6 has it: scratch memory is asked for, and the C function is started."""

    launch_cooperative_grid, launch_pdl, num_ctas = False, True, 1
    global_scratch_align = profile_scratch_align = 1

    def __init__(self, scratch: int = 0) -> None:
        self.global_scratch_size = self.profile_scratch_size = scratch
        self.calls: list[Any] = []
        self.launch = lambda *args: self.calls.append(args)


@pytest.mark.skipif(launch._VERSION != "3.6", reason="Triton 3.6 is what is gone around")
def test_the_launcher_of_triton_3_6_is_gone_around() -> None:
    """The C function gets what Triton's own Python call gives it."""
    from triton.backends.nvidia.driver import CudaLauncher as Real

    for scratch in (0, 1):
        mine = CudaLauncher(scratch)
        compiled: Any = SimpleNamespace(run=mine, function="function", packed_metadata="metadata")
        run, head = launch._start_of(compiled)
        assert (run is mine.launch) is (scratch == 0)
        if scratch == 0:
            run(2, 3, 4, "stream", *head, "a", "b")
            stock = "function", "metadata", None, None, None, "a", "b"
            Real.__call__(mine, 2, 3, 4, "stream", *stock)  # type: ignore[arg-type]
            assert mine.calls[0] == mine.calls[1]


def made(run: Any) -> Launch:
    """Return a launch; `run` stands for the compiled kernel's."""
    device = torch.device("cpu")
    found = Launch(None, (2, 1, 1), device, None, 1, (32,), (7,), {"A": True})
    found.run, found.head = run, ("head",)  # type: ignore[assignment]
    return found


def test_the_stream_of_the_current_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    one = torch.device("cuda:1")
    monkeypatch.setattr(launch, "stream_of", lambda device: 10 + device.index)
    monkeypatch.setattr(launch, "several_gpus", lambda: True)
    now = launch._stream_here(one)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert now() == 11
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert now() is None
    there = made("run")
    there.device = one
    assert there.again((torch.zeros(16),), 1) is None
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    found = there.again((torch.zeros(16),), 1)
    assert found is not None and found.stream == 11


@inside
def test_what_is_told_to_the_layers_after(starts: Counter[Any]) -> None:
    """Rows of a prompt, a written token, and codes, by address: as by the first launch."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = tensors(2, 4, 24, 16, kv_heads=2, dtype=torch.float32)
    codes = torch.randint(0, 4, (2, 20), generator=draw, dtype=torch.uint8)
    heads = torch.tensor([1, 0, 1, 1], dtype=torch.uint8)
    edit = Edit(codes, 0.6, move=True, rho=0.1, least=0.05, heads=heads)
    rows = Rows(torch.tensor([[3, 9, 23], [1, 1, 0], [1, 0, 1]], dtype=torch.int32))
    shared = Shared(24)
    with torch.no_grad():
        outs = [torch.zeros(2, 24, 4, 16) for _ in range(3)]
        assert edit_rows(q, k, v, outs[0], edit, rows, None, None, True, shared)
        assert edit_rows(q, k, v, outs[2], edit, rows, None, None, True)
        assert torch.equal(outs[0], outs[2]) and starts["rows", True] == 1
        mine = shared.again(q, k, v, outs[1], codes, heads, None, None, True, 24)
        assert mine is outs[1] and torch.equal(*outs[:2]) and outs[0].any()
        single, shared = q[:, :, 5:6], Shared(24)
        first = edited_row(single, k, v, edit, None, None, shared=shared)
        second = shared.again(single, k, v, None, codes, heads, None, None, False, 24)
        alone = edited_row(single, k, v, edit, None, None)
        assert first is not None and torch.equal(first, second) and torch.equal(first, alone)
        x = torch.randn(2, 24, 32, generator=draw)
        labels = torch.ones(2, 24, dtype=torch.uint8)
        call = codes_call(x, torch.tensor([1, 4]), labels, 1.2, 24, 9)
        assert call.next(x) is None
        want = call(x)
        assert len(call.room) == spikes.FIRST - 1
        plain = call.room.pop()
        call.launch((x, *call.given, plain), *call.numbers)
        assert torch.equal(plain, want) and want.unique().tolist() == [2, 3]
        places = [call.next(x + 0) for _ in range(9)]  # room for all others is made on the way
        assert len(call.room) == spikes.FIRST - 2
        assert all(torch.equal(found, want) for found in places)
        assert len({found.data_ptr() for found in [want, plain, *places]}) == 2 + len(places)
        for other in (x.half(), x[:1], x[:, :, :16], torch.randn(2, 32, 24).mT):
            assert call.next(other) is None
        assert call.next(x) is not None


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("family", "control", "options"), [one for one in MODELS if not one[0].startswith("qwen")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_models_on_a_gpu(
    family: str,
    control: str,
    options: dict[str, Any],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the bit as one by one, and in float32 as on the torch path."""
    monkeypatch.setitem(TEXT, "head_dim", 16)  # a layout that Triton compiles for once
    model = VLMS[family].build().to("cuda", dtype)
    inputs = {name: x.cuda() for name, x in VLMS[family].inputs((0, 1)).items()}
    made = attnctl.control(control, **{**CONTROLS[control], **options})
    found = counted(monkeypatch)
    with attnctl.patch(model, made):
        runs = [generate(model, inputs, 3) for _ in range(3)]
    taken = found["rows", True], found["codes", True]
    one_by_one(monkeypatch)
    with attnctl.patch(model, made):
        plain = generate(model, inputs, 3)
    assert all(torch.equal(logits, plain) for logits in runs)
    assert taken[0] > 0 and (control == "pai" or taken[1] > 0), taken
    if dtype == torch.float32:
        monkeypatch.setattr("attnctl.processors.vlm.rows.rows_fit", lambda *_: False)
        monkeypatch.setattr("attnctl.processors.vlm.sinks.codes_call", lambda *_: None)
        with attnctl.patch(model, made):
            exact = generate(model, inputs, 3)
        torch.testing.assert_close(plain, exact, rtol=1e-3, atol=1e-3)
