"""PAI against explicit maps in float64, on tensors and inside whole models."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attnctl
from attnctl.hosts.vlm_tokens import Sequence, tokens_of
from attnctl.kernels.group_attention import Edit
from attnctl.processors.vlm.pai import add_bias, raised_logits
from attnctl.processors.vlm.rows import EditedPrompt, RowMemory, _found_rows
from attnctl.records import Tokens
from attnctl.testing import oracles
from attnctl.testing.calls import Record
from attnctl.testing.vlms import VLMS, generate

IMAGE, ALPHA = 10, 0.7


def raised_map(z: Tensor, image: Tensor, rows: Tensor, heads: Tensor) -> Tensor:
    """Return the softmax of logits raised one entry at a time.

    `z` [B, H, Nq, Nk] with -inf where masked, `image` [B, Nk], `rows` [B, Nq], `heads` [H].
    """
    chosen = image[:, None, None] & rows[:, None, :, None] & heads[:, None, None] & z.isfinite()
    return oracles.softmax(torch.where(chosen, z + ALPHA * z.abs(), z))


def test_the_bias_of_grouped_queries_equals_explicit_logits() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 6, 5, 8).double(), torch.randn(2, 2, 9, 8).double()
    image = torch.rand(2, 9) > 0.5
    found = raised_logits(q, k, ALPHA * 0.3 * image[:, None, None].double())
    wanted = ALPHA * oracles.logits(q, k, scale=0.3).abs() * image[:, None, None]
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["none", "bool", "float"])
def test_masked_tokens_stay_masked(kind: str) -> None:
    bias = torch.rand(1, 2, 3, 4) * 5
    seen = torch.tensor([[[[True, False, True, True]]]])
    low = torch.finfo(torch.float32).min
    mask = {"none": None, "bool": seen, "float": torch.where(seen, 0.0, low)}[kind]
    both = add_bias(mask, bias)
    if kind != "none":
        assert (both.softmax(-1)[..., 1] == 0).all()
    assert torch.equal(both[..., [0, 2, 3]], bias[..., [0, 2, 3]])


def explicit(
    call: attnctl.AttentionCall, past: int, ids: Tensor, rows: str, heads: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the output on maps in full, and which rows are no padding; ids are the prompt's."""
    nq, nk, prompt = call.q.shape[2], call.k.shape[2], ids.shape[1]
    mask = call.mask
    if mask is None and call.is_causal:
        mask = oracles.causal_mask(nq, nk)
    elif mask is not None and mask.dtype != torch.bool:
        mask = mask > -1e30
    z = oracles.logits(call.q, call.k, mask, call.scale)
    image = torch.zeros(len(ids), past + nq, dtype=torch.bool)
    image[:, :prompt] = ids == IMAGE
    pad = torch.zeros_like(image)
    pad[:, :prompt] = ids == 0
    chosen = {"text": ~image & ~pad, "all": ~pad, "answer": torch.zeros_like(image)}
    chosen["answer"][:, prompt - 1 :] = True
    a = raised_map(z, image[:, past + nq - nk :], chosen[rows][:, past:], heads)
    return oracles.apply_map(a, call.v), ~pad[:, past:]


