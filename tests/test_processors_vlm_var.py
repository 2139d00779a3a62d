"""VAR against explicit maps in float64, on tensors and inside whole models."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import attnctl
from attnctl.processors.vlm.sinks import phi
from attnctl.processors.vlm.var import reads_image, redistribution
from attnctl.testing import oracles
from attnctl.testing.calls import Record
from attnctl.testing.vlms import VLMS, generate

IMAGE = 10
FEW = ("llava", "qwen2.5-vl", "gemma3", "internvl")
DIMS, TAU, RHO, P = (3, 17), 1.3, 0.4, 0.6
SMALL: dict[str, Any] = {"sink_dims": DIMS, "tau": TAU, "rho_nonsink": RHO, "image_mass": 0.1}
"""Random weights have no real sinks: with these options some tokens count as such."""


# -- the formula -----------------------------------------------------------------------------


def moved(row: Tensor, sinks: list[int], image: list[int], p: float, rho: float, m: float) -> Any:
    """Return one row of weights redistributed one entry at a time; None where it is left."""
    others = [j for j in image if j not in sinks]
    total, kept = sum(row[j] for j in image), sum(row[j] for j in others)
    seen = sum(row[j] for j in image if j in sinks)
    if not (total >= m and kept >= rho * total and seen > 0 and kept > 0):
        return None
    budget, new = p * sum(row[j] for j in sinks), row.clone()
    for j in sinks:
        new[j] = (1 - p) * row[j]
    for j in others:
        new[j] = row[j] + budget * row[j] / kept
    return new


def redistributed(row: Tensor, sinks: list[int], image: list[int], p: float) -> Tensor:
    """Return one row by the factors of the control."""
    groups = torch.zeros(3, len(row), dtype=row.dtype)
    for j in range(len(row)):
        g = (0 if j not in image else 1) if j in sinks else (2 if j in image else None)
        if g is not None:
            groups[g, j] = 1
    masses = groups @ row
    factors = redistribution(masses, reads_image(masses, RHO, 0.1), p)
    return row * (1 + (factors - 1) @ groups)


@pytest.mark.parametrize("p", [0.4, 0.6, 1.0])
def test_rows_keep_their_sum_and_their_order(p: float) -> None:
    torch.manual_seed(0)
    sinks, image = [0, 4, 7], [3, 4, 5, 6, 7, 8]
    hit = 0
    for _ in range(50):
        row = (2 * torch.randn(12).double()).softmax(0)
        row[10] = 0.0
        new = redistributed(row, sinks, image, p)
        wanted = moved(row, sinks, image, p, RHO, 0.1)
        if wanted is None:
            assert torch.equal(new, row)
            continue
        hit += 1
        torch.testing.assert_close(new, wanted, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(new.sum(), row.sum(), rtol=1e-12, atol=0)
        assert (new >= 0).all() and new[10] == 0
        rest = [1, 2, 9, 11]
        assert torch.equal(new[rest], row[rest])
        others = [3, 5, 6, 8]
        assert torch.equal(new[others].argsort(), row[others].argsort())
        if p == 1.0:
            assert (new[sinks] == 0).all()
    assert 20 < hit < 50


def test_the_head_test_at_its_bounds() -> None:
    eps = 1e-9
    masses = torch.tensor(
        [
            [0.5, 0.1, 0.1],  # image 0.2, of which half: chosen at both bounds
            [0.5, 0.1 - eps, 0.1],  # too little attention to the image
            [0.3, 0.3 + eps, 0.3],  # too much of it on sinks
            [0.5, 0.0, 0.4],  # no image sink in sight
            [0.0, 0.5, 0.0],
        ],
        dtype=torch.float64,
    )
    assert reads_image(masses, 0.5, 0.2).tolist() == [True, False, False, False, False]
    assert not reads_image(masses[-1], 0.0, 0.0)  # nothing to give it to
    chosen = torch.tensor([True, False])
    found = redistribution(masses[:2], chosen, 0.6)
    assert (found[1] == 1).all() and found[0, 0] == found[0, 1] == 0.4
    assert float(found[0, 2]) == pytest.approx(1 + 0.6 * 0.6 / 0.1)


def test_phi() -> None:
    x = torch.randn(4, 9, 32).double()
    wanted = torch.stack([x[..., d].abs() for d in DIMS]).amax(0) / x.square().mean(-1).sqrt()
    torch.testing.assert_close(phi(x, DIMS), wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(phi(1e3 * x, DIMS), phi(x, DIMS), rtol=1e-12, atol=0)
    spike = torch.zeros(32)
    spike[17] = -5.0
    assert phi(spike, DIMS) == pytest.approx(math.sqrt(32)) and phi(spike, (3,)) == 0
    assert phi(torch.zeros(32), DIMS) == 0
    with pytest.raises(attnctl.OptionError, match="outside this model's 32"):
        phi(x, (2533, 1415))


# -- whole models ----------------------------------------------------------------------------


def explicit(
    call: attnctl.AttentionCall, sinks: Tensor, ids: Tensor, past: int, heads: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the output on maps in full, and which rows and heads were redistributed."""
    nq, nk = call.q.shape[2], call.k.shape[2]
    mask = call.mask
    if mask is None and call.is_causal:
        mask = oracles.causal_mask(nq, nk)
    elif mask is not None and mask.dtype != torch.bool:
        mask = mask > -1e30
    a = oracles.softmax_map(call.q, call.k, mask, call.scale)
    first, hit = max(0, past + nq - nk), torch.zeros(a.shape[:3], dtype=torch.bool)
    for b in range(len(ids)):
        image = [j - first for j in (ids[b] == IMAGE).nonzero()[:, 0].tolist() if j >= first]
        mine = [j - first for j in sinks[b].nonzero()[:, 0].tolist() if j >= first]
        for i in range(nq):
            at = past + i
            if at < ids.shape[1] and ids[b, at] in (IMAGE, 0):
                continue
            for h in heads.nonzero()[:, 0].tolist():
                new = moved(a[b, h, i].clone(), mine, image, P, RHO, 0.1)
                if new is not None:
                    a[b, h, i], hit[b, h, i] = new, True
    return oracles.apply_map(a, call.v), hit


