"""What a kernel is started with, and when Triton is asked; stand-ins for Triton and the GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from attnctl.kernels.group_attention import Edit, Rows, launch
from attnctl.kernels.group_attention import triton as kernel
from attnctl.kernels.group_attention.launch import Launch
from attnctl.testing.calls import tensors


class Compiled(launch.CompiledKernel):
    """Notes what it is started with."""

    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls

    function, packed_metadata = "function", "metadata"

    def run(self, *args: Any) -> None:
        self.calls.append(args)

    def __del__(self) -> None:
        """Nothing was loaded."""


class Kernel:
    """Notes what Triton is asked for, and gives a compiled kernel back."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.direct: list[Any] = []

    def __getitem__(self, grid: Any) -> Any:
        def run(*args: Any, **constants: Any) -> Compiled:
            self.asked.append((grid, args, constants))
            return Compiled(self.direct)

        return run


def made(
    found: Kernel, sizes: tuple[int, ...] = (32, 0), device: str = "cpu", **constants: Any
) -> Launch:
    return Launch(
        found,
        (2, 1, 1),
        torch.device(device),
        "types",
        1,
        sizes,
        (7, 0.5),
        {"A": True, **constants},
    )


def test_triton_is_asked_once_for_a_kind() -> None:
    found, x, y = Kernel(), torch.zeros(64), torch.zeros(65)[1:]
    start = made(found)
    for _ in range(3):
        start((x, y), 3, 0.25)
    assert found.asked == [((2, 1, 1), (x, y, 3, 0.25, 32, 0, 7, 0.5), {"A": True})]
    head = (2, 1, 1, 0, "function", "metadata", None, None, None)  # grid, stream, no hooks
    args = (x.data_ptr(), y.data_ptr(), 3, 0.25, 32, 0, 7, 0.5, True)
    assert found.direct == [(*head, *args)] * 2  # in the order of the kernel's parameters
    made(found, (64, 16))((x, y), 3, 0.25)  # other sizes of the same kind
    assert len(found.asked) == 1 and len(found.direct) == 3
    made(found, A=False)((x, y), 3, 0.25)  # another constant is another kernel
    assert len(found.asked) == 2


def test_triton_is_asked_where_it_would_compile_otherwise() -> None:
    found, x, y = Kernel(), torch.zeros(64), torch.zeros(65)[1:]
    start = made(found)
    for _ in range(2):
        start((y, x), 3, 0.25)  # an address that is no multiple of 16
    for sizes in ((33, 0), (2**31, 0)):
        for _ in range(2):
            made(found, sizes)((x, y), 3, 0.25)
    assert len(found.asked) == 6 and not found.direct
    start((x, y), 3, 0.25)
    start((y, x), 3, 0.25)
    assert len(found.asked) == 8 and not found.direct
    start((x, y), 3, 0.25)
    assert len(found.direct) == 1


def test_a_profiler_hears_of_every_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    found, x, y = Kernel(), torch.zeros(64), torch.zeros(64)
    start = made(found)
    start((x, y), 3, 0.25)
    start((x, y), 3, 0.25)
    assert len(found.asked) == 1 and len(found.direct) == 1
    monkeypatch.setattr(launch.knobs.runtime, "launch_enter_hook", lambda metadata: None)
    start((x, y), 3, 0.25)
    assert len(found.asked) == 2 and len(found.direct) == 1


def test_a_launch_goes_to_the_stream_of_its_device_at_that_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, found, x = {0: 10, 1: 20}, Kernel(), torch.zeros(64)
    active = SimpleNamespace(get_current_stream=lambda index: now[index])
    monkeypatch.setattr(launch, "driver", SimpleNamespace(active=active))
    starts = [made(found, device=f"cuda:{index}") for index in (0, 1)]
    for start in starts:
        start((x, x), 3, 0.25)
    assert len(found.asked) == 2  # each GPU has its own compiled kernel
    for streams in ({0: 10, 1: 20}, {0: 11, 1: 21}, {0: 10, 1: 21}):
        now |= streams
        for index, start in enumerate(starts):
            start((x, x), 3, 0.25)
            assert found.direct[-1][3] == streams[index]
    assert len(found.asked) == 2 and len(found.direct) == 6
    made(found, device="cuda:1")((x, x), 3, 0.25)  # known there
    made(found, device="cuda:2")((x, x), 3, 0.25)
    assert len(found.asked) == 3 and len(found.direct) == 7


