"""Edited rows by the Triton kernel, in Triton's interpreter on the CPU, against float64 maps.

The interpreter must be asked for before triton is imported, so these tests run in a process of
their own.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnctl
from attnctl.kernels.group_attention import (
    Edit,
    Rows,
    codes_call,
    edit_rows,
    edited_row,
    ops,
    rows_fit,
)
from attnctl.processors.vlm.sinks import phi
from attnctl.processors.vlm.var import reads_image, redistribution
from attnctl.testing import oracles
from attnctl.testing.alone import INTERPRETED as INSIDE
from attnctl.testing.alone import run_alone, set_up_interpreter
from attnctl.testing.calls import tensors
from attnctl.testing.flash import choose_attention, flash_stand_in
from attnctl.testing.vlms import VLMS, generate

pytest.importorskip("triton")
torch.set_num_threads(1)
inside = pytest.mark.skipif(not INSIDE, reason="run by test_in_the_interpreter")
CLOSE = {torch.float32: 2e-5, torch.float16: 4e-3}
RHO, LEAST = 0.3, 0.1

if INSIDE:
    from attnctl.kernels.group_attention import triton as kernel

    set_up_interpreter()


@pytest.mark.skipif(INSIDE, reason="this is the interpreter")
def test_in_the_interpreter() -> None:
    run_alone(__file__, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


def test_a_cpu_takes_the_torch_path() -> None:
    if INSIDE:
        return
    q, k, v = tensors(1, 2, 1, 8, keys=5, dtype=torch.float32)
    assert not rows_fit(q, k, v, None)
    no = torch.zeros(1, 2, dtype=torch.uint8)
    assert codes_call(torch.zeros(1, 2, 3), torch.tensor([0]), no, 1.0, 2) is None


def codes_of(batch: int, keys: int) -> Tensor:
    """Return codes of the first keys: sinks of both kinds, image tokens and none."""
    draw = torch.Generator().manual_seed(4)
    codes = torch.randint(0, 4, (batch, keys - 3), generator=draw).to(torch.uint8)
    codes[:, 2:6] = torch.tensor([1, 2, 3, 0])
    return codes


def masks(kind: str, batch: int, heads: int, queries: int, keys: int) -> Tensor | None:
    draw = torch.Generator().manual_seed(5)
    if kind == "none":
        return None
    if kind == "bool":  # left padding
        seen = torch.ones(batch, 1, queries, keys, dtype=torch.bool)
        seen[-1, :, :, :2] = False
        return seen
    bias = torch.randn(1, heads, 1, keys, generator=draw)
    bias[..., 5] = torch.finfo(torch.float32).min
    return bias


def wanted(
    q: Tensor, k: Tensor, v: Tensor, edit: Edit, mask: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    """Return the output on maps in float64 with every row edited, and where it is [B, H, Nq]."""
    q, k, v = q.double(), k.double(), v.double()
    batch, heads, n_q, width = q.shape
    n_k = k.shape[2]
    code = torch.zeros(batch, n_k, dtype=torch.uint8)
    mine = edit.codes[:, edit.first :].expand(batch, -1)[:, :n_k]
    code[:, : mine.shape[1]] = mine
    free = torch.ones(heads, dtype=torch.bool) if edit.heads is None else edit.heads != 0
    a = q @ k.repeat_interleave(heads // k.shape[1], dim=1).transpose(-1, -2) / width**0.5
    if not edit.move:
        raised = (code == 1)[:, None, None] & free[:, None, None]
        a = a + torch.where(raised, edit.strength * a.abs(), 0.0)
    if causal:
        a = a.masked_fill(~oracles.causal_mask(n_q, n_k), -torch.inf)
    if mask is not None:
        a = a.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else a + mask.double()
    w = a.softmax(-1)
    hit = free[:, None].expand(batch, heads, n_q)
    if edit.move:
        groups = torch.stack([code == g for g in (1, 2, 3)], dim=1).double()
        sums = w @ groups.transpose(-1, -2)[:, None]
        hit = reads_image(sums, edit.rho, edit.least) & free[:, None]
        w = w * (1 + (redistribution(sums, hit, edit.strength) - 1) @ groups[:, None])
    return oracles.apply_map(w, v), hit


EDITS: list[dict[str, Any]] = [
    {"strength": 0.7},
    {"strength": 0.6, "move": True, "rho": RHO, "least": LEAST},
]


@pytest.mark.parametrize("edit", EDITS, ids=["raise", "move"])
@pytest.mark.parametrize("mask", ["none", "bool", "float"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_operator(edit: dict[str, Any], mask: str, dtype: torch.dtype) -> None:
    """Which compiled code has for a written token: in torch, and by the kernel, in parts too."""
    q, k, v = tensors(2, 6, 1, 24, kv_heads=2, keys=261, dtype=dtype)
    codes, some = codes_of(2, 261), (torch.arange(6) % 2).to(torch.uint8)
    seen, counts = masks(mask, 2, 6, 1, 261), torch.zeros(ops.COUNTS, dtype=torch.int32)
    made = Edit(codes, **edit)
    for heads in (None, some):
        exact, hit = wanted(q, k, v, made._replace(heads=heads), seen, False)
        numbers = made.strength, made.move, made.rho, made.least
        out = ops.call(q, k, v, seen, codes, heads, counts, numbers, None)
        error = (out.transpose(1, 2).double() - exact).abs().max()
        assert hit.any() and error < (1e-12 if dtype == torch.float64 else 2e-5)
        assert not counts.any()
    if not INSIDE and dtype == torch.float32:
        torch.library.opcheck(
            torch.ops.attnctl.edited_row.default,
            (q, k, v, seen, codes, some, counts, *map(float, numbers[:1]), *numbers[1:], 0.2),
            test_utils=("test_schema", "test_faketensor"),
        )


@inside
@pytest.mark.parametrize("edit", EDITS, ids=["raise", "move"])
@pytest.mark.parametrize(
    ("batch", "heads", "kv", "keys", "width", "dtype", "some", "first", "mask"),
    [
        (2, 3, 3, 67, 8, torch.float32, False, 0, "none"),
        (2, 6, 2, 131, 24, torch.float16, True, 0, "bool"),
        (1, 7, 1, 70, 64, torch.float32, True, 5, "float"),
        (1, 7, 1, 70, 64, torch.float32, True, 5, "none"),
        # more heads in a group than a block has rows
        (1, 20, 1, 9, 16, torch.float32, False, 0, "bool"),
    ],
)
def test_a_written_token(
    batch: int, heads: int, kv: int, keys: int, width: int, dtype: torch.dtype, some: bool,
    first: int, mask: str, edit: dict[str, Any],
) -> None:  # fmt: skip
    q, k, v = tensors(batch, heads, 1, width, kv_heads=kv, keys=keys, dtype=dtype)
    chosen = (torch.arange(heads) % 2).to(torch.uint8) if some else None
    made = Edit(codes_of(batch, keys), **edit, heads=chosen, first=first)
    seen = masks(mask, batch, heads, 1, keys)
    assert rows_fit(q, k, v, seen)
    out = edited_row(q, k, v, made, seen, None)
    assert out is not None
    assert out.shape == q.transpose(1, 2).shape and out.is_contiguous()
    out = out.transpose(1, 2)
    exact, hit = wanted(q, k, v, made, seen, False)
    assert hit.any()
    assert (out.double() - exact).abs().max() < CLOSE[dtype]
    plain = wanted(q, k, v, made._replace(strength=0.0), seen, False)[0]
    assert (exact - plain).abs().max() > 10 * CLOSE[dtype]  # the edit can be told


@inside
@pytest.mark.parametrize("edit", EDITS, ids=["raise", "move"])
@pytest.mark.parametrize(("heads", "kv", "keys"), [(2, 2, 333), (7, 1, 257)])
def test_keys_of_a_written_token_in_parts(
    heads: int, kv: int, keys: int, edit: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "FEWEST_KEYS", 60)
    assert kernel._splits(2 * kv, keys, False) > 2
    q, k, v = tensors(2, heads, 1, 8, kv_heads=kv, keys=keys, dtype=torch.float32)
    some = (torch.arange(heads) % 2).to(torch.uint8)
    seen = masks("bool", 2, heads, 1, keys)
    assert seen is not None
    seen[:, :, :, 64:192] = False  # a part without a key
    for made in (Edit(codes_of(2, keys), **edit), Edit(codes_of(2, keys), **edit, heads=some)):
        exact, _ = wanted(q, k, v, made, seen, False)
        for _ in range(2):  # the counts of those done are 0 again
            out = edited_row(q, k, v, made, seen, None)
            assert out is not None
            error = (out.transpose(1, 2).double() - exact).abs().max()
            assert error < CLOSE[torch.float32]


@inside
@pytest.mark.parametrize("edit", EDITS, ids=["raise", "move"])
@pytest.mark.parametrize(
    ("mask", "causal", "dtype"),
    [
        ("none", True, torch.float32),
        ("none", True, torch.float16),
        ("none", False, torch.float32),
        ("bool", False, torch.float32),
        ("float", True, torch.float32),
    ],
)
@pytest.mark.parametrize("n", [37, 151])
def test_rows_of_a_prompt(
    n: int,
    mask: str,
    causal: bool,
    dtype: torch.dtype,
    edit: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In one part, and with the keys in three."""
    monkeypatch.setattr(kernel, "FEWEST_IN_PROMPT", 50)
    batch, heads = 2, 6
    assert kernel._splits(2 * batch * 2, n, True) == (1 if n == 37 else 3)
    q, k, v = tensors(batch, heads, n, 8, kv_heads=2, keys=n, dtype=dtype)
    columns = torch.tensor([0, 3, 9, 20, 21, 22, 36], dtype=torch.int32)
    flags = torch.ones(batch, 7, dtype=torch.int32)
    flags[1, 2] = 0
    seen = masks(mask, batch, heads, n, n)
    some = (torch.arange(heads) != 1).to(torch.uint8)
    made = Edit(codes_of(batch, n), **edit, heads=some)
    out = torch.full((batch, n, heads, 8), 7.0, dtype=dtype)
    rows = Rows(torch.cat([columns[None], flags]))
    assert edit_rows(q, k, v, out, made, rows, seen, None, causal)
    out = out.transpose(1, 2)
    exact, hit = wanted(q, k, v, made, seen, causal)
    asked = torch.zeros(batch, n, dtype=torch.bool)
    asked[:, columns.long()] = flags != 0
    hit = hit & asked[:, None]
    assert (out[~hit] == 7).all() and 0 < int(hit.sum()) < hit.numel()  # the rest as it was
    assert (out.double() - exact).abs().amax(-1)[hit].max() < CLOSE[dtype]