CASES = [
    ("llava", "all", "sdpa"),
    ("llava", "L0H1-3 L2H0", "eager"),
    ("llava-next", "all", "sdpa"),
    ("qwen2.5-vl", "H0 H3", "sdpa"),
    ("gemma3", "all", "sdpa"),
    ("gemma3", "all", "eager"),
    ("paligemma", "all", "sdpa"),
    ("instructblip", "H1-2", "sdpa"),
]


@pytest.mark.parametrize(("name", "heads", "attention"), CASES)
def test_every_call_of_an_answer_equals_explicit_maps(
    name: str, heads: str, attention: str
) -> None:
    """Prompt and written tokens, grouped queries, padding, two images, windows, heads."""
    family = VLMS[name]
    # the eager attention of transformers takes its softmax in float32
    dtype, most = (torch.float64, 1e-12) if attention == "sdpa" else (torch.float32, 1e-5)
    model = family.build(attention=attention).to(dtype)
    inputs = family.inputs((0, 1), images=2 if family.several else 1)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    control = attnctl.VAR(heads=heads, p_moved=P, skip_last=False, **SMALL)
    chosen = attnctl.sites(model).select(control.selector, ["causal"])
    record = Record()
    with attnctl.patch(model, record, control):
        generate(model, inputs, 3)
    ids = inputs["input_ids"]
    given = record.calls[0][0].mask
    if given is not None and given.is_floating_point() and given.dtype != dtype:
        pytest.skip("transformers 4 gives this model a float32 mask, which float64 misreads")
    sinks: dict[int, Tensor] = {}
    hits = 0
    for n, (call, out) in enumerate(record.calls):
        step, site = n // family.layers, call.site.index
        past = 0 if step == 0 else ids.shape[1] + step - 1
        assert (call.residual is None) == (site not in chosen)  # other layers are not followed
        if call.residual is None:
            continue
        assert call.residual.past == past
        if step == 0:
            sinks[site] = (phi(call.residual.hidden, DIMS) >= TAU) & (ids != 0)
        wanted, hit = explicit(call, sinks[site], ids, past, chosen[site])
        real = torch.ones(len(ids), call.q.shape[2], dtype=torch.bool)
        if step == 0:
            real = ids != 0
        assert (out - wanted).abs().amax((1, 3))[real].max() < most
        stock = call.primitive()
        assert torch.equal(out[~hit], stock[~hit])  # to the bit
        if hit.any():
            assert (out - stock).abs().amax(-1)[hit].min() > 0
        hits += int(hit[:, :, -1].any())
    assert hits >= 2  # the row that predicts the first word, and written ones