CASES = [
    ("llava", "answer", "all", 0),
    ("llava", "text", "L0H1-3 L2", 0),
    ("llava", "all", "all", 1),
    ("qwen2.5-vl", "answer", "H0 H3", 0),
    ("qwen2.5-vl", "text", "all", 0),
    ("gemma3", "answer", "all", 0),
    ("paligemma", "text", "all", 1),
]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("name", "rows", "heads", "first"), CASES)
def test_every_call_of_an_answer_equals_explicit_maps(
    name: str, rows: Any, heads: str, first: int, attention: str
) -> None:
    """Prompt and written tokens, grouped queries, padding, two images, windows, heads."""
    family = VLMS[name]
    # the eager attention of transformers takes its softmax in float32
    dtype, most = (torch.float64, 1e-12) if attention == "sdpa" else (torch.float32, 1e-5)
    model = family.build(attention=attention).to(dtype)
    inputs = family.inputs((0, 1), images=2 if family.several else 1)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    control = attnctl.PAI(heads=heads, alpha=ALPHA, rows=rows, first_layer=first)
    chosen = attnctl.sites(model).select(control.selector, ["causal"])
    record = Record()
    with attnctl.patch(model, record, control):
        generate(model, inputs, 3)
    ids = inputs["input_ids"]
    given = record.calls[0][0].mask
    if given is not None and given.is_floating_point() and given.dtype != dtype:
        pytest.skip("transformers 4 gives this model a float32 mask, which float64 misreads")
    assert len(record.calls) == 3 * family.layers
    for n, (call, out) in enumerate(record.calls):
        step = n // family.layers
        past = 0 if step == 0 else ids.shape[1] + step - 1
        mine = chosen.get(call.site.index, torch.zeros(4, dtype=torch.bool))
        wanted, real = explicit(call, past, ids, rows, mine)
        difference = (out - wanted).abs().amax((1, 3))[real]
        assert difference.max() < most
        stock = (call.primitive() - wanted).abs().amax((1, 3))[real]
        assert (stock.max() > 1e-3) == bool(mine.any())


def test_only_the_answer_row_of_the_prompt_changes() -> None:
    model, inputs = VLMS["llava"].build(), VLMS["llava"].inputs()
    with torch.no_grad():
        before = model(**inputs).logits
        with attnctl.patch(model, attnctl.PAI(alpha=1.0, first_layer=0)):
            after = model(**inputs).logits
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert (before[:, -1] - after[:, -1]).abs().amax(1).min() > 1e-4


def test_attention_to_the_image_rises() -> None:
    """The image's share of the answer row, on a call with positive logits there."""
    torch.manual_seed(0)
    z = torch.randn(1, 2, 1, 12).abs().double()
    image = torch.arange(12)[None] < 5
    one = torch.ones(1, 1, dtype=torch.bool)
    raised = raised_map(z, image, one, torch.ones(2, dtype=torch.bool))
    assert (raised[..., :5].sum(-1) > oracles.softmax(z)[..., :5].sum(-1)).all()