@inside
@pytest.mark.parametrize("edit", EDITS, ids=["raise", "move"])
def test_a_single_row_of_a_prompt_is_split_as_a_written_one(
    edit: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "FEWEST_KEYS", 40)
    monkeypatch.setattr(kernel, "_KNOWN", {})
    n = 151
    q, k, v = tensors(1, 2, n, 8, kv_heads=2, keys=n, dtype=torch.float32)
    made, out = Edit(codes_of(1, n), **edit), torch.full((1, n, 2, 8), 7.0)
    for column in (n - 1, 50):  # before some parts of the keys, too
        rows = Rows(torch.tensor([[column], [1]], dtype=torch.int32))
        assert edit_rows(q, k, v, out, made, rows, None, None, True)
        exact, hit = wanted(q, k, v, made, None, True)
        assert hit[:, :, column].all()
        error = (out.transpose(1, 2).double() - exact)[:, :, column].abs().max()
        assert error < CLOSE[torch.float32]
    (call,) = kernel._KNOWN.values()
    assert call.parts and call.attend.grid == (3, 2, 1)
    assert (out == 7).all(-1).sum() == (n - 2) * 2


@inside
def test_rows_that_see_nothing_get_zeros() -> None:
    q, k, v = tensors(1, 2, 1, 8, keys=5, dtype=torch.float32)
    nothing = torch.zeros(1, 1, 1, 5, dtype=torch.bool)
    for edit in EDITS:
        out = edited_row(q, k, v, Edit(codes_of(1, 9), **edit), nothing, None)
        assert out is not None and (out == 0).all()


