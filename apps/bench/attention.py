"""The command `attnctl bench attention`: backends of block-sparse attention side by side.

Each backend first passes a gate: some of its rows against float64, beside what stock attention
makes of the same rows in the same number type, and three runs equal bit for bit. Then all that
passed are timed in turn, each among calls of its own kind, and compared by their medians with
dense attention of the same run.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from attnctl.apps.files import write_whole
from attnctl.apps.pictures import write_png
from attnctl.apps.record import versions
from attnctl.apps.tables import paragraph, table, terminal_width
from attnctl.errors import OptionError
from attnctl.kernels import BlockMask, block_sparse_attention, block_sparse_backend
from attnctl.kernels.block_sparse.api import BACKENDS
from attnctl.processors.sparse.radial_mask import forget_masks

from .attention_cases import CASES, GROUPS, Case
from .command import output_base
from .curves import Curve, Panel, curves

__all__ = [
    "DENSE", "Row", "bench_attention", "device_named", "fast_dense", "inputs", "measure", "passes",
    "steady", "timed",
]  # fmt: skip

Say = Callable[[str], None]
Run = Callable[[], tuple[Tensor, Tensor | None]]

DENSE = "dense"
_ALLOWED = 2.0
"""Largest error that passes, in units of stock attention's."""
_LSE = 1e-3
"""Largest error of a log-sum-exp that passes."""
_SAMPLE_ROWS = 3
_MASK_ROUNDS = 9
_LEAD_MS = 150.0
"""How long a backend runs before a call is timed. A GPU sets its clock by the power of what ran
last: right after another, a backend would be timed at the other's clock."""
_LONG_MS = 50.0
"""From here on a launch does not matter."""


@dataclass(frozen=True)
class Row:
    """One backend on one case.

    Args:
        case: name of the case.
        backend: name of the backend; "dense" is stock attention without a mask.
        tokens: tokens of the case.
        density: kept part of the blocks.
        ms: median time, None if it was not timed.
        tflops: rate over the kept blocks, in TFLOP/s.
        speedup: dense time over this time.
        error: largest error over that of stock attention, None for dense.
        first_s: seconds of the first call, compilation included.
        memory_mib: GPU memory of a call beyond its inputs: output, log-sum-exp, work space.
        why_not: why it was not timed.
    """

    case: str
    backend: str
    tokens: int
    density: float
    ms: float | None = None
    tflops: float | None = None
    speedup: float | None = None
    error: float | None = None
    first_s: float | None = None
    memory_mib: float | None = None
    why_not: str | None = None


def bench_attention(
    cases: Sequence[str],
    backends: Sequence[str],
    *,
    rounds: int,
    dtype: str,
    device: str,
    out: Path | None,
    overwrite: bool,
    say: Say,
    zeros: bool = False,
) -> None:
    """Run the bench, print the table, write the JSON file and the picture.

    Args:
        cases: names of cases or groups; none for what suits the device.
        backends: names of backends; none for all that can run.
        rounds: timings of each backend.
        dtype: auto, float32, float16 or bfloat16.
        device: auto, cpu or cuda.
        out: folder, or base name without suffix; None for the next free default name.
        overwrite: whether files of that name may be replaced.
        say: is given notes for the user.
        zeros: whether queries, keys and values are zeros, which cost a GPU little power: what
            the kernels could do if power did not bound them.

    Raises:
        AttnctlError: if something in the order cannot be done; told before anything slow.
    """
    where = device_named(device)
    chosen = _cases(cases or ("models" if where.type == "cuda" else "toys",))
    _check(backends, rounds)
    kind = _dtype(dtype, where)
    base = output_base(out, overwrite, "attention")
    rows = []
    for case in chosen:
        say(f"{case.name} ...")
        rows += measure(case, backends, rounds=rounds, dtype=kind, device=where, zeros=zeros)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else "CPU"
    head = f"{name}, {str(kind).removeprefix('torch.')}, medians of {rounds}"
    head += ", inputs of zeros" if zeros else ""
    print(_report(head, rows))
    masks = [_mask_cost(case) for case in chosen]
    print(f"\n{_masks_table(masks)}")
    print(f"\nwrote {' and '.join(_write(base, head, rows, masks))}")