def test_long_prompts_are_done_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = VLMS["llava"].build(), VLMS["llava"].inputs()
    with attnctl.patch(model, attnctl.PAI(alpha=1.0, rows="all", first_layer=0)):
        whole = generate(model, inputs, 2)
        monkeypatch.setattr("attnctl.processors.vlm.rows._CHUNK_ELEMENTS", 700)
        torch.testing.assert_close(generate(model, inputs, 2), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    inputs = VLMS["llava"].inputs()
    errors = []
    for alpha in (0.0, 0.5):
        model = VLMS["llava"].build()
        with attnctl.patch(model, attnctl.PAI(alpha=alpha)), torch.no_grad():
            exact = model(**inputs).logits[:, -1]
            half = model.to(dtype)(**{**inputs, "pixel_values": inputs["pixel_values"].to(dtype)})
        errors.append(float((half.logits[:, -1].float() - exact).norm() / exact.norm()))
    assert errors[1] < 2 * errors[0] < 0.4  # no worse than the model by itself


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -0.1}, "0 or above"),
        ({"alpha": float("inf")}, "finite"),
        ({"rows": "image"}, "answer, text or all"),
        ({"first_layer": 3, "last_layer": 2}, "first_layer <= last_layer"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(attnctl.OptionError, match=message):
        attnctl.PAI(**options)


def test_layers() -> None:
    model = VLMS["llava"].build()
    for control, layers in (
        (attnctl.PAI(), {2}),
        (attnctl.PAI(first_layer=0, last_layer=1), {0, 1}),
        (attnctl.PAI(first_layer=1, last_layer=2), {1, 2}),
        (attnctl.PAI(heads=[(1, 0), (2, 3)], first_layer=0), {1, 2}),
    ):
        with attnctl.patch(model, control) as handle:
            generate(model, VLMS["llava"].inputs(), 1)
            assert handle.report().lines[0].sites_hit == len(layers)
    with pytest.raises(attnctl.OptionError, match="layers 0 to 2"):
        attnctl.patch(model, attnctl.PAI(last_layer=31))
    with pytest.raises(attnctl.SelectorError, match="takes away"):
        attnctl.patch(model, attnctl.PAI(heads="L0-1"))


def test_a_layer_on_another_device_is_asked_in_the_usual_way() -> None:
    """The rows of a prompt are kept on the device of the first layer."""
    q = torch.zeros(1, 2, 5, 8)
    call = 0, q, q, q, None, None, True, None, None, q.transpose(1, 2).contiguous()
    there = torch.ones(1, 5, dtype=torch.bool)
    tokens = Tokens(lambda _: there, lambda _: there)
    asked: list[int] = []

    def codes(site: int, hidden: Any) -> torch.Tensor:
        asked.append(site)
        return edit.codes

    edit = Edit(torch.zeros(1, 5, dtype=torch.uint8), 0.2)
    for first, want in ((q.to("meta"), []), (q, [0])):
        made = EditedPrompt("text", first, tokens, edit, RowMemory(), codes)
        assert made(*call) is None  # no kernel here
        assert asked == want


def test_a_prompt_keeps_no_tensors_of_its_first_layer() -> None:
    """They would be a large part of what a long prompt takes."""
    q, there = torch.zeros(1, 2, 5, 8), torch.ones(1, 5, dtype=torch.bool)
    tokens = Tokens(lambda _: there, lambda _: there)
    made = EditedPrompt("text", q, tokens, Edit(there.view(torch.uint8), 0.2), RowMemory())
    kept, _ = weakref.ref(q), made(0, q, q, q, None, None, True, None, None, q)
    del q, _
    assert kept() is None and made.q.shape == (1, 2, 5, 8)


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("past", [0, 2, 5])
@pytest.mark.parametrize("role", ["text", "image", "answer", "all"])
@pytest.mark.parametrize("image", [(), (3,), (4, 1), (0,), (8,)])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_queries_of_a_role(
    batch: int, image: tuple[int, ...], role: str, past: int, labelled: bool
) -> None:
    """All of them, and those from the first image of the batch on; of a part of a prompt, too."""
    labels = torch.zeros(batch, 9, dtype=torch.uint8)
    labels[-1, :3] = 2
    for row, slot in zip(range(batch), image, strict=False):
        labels[row, slot] = 1
    sequence = Sequence(labels, prompt=9)
    tokens = tokens_of(sequence, past, batch, 9 - past, 9, torch.device("cpu"))
    if not labelled:
        tokens.labels = tokens.answering = None
    there = torch.ones(batch, 9 - past).bool() if role == "all" else tokens.queries(role)
    found = [_found_rows(batch, 9 - past, tokens, role, late) for late in (False, True)]
    columns = there.any(0).nonzero()[:, 0]
    firsts = (labels == 1).any(0).nonzero()[:, 0].tolist()
    seeing = columns[columns >= (firsts[0] if firsts else 9) - past]
    for table, want in zip(found, (columns, seeing), strict=True):
        assert table.dtype == np.int32 and table.flags.c_contiguous
        assert table[0].tolist() == want.tolist()
        assert np.array_equal(table[1:], there[:, want])


def test_presets() -> None:
    model = VLMS["llava"].build()
    assert attnctl.PAI.for_model(model) == attnctl.PAI(alpha=0.2)
    assert attnctl.PAI.for_model(model, "llava-1.5-7b", rows="text").alpha == 0.5
    assert attnctl.control("pai", alpha="0.3", last_layer="none") == attnctl.PAI(alpha=0.3)