@inside
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [24, 1030])
def test_codes_of_keys(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, dims, n = torch.randn(2, 19, width).to(dtype), torch.tensor([3, 17, 5]), 19
    labels = torch.randint(0, 4, (2, n)).to(torch.uint8)
    tau, limit = 1.5, 16
    sink = (phi(x, dims) >= tau) & (labels < 2) & (torch.arange(n) < limit)
    image = (labels == 1) | (labels == 3)
    exact = torch.where(image, 3 - sink.to(torch.uint8), sink.to(torch.uint8))
    call = codes_call(x, dims, labels, tau, limit, 2)
    found = []
    for stream in (x, torch.zeros_like(x), x):  # one layer after another
        assert call.takes(stream) and not call.takes(x[:, 1:])
        found.append(call(stream))
    assert torch.equal(found[0], exact) and torch.equal(found[2], exact)
    assert len({codes.data_ptr() for codes in found}) == 3  # each in its own room
    assert found[0].unique().tolist() == [0, 1, 2, 3]
    for other in (x.repeat_interleave(2, 1)[:, ::2], x.double(), x.to("meta")):
        assert other.shape == x.shape and not call.takes(other)


CONTROLS: dict[str, dict[str, Any]] = {
    "pai": {"alpha": 1.0, "first_layer": 0},
    "var": {"sink_dims": (3, 17), "tau": 1.3, "rho_nonsink": 0.4, "image_mass": 0.1},
}


def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let models take the torch path from here on."""
    monkeypatch.setattr("attnctl.processors.vlm.rows.rows_fit", lambda *_: False)
    monkeypatch.setattr("attnctl.processors.vlm.sinks.codes_call", lambda *_: None)


@inside
@pytest.mark.parametrize(
    ("family", "control", "options"),
    [
        ("llava", "pai", {}),
        ("llava", "pai", {"rows": "all", "heads": "L0H1-3 L1"}),
        ("qwen2.5-vl", "pai", {"rows": "text"}),
        ("gemma3", "pai", {}),
        ("llava", "var", {"protect": (1,)}),
        ("qwen2.5-vl", "var", {"heads": "H0 H3"}),
        ("gemma3", "var", {"skip_last": False}),
    ],
)
def test_whole_models_take_it(
    family: str, control: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompt and written tokens, padding, windows: as on the torch path."""
    model, inputs = VLMS[family].build(), VLMS[family].inputs((0, 1))
    made = attnctl.control(control, **{**CONTROLS[control], **options})
    runs: list[bool] = []
    start = kernel.RowsCall.__call__

    def counted(*args: Any) -> None:
        runs.append(args[6] is None)
        start(*args)

    monkeypatch.setattr(kernel.RowsCall, "__call__", counted)
    stock = generate(model, inputs, 3)
    with attnctl.patch(model, made):
        found = generate(model, inputs, 3)
    assert any(runs) and not all(runs)  # written tokens, and the prompt
    without_kernels(monkeypatch)
    runs.clear()
    with attnctl.patch(model, made):
        plain = generate(model, inputs, 3)
    assert not runs
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)
    assert (plain - stock).abs().max() > 1e-3


