"""The attention bench: its gate, its table, its files, its refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from attnctl.apps import cli
from attnctl.apps.bench import attention
from attnctl.apps.bench.attention import Row, _report, _slopes, measure
from attnctl.apps.bench.attention_cases import CASES, GROUPS, Case
from attnctl.apps.bench.curves import Curve, Panel, curves
from attnctl.kernels import BlockMask
from attnctl.testing.blocks import exact, random_blocks, random_map
from attnctl.testing.calls import tensors

torch.set_num_threads(1)


def small() -> BlockMask:
    return random_blocks(200, 200, 32)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(CASES, "small", Case("small", 2, 16, lambda: BlockMask.full(200, 200, 32)))
    return tmp_path


def bench(*words: str) -> int:
    return cli.run(["bench", "attention", *words])


def test_the_command_writes_table_picture_and_record(place, capsys):
    assert bench("--case", "small", "--rounds", "2", "--device", "cpu") == 0
    said = capsys.readouterr().out
    assert all(len(line) <= 80 for line in said.splitlines())
    rows = [line.split() for line in said.splitlines() if line.startswith("small")]
    assert [r[3] for r in rows[:2]] == ["dense", "reference"]
    data = json.loads((place / "attention-001.json").read_text())
    assert data["bench"] == "attention" and data["rows"][1]["density"] == 1.0
    (cost,) = data["masks"]
    assert cost["case"] == "small" and cost["blocks"] == 7 and cost["cold_ms"] > 0
    assert rows[2][:2] == ["small", "7"] and len(rows) == 3
    with Image.open(place / "attention-001.png") as image:
        assert image.width > image.height
    assert bench("--case", "small", "--rounds", "1", "--device", "cpu", "--out", "x") == 0
    assert bench("--case", "small", "--device", "cpu", "--out", "x") == cli.BAD_INPUT
    assert "would be replaced" in capsys.readouterr().err


def test_what_is_measured_is_consistent():
    case = Case("half", 2, 16, small)
    dense, row = measure(case, ["reference"], rounds=2, dtype=torch.float32, device="cpu")
    mask = small()
    assert (row.tokens, row.density) == (200, mask.density) and row.error < 2
    assert row.speedup == pytest.approx(dense.ms / row.ms)
    work = 4 * 2 * 16 * 200 * 200
    assert dense.tflops == pytest.approx(work / dense.ms / 1e9)
    assert row.tflops == pytest.approx(work * mask.density / row.ms / 1e9)


@pytest.mark.parametrize(
    "how,message",
    [
        ("shift", "times the error"),
        ("nan", "times the error"),
        ("lse", "times the error"),
        ("noise", "runs differ"),
    ],
)
def test_the_gate_lets_nothing_wrong_through(how, message, monkeypatch):
    stock = attention.block_sparse_attention

    def broken(*args, **options):
        out, lse = stock(*args, **options)
        out, lse = out.clone(), lse.clone()
        if how == "shift":
            out[..., -1, 0] += 1e-3
        elif how == "nan":
            out[..., -1, 0] = torch.nan
        elif how == "lse":
            lse[..., 0] += 0.01
        else:
            out[..., 50, 0] += torch.rand(()) * 1e-3
        return out, lse

    monkeypatch.setattr(attention, "block_sparse_attention", broken)
    case = Case("full", 2, 16, lambda: BlockMask.full(200, 200, 32))
    _, row = measure(case, ["reference"], rounds=1, dtype=torch.float32, device="cpu")
    assert message in row.why_not and row.ms is None
    assert "reference was not timed" in " ".join(_report("CPU", [row]).split())


def test_what_cannot_run_is_told_when_asked_for():
    case = CASES["small"]
    rows = measure(case, ["triton"], rounds=1, dtype=torch.float32, device="cpu")
    assert "'triton' cannot run here" in rows[1].why_not


@pytest.mark.parametrize("break_at", [None, 0, -1])
def test_the_gate_reads_partial_blocks(break_at):
    mask = BlockMask.from_dense(random_map(200, 200), 32)
    q, k, v = tensors(1, 2, 200, 16, dtype=torch.float32)
    out, lse = (x.float() for x in exact(q.double(), k.double(), v.double(), mask))
    assert attention._error(out, lse, q, k, v, mask) <= 2
    if break_at is not None:  # the first query keeps nothing, the last one something
        out[..., break_at, 0] += 0.01
        assert attention._error(out, lse, q, k, v, mask) > 100


def test_zeros_are_zeros(place, capsys):
    words = ("--case", "small", "--rounds", "1", "--device", "cpu", "--backends", "reference")
    assert bench(*words, "--zeros", "--out", "z") == 0
    data = json.loads((place / "z.json").read_text())
    assert data["machine"].endswith("inputs of zeros") and data["rows"][1]["error"] == 0
    assert bench(*words, "--out", "r") == 0
    assert json.loads((place / "r.json").read_text())["rows"][1]["error"] > 0


def test_growth_is_the_slope_over_frames():
    rows = [
        Row(name, "x", 100 * i, 0.1, ms=float(i**1.5), tflops=1.0, speedup=1.0, first_s=0.0)
        for i, name in enumerate(GROUPS["frames"], 1)
    ]
    assert _slopes(rows)["x"] == pytest.approx(1.5)
    assert "to the power x 1.50" in _report("CPU", rows)
    assert _slopes(rows[:2]) == {}


def test_wrong_orders_are_refused(capsys):
    for words, message in [
        (("--case", "wan"), "expected models, bands, windows, frames, densities"),
        (("--backends", "fast"), "expected some of gluon, triton"),
        (("--rounds", "0"), "at least 1"),
        (("--dtype", "int8"), "expected auto, float32"),
        (("--device", "tpu"), "expected auto, cpu"),
        (("--out", "missing/x"), "does not exist"),
    ]:
        assert bench(*words) == cli.BAD_INPUT
        assert message in " ".join(capsys.readouterr().err.split())


def test_masks_are_forgotten_before_they_are_timed():
    case = CASES["toy"]
    kept = case.mask()
    assert case.mask() is kept
    cost = attention._mask_cost(case)
    assert case.mask() is not kept and cost.cold_ms > cost.warm_ms


def test_a_backend_that_breaks_is_told_and_the_others_are_timed(monkeypatch):
    def broken(*args, **options):
        if options["backend"] == "reference":
            raise LookupError("no kernel\nfor this")  # what a foreign compiler may raise
        return attention_of(*args, **options)

    attention_of = attention.block_sparse_attention
    monkeypatch.setattr(attention, "block_sparse_attention", broken)
    dense, row, flex = measure(
        CASES["small"], ["reference", "flex"], rounds=1, dtype=torch.float32, device="cpu"
    )
    assert row.why_not == "LookupError: no kernel" and row.ms is None
    assert dense.ms and flex.ms and flex.why_not is None


def test_bands_have_no_ragged_end():
    mask = CASES["bands-480p"].mask()
    assert mask.nq % mask.block == 0 and mask.density == pytest.approx(0.31, abs=0.01)


def test_cases_have_the_tokens_they_name():
    assert CASES["toy"].mask().num_blocks == 140  # golden value of the released rule
    assert CASES["random-0.1"].mask().density == pytest.approx(0.1, abs=0.01)
    assert all(name in CASES for names in GROUPS.values() for name in names)


def test_curves_lie_where_their_values_are():
    lines = [Curve("a", [(1.0, 1.0), (100.0, 100.0)]), Curve("b", [(10.0, 10.0)], False)]
    image = curves("title", [Panel("x", "y", lines)])
    red = [(x, y) for x in range(image.width) for y in range(60, image.height)
           if image.getpixel((x, y)) == (200, 60, 40)]  # fmt: skip
    x, y = (sum(c) / len(red) for c in zip(*red, strict=True))
    middle = 56 + 200, 58 + 160
    assert abs(x - middle[0]) < 2 and abs(y - middle[1]) < 3