def measure(
    case: Case,
    backends: Sequence[str] = (),
    *,
    rounds: int = 5,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    zeros: bool = False,
) -> list[Row]:
    """Return what each backend makes of a case, dense first.

    Args:
        case: the case.
        backends: names; none for all that can run (without FlexAttention's eager form).
        rounds: timings of each backend.
        dtype: of queries, keys and values.
        device: where.
        zeros: whether the inputs are zeros.
    """
    mask = case.mask().to(device)
    q, k, v = inputs(case, mask, dtype, device)
    if zeros:
        q, k, v = (torch.zeros_like(x) for x in (q, k, v))
    blank = Row(case.name, DENSE, mask.nq, mask.density)
    runs: dict[str, Run] = {DENSE: lambda: (_dense(q, k, v), None)}
    found = {DENSE: _with(_first(runs[DENSE], blank), memory_mib=_memory(runs[DENSE], q.device))}
    eager = torch.device(device).type == "cpu"
    for name in backends or [n for n in BACKENDS if not (eager and n == "flex")]:
        row = Row(case.name, name, mask.nq, mask.density)
        try:
            block_sparse_backend(q, k, v, mask, name)
        except ValueError as error:
            if backends:
                found[name] = _with(row, why_not=str(error))
            continue
        run = _runner(q, k, v, mask, name)
        found[name] = _gate(run, q, k, v, mask, _first(run, row))
        if found[name].why_not is None:
            runs[name] = run
    times = _times(runs, rounds, torch.device(device))
    return [_rated(row, case, mask, times) for row in found.values()]


def _runner(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, name: str) -> Run:
    def run() -> tuple[Tensor, Tensor | None]:
        out, lse = block_sparse_attention(q, k, v, mask, return_lse=True, backend=name)
        return out, lse

    return run


def inputs(
    case: Case, mask: BlockMask, dtype: torch.dtype, device: torch.device | str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return random queries, keys and values of a case."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, case.heads, mask.nq, case.width)
    q, k, v = (
        torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(3)
    )
    return q, k, v


def _dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return stock attention; by cuDNN on a GPU that it knows, the fastest there is in torch."""
    with fast_dense():
        return functional.scaled_dot_product_attention(q, k, v)


def fast_dense() -> contextlib.AbstractContextManager[None]:
    """Return a context in which stock attention is cuDNN's where that can run."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [
        SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]  # fmt: skip
    return sdpa_kernel(order, set_priority=True)


# -- the gate ------------------------------------------------------------------------------


def _first(run: Run, row: Row) -> Row:
    """Return the row with the time of the first call, or why that failed."""
    start = time.perf_counter()
    try:
        run()
        _wait()
    except Exception as error:  # out of memory, or whatever a backend's own compiler raises
        line = (str(error).splitlines() or [""])[0]
        return _with(row, why_not=f"{type(error).__name__}: {line}")
    return _with(row, first_s=time.perf_counter() - start)


