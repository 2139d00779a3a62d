"""Which tiles suit the plain Triton kernel on a GPU: all that fit are checked and timed.

    python -m attnctl.apps.bench.attention_tiles --out tiles

Each candidate first passes the gate of `attnctl bench attention`. All are timed on the first
case of a head dim, the best of them on its other cases; the one with the lowest geometric mean
wins. Writes tiles-measured.json, and tiles.json: the data in `kernels/block_sparse/tiles.json`
with this GPU's tiles, to be put in its place. Minutes on a GPU; `--workers` compile beforehand.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnctl.kernels import BlockMask, block_sparse_attention, block_sparse_backend
from attnctl.kernels.block_sparse.tiles import FILE, Tiles, gpu_name

from .attention import device_named, inputs, passes, steady
from .attention_cases import CASES, GROUPS, Case

__all__ = ["candidates", "choose", "main", "tuned"]

Say = Callable[[str], None]
Found = dict[str, dict[str, float]]
"""Milliseconds by candidate and case."""


def candidates(width: int, descriptors: bool) -> list[Tiles]:
    """Return the tiles to try for a head dim.

    Args:
        width: head dim.
        descriptors: whether the GPU has them.
    """
    cuts = [
        (m, n, warps, stages)
        for m, n, warps in ((128, 64, 4), (128, 64, 8), (128, 128, 8), (64, 64, 4), (64, 128, 4))
        for stages in (2, 3)
    ]
    cuts += [(128, 32, 4, stages) for stages in (3, 4)]
    if width <= 64:
        cuts += [(128, 128, 4, 2), (128, 128, 4, 3), (128, 64, 4, 4), (64, 64, 4, 4)]
    out = [Tiles(*cut, descriptors) for cut in cuts]
    if descriptors:
        out += [Tiles(128, 64, 4, 2), Tiles(128, 64, 4, 3), Tiles(128, 128, 8, 2)]
        # three programs on a multiprocessor have 168 registers a thread, four 128
        few = [(128, 64, 4, 2), (128, 64, 4, 3), (128, 32, 4, 4)]
        out += [Tiles(*cut, descriptors, 168) for cut in few]
        out += [Tiles(64, 64, 4, 3, descriptors, 128)]
    return list(dict.fromkeys(out))


def name(tiles: Tiles) -> str:
    """Return tiles in few letters: 128x64 w4 s2 tma r168."""
    words = [f"{tiles.m}x{tiles.n}", f"w{tiles.warps}", f"s{tiles.stages}"]
    words += ["tma"] if tiles.descriptors else []
    words += [f"r{tiles.registers}"] if tiles.registers else []
    return " ".join(words)


def choose(found: Found) -> str:
    """Return the candidate with the lowest geometric mean over the cases that most have."""
    most = max(len(times) for times in found.values())
    full = {key: times for key, times in found.items() if len(times) == most}
    return min(full, key=lambda key: statistics.fmean(math.log(ms) for ms in full[key].values()))


def tuned(
    cases: Sequence[Case],
    tries: Sequence[Tiles],
    *,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
    keep: int,
    until: float,
    beside: Sequence[str],
    say: Say,
) -> tuple[Found, Found]:
    """Return milliseconds of candidates, and of other backends, on the cases of one head dim.

    Args:
        cases: the cases, the first for all candidates.
        tries: the candidates.
        device: where.
        dtype: of queries, keys and values.
        rounds: timings of each.
        keep: how many go on to the other cases.
        until: when to stop, by `time.monotonic`.
        beside: backends timed on the same cases, for comparison.
        say: is told what was found, as it is.
    """
    found: Found = {}
    others: Found = {}
    going = list(tries)
    for case in cases:
        if time.monotonic() > until:
            break
        mask = case.mask().to(device)
        q, k, v = inputs(case, mask, dtype, device)
        work = 4 * case.heads * case.width * mask.nq * mask.nk * mask.density / 1e9
        runs: dict[str, Callable[[], Any]] = {
            name(tiles): partial(_run, q, k, v, mask, tiles) for tiles in going
        }
        runs |= {backend: partial(_other, q, k, v, mask, backend) for backend in beside}
        for key, run in runs.items():
            if time.monotonic() > until:
                break
            ms, why = _timed(run, q, k, v, mask, rounds)
            say(f"{case.name}: {key}: {why or f'{ms:.2f} ms, {work / ms:.0f} TFLOP/s'}")
            if why is None:
                (others if key in beside else found).setdefault(key, {})[case.name] = ms
        best = sorted(found, key=lambda key: found[key].get(case.name, math.inf))[:keep]
        going = [tiles for tiles in going if name(tiles) in best]
    return found, others


def _timed(
    run: Callable[[], Any], q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, rounds: int
) -> tuple[float, str | None]:
    """Return the median time of a candidate, or why it has none."""
    try:
        _, why = passes(run, q, k, v, mask)
        if why is None:
            return statistics.median(steady(run, q.device) for _ in range(rounds)), None
    except Exception as error:  # whatever a compiler raises for tiles that do not fit
        why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return math.inf, why


def _run(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, tiles: Tiles) -> tuple[Tensor, Tensor]:
    from attnctl.kernels.block_sparse.triton import block_sparse_triton

    return block_sparse_triton(q, k, v, mask, q.shape[-1] ** -0.5, tiles)


def _other(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, backend: str) -> Any:
    return block_sparse_attention(q, k, v, mask, return_lse=True, backend=backend)


def compile_part(
    widths: Iterable[int], part: int, of: int, device: torch.device, dtype: torch.dtype
) -> None:
    """Run every `of`-th candidate once on a small problem, so that Triton has it in its cache."""
    for width in widths:
        tries = candidates(width, _has_descriptors(device))
        mask = BlockMask.full(256, 256).to(device)
        q, k, v = (torch.zeros(1, 2, 256, width, device=device, dtype=dtype) for _ in range(3))
        for tiles in tries[part::of]:
            _timed(partial(_run, q, k, v, mask, tiles), q, k, v, mask, 1)


def _has_descriptors(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def main(words: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", action="append", help="as in attnctl bench attention")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", type=int, default=6, help="candidates for further cases")
    parser.add_argument("--seconds", type=float, default=600.0, help="when to stop")
    parser.add_argument("--beside", default="", help="backends to time as well")
    parser.add_argument("--workers", type=int, default=0, help="processes that compile first")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("."))
    given = parser.parse_args(words)
    device = device_named(given.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    wanted = (n for case in given.case or ["models"] for n in GROUPS.get(case, (case,)))
    names = list(dict.fromkeys(wanted))
    widths = {
        w: [CASES[n] for n in names if CASES[n].width == w]
        for w in dict.fromkeys(CASES[n].width for n in names)
    }
    if given.part:
        part, of = map(int, given.part.split("/"))
        compile_part(widths, part, of, device, dtype)
        return
    until = time.monotonic() + given.seconds
    given.out.mkdir(parents=True, exist_ok=True)
    _compile(given, names, until)
    data = json.loads(FILE.read_text(encoding="utf-8"))
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    record: dict[str, Any] = {"bench": "tiles", "machine": machine, "widths": {}}
    for at, (width, cases) in enumerate(widths.items()):
        left = until - time.monotonic()
        found, others = tuned(
            cases,
            candidates(width, _has_descriptors(device)),
            device=device,
            dtype=dtype,
            rounds=given.rounds,
            keep=given.keep,
            until=time.monotonic() + left / (len(widths) - at),
            beside=[b for b in given.beside.split(",") if _can(b, cases[0], device, dtype)],
            say=partial(print, flush=True),
        )
        if not found:
            continue
        best = choose(found)
        record["widths"][width] = {"best": best, "ms": found, "others": others}
        tiles = next(t for t in candidates(width, _has_descriptors(device)) if name(t) == best)
        data["triton"].setdefault(gpu_name(device), {})[str(width)] = _entry(tiles)
        print(f"head dim {width}: {best}", flush=True)
        (given.out / "tiles-measured.json").write_text(json.dumps(record, indent=1))
        (given.out / "tiles.json").write_text(written(data))


def _compile(given: argparse.Namespace, names: Sequence[str], until: float) -> None:
    """Have processes compile all candidates into Triton's cache."""
    base = [sys.executable, "-P", "-m", __spec__.name if __spec__ else __name__]
    base += ["--device", given.device, *(w for n in names for w in ("--case", n))]
    parts = [
        subprocess.Popen([*base, "--part", f"{i}/{given.workers}"]) for i in range(given.workers)
    ]
    for part in parts:
        try:
            part.wait(max(1.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            part.kill()


def _can(backend: str, case: Case, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a backend can take the kind of a case."""
    x = torch.zeros(1, 1, 128, case.width, device=device, dtype=dtype)
    try:
        return bool(backend) and bool(
            block_sparse_backend(x, x, x, BlockMask.full(128, 128).to(device), backend)
        )
    except ValueError as error:
        print(f"{backend}: {error}", flush=True)
        return False


def _entry(tiles: Tiles) -> dict[str, Any]:
    return {key: value for key, value in tiles._asdict().items() if value}


def written(data: dict[str, Any]) -> str:
    """Return the text of the data file, a line for each head dim."""
    kernels = []
    for kernel, gpus in sorted(data.items()):
        entries = []
        for gpu, table in gpus.items():
            lines = [f'   "{w}": {json.dumps(table[w])}' for w in sorted(table, key=int)]
            entries.append(f'  "{gpu}": {{\n' + ",\n".join(lines) + "\n  }")
        kernels.append(f' "{kernel}": {{\n' + ",\n".join(entries) + "\n }")
    return "{\n" + ",\n".join(kernels) + "\n}\n"


if __name__ == "__main__":
    main()