def test_streams_and_devices_share_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is under way on one would be written over by the other."""
    now = [3]
    monkeypatch.setattr(kernel, "_ROOM", {})
    monkeypatch.setattr(kernel, "stream_of", lambda device: now[0])
    one, other = torch.device("cpu"), torch.device("meta")
    first = kernel._room(one, 8)
    assert kernel._room(one, 5) is first and kernel._room(other, 5)[0].device == other
    now[0] = 4
    second = kernel._room(one, 8)
    assert second[0] is not first[0] and second[1] is not first[1]
    now[0] = 3
    assert kernel._room(one, 8) is first
    parts, counts = kernel._room(one, 9)
    assert len(parts) == 9 and not counts.any()


@pytest.mark.parametrize("many", [False, True])
def test_every_program_that_merges_has_a_count(many: bool) -> None:
    _, counts = kernel._room(torch.device("cpu"), 1)
    for programs in range(1, 2 * len(counts)):
        for keys in (1, 700, 10_000, 1_000_000):
            splits = kernel._splits(programs, keys, many)
            assert splits == 1 or programs <= len(counts)
            assert 1 <= splits <= kernel.MOST_SPLITS and splits <= max(1, keys)


def test_rows_of_a_prompt_and_of_written_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """All layers share what is made once; whole numbers do not become constants."""
    monkeypatch.setattr(kernel, "_KNOWN", {})
    found = Kernel()
    monkeypatch.setattr(kernel, "edited_rows_kernel", found)
    codes = torch.zeros(1, 40, dtype=torch.uint8)
    edit = Edit(codes, 1, move=True, rho=0, least=1)
    q, k, v = tensors(1, 2, 48, 16, dtype=torch.float32)
    rows = Rows(torch.tensor([[0], [1]], dtype=torch.int32))
    for some, single in ((rows, q), (None, q[:, :, :1])):
        calls = [
            kernel.rows_call(single, k, v, edit, some, None, scale, some is not None)
            for scale in (None, None, 0.5)
        ]
        assert calls[0] is calls[1] is not calls[2] and calls[0] is not None
        calls[0](single, k, v, torch.empty(1, 48, 2, 16), edit, some, None)
        numbers = found.asked[-1][1][10:14]
        assert numbers == (0, 1.0, 0.0, 1.0)
        assert [type(number) for number in numbers] == [int, float, float, float]
    assert [asked[2]["ALONE"] for asked in found.asked] == [False, True]
    wide = tensors(1, 2, 48, 272, dtype=torch.float32)
    assert kernel.rows_call(*wide, edit, rows, None, None, True) is None


@pytest.mark.parametrize(
    ("move", "batch", "rows", "keys", "warps"),
    [
        (True, 1, 60, 671, kernel.FEW_WARPS),
        (True, 2, 60, 671, kernel.WARPS),  # more programs than multiprocessors
        (True, 1, 60, 2975, kernel.WARPS),  # split
        (True, 1, 9, 100, kernel.WARPS),  # one program for each head
        (False, 1, 60, 671, kernel.WARPS),
    ],
)
def test_programs_that_have_a_multiprocessor_each_have_more_warps(
    move: bool, batch: int, rows: int, keys: int, warps: int
) -> None:
    q = torch.empty(batch, 32, keys, 128, dtype=torch.bfloat16, device="meta")
    some = Rows(torch.empty(1 + batch, rows, dtype=torch.int32, device="meta"))
    edit = Edit(torch.empty(batch, keys, dtype=torch.uint8, device="meta"), 0.5, move=move)
    call = kernel.RowsCall(q, q, q, edit, some, None, None, True)
    assert call.attend.constants["num_warps"] == warps