@pytest.mark.parametrize("name", VLMS)
def test_every_family(name: str) -> None:
    """Changes the first word's scores; neutral, undo and a batch's rows are exact."""
    family = VLMS[name]
    model, inputs = family.build(), family.inputs()
    before = generate(model, inputs, 3)
    held = {n: (type(m), set(vars(m))) for n, m in model.named_modules()}
    off = ({"p_moved": 0.0}, {"tau": math.inf}, {"rho_nonsink": 1.01}, {"tau": 100.0})
    for options in off:
        with attnctl.patch(model, attnctl.VAR(**{**SMALL, **options})):
            assert torch.equal(generate(model, inputs, 3), before)
    with attnctl.patch(model, attnctl.VAR(**SMALL, skip_last=False)) as handle:
        both = generate(model, inputs, 3)
        assert handle.report().lines[0].sites_hit == family.layers
        assert torch.equal(generate(model, inputs, 3), both)  # nothing is left of the first
        for i in (0, 1):
            alone = generate(model, family.inputs((i,)), 3)[0]
            torch.testing.assert_close(both[i], alone, rtol=1e-4, atol=1e-5)
        if name in FEW:  # where the tiny model writes no image token, which it then would read
            whole = generate(model, inputs, 3, use_cache=False)
            torch.testing.assert_close(both, whole, rtol=1e-4, atol=1e-5)
    assert (both - before).abs().max() > 1e-4
    assert torch.equal(generate(model, inputs, 3), before)
    assert {n: (type(m), set(vars(m))) for n, m in model.named_modules()} == held


def test_undo_after_an_exception() -> None:
    model, inputs = VLMS["llava"].build(), VLMS["llava"].inputs()
    before = generate(model, inputs, 2)

    @dataclasses.dataclass(frozen=True)
    class Fail(Record):
        def attend(self, call: attnctl.AttentionCall) -> Tensor:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), attnctl.patch(model, Fail(), attnctl.VAR(**SMALL)):
        generate(model, inputs, 2)
    assert torch.equal(generate(model, inputs, 2), before)


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_beams_sampling_and_caches_keep_their_sinks(name: str) -> None:
    model, family = VLMS[name].build(), VLMS[name]
    ask = {"max_new_tokens": 4, "min_new_tokens": 4}
    inputs = family.inputs()
    with attnctl.patch(model, attnctl.VAR(**SMALL)), torch.no_grad():
        both = model.generate(**inputs, **ask, num_beams=3)
        for i in (0, 1):
            alone = model.generate(**family.inputs((i,)), **ask, num_beams=3)
            assert torch.equal(both[i, -4:], alone[0, -4:])
        dynamic = generate(model, inputs, 3)
        static = generate(model, inputs, 3, cache_implementation="static", disable_compile=True)
        torch.testing.assert_close(dynamic, static, rtol=1e-4, atol=1e-5)
        torch.manual_seed(0)
        many = model.generate(**inputs, **ask, do_sample=True, num_return_sequences=2)
    assert len(many) == 4


def test_a_loop_by_hand_and_a_prompt_in_parts_equal_generate() -> None:
    model, inputs = VLMS["llava"].build(), VLMS["llava"].inputs((0,))
    control = attnctl.VAR(**SMALL)
    n = inputs["input_ids"].shape[1]
    with attnctl.patch(model, control), torch.no_grad():
        wanted = generate(model, inputs, 2)
        out = model(**inputs, use_cache=True)
        torch.testing.assert_close(out.logits[:, -1], wanted[:, 0], rtol=1e-4, atol=1e-5)
        new = out.logits[:, -1].argmax(-1)[:, None]
        cache = copy.deepcopy(out.past_key_values)
        out = model(input_ids=new, past_key_values=cache, use_cache=True)
        torch.testing.assert_close(out.logits[:, -1], wanted[:, 1], rtol=1e-4, atol=1e-5)
        # the text after the image in a second part
        cut = n - 3
        first = {"input_ids": inputs["input_ids"][:, :cut], "pixel_values": inputs["pixel_values"]}
        out = model(**first, use_cache=True)
        rest = {"input_ids": inputs["input_ids"][:, cut:], "past_key_values": out.past_key_values}
        out = model(**rest, use_cache=True)
        torch.testing.assert_close(out.logits[:, -1], wanted[:, 0], rtol=1e-4, atol=1e-5)