def _memory(run: Run, device: torch.device) -> float | None:
    """Return the most memory of a call beyond what was there, in MiB; None where not counted."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _gate(run: Run, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, row: Row) -> Row:
    """Return the row with its error, or why the backend is not timed."""
    if row.why_not is not None:
        return row
    error, why = passes(run, q, k, v, mask)
    return _with(row, error=error, memory_mib=_memory(run, q.device), why_not=why)


def passes(run: Run, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> tuple[float, str | None]:
    """Return the error over that of stock attention, and why a backend is not timed, or None."""
    out, lse = run()
    error = _error(out, lse, q, k, v, mask)
    if not error <= _ALLOWED:  # NaN fails too
        return error, f"wrong: {error:.1f} times the error of stock attention"
    same = all(torch.equal(out, run()[0]) for _ in range(2))
    return error, None if same else "its runs differ"


def _error(
    out: Tensor, lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask
) -> float:
    """Return the largest error of some rows over that of stock attention on them."""
    pairs = [
        _errors(h, r, out, lse, q, k, v, mask)
        for h in sorted({0, q.shape[1] - 1})
        for r in torch.linspace(0, mask.rows - 1, _SAMPLE_ROWS).long().unique().tolist()
    ]
    ours, theirs = torch.tensor(pairs, dtype=torch.float64).amax(0).tolist()  # NaN stays NaN
    return ours / theirs if ours else 0.0


def _errors(
    h: int, r: int, out: Tensor, lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    mask: BlockMask,
) -> tuple[float, float]:  # fmt: skip
    """Return the largest errors of a row of blocks: the backend's and stock attention's."""
    at = slice(r * mask.block, min((r + 1) * mask.block, mask.nq))
    tokens, allowed = _kept(mask, r)
    some = allowed.any(-1)
    empty = out[:, h, at][:, ~some]
    if bool((empty != 0).any()):  # NaN too
        return math.inf, 0.0
    if not bool(some.any()):
        return 0.0, 0.0
    rows, keys, values, allowed = (
        q[:, h, at][:, some],
        k[:, h, tokens],
        v[:, h, tokens],
        allowed[some],
    )
    logits = rows.double() @ keys.double().mT * q.shape[-1] ** -0.5
    logits = logits.masked_fill(~allowed, -math.inf)
    want = torch.softmax(logits, -1) @ values.double()
    stock = functional.scaled_dot_product_attention(
        rows[:, None], keys[:, None], values[:, None], None if bool(allowed.all()) else allowed
    )
    ours, theirs = _worst(out[:, h, at][:, some], want), _worst(stock[:, 0], want)
    want_lse = torch.logsumexp(logits, -1)
    if lse is not None and not _worst(lse[:, h, at][:, some], want_lse) < _LSE:
        ours = math.inf
    return ours, theirs


def _kept(mask: BlockMask, r: int) -> tuple[Tensor, Tensor]:
    """Return the keys of a row of blocks [n], and which of them each query keeps [rows, n]."""
    full, part = mask.lists.row(0, 0, r), mask.parts.row(0, 0, r)
    columns = torch.cat([mask.lists.idx[full], mask.parts.idx[part]]).long()
    tiles = mask.tiles(mask.part_bits[part])
    whole = tiles.new_ones(len(columns) - len(tiles), mask.block, mask.block)
    allowed = torch.cat([whole, tiles]).transpose(0, 1).flatten(1)
    tokens = (
        columns[:, None] * mask.block + torch.arange(mask.block, device=mask.device)
    ).flatten()
    inside = tokens < mask.nk
    return tokens[inside], allowed[: mask.nq - r * mask.block, inside]


def _worst(got: Tensor, want: Tensor) -> float:
    return (got.double() - want).abs().max().item()


# -- the times -----------------------------------------------------------------------------


def _times(runs: dict[str, Run], rounds: int, device: torch.device) -> dict[str, float]:
    """Return the median milliseconds of each, timed in turn."""
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            spent[name].append(steady(run, device))
    return {name: statistics.median(times) for name, times in spent.items()}


def steady(run: Callable[[], Any], device: torch.device) -> float:
    """Return the milliseconds of one call among others of its kind."""
    if device.type == "cuda":
        passed = last = 0.0
        while passed < _LEAD_MS:
            last = timed(run, device)
            passed += last
        if last < _LONG_MS:
            run()  # hides the launch of the one that is timed, as in a model
    return timed(run, device)


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Return the milliseconds of one call."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _rated(row: Row, case: Case, mask: BlockMask, times: dict[str, float]) -> Row:
    ms = times.get(row.backend)
    if ms is None or row.why_not is not None:
        return row
    pairs = mask.nq * mask.nk * (1.0 if row.backend == DENSE else mask.density)
    rate = 4 * case.heads * case.width * pairs / ms / 1e9
    return _with(row, ms=ms, tflops=rate, speedup=times[DENSE] / ms)


def _with(row: Row, **changes: Any) -> Row:
    return Row(**{**asdict(row), **changes})


# -- the masks -----------------------------------------------------------------------------


@dataclass(frozen=True)
class MaskCost:
    """What the mask of a case costs on one CPU core.

    Args:
        case: name of the case.
        blocks: its side in blocks.
        cold_ms: milliseconds to build it with nothing remembered.
        warm_ms: milliseconds to have it again.
        kib: its lists.
    """

    case: str
    blocks: int
    cold_ms: float
    warm_ms: float
    kib: float


def _mask_cost(case: Case) -> MaskCost:
    cold, warm = [], []
    for _ in range(_MASK_ROUNDS):
        forget_masks()
        cold.append(timed(case.mask, torch.device("cpu")))
        warm.append(timed(case.mask, torch.device("cpu")))
    mask = case.mask()
    lists = mask.lists.ptr, mask.lists.idx, mask.order
    kib = sum(x.nbytes for x in lists if x is not None) / 2**10
    return MaskCost(case.name, mask.rows, statistics.median(cold), statistics.median(warm), kib)


def _masks_table(masks: Sequence[MaskCost]) -> str:
    cells = [
        (m.case, m.blocks, f"{m.cold_ms:.1f}", f"{m.warm_ms:.3f}", f"{m.kib:.0f}") for m in masks
    ]
    return table(("mask", "blocks", "built, ms", "again, ms", "KiB"), cells, None, " rrrr")


# -- the report ----------------------------------------------------------------------------


def _report(head: str, rows: Sequence[Row]) -> str:
    """Return the table, what was left out, and how time grows where that can be said."""
    timed = [row for row in rows if row.ms is not None]
    cells = [
        (r.case, r.tokens, f"{r.density:.3f}", r.backend, f"{r.ms:.2f}", f"{r.tflops:.3g}",
         f"{r.speedup:.2f}", "" if r.error is None else f"{r.error:.2f}", f"{r.first_s:.1f}")
        for r in timed
    ]  # fmt: skip
    heads = ("case", "tokens", "density", "backend", "ms", "TFLOP/s", "x dense", "error", "1st s")
    parts = [
        head,
        table(heads, cells, None, " rr rrrrr"),
        paragraph(
            "TFLOP/s over the kept blocks; error over that of stock attention on the same rows; "
            "1st s: the first call, compilation included.",
            min(terminal_width(), 80),
        ),
    ]
    skipped = [f"{r.case}: {r.backend} was not timed, {r.why_not}" for r in rows if r.why_not]
    parts += ["\n".join(paragraph(s, min(terminal_width(), 80), "", "  ") for s in skipped)]
    slopes = [f"{name} {slope:.2f}" for name, slope in _slopes(timed).items()]
    if slopes:
        parts.append("time grows with frames to the power " + ", ".join(slopes))
    return "\n\n".join(p for p in parts if p)


def _slopes(rows: Sequence[Row]) -> dict[str, float]:
    """Return the slopes of log time over log tokens in the group of growing frames."""
    out = {}
    for name in dict.fromkeys(r.backend for r in rows):
        mine = [r for r in rows if r.backend == name and r.case in GROUPS["frames"]]
        if len(mine) > 2:
            x = [math.log(r.tokens) for r in mine]
            y = [math.log(r.ms or 1.0) for r in mine]
            out[name] = statistics.linear_regression(x, y).slope
    return out


def _write(
    base: Path, head: str, rows: Sequence[Row], masks: Sequence[MaskCost]
) -> tuple[str, str]:
    data = {
        "bench": "attention",
        "machine": head,
        "versions": versions(),
        "rows": [asdict(row) for row in rows],
        "masks": [asdict(mask) for mask in masks],
        "slopes": _slopes([row for row in rows if row.ms is not None]),
    }
    json_file, png = base.with_name(f"{base.name}.json"), base.with_name(f"{base.name}.png")
    write_whole(json_file, json.dumps(data, indent=1).encode())
    write_png(_picture(head, rows), png, data)
    return str(json_file), str(png)


def _picture(head: str, rows: Sequence[Row]) -> Any:
    timed = [row for row in rows if row.ms is not None]
    names = list(dict.fromkeys(row.backend for row in timed))

    def panel(title: str, of: Callable[[Row], float], group: str) -> Panel:
        # lines where nothing but this axis changes; without such cases, all as dots
        along = [r for r in timed if r.case in GROUPS[group]]
        lines = []
        for name in names:
            points = [(of(r), r.ms or 0.0) for r in along or timed if r.backend == name]
            lines += [Curve(name, points, bool(along))] if points else []
        return Panel(title, "ms", lines)

    panels = [
        panel("tokens", lambda r: r.tokens, "frames"),
        panel("density", lambda r: r.density, "densities"),
    ]
    return curves(head, panels)


# -- the order -----------------------------------------------------------------------------


def _cases(names: Sequence[str]) -> list[Case]:
    """Return the cases that names stand for."""
    out: dict[str, Case] = {}
    for name in names:
        if name not in CASES and name not in GROUPS:
            raise OptionError(
                f"--case {name}: expected {', '.join(GROUPS)}, or one of {', '.join(CASES)}"
            )
        out |= {n: CASES[n] for n in GROUPS.get(name, (name,))}
    return list(out.values())


def _check(backends: Sequence[str], rounds: int) -> None:
    for name in backends:
        if name not in BACKENDS:
            raise OptionError(f"--backends {name}: expected some of {', '.join(BACKENDS)}")
    if rounds < 1:
        raise OptionError(f"--rounds {rounds} must be at least 1")


def device_named(name: str) -> torch.device:
    """Return the device called auto, cpu or cuda; refuse others and what is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda") or (name == "cuda" and not torch.cuda.is_available()):
        raise OptionError(f"--device {name}: expected auto, cpu, or cuda where there is a GPU")
    return torch.device(name)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    kinds = {t: getattr(torch, t) for t in ("float32", "float16", "bfloat16")}
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in kinds:
        raise OptionError(f"--dtype {name}: expected auto, {', '.join(kinds)}")
    return kinds[name]
