"""Every control of processors/guidance against explicit float64 maps, on calls made by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from attnctl.errors import HostError, OptionError
from attnctl.processors import guidance
from attnctl.processors.guidance.heads import writable
from attnctl.processors.guidance.nag import normalized_guidance
from attnctl.processors.guidance.pag import identity_among_images
from attnctl.processors.guidance.perturbed import PerturbedGuidance, soften
from attnctl.processors.guidance.pladis import entmax15, sparse_attention
from attnctl.processors.guidance.seg import blur_matrix, blur_queries
from attnctl.records import AttentionCall, ForwardCall, Rows, Spans, Step
from attnctl.testing import oracles
from attnctl.testing.calls import attention_call, joint_spans, sdpa, tensors

torch.set_num_threads(1)
GROUPS = ("uncond", "cond", "perturbed/0")
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 1e-2}


def close(got: Tensor, want: Tensor, dtype: torch.dtype = torch.float64) -> None:
    error = TOLERANCE[dtype]
    rtol = error if dtype == torch.bfloat16 else 0
    torch.testing.assert_close(got.double(), want.double(), atol=error, rtol=rtol)


# -- the layouts, masks and oracles of the big table ---------------------------------------


@dataclass(frozen=True)
class Layout:
    """Tokens of a call: an image grid, and text before or after it."""

    grid: tuple[int, int, int]
    text: int = 0
    text_first: bool = False
    kv_heads: int = 4

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2] + self.text

    @property
    def kind(self) -> str:
        return "joint" if self.text else "self"

    @property
    def spans(self) -> Spans:
        image = self.tokens - self.text
        return joint_spans(image, self.text, text_first=self.text_first, grid=self.grid)

    @property
    def image(self) -> slice:
        found = self.spans.queries("image")
        assert found is not None
        return found


LAYOUTS = {
    "self-5x7": Layout((1, 5, 7)),
    "self-63": Layout((1, 7, 9), kv_heads=2),
    "image-text": Layout((1, 5, 7), 6),
    "text-image": Layout((1, 5, 7), 6, text_first=True, kv_heads=2),
    "video-text": Layout((3, 3, 5), 4, text_first=True),
}


def mask_of(kind: str, batch: int, heads: int, n: int) -> Tensor | None:
    generator = torch.Generator().manual_seed(3)
    keys = torch.rand(batch, 1, 1, n, generator=generator) < 0.7
    dense = torch.rand(batch, heads, n, n, generator=generator) < 0.7
    keys[..., [0, -1]] = dense[..., [0, -1]] = True
    return {
        "none": None,
        "keys": keys,
        "dense": dense,
        "float": torch.zeros(1, 1, n, n).masked_fill(~dense[:1, :1], -torch.inf),
        "bias": torch.randn(batch, heads, n, n, generator=generator),
    }[kind]


Oracle = Callable[[Tensor, Tensor, Tensor, Any, Layout], Tensor]


def from_map(make: Callable[..., Tensor]) -> Oracle:
    """An oracle that forms the perturbed map and applies it to the values."""
    return lambda q, k, v, mask, layout: oracles.apply_map(make(q, k, mask, layout), v)


def plain(q: Tensor, k: Tensor, mask: Any, layout: Layout) -> Tensor:
    return oracles.softmax_map(q, k, mask)


def image_identity(q: Tensor, k: Tensor, mask: Any, layout: Layout) -> Tensor:
    return oracles.image_identity_map(plain(q, k, mask, layout), layout.image)


def image_logit(q: Tensor, k: Tensor, mask: Any, layout: Layout) -> Tensor:
    if not layout.text:
        return oracles.identity_map(plain(q, k, None, layout))
    return oracles.image_logit_map(q, k, layout.image, mask)


def seg(sigma: float) -> Callable[..., Tensor]:
    def make(q: Tensor, k: Tensor, mask: Any, layout: Layout) -> Tensor:
        q = q.double().clone()
        image = q[:, :, layout.image]
        infinite = sigma > 9999
        q[:, :, layout.image] = (
            oracles.mean_query(image)
            if infinite
            else oracles.blurred_queries(image, layout.grid, sigma)
        )
        return oracles.softmax_map(q, k, mask)

    return make


def permuted(q: Tensor, k: Tensor, mask: Any, layout: Layout) -> Tensor:
    call = attention_call(q, k, k, spans=layout.spans)
    image = layout.image
    order = torch.arange(layout.tokens)
    order[image] = order[image][guidance.TPG().permutation(call, image.stop - image.start)]
    return oracles.permutation_map(plain(q, k, mask, layout), order)


CASES: dict[str, tuple[PerturbedGuidance, Oracle]] = {
    "pag-joint": (
        guidance.PAG(),
        from_map(lambda q, k, m, lay: oracles.identity_map(plain(q, k, None, lay))),
    ),
    "pag-image": (guidance.PAG(block="image"), from_map(image_identity)),
    "pag-image_logit": (guidance.PAG(block="image_logit"), from_map(image_logit)),
    "softpag": (
        guidance.SoftPAG(),
        from_map(lambda q, k, m, lay: oracles.identity_map(plain(q, k, None, lay))),
    ),
    "uniform": (
        guidance.UniformGuidance(),
        from_map(lambda q, k, m, lay: oracles.uniform_map(plain(q, k, None, lay), m)),
    ),
    "temperature-0.3": (
        guidance.TemperatureGuidance(tau=0.3),
        from_map(lambda q, k, m, lay: oracles.softmax_map(q, k, m, 8**-0.5 / 0.3)),
    ),
    "temperature-4": (
        guidance.TemperatureGuidance(tau=4.0),
        from_map(lambda q, k, m, lay: oracles.softmax_map(q, k, m, 8**-0.5 / 4)),
    ),
    "seg-0.7": (guidance.SEG(sigma=0.7), from_map(seg(0.7))),
    "seg-30": (guidance.SEG(sigma=30.0), from_map(seg(30.0))),
    "seg-inf": (guidance.SEG(), from_map(seg(1e5))),
    "seg-all": (
        guidance.SEG(tokens="all"),
        from_map(lambda q, k, m, lay: oracles.softmax_map(oracles.mean_query(q), k, m)),
    ),
    "slg": (guidance.SLG(), lambda q, k, v, m, lay: torch.zeros_like(q, dtype=torch.float64)),
    "tpg": (guidance.TPG(), from_map(permuted)),
}


def perturbed_rows(
    control: PerturbedGuidance,
    layout: Layout,
    mask_kind: str = "none",
    dtype: torch.dtype = torch.float64,
    heads: list[int] | None = None,
    n: int = 2,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    """Run `attend` on [uncond, cond, perturbed] x n; return (got, stock, oracle's arguments)."""
    made = tensors(3 * n, 4, layout.tokens, 8, kv_heads=layout.kv_heads, dtype=dtype)
    q, k, v = (t.to(device) for t in made)
    mask = mask_of(mask_kind, 3 * n, 4, layout.tokens)
    if mask is not None:
        mask = mask.to(device, torch.bool if mask.dtype == torch.bool else dtype)
    call = attention_call(
        q, k, v, kind=layout.kind, groups=GROUPS, heads=heads, mask=mask, spans=layout.spans
    )
    before = [t.clone() for t in (q, k, v)]
    got, stock = control.attend(call), call.primitive()
    assert all(map(torch.equal, before, (q, k, v)))  # the model's tensors are left alone
    rows = slice(2 * n, None)
    part = mask if mask is None or mask.shape[0] == 1 else mask[rows]
    return got, stock, (q[rows], k[rows], v[rows], part, layout)


MASKS = ("none", "keys", "dense", "float", "bias")
CASES_AND_MASKS = [
    # a finite bias does not say which keys a row may see
    (case, mask)
    for case in CASES
    for mask in MASKS
    if (case, mask) != ("uniform", "bias")
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case,mask", CASES_AND_MASKS)
def test_full_strength_equals_the_explicit_map(case, layout, mask):
    control, oracle = CASES[case]
    control = replace(control, u=1.0)
    got, stock, arguments = perturbed_rows(control, LAYOUTS[layout], mask, heads=[0, 3])
    assert torch.equal(got[:4], stock[:4])
    assert torch.equal(got[4:, [1, 2]], stock[4:, [1, 2]])
    close(got[4:, [0, 3]], oracle(*arguments)[:, [0, 3]])


@pytest.mark.parametrize("heads", [None, [2], [0, 1, 3]])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("u", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("case", CASES)
def test_strength_mixes_the_maps_in_every_precision(case, u, dtype, heads):
    control, oracle = CASES[case]
    layout = LAYOUTS["text-image"]
    got, stock, arguments = perturbed_rows(replace(control, u=u), layout, "none", dtype, heads)
    q, k, v, mask, _ = arguments
    full = oracle(*arguments)
    want = (1 - u) * oracles.apply_map(plain(q, k, mask, layout), v) + u * full
    chosen = list(range(4)) if heads is None else heads
    others = [h for h in range(4) if h not in chosen]
    assert got.dtype == dtype and torch.equal(got[:4], stock[:4])
    assert torch.equal(got[4:, others], stock[4:, others])
    close(got[4:, chosen], want[:, chosen], dtype)
    if u == 0:
        assert torch.equal(got, stock)
    if u == 1 and case in ("pag-joint", "softpag"):
        assert torch.equal(got[4:, chosen], v.repeat_interleave(2, 1)[:, chosen])
    if u == 1 and case == "slg":
        assert (got[4:, chosen] == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("mask", ["none", "keys"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu(dtype, mask):
    for name in ("self-63", "image-text", "text-image"):
        for case, (control, oracle) in CASES.items():
            control = replace(control, u=1.0)
            layout = LAYOUTS[name]
            got, stock, given = perturbed_rows(control, layout, mask, dtype, [0, 3], device="cuda")
            on_cpu = [x.cpu() if isinstance(x, Tensor) else x for x in given]
            assert torch.equal(got[:4], stock[:4]), case
            error = (got[4:, [0, 3]].cpu().double() - oracle(*on_cpu)[:, [0, 3]]).abs().max()
            assert error < (1e-5 if dtype is torch.float32 else 3e-2), (case, error)


@pytest.mark.parametrize("case", ["pag-image", "pag-image_logit", "seg-0.7", "seg-inf", "tpg"])
@pytest.mark.parametrize("layout", ["image-text", "text-image"])
def test_text_rows_stay_bit_equal(case, layout):
    chosen = LAYOUTS[layout]
    got, stock, _ = perturbed_rows(replace(CASES[case][0], u=1.0), chosen)
    text = chosen.spans.queries("text")
    assert torch.equal(got[:, :, text], stock[:, :, text])
    assert not torch.equal(got[4:, :, chosen.image], stock[4:, :, chosen.image])


@pytest.mark.parametrize("case", [c for c in CASES if c != "tpg"])
@pytest.mark.parametrize("mask", ["none", "dense"])
def test_the_order_of_image_and_text_does_not_matter(case, mask):
    there, back = LAYOUTS["image-text"], replace(LAYOUTS["text-image"], kv_heads=4)
    order = torch.tensor([*range(35, 41), *range(35)])  # [text, image] out of [image, text]
    q, k, v = tensors(2, 4, 41, 8)
    full = mask_of(mask, 2, 4, 41)
    turned = None if full is None else full[:, :, order][:, :, :, order]
    control = replace(CASES[case][0], u=0.6)
    first = control.attend(
        attention_call(q, k, v, kind="joint", mask=full, spans=there.spans, heads=[1, 2])
    )
    second = control.attend(
        attention_call(
            q[:, :, order], k[:, :, order], v[:, :, order],
            kind="joint", mask=turned, spans=back.spans, heads=[1, 2],
        )
    )  # fmt: skip
    close(second, first[:, :, order])


@pytest.mark.parametrize("heads", [None, [1]])
def test_causal_calls_keep_their_order(heads):
    q, k, v = tensors(1, 2, 9, 8)
    causal = oracles.causal_mask(9, 9)
    for control, want in (
        (guidance.UniformGuidance(), oracles.uniform_map(oracles.softmax_map(q, k), causal)),
        (guidance.SEG(tokens="all"), oracles.softmax_map(oracles.mean_query(q), k, causal)),
        (guidance.TemperatureGuidance(tau=2), oracles.softmax_map(q, k, causal, 8**-0.5 / 2)),
    ):
        call = attention_call(q, k, v, is_causal=True, heads=heads)
        chosen = heads or [0, 1]
        close(control.attend(call)[:, chosen], oracles.apply_map(want, v)[:, chosen])


def test_rows_folded_into_the_batch_and_rows_one_by_one():
    q, k, v = tensors(6, 2, 5, 8)  # 3 groups of one sample, each folded in two
    got = guidance.PAG().attend(
        replace(attention_call(q, k, v, groups=GROUPS), rows=Rows(GROUPS, 1))
    )
    stock = sdpa(q, k, v, None, None, False, False)
    assert torch.equal(got[:4], stock[:4]) and torch.equal(got[4:], v[4:])
    for row in range(6):  # Mochi: one primitive call a row
        one = attention_call(q[row : row + 1], k[row : row + 1], v[row : row + 1], index=row)
        got = guidance.PAG().attend(replace(one, rows=Rows(GROUPS, 2)))
        want = v[row : row + 1] if row >= 4 else stock[row : row + 1]
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


def test_other_rows_and_added_branches_pass_by():
    q, k, v = tensors(2, 2, 5, 8)
    call = attention_call(q, k, v, groups=("uncond", "cond"))
    assert torch.equal(guidance.SLG().attend(call), call.primitive())
    k, v = k[:, :, :3], v[:, :, :3]  # the image branch of an IP-Adapter at the same site
    call = attention_call(q, k, v, index=1, kind="joint", spans=Spans((), ()))
    for name, (control, _) in CASES.items():
        assert torch.equal(control.attend(call), call.primitive()), name
    nag = guidance.NAG(scale=5)
    call = attention_call(q, k, v, index=1, kind="joint", groups=("cond", "nag/0"), role="nag/0")
    assert torch.equal(
        nag.attend(replace(call, spans_of=lambda _: Spans((), ()))), call.primitive()
    )


# -- writing into the output ---------------------------------------------------------------


class Returns:
    """An inner stack entry that returns what it is told to."""

    def __init__(self, make: Callable[[AttentionCall], Tensor]) -> None:
        self.attend = make


@pytest.mark.parametrize("heads", [None, [1]])
@pytest.mark.parametrize(
    "make", [lambda c: c.v, lambda c: c.v.mean(2, keepdim=True).expand_as(c.v)], ids=["v", "mean"]
)
@pytest.mark.parametrize(
    "control", [guidance.SLG(), guidance.NAG(scale=5), guidance.PLADIS()], ids=lambda c: c.name
)
def test_what_an_inner_control_returns_is_not_written_into(control, make, heads):
    q, k, v = tensors(2, 2, 5, 8)
    spans = Spans((("image", 0, 5),), (("text", 0, 5),))
    call = attention_call(
        q, k, v, kind="cross", spans=spans, heads=heads, groups=("cond", "x"), role="x"
    )
    before = v.clone()
    out = control.attend(replace(call, rest=(Returns(make),)))
    assert torch.equal(v, before) and out.shape == q.shape


def test_an_output_with_storage_of_its_own_is_written_in_place():
    q, k, v = tensors(2, 2, 5, 8)
    call = attention_call(q, k, v)
    out = call.primitive()
    assert writable(out, call) is out
    assert writable(out.requires_grad_(), call) is not out


@pytest.mark.parametrize("case", CASES)
def test_gradients_flow_through_the_perturbed_rows(case):
    layout = LAYOUTS["image-text"]
    q, k, v = (t.requires_grad_() for t in tensors(2, 2, layout.tokens, 8))
    call = attention_call(
        q, k, v, kind="joint", groups=("cond", "p"), role="p", heads=[1], spans=layout.spans
    )
    replace(CASES[case][0], u=0.5).attend(call).square().sum().backward()
    for t in (q, k, v):
        assert t.grad is not None and t.grad.isfinite().all() and (t.grad[1, 0] != 0).any()


# -- soften --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strength_per_head_equals_the_mixed_map(dtype):
    q, k, v = tensors(2, 3, 63, 8, dtype=dtype)
    u = torch.tensor([0.0, 0.25, 1.0])
    out = sdpa(q, k, v, None, None, False, False)
    got = soften(out, v, u)
    attention = oracles.softmax_map(q, k)
    mixed = oracles.mix_maps(attention, oracles.identity_map(attention), u)
    close(got, oracles.apply_map(mixed, v), dtype)
    assert torch.equal(got[:, 0], out[:, 0]) and torch.equal(got[:, 2], v[:, 2])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
def test_the_end_points_are_exact_for_any_size_of_numbers(dtype):
    a, b = (1e4 * torch.randn(1, 2, 7, 8)).to(dtype), (1e-4 * torch.randn(1, 2, 7, 8)).to(dtype)
    assert torch.equal(soften(a, b, 0.0), a) and torch.equal(soften(a, b, 1.0), b)
    assert torch.equal(soften(a, b, torch.tensor([0.0, 1.0])), torch.stack([a[:, 0], b[:, 1]], 1))


# -- PAG ------------------------------------------------------------------------------------


def test_the_three_blocks_are_different_operators():
    layout = LAYOUTS["image-text"]
    outs = [
        perturbed_rows(guidance.PAG(block=b), layout)[0] for b in ("joint", "image", "image_logit")
    ]
    image, text = layout.image, layout.spans.queries("text")
    assert torch.equal(outs[0][4:, :, image], outs[1][4:, :, image])
    assert not torch.allclose(outs[0][4:, :, text], outs[1][4:, :, text], atol=1e-2)
    assert not torch.allclose(outs[1][4:, :, image], outs[2][4:, :, image], atol=1e-2)


@pytest.mark.parametrize("refs", [0, 4])
def test_reference_tokens_count_as_image(refs):
    spans = joint_spans(6, 3, text_first=True, refs=refs)
    n = 9 + refs
    q, k, v = tensors(1, 2, n, 8)
    call = attention_call(q, k, v, kind="joint", spans=spans)
    got = guidance.PAG(block="image_logit").attend(call)
    want = oracles.apply_map(oracles.image_logit_map(q, k, slice(3, n)), v)
    close(got, want)
    assert torch.equal(guidance.PAG(block="image").attend(call)[:, :, 3:], v[:, :, 3:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n,text", [(63, 1), (35, 40), (1, 7)])
def test_identity_among_images_equals_masked_attention(n, text, dtype):
    q, k, v = tensors(2, 3, n + text, 8, dtype=dtype)
    blocked = torch.zeros(n + text, n + text, dtype=torch.bool)
    blocked[:n, :n] = ~torch.eye(n, dtype=torch.bool)
    want = sdpa(q, k, v, ~blocked, 0.4, False, False)[:, :, :n]
    got = identity_among_images(q, k, v, slice(0, n), slice(n, None), scale=0.4)
    assert got.dtype == dtype
    close(got, want, dtype)


@pytest.mark.parametrize("own", [True, False])
def test_a_masked_diagonal_counts(own):
    q, k, v = tensors(1, 1, 6, 8)
    mask = torch.ones(6, 6, dtype=torch.bool)
    mask.fill_diagonal_(own)
    got = identity_among_images(q, k, v, slice(0, 4), slice(4, 6), mask)
    close(got, oracles.apply_map(oracles.image_logit_map(q, k, slice(0, 4), mask), v)[:, :, :4])


# -- SEG ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.05, 0.5, 1.0, 2.5, 100.0, 9999.0])
@pytest.mark.parametrize(
    "grid", [(1, 1, 1), (1, 2, 2), (1, 5, 7), (1, 8, 3), (2, 4, 5), (1, 1, 9)]
)
def test_blur_equals_a_looped_kernel(grid, sigma):
    n = grid[0] * grid[1] * grid[2]
    q = tensors(1, 2, n, 3)[0]
    close(blur_queries(q, grid, sigma), oracles.blurred_queries(q, grid, sigma))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blur_keeps_a_constant_and_the_type(dtype):
    q = torch.full((1, 2, 35, 4), 3.0, dtype=dtype)
    got = blur_queries(q, (1, 5, 7), 1.3)
    assert got.dtype == dtype
    torch.testing.assert_close(got, q, atol=1e-6 if dtype is torch.float32 else 0, rtol=0)


@pytest.mark.parametrize("size", [1, 2, 5, 8, 63])
def test_blur_rows_sum_to_one(size):
    for sigma in (0.1, 1.0, 50.0):
        rows = blur_matrix(sigma, size)
        assert (rows >= 0).all()
        torch.testing.assert_close(rows.sum(1), torch.ones(size).double(), atol=1e-12, rtol=0)


def test_the_infinite_limit_gives_identical_rows_and_a_wide_blur_comes_near_it():
    q, k, v = tensors(1, 2, 35, 8, dtype=torch.float32)
    spans = Spans((("image", 0, 35),), (("image", 0, 35),), (1, 5, 7))
    call = attention_call(q, k, v, spans=spans)
    out = guidance.SEG().attend(call)
    assert torch.equal(out, out[:, :, :1].expand_as(out))
    spread = [guidance.SEG(sigma=s).attend(call).std(2).mean() for s in (0.3, 1.0, 2.0)]
    assert call.primitive().std(2).mean() > spread[0] > spread[1] > spread[2] > 0


def test_seg_works_without_a_grid_only_in_the_infinite_limit():
    q, k, v = tensors(1, 2, 35, 8)
    call = attention_call(q, k, v)
    close(
        guidance.SEG().attend(call),
        oracles.apply_map(oracles.softmax_map(oracles.mean_query(q), k), v),
    )
    with pytest.raises(HostError, match="grid"):
        guidance.SEG(sigma=2.0).attend(call)


# -- temperature, uniform, TPG --------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
def test_low_temperature_is_one_hot(dtype):
    q, k, v = tensors(1, 2, 63, 8, dtype=dtype)
    z = oracles.logits(q, k)
    top = z.topk(2).values
    clear = (top[..., 0] - top[..., 1]) > 1e-3
    got = guidance.TemperatureGuidance().attend(attention_call(q, k, v))
    want = oracles.apply_map(oracles.one_hot_map(z), v)
    assert clear.float().mean() > 0.9
    torch.testing.assert_close(got.double()[clear], want[clear], atol=1e-6, rtol=0)


def test_temperature_keeps_a_scale_of_its_own_and_high_values_flatten():
    q, k, v = tensors(1, 2, 9, 8)
    call = attention_call(q, k, v, scale=0.9)
    got = guidance.TemperatureGuidance(tau=0.5).attend(call)
    close(got, oracles.apply_map(oracles.softmax_map(q, k, scale=1.8), v))
    flat = guidance.TemperatureGuidance(tau=1e15).attend(call)
    close(flat, v.mean(2, keepdim=True).expand_as(v))


def test_uniform_rows_are_the_mean():
    q, k, v = tensors(1, 2, 9, 8, dtype=torch.float32)
    got = guidance.UniformGuidance().attend(attention_call(q, k, v))
    assert torch.equal(got, v.mean(2, keepdim=True).expand_as(v))


def test_tpg_equals_attention_of_permuted_queries_and_repeats_by_seed():
    q, k, v = tensors(1, 2, 35, 8)
    call = attention_call(q, k, v, step=2, site=5)
    control = guidance.TPG(seed=3)
    order = control.permutation(call, 35)
    assert sorted(order.tolist()) == list(range(35)) != order.tolist()
    close(control.attend(call), sdpa(q[:, :, order], k, v, None, None, False, False))
    state = torch.get_rng_state()
    assert torch.equal(control.attend(call), guidance.TPG(seed=3).attend(call))
    assert torch.equal(torch.get_rng_state(), state)
    others = [
        guidance.TPG(seed=4).permutation(call, 35),
        control.permutation(replace(call, step=Step(3, 10)), 35),
        control.permutation(replace(call, site=replace(call.site, index=6)), 35),
    ]
    assert len({tuple(p.tolist()) for p in [order, *others]}) == 4
    # fixed for ever: pictures made with a seed must stay as they are
    first = guidance.TPG().permutation(attention_call(q, k, v), 8)
    assert first.tolist() == [5, 3, 6, 2, 7, 0, 1, 4]


# -- NAG ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("tau", [0.5, 1.0, 2.5, 1e3])
@pytest.mark.parametrize("scale", [1.0, 1.5, 11.0])
def test_nag_equals_the_formula_token_by_token(scale, tau, alpha, dtype):
    plus, minus = tensors(2, 3, 7, 8, dtype=dtype)[1:]
    got = normalized_guidance(plus, minus, scale, tau, alpha)
    assert got.dtype == dtype
    want = oracles.normalized_guidance(plus, minus, scale, tau, alpha)
    close(got / (1 + tau), want / (1 + tau), dtype)


def test_nag_of_zero_is_zero_and_equal_branches_change_nothing():
    zero, some = torch.zeros(1, 2, 3, 8), torch.randn(1, 2, 3, 8)
    assert (normalized_guidance(zero, some, 5.0, 2.5, 0.25) == 0).all()
    assert (normalized_guidance(some, 1.25 * some, 5.0, 2.5, 1.0).abs() < 1e-5).all()
    close(normalized_guidance(some, some, 5.0, 2.5, 0.25), some, torch.float32)


@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_nag_bounds_the_growth(alpha):
    plus, minus = tensors(1, 2, 63, 8)[1:]
    got = normalized_guidance(plus, minus, 50.0, 2.0, alpha)
    ratio = got.norm(dim=(1, 3)) / plus.norm(dim=(1, 3))
    assert ratio.max() <= alpha * 2.0 + (1 - alpha) + 1e-9


@pytest.mark.parametrize("heads", [None, [1, 3]])
@pytest.mark.parametrize("layout", ["image-text", "text-image"])
def test_nag_guides_image_rows_and_shares_them(layout, heads):
    chosen = LAYOUTS[layout]
    q, k, v = tensors(6, 4, chosen.tokens, 8)
    groups = ("uncond", "cond", "nag/0")
    call = attention_call(
        q, k, v, kind="joint", groups=groups, role="nag/0", heads=heads, spans=chosen.spans
    )
    got, stock = guidance.NAG().attend(call), call.primitive()
    image, text = chosen.image, chosen.spans.queries("text")
    some = heads or list(range(4))
    others = [h for h in range(4) if h not in some]
    assert torch.equal(got[:2], stock[:2]) and torch.equal(got[:, :, text], stock[:, :, text])
    assert torch.equal(got[2:4, :, image], got[4:6, :, image])
    assert torch.equal(got[2:4, others], stock[2:4, others])
    want = oracles.normalized_guidance(
        stock[2:4, some][:, :, image], stock[4:6, some][:, :, image], 5.0, 2.5, 0.25
    )
    close(got[2:4, some][:, :, image], want)


def test_nag_refuses_models_that_attend_row_by_row_and_unknown_tokens():
    q, k, v = tensors(1, 2, 5, 8)
    call = attention_call(q, k, v, kind="joint", role="nag/0")
    with pytest.raises(HostError, match="one row at a time"):
        guidance.NAG().attend(replace(call, rows=Rows(("cond", "nag/0"), 1), index=1))
    q, k, v = tensors(2, 2, 5, 8)
    call = attention_call(q, k, v, kind="joint", groups=("cond", "nag/0"), role="nag/0")
    with pytest.raises(HostError, match="not known"):
        guidance.NAG().attend(replace(call, spans_of=lambda _: Spans((), ())))
    other = attention_call(q, k, v, groups=("uncond", "perturbed/1"), role="nag/0")
    assert torch.equal(guidance.NAG().attend(other), other.primitive())


# -- PLADIS ---------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 63, 111])
@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0, 10.0, 1e6])
def test_entmax_equals_bisection(n, spread):
    z = spread * torch.randn(3, 5, n, generator=torch.Generator().manual_seed(n)).double()
    torch.testing.assert_close(entmax15(z), oracles.entmax15(z), atol=1e-12, rtol=0)
    single = entmax15(z.float())
    torch.testing.assert_close(single.double(), oracles.entmax15(z.float()), atol=2e-6, rtol=0)
    torch.testing.assert_close(single.sum(-1), torch.ones(3, 5), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_entmax_edge_cases(dtype):
    inf = torch.inf
    cases = {
        (7.0,): [1.0],
        (2.0, 2.0, 2.0, 2.0): [0.25] * 4,
        (5.0, 5.0, -3.0): [0.5, 0.5, 0.0],
        (0.0, -inf, -inf): [1.0, 0.0, 0.0],
        (-inf, 1.0, 1.0): [0.0, 0.5, 0.5],
        (-inf, -inf): [0.0, 0.0],
        (6e4, -6e4, 0.0): [1.0, 0.0, 0.0],
        (0.0, -2.0, -2.0): [1.0, 0.0, 0.0],  # just outside the support
    }
    for z, want in cases.items():
        got = entmax15(torch.tensor(z, dtype=dtype))
        assert got.dtype == dtype
        torch.testing.assert_close(got, torch.tensor(want, dtype=dtype), atol=1e-6, rtol=0)


def test_entmax_of_many_keys_just_outside_the_support():
    z = torch.full((512,), -1.999, dtype=torch.float32)
    z[0] = 0
    torch.testing.assert_close(entmax15(z).double(), oracles.entmax15(z), atol=1e-4, rtol=0)
    assert abs(float(entmax15(z).sum()) - 1) < 1e-3


def test_entmax_does_not_depend_on_a_shift_and_keeps_the_order():
    z = torch.randn(4, 63).double()
    torch.testing.assert_close(entmax15(z + 1000), entmax15(z), atol=1e-10, rtol=0)
    order = z.argsort(-1)
    assert (entmax15(z).gather(-1, order).diff(dim=-1) >= 0).all()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sparse_attention_equals_the_explicit_map(dtype, mask):
    q, k, v = tensors(2, 3, 21, 8, dtype=dtype)
    given = mask_of(mask, 2, 3, 21)
    got = sparse_attention(q, k, v, given)
    close(got, oracles.apply_map(oracles.entmax15(oracles.logits(q, k, given)), v), dtype)


@pytest.mark.parametrize("heads", [None, [0, 3]])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("lam", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pladis_extrapolates_the_maps(dtype, lam, kv_heads, heads):
    q, k, v = tensors(2, 4, 35, 8, keys=11, kv_heads=kv_heads, dtype=dtype)
    keys = torch.ones(2, 1, 1, 11, dtype=torch.bool)
    keys[1, ..., 6:] = False
    spans = Spans((("image", 0, 35),), (("text", 0, 11),))
    call = attention_call(
        q, k, v, kind="cross", groups=("uncond", "cond"), heads=heads, mask=keys, spans=spans
    )
    got, stock = guidance.PLADIS(lam=lam).attend(call), call.primitive()
    z = oracles.logits(q, k, keys)
    mixed = oracles.mix_maps(oracles.softmax(z), oracles.entmax15(z), lam)
    some = heads or list(range(4))
    others = [h for h in range(4) if h not in some]
    assert torch.equal(got[:, others], stock[:, others])
    close(got[:, some], oracles.apply_map(mixed, v)[:, some], dtype)
    torch.testing.assert_close(mixed.sum(-1), torch.ones_like(mixed[..., 0]))


@pytest.mark.parametrize("heads", [None, [1]])
def test_pladis_around_another_control_adds_to_what_that_did(heads):
    q, k, v = tensors(1, 2, 5, 8, keys=3)
    spans = Spans((("image", 0, 5),), (("text", 0, 3),))
    call = attention_call(q, k, v, kind="cross", spans=spans, heads=heads)
    shifted = replace(call, rest=(Returns(lambda c: c.primitive() + 1),))
    close(guidance.PLADIS().attend(shifted)[:, 1], guidance.PLADIS().attend(call)[:, 1] + 1)


def test_pladis_leaves_image_prompts_alone():
    q, k, v = tensors(1, 2, 5, 8, keys=3)
    call = attention_call(
        q, k, v, kind="cross", index=1, spans=Spans((("image", 0, 5),), (("ip", 0, 3),))
    )
    assert torch.equal(guidance.PLADIS().attend(call), call.primitive())


# -- the guidance term ----------------------------------------------------------------------


class FakeRun:
    """What `denoise` asks of a run."""

    def __init__(self, g: float = 4.0, guided: bool = False, time: float = 600.0) -> None:
        self.g, self.is_guided, self.time = g, guided, time

    def guided(self, rows: Rows) -> bool:
        return "uncond" in rows or self.is_guided

    def guidance_scale(self, denoiser: str) -> float:
        return self.g


class Denoiser:
    """A denoiser that returns a fixed tensor for each role, and counts its calls."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        names = ("uncond", "cond", "p/0", "p/1", "p/2")
        self.out = {r: 3 * torch.randn(2, 4, 3).to(dtype) for r in names}
        self.calls: list[tuple[str, ...]] = []

    def __call__(self, call: ForwardCall) -> Tensor:
        self.calls.append(call.rows.groups)
        assert call.inputs["x"].shape[0] == len(call.rows)
        return torch.cat([self.out[r] for r in call.rows.groups])


def forward(
    denoiser: Denoiser, groups: tuple[str, ...], run: Any, step: int = 0, cached: bool = False
) -> ForwardCall:
    from attnctl.hosts.batch import extend_inputs, take_inputs

    return ForwardCall(
        inputs={"x": torch.zeros(2 * len(groups), 1)},
        rows=Rows(groups, 2),
        step=Step(step, 10),
        run=run,
        base=denoiser,
        extend_inputs=lambda i, rows, at: extend_inputs(i, len(rows), at, ()),
        take_inputs=lambda i, rows, at: take_inputs(i, len(rows), at, ()),
        cached=cached,
        role="p/0",
    )


def guide(control: PerturbedGuidance, call: ForwardCall, state: Any = None) -> Tensor:
    state = state or control.begin(None, {})
    return control.denoise(replace(call, state=state))


@pytest.mark.parametrize("passes", ["rows", "calls"])
@pytest.mark.parametrize("w", [-1.0, 0.0, 0.5, 3.0])
def test_guidance_with_cfg_in_one_call(w, passes):
    model = Denoiser()
    control = guidance.PAG(scale=w, passes=passes)
    out = guide(control, forward(model, ("uncond", "cond"), FakeRun()))
    u, c, p = (model.out[r] for r in ("uncond", "cond", "p/0"))
    mixed = out[:2] + 4 * (out[2:] - out[:2])
    close(mixed, u + 4 * (c - u) + w * (c - p))
    want = [("uncond", "cond", "p/0")] if passes == "rows" else [("uncond", "cond"), ("p/0",)]
    assert model.calls == (want if w else [("uncond", "cond")])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("w", [0.0, 1.0, 3.0])
def test_guidance_without_cfg_is_affine_in_w(w, dtype):
    model = Denoiser(dtype)
    out = guide(guidance.PAG(scale=w), forward(model, ("cond",), FakeRun()))
    c, p = model.out["cond"].double(), model.out["p/0"].double()
    assert out.dtype == dtype
    close(out / (1 + w), ((1 + w) * c - w * p) / (1 + w), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [("cond",), ("uncond", "cond")])
@pytest.mark.parametrize("w", [0.0, 3.0, 1e4])
def test_no_perturbation_gives_no_term_whatever_the_scale(w, groups, dtype):
    model = Denoiser(dtype)
    model.out["p/0"] = model.out["cond"]
    out = guide(guidance.PAG(scale=w), forward(model, groups, FakeRun()))
    assert torch.equal(out, torch.cat([model.out[r] for r in groups]))


@pytest.mark.parametrize("cond_first", [True, False])
@pytest.mark.parametrize("passes", ["rows", "calls"])
def test_cfg_in_two_calls_gives_the_same_sum_in_either_order(cond_first, passes):
    model, run, g, w = Denoiser(), FakeRun(), 4.0, 2.0
    control = guidance.PAG(scale=w, passes=passes)
    state = control.begin(run, {})
    u, c, p = (model.out[r] for r in ("uncond", "cond", "p/0"))
    for step in range(3):
        got = {}
        for role in ("cond", "uncond") if cond_first else ("uncond", "cond"):
            got[role] = guide(control, forward(model, (role,), run, step), state)
        mixed = got["uncond"] + g * (got["cond"] - got["uncond"])
        close(mixed, u + g * (c - u) + w * (c - p))


@pytest.mark.parametrize("cond_first", [True, False])
@pytest.mark.parametrize("passes", ["rows", "calls"])
def test_two_controls_add_up_in_any_order_of_calls(cond_first, passes):
    model, run, g = Denoiser(), FakeRun(), 4.0
    weights = (2.0, 0.5)
    stack = [guidance.PAG(scale=w, passes=passes) for w in weights]
    states = [c.begin(run, {}) for c in stack]

    class Inner:
        def denoise(self, call: ForwardCall) -> Tensor:
            return stack[1].denoise(replace(call, state=states[1], role="p/1"))

    u, c, p, p1 = (model.out[r] for r in ("uncond", "cond", "p/0", "p/1"))
    got = {}
    for role in ("cond", "uncond") if cond_first else ("uncond", "cond"):
        call = replace(forward(model, (role,), run), rest=(Inner(),))
        got[role] = guide(stack[0], call, states[0])
    mixed = got["uncond"] + g * (got["cond"] - got["uncond"])
    close(mixed, u + g * (c - u) + 2 * (c - p) + 0.5 * (c - p1))


def test_a_cached_denoiser_gets_passes_of_constant_size():
    model = Denoiser()
    guide(guidance.PAG(), forward(model, ("uncond", "cond"), FakeRun(), cached=True))
    assert model.calls == [("uncond", "cond"), ("p/0",)]


@pytest.mark.parametrize("w", [1.0, 2.8])
def test_the_guider_convention_counts_from_one_without_cfg(w):
    model = Denoiser()
    c, p = model.out["cond"], model.out["p/0"]
    control = guidance.PAG(scale=w, convention="guider")
    close(guide(control, forward(model, ("cond",), FakeRun())), p + w * (c - p))
    assert len(model.calls[-1]) == (1 if w == 1 else 2)
    out = guide(control, forward(model, ("uncond", "cond"), FakeRun()))
    close(out[2:], c + w * (c - p))
    out = guide(control, forward(model, ("cond",), FakeRun(guided=True)))
    close(out, c + w * (c - p))


@pytest.mark.parametrize("time,weight", [(1000.0, 3.0), (900.0, 2.0), (700.0, 0.0), (0.0, 0.0)])
@pytest.mark.parametrize("groups", [("cond",), ("uncond", "cond")])
def test_adaptive_scale_falls_with_time(time, weight, groups):
    model = Denoiser()
    control = guidance.PAG(scale=3.0, adaptive=0.01)
    out = guide(control, forward(model, groups, FakeRun(time=time)))
    term = weight * (model.out["cond"] - model.out["p/0"])
    close(out, torch.cat([model.out[r] + term for r in groups]))
    assert len(model.calls[0]) == len(groups) + (weight > 0)


def test_a_weight_of_zero_also_passes_the_other_branch():
    model, run = Denoiser(), FakeRun(time=0.0)
    control = guidance.PAG(scale=3.0, adaptive=0.01)
    state = control.begin(run, {})
    for role in ("cond", "uncond", "p/1"):
        assert torch.equal(guide(control, forward(model, (role,), run), state), model.out[role])
    assert model.calls == [("cond",), ("uncond",), ("p/1",)]


def test_what_denoise_refuses():
    model = Denoiser()
    with pytest.raises(HostError, match="no conditional rows"):
        guide(guidance.PAG(), forward(model, ("p/1",), FakeRun()))
    with pytest.raises(HostError, match="bare denoiser"):
        guide(guidance.PAG(adaptive=0.1), forward(model, ("cond",), FakeRun(time=float("nan"))))
    run, control = FakeRun(g=0.0), guidance.PAG()
    state = control.begin(run, {})
    guide(control, forward(model, ("uncond",), run), state)
    with pytest.raises(HostError, match="guidance scale 0"):
        guide(control, forward(model, ("cond",), run), state)


# -- NAG's rows ------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2])
def test_nag_runs_the_negative_prompt_along_and_drops_its_output(rows):
    seen: dict[str, Tensor] = {}
    negative = torch.arange(rows * 3.0).reshape(rows, 3, 1)
    control = guidance.NAG(negative={"text": negative})

    def base(call: ForwardCall) -> Tensor:
        seen.update(call.inputs)
        return torch.arange(float(len(call.rows)))[:, None]

    call = forward(Denoiser(), ("uncond", "cond"), FakeRun())
    call = replace(call, inputs={**call.inputs, "text": torch.ones(4, 3, 1)}, base=base)
    out = control.denoise(replace(call, state=control.begin(None, {}), role="nag/0"))
    assert out.flatten().tolist() == [0, 1, 2, 3]
    assert torch.equal(seen["text"][4:], negative.expand(2, 3, 1)) and seen["x"].shape[0] == 6


def test_nag_checks_the_negative_inputs():
    call = forward(Denoiser(), ("cond",), FakeRun())
    call = replace(call, inputs={**call.inputs, "text": torch.ones(2, 3, 1)})
    for given, words in (
        ({"text": torch.ones(3, 3, 1)}, "expected 1 or 2"),
        ({"text": torch.ones(2, 5, 1)}, "equal token lengths"),
        ({"other": torch.ones(2, 5, 1)}, "other"),
    ):
        control = guidance.NAG(negative=given)
        with pytest.raises(HostError, match=words):
            control.denoise(replace(call, state=control.begin(None, {}), role="nag/0"))


def test_nag_encodes_a_prompt_through_the_run_and_skips_calls_without_cond():
    class Run:
        def text_inputs(self, prompt: str) -> dict[str, str]:
            return {"prompt": prompt}

    assert guidance.NAG(negative="blurry").begin(Run(), {}) == {"prompt": "blurry"}
    model = Denoiser()
    call = replace(forward(model, ("uncond",), FakeRun()), state={})
    assert torch.equal(guidance.NAG().denoise(call), model.out["uncond"])


# -- options ----------------------------------------------------------------------------------

PERTURBED = [
    c for c in vars(guidance).values() if isinstance(c, type) and c.__name__ in guidance.__all__
]
NAMES = {c.__name__: c for c in PERTURBED}
WRONG = [
    *((n, {"u": u}) for n in ("PAG", "SoftPAG", "SEG", "TPG", "SLG") for u in (-0.1, 1.1)),
    ("PAG", {"u": float("nan")}),
    ("PAG", {"scale": float("nan")}),
    ("PAG", {"scale": float("inf")}),
    ("PAG", {"adaptive": -1e-3}),
    ("PAG", {"adaptive": float("nan")}),
    ("PAG", {"adaptive": float("inf")}),
    ("PAG", {"convention": "other"}),
    ("PAG", {"passes": "both"}),
    ("PAG", {"start": 0.6, "stop": 0.4}),
    ("PAG", {"start": -0.1}),
    ("PAG", {"stop": 1.1}),
    ("PAG", {"sigmas": (1.0, 5.0)}),
    ("PAG", {"block": "text"}),
    ("SoftPAG", {"block": ""}),
    ("SEG", {"sigma": 0.0}),
    ("SEG", {"sigma": float("nan")}),
    ("SEG", {"tokens": "text"}),
    ("SEG", {"tokens": "all", "sigma": 10.0}),
    ("TemperatureGuidance", {"tau": 0.0}),
    ("TemperatureGuidance", {"tau": -1.0}),
    ("TemperatureGuidance", {"tau": float("nan")}),
    ("NAG", {"scale": 0.9}),
    ("NAG", {"scale": float("inf")}),
    ("NAG", {"tau": 0.0}),
    ("NAG", {"alpha": -0.1}),
    ("NAG", {"alpha": 1.1}),
    ("NAG", {"negative": None}),
    ("NAG", {"start": 0.9, "stop": 0.1}),
    ("PLADIS", {"lam": -0.1}),
    ("PLADIS", {"lam": float("nan")}),
    ("PLADIS", {"lam": float("inf")}),
    ("PLADIS", {"stop": 2.0}),
]


@pytest.mark.parametrize("name,options", WRONG, ids=str)
def test_wrong_options_are_refused_by_name(name, options):
    with pytest.raises(OptionError) as error:
        NAMES[name](**options)
    key = next(iter(options))
    assert key in str(error.value) or "window" in str(error.value)


@pytest.mark.parametrize(
    "name,options",
    [
        ("PAG", {"scale": 0.0}),
        ("PAG", {"u": 0.0}),
        ("PAG", {"start": 0.5, "stop": 0.5}),
        ("SEG", {"scale": 0}),
        ("TemperatureGuidance", {"tau": 1.0}),
        ("NAG", {"scale": 1.0}),
        ("NAG", {"alpha": 0.0}),
        ("NAG", {"start": 1.0}),
        ("PLADIS", {"lam": 0.0}),
        ("PLADIS", {"stop": 0.0}),
    ],
    ids=str,
)
def test_neutral_options(name, options):
    assert NAMES[name](**options).neutral
    assert not NAMES[name]().neutral
    assert not guidance.PAG(scale=0.0, convention="guider").neutral


def test_what_no_map_can_be_made_of_is_refused():
    q, k, v = tensors(1, 2, 5, 8)
    with pytest.raises(HostError, match="no identity map"):
        guidance.PAG().attend(attention_call(q, k[:, :, :3], v[:, :, :3]))
    unknown = attention_call(q, k, v, kind="joint")
    unknown = replace(unknown, spans_of=lambda _: Spans((), ()))
    for control in (guidance.PAG(block="image"), guidance.PAG(block="image_logit"),
                    guidance.SEG(), guidance.TPG()):  # fmt: skip
        with pytest.raises(HostError, match="not known"):
            control.attend(unknown)
    assert torch.equal(guidance.PAG().attend(unknown), v)
    with pytest.raises(NotImplementedError, match="PerturbedGuidance"):
        PerturbedGuidance().perturb(unknown, v)