def test_the_sinks_of_a_layer_are_told_by_what_it_reads() -> None:
    """A spike behind layer 0 makes a sink of layer 1 on, and layer 0 stays as it was."""
    model, inputs = VLMS["llava"].build(), VLMS["llava"].inputs((0,))
    token = int((inputs["input_ids"][0] == IMAGE).nonzero()[5, 0])

    def spike(module: Any, args: Any, out: Tensor) -> Tensor:
        out = (out[0] if isinstance(out, tuple) else out).clone()
        if out.shape[1] > 1:
            out[:, token, DIMS[0]] = 1000.0
        return out

    layers = model.model.language_model.layers
    handle = layers[0].register_forward_hook(spike)
    record = Record()
    control = attnctl.VAR(**{**SMALL, "tau": 5.0})
    try:
        with attnctl.patch(model, record, control):
            generate(model, inputs, 2)
    finally:
        handle.remove()
    changed = [not torch.equal(out, call.primitive()) for call, out in record.calls]
    assert changed == [False, True, False] * 2  # layer 2 is the last


def test_protected_tokens_are_no_sinks() -> None:
    model, inputs = VLMS["llava"].build(), VLMS["llava"].inputs()
    before = generate(model, inputs, 2)
    with attnctl.patch(model, attnctl.VAR(**SMALL, protect=tuple(range(16)))):
        assert torch.equal(generate(model, inputs, 2), before)
    with attnctl.patch(model, attnctl.VAR(**SMALL, protect=(0, 1))):
        assert not torch.equal(generate(model, inputs, 2), before)


def test_text_alone_is_left_alone() -> None:
    model = VLMS["llava"].build()
    inputs = {"input_ids": torch.tensor([[1, 30, 31, 32]])}
    before = generate(model, inputs, 2)
    with attnctl.patch(model, attnctl.VAR(**SMALL)):
        assert torch.equal(generate(model, inputs, 2), before)


def test_with_pai_around_it_both_act() -> None:
    """PAI raises logits first, so that VAR's masses are of the raised weights."""
    model, inputs = VLMS["llava"].build(), VLMS["llava"].inputs()
    pai, var = attnctl.PAI(alpha=0.5, first_layer=0), attnctl.VAR(**SMALL)
    found = []
    for stack in ((), (pai,), (var,), (pai, var)):
        if stack:
            with attnctl.patch(model, *stack):
                found.append(generate(model, inputs, 2))
        else:
            found.append(generate(model, inputs, 2))
    for i in range(4):
        for j in range(i):
            assert (found[i] - found[j]).abs().max() > 1e-4
    with pytest.raises(attnctl.ControlConflict, match="list pai before var"):
        attnctl.patch(model, var, pai)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    inputs, errors = VLMS["llava"].inputs(), []
    for p in (0.0, 0.6):
        model = VLMS["llava"].build()
        with attnctl.patch(model, attnctl.VAR(**SMALL, p_moved=p)), torch.no_grad():
            exact = model(**inputs).logits[:, -1]
            half = model.to(dtype)(**{**inputs, "pixel_values": inputs["pixel_values"].to(dtype)})
        errors.append(float((half.logits[:, -1].float() - exact).norm() / exact.norm()))
    assert errors[1] < 2 * errors[0] < 0.4  # no worse than the model by itself


def test_gradients_flow() -> None:
    model, inputs = VLMS["llava"].build(), VLMS["llava"].inputs((0,))
    pixels = inputs["pixel_values"].clone().requires_grad_()
    with attnctl.patch(model, attnctl.VAR(**SMALL)):
        model(**{**inputs, "pixel_values": pixels}).logits[:, -1].sum().backward()
    assert pixels.grad is not None and pixels.grad.abs().max() > 0