@inside
@pytest.mark.parametrize(
    ("family", "control", "options"),
    [("llava", "pai", {"rows": "text"}), ("llava", "var", {}), ("gemma3", "pai", {})],
)
def test_models_on_flash_attention_take_it(
    family: str, control: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding is beside the causal flag there, and no mask of queries by keys is made for it."""
    model, inputs = VLMS[family].build(), VLMS[family].inputs((0, 1))
    inputs.pop("token_type_ids", None)
    made = attnctl.control(control, **{**CONTROLS[control], **options})
    runs: list[tuple[bool, tuple[int, ...], bool]] = []
    start = kernel.rows_call

    def noted(*args: Any) -> Any:
        mask: Tensor | None = args[5]
        shape = () if mask is None else tuple(mask.shape[1:3])
        runs.append((args[4] is None, shape, args[7]))
        return start(*args)

    def attend(*_: Any) -> Tensor:
        raise AssertionError("not the short way")

    monkeypatch.setattr(kernel, "rows_call", noted)
    monkeypatch.setattr(type(made), "attend", attend)
    with flash_stand_in():
        choose_attention(model, "flash_attention_2")
        with attnctl.patch(model, made):
            found = generate(model, inputs, 3)
    monkeypatch.undo()
    prompts = {(shape, causal) for written, shape, causal in runs if not written}
    assert ((1, 1), True) in prompts and any(written for written, *_ in runs)
    assert family == "gemma3" or len(prompts) == 1  # a window needs a mask that says it
    choose_attention(model, "sdpa")
    without_kernels(monkeypatch)
    with attnctl.patch(model, made):
        torch.testing.assert_close(found, generate(model, inputs, 3), rtol=1e-4, atol=1e-4)


@inside
def test_queries_in_front_of_the_image_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """They see no image token, so that nothing is moved there; without a mask this is known."""
    model, inputs = VLMS["llava"].build(), VLMS["llava"].inputs((0,))
    image = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
    rows: list[Any] = []
    start = kernel.RowsCall.__call__

    def noted(*args: Any) -> None:
        rows.append(args[6])
        start(*args)

    monkeypatch.setattr(kernel.RowsCall, "__call__", noted)
    control = attnctl.control("var", **CONTROLS["var"])
    with attnctl.patch(model, control):
        found = generate(model, inputs, 1)
    after = torch.arange(int(image[-1]) + 1, inputs["input_ids"].shape[1])
    assert int(image[0]) > 0 and len(rows) > 1
    table = torch.stack([after, torch.ones_like(after)])
    assert all(torch.equal(few.table, table.int()) for few in rows)
    without_kernels(monkeypatch)
    with attnctl.patch(model, control):
        torch.testing.assert_close(found, generate(model, inputs, 1), rtol=1e-4, atol=1e-4)


@inside
def test_written_tokens_whose_kernel_declines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers show their input while sinks are looked for; after that, nothing needs it."""
    from attnctl.hosts import vlm
    from attnctl.processors.vlm.rows import EditedRow

    model, inputs = VLMS["llava"].build(), VLMS["llava"].inputs((0, 1))
    control = attnctl.control("var", **CONTROLS["var"])
    shown: list[bool] = []
    run, decline = EditedRow.__call__, lambda *_: None

    def noted(self: Any, *args: Any) -> Any:
        assert vlm.LOCAL.forward is not None
        shown.append(vlm.LOCAL.forward.stream is not None)
        return run(self, *args)

    with attnctl.patch(model, control):
        monkeypatch.setattr(EditedRow, "__call__", noted)
        found = generate(model, inputs, 4)
        layers = model.config.text_config.num_hidden_layers
        assert any(shown) and not any(shown[layers:])
        monkeypatch.setattr(EditedRow, "__call__", decline)
        torch.testing.assert_close(found, generate(model, inputs, 4), rtol=1e-4, atol=1e-4)


@inside
@pytest.mark.parametrize("control", ["pai", "var"])
def test_a_prompt_in_two_parts(control: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = VLMS["llava"].build(), VLMS["llava"].inputs((0, 1))
    options = {**CONTROLS[control], **({"rows": "text"} if control == "pai" else {})}
    ids, seen = inputs["input_ids"], inputs["attention_mask"]

    @torch.no_grad()
    def run() -> Tensor:
        with attnctl.patch(model, attnctl.control(control, **options)):
            first = model(**{**inputs, "input_ids": ids[:, :-3], "attention_mask": seen[:, :-3]})
            cache = first.past_key_values
            last = model(input_ids=ids[:, -3:], attention_mask=seen, past_key_values=cache)
        return torch.cat([first.logits, last.logits], dim=1)

    found = run()
    without_kernels(monkeypatch)
    plain = run()
    real = seen.bool()
    torch.testing.assert_close(found[real], plain[real], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert (plain - model(**inputs).logits)[real].abs().max() > 1e-3