# -- options ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p_moved": 1.1}, "0 to 1"),
        ({"rho_nonsink": -0.1}, "0 or above"),
        ({"tau": 0.0}, "above 0"),
        ({"image_mass": 2.0}, "0 to 1"),
        ({"first_layer": -1}, "0 or above"),
        ({"sink_dims": (-3,)}, "0 or above"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(attnctl.OptionError, match=message):
        attnctl.VAR(**options)


def test_layers_and_the_official_repository() -> None:
    model, inputs = VLMS["llava"].build(), VLMS["llava"].inputs()
    repo = attnctl.VAR.official_repo(sink_dims=DIMS)
    assert (repo.p_moved, repo.rho_nonsink, repo.first_layer, repo.skip_last) == (
        0.4,
        0.5,
        2,
        False,
    )
    for control, layers in (
        (attnctl.VAR(**SMALL), 2),
        (attnctl.VAR(**SMALL, first_layer=1), 1),
        (attnctl.VAR(**SMALL, skip_last=False), 3),
        (repo, 1),
        (attnctl.VAR(**SMALL, heads=[(1, 0), (0, 3)]), 2),
    ):
        with attnctl.patch(model, control) as handle:
            generate(model, inputs, 1)
            assert handle.report().lines[0].sites_hit == layers
    with pytest.raises(attnctl.OptionError, match="sink_dims is empty"):
        attnctl.patch(model, attnctl.VAR())
    with pytest.raises(attnctl.OptionError, match="layers 0 to 2"):
        attnctl.patch(model, attnctl.VAR(**SMALL, first_layer=3))
    with (
        attnctl.patch(model, attnctl.VAR(sink_dims=(2533, 1415))),
        pytest.raises(attnctl.OptionError, match="those of another checkpoint"),
    ):
        generate(model, inputs, 1)


def test_presets_are_of_one_structure_each() -> None:
    from attnctl.presets import presets

    known = presets("var")
    for preset in known:
        structure = (preset.denoiser, preset.layers, preset.heads, preset.width)
        assert [p.name for p in known if p.fits(*structure)] == [preset.name]
        assert attnctl.VAR(**preset.options).sink_dims
        assert max(preset.options["sink_dims"]) < preset.width
    assert {p.origin for p in known} == {"published", "ours"}
    text = attnctl.control("var", sink_dims="2533-1415", tau="18")
    assert text == attnctl.VAR(sink_dims=(2533, 1415), tau=18.0)
    with pytest.raises(attnctl.OptionError, match="numbers joined by -"):
        attnctl.control("var", sink_dims="a-b")


@pytest.mark.parametrize("family", ["llava", "qwen2.5-vl", "idefics3"])
@pytest.mark.parametrize("most", [5, 8])
def test_a_prompt_that_generate_reads_in_parts(family: str, most: int) -> None:
    """Also below PAI, which asks for the row of the answer alone while the prompt is read."""
    transformers = pytest.importorskip("transformers")
    if transformers.__version__ < "5":
        pytest.skip("transformers 4 goes past the model's call there")
    model, inputs = VLMS[family].build(), VLMS[family].inputs((0,))
    stack = attnctl.PAI(alpha=0.7, first_layer=0), attnctl.VAR(**SMALL)

    def logits(**options: Any) -> Tensor:
        made = model.generate(
            **inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, output_logits=True,
            return_dict_in_generate=True, **options,
        )  # fmt: skip
        return torch.stack(made.logits)

    stock = logits()
    try:
        apart = (logits(prefill_chunk_size=most) - stock).abs().max()
    except (RuntimeError, ValueError):
        apart = torch.tensor(math.inf)
    if apart > 1e-4:
        pytest.skip("this transformers reads no parts of a prompt with images, or wrong ones")
    for controls in (stack[1:], stack):
        with attnctl.patch(model, *controls):
            whole = logits()
            found = logits(prefill_chunk_size=most)
        torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)
        assert (whole - stock).abs().max() > 1e-3
