"""Decoders on FlashAttention: the model's own function computes, controls act as on sdpa.

flash-attn needs a GPU. Elsewhere a stand-in is loaded in its place; everything of transformers in
front of it, its masks for one, is the real one (`attnctl.testing.flash`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as functional
import transformers.modeling_flash_attention_utils
import transformers.modeling_utils
from torch import Tensor

import attnctl
from attnctl.hosts.vlm_flash import flash_of, seen_by_sdpa
from attnctl.testing.flash import NAMES, choose_attention, flash_stand_in
from attnctl.testing.vlms import VLMS, generate
from attnctl.testing.vlms.models import EYES, TEXT, _llava

TOKENS = 3
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
CONTROLS: dict[str, attnctl.Control] = {
    "answer": attnctl.PAI(alpha=1.0, first_layer=0),
    "text": attnctl.PAI(heads="H0 H3", alpha=1.0, rows="text", first_layer=0),
    "all": attnctl.PAI(alpha=1.0, rows="all", first_layer=1),
    "var": attnctl.VAR(sink_dims=(0, 1), tau=1.2, rho_nonsink=0.0, skip_last=False),
}


@pytest.fixture(autouse=True)
def stand_in(request: pytest.FixtureRequest) -> Iterator[None]:
    with nullcontext() if "gpu" in request.keywords else flash_stand_in():
        yield


@functools.cache
def built(name: str, attention: str = "sdpa") -> Any:
    model = VLMS[name].build()
    choose_attention(model, attention)
    return model


def inputs_of(name: str, samples: tuple[int, ...] = (0, 1)) -> dict[str, Any]:
    inputs = VLMS[name].inputs(samples)
    if name == "gemma3":  # image tokens see each other on sdpa, and cannot on FlashAttention
        inputs.pop("token_type_ids")
    return inputs


@dataclasses.dataclass(frozen=True)
class Again(attnctl.Control):
    """Computes every call again with the mask that it is shown."""

    shapes: set[Any] = dataclasses.field(default_factory=set)
    off: list[float] = dataclasses.field(default_factory=list)

    name: ClassVar[str] = "again"
    kinds: ClassVar[tuple[str, ...]] = ("causal",)

    def attend(self, call: attnctl.AttentionCall) -> Tensor:
        out, tokens = call.proceed(), call.spans.tokens
        assert tokens is not None and not (call.is_causal and call.mask is not None)
        again = functional.scaled_dot_product_attention(
            call.q, call.k, call.v, call.mask, 0.0, call.is_causal,
            scale=call.scale, enable_gqa=call.enable_gqa,
        )  # fmt: skip
        rows = ~tokens.queries("pad")
        real = rows[:, None, :, None].expand_as(out)
        self.off.append(float((again - out)[real].abs().max()))
        shape = None if call.mask is None else tuple(call.mask.shape[1:3])
        self.shapes.add((call.q.shape[2] == 1, shape, call.is_causal))
        return out


# -- the same as on sdpa ---------------------------------------------------------------------


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("name", ["llava", "qwen2.5-vl", "gemma3", "instructblip"])
def test_controls_act_as_on_sdpa(name: str, control: str) -> None:
    """Prompt and written tokens, left padding, grouped queries, sliding windows (gemma3)."""
    found = []
    for attention in ("sdpa", "flash_attention_2"):
        model, inputs = built(name, attention), inputs_of(name)
        stock = generate(model, inputs, TOKENS)
        with attnctl.patch(model, CONTROLS[control]):
            found.append(generate(model, inputs, TOKENS))
        assert (found[-1] - stock).abs().amax((0, 2)).min() > 1e-3  # at every token
        assert torch.equal(generate(model, inputs, TOKENS), stock)
    torch.testing.assert_close(found[1], found[0], **CLOSE)


@pytest.mark.parametrize("name", VLMS)
def test_unchanged_calls_are_stock_and_their_masks_say_what_it_did(name: str) -> None:
    model, again = built(name, "flash_attention_2"), Again()
    static = {"cache_implementation": "static", "disable_compile": True}
    runs: list[Any] = [((0, 1), {}), ((0,), {})]
    if hasattr(transformers.modeling_flash_attention_utils, "_loaded_implementation"):
        runs.append(((0, 1), static))  # transformers 4 itself fails with padding there
    for samples, options in runs:
        inputs = VLMS[name].inputs(samples)
        stock = generate(model, inputs, TOKENS, **options)
        held = {n: (type(m), set(vars(m))) for n, m in model.named_modules()}
        with attnctl.patch(model, again):
            assert torch.equal(generate(model, inputs, TOKENS, **options), stock)
    with attnctl.patch(model, attnctl.PAI(alpha=0.0)):
        assert torch.equal(generate(model, inputs, TOKENS), stock)
    assert max(again.off) < 1e-5 and len(again.off) == len(runs) * TOKENS * VLMS[name].layers
    n = VLMS[name].inputs()["input_ids"].shape[1]
    prefix = name == "paligemma" and (False, None, False) in again.shapes  # not causal
    assert (False, (1, 1 if prefix else n), False) in again.shapes  # padding, in one mask
    assert (True, (1, 1), False) in again.shapes
    if not prefix and name != "gemma3":  # which has windows
        assert (False, None, True) in again.shapes  # no padding, and no mask
    assert {n: (type(m), set(vars(m))) for n, m in model.named_modules()} == held
    assert model.config.get_text_config()._attn_implementation == "flash_attention_2"


@pytest.mark.parametrize("control", ["text", "var"])
def test_a_prompt_in_two_parts(control: str) -> None:
    """Queries are the last of the keys: sdpa's flag would let them see the first ones only."""
    found, inputs = [], inputs_of("llava")
    ids, seen = inputs["input_ids"], inputs["attention_mask"]
    for attention in ("sdpa", "flash_attention_2"):
        model, again = built("llava", attention), Again()
        with attnctl.patch(model, again, CONTROLS[control]), torch.no_grad():
            first = model(**{**inputs, "input_ids": ids[:, :-3], "attention_mask": seen[:, :-3]})
            cache = first.past_key_values
            last = model(input_ids=ids[:, -3:], attention_mask=seen, past_key_values=cache)
        found.append(last.logits)
    assert (False, (1, 3), False) in again.shapes
    torch.testing.assert_close(found[1], found[0], **CLOSE)


@pytest.mark.parametrize("control", ["all", "var"])
def test_windows_of_a_cache_that_keeps_everything(control: str) -> None:
    """A written token meets all keys, and FlashAttention is told the window."""
    found = []
    for attention in ("sdpa", "flash_attention_2"):
        model, inputs = built("gemma3", attention), inputs_of("gemma3")
        with attnctl.patch(model, CONTROLS[control]):
            found.append(
                generate(model, inputs, TOKENS, past_key_values=transformers.DynamicCache())
            )
    torch.testing.assert_close(found[1], found[0], **CLOSE)


def test_a_static_cache_that_would_be_compiled_runs_eagerly() -> None:
    how = transformers.CompileConfig(backend="eager")
    how._compile_all_devices = True
    model, inputs = built("llava", "flash_attention_2"), inputs_of("llava")
    with attnctl.patch(model, CONTROLS["var"]):
        wanted = generate(model, inputs, TOKENS)
        binding = model.model.language_model.__dict__["_attnctl"]
        found = generate(model, inputs, TOKENS, cache_implementation="static", compile_config=how)
        assert not binding.compiled.forms
    torch.testing.assert_close(found, wanted, **CLOSE)


def test_beams_and_a_change_of_attention_under_the_patch() -> None:
    model, inputs = VLMS["llava"].build(), inputs_of("llava")
    ask = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 3}
    with attnctl.patch(model, CONTROLS["answer"]), torch.no_grad():
        on_sdpa = model.generate(**inputs, **ask)
        choose_attention(model, "flash_attention_2")
        assert torch.equal(model.generate(**inputs, **ask), on_sdpa)


# -- masks -----------------------------------------------------------------------------------


class Module(torch.nn.Module):
    """What FlashAttention asks of an attention module."""

    def __init__(self, causal: bool, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config: Any = built("llava", "flash_attention_2").config.get_text_config()
        self.is_causal, self.layer_idx = causal, 0
        self.weight = torch.nn.Linear(2, 2, dtype=dtype)


PADDED = [[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9, [0, 1, 1, 1, 1, 1, 1, 1, 1]]
SIDES = {"none": None, "left": PADDED, "right": [row[::-1] for row in PADDED]}


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("n", "room", "side"),
    [(9, 9, "none"), (9, 9, "left"), (9, 9, "right"), (9, 12, "left"), (4, 9, "none"),
     (4, 9, "left"), (4, 12, "left"), (1, 9, "none"), (1, 9, "left"), (1, 9, "right"),
     (1, 12, "left")],
)  # fmt: skip
def test_the_mask_of_any_call(
    n: int, room: int, side: str, causal: bool, window: int | None
) -> None:
    padding = None if SIDES[side] is None else torch.tensor(SIDES[side], dtype=torch.bool)
    q, k, v = torch.randn(3, 4, n, 8), torch.randn(3, 2, room, 8), torch.randn(3, 2, room, 8)
    module, kwargs = Module(causal), {"scaling": 0.3, "sliding_window": window}
    if side == "left":  # said by the model, which counts for more
        module, kwargs["is_causal"] = Module(not causal), causal
    flash = flash_of(transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["flash_attention_2"])
    assert flash is not None
    wanted = flash(module, q, k, v, padding, **kwargs)[0].transpose(1, 2)
    seen = seen_by_sdpa(module, (q, k, v, padding), kwargs, {})
    mask, flag = seen.mask, seen.causal
    if seen.whole is not None:  # the flag and the mask beside it, and the mask that says both
        assert flag and mask is not None
        both = mask & torch.ones(n, seen.k.shape[2], dtype=torch.bool).tril()
        assert torch.equal(both, seen.whole()) and seen.whole() is seen.whole()
        mask, flag = both, False
    found = functional.scaled_dot_product_attention(
        seen.q, seen.k, seen.v, mask, 0.0, flag, scale=0.3, enable_gqa=True
    )
    real = torch.ones(3, n, dtype=torch.bool)
    if padding is not None and n > 1:
        real = padding[:, -n:]
    real = real[:, None, :, None].expand_as(found)
    torch.testing.assert_close(found[real], wanted[real], **CLOSE)


def test_layers_share_masks() -> None:
    known: dict[Any, Any] = {}
    padding = torch.tensor(PADDED, dtype=torch.bool)
    q, k = torch.randn(3, 4, 9, 8), torch.randn(3, 2, 9, 8)

    def layer(padding: Tensor, window: int | None = None) -> Any:
        kwargs = {"sliding_window": window}
        return seen_by_sdpa(Module(True), (q, k, k, padding), kwargs, known)

    one, two, windowed = layer(padding), layer(padding), layer(padding, 3)
    assert one.mask is two.mask and one.whole() is two.whole()
    assert windowed.mask is layer(padding, 3).mask is not one.whole()
    other = padding.clone()
    assert layer(other).mask is not one.mask


def test_queries_in_another_type_are_computed_in_that_of_the_model() -> None:
    q, k, v = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8).half()
    seen = seen_by_sdpa(Module(True, torch.float16), (q, k, v, None), {}, {})
    assert {x.dtype for x in seen[:3]} == {torch.float16}


# -- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "advice"),
    [("softcap", "eager"), ("s_aux", "eager"), ("cache", "generate"), ("cu_seq_lens_q", "padded")],
)
def test_what_a_row_computed_again_would_not_have_is_refused(given: str, advice: str) -> None:
    q = torch.randn(1, 2, 3, 8)
    with pytest.raises(attnctl.HostError, match=f"asks FlashAttention for {given};.*{advice}"):
        seen_by_sdpa(Module(True), (q, q, q, None), {given: 1.0}, {})


def test_capped_logits_on_eager_are_for_controls_that_leave_the_softmax_to_it() -> None:
    model, inputs = built("llava", "eager"), inputs_of("llava")
    with torch.no_grad():
        with attnctl.patch(model, CONTROLS["answer"]):
            model(**inputs, softcap=30.0)
        with (
            attnctl.patch(model, CONTROLS["var"]),
            pytest.raises(attnctl.HostError, match=r"without this decoder's softcap; .* pai"),
        ):
            model(**inputs, softcap=30.0)


def test_packed_sequences_are_refused() -> None:
    model = built("llava", "flash_attention_2")
    ids = torch.tensor([[1, 30, 31, 1, 40, 41]])
    packed = {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}
    with torch.no_grad():
        stock = model(**packed).logits
        with attnctl.patch(model, attnctl.PAI(heads="L1", first_layer=0, alpha=1.0)):
            with pytest.raises(attnctl.HostError, match="padded, as rows of a batch"):
                model(**packed)
            model(input_ids=ids, position_ids=torch.arange(7, 13)[None])
            several = {k: v.expand(2, -1) for k, v in packed.items()}
            model(**several)  # FlashAttention packs nothing here
        assert torch.equal(model(**packed).logits, stock)


def test_another_kind_of_attention_is_refused() -> None:
    model = VLMS["llava"].build()
    choose_attention(model, "flex_attention")
    with pytest.raises(attnctl.HostError, match="set_attn_implementation"):
        attnctl.patch(model, CONTROLS["answer"])


# -- the real one ----------------------------------------------------------------------------


@torch.no_grad()
def two_tokens(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Return the logits [B, 2, V] after a prompt and after one written token, always the same."""
    read = model(**inputs)
    ids = inputs["input_ids"]
    mask = functional.pad(inputs["attention_mask"], (0, 1), value=1)
    written = model(
        input_ids=torch.full_like(ids[:, :1], 30), attention_mask=mask,
        past_key_values=read.past_key_values,
    )  # fmt: skip
    return torch.stack([read.logits[:, -1], written.logits[:, -1]], dim=1).float()


def check_against_sdpa(model: Any, name: str, device: str, choose: Any) -> None:
    """Run controls on both attentions in half precision."""
    inputs = {k: v.to(device) for k, v in inputs_of("llava").items()}
    inputs["pixel_values"] = inputs["pixel_values"].half()
    model.to(device, torch.float16)
    for control in CONTROLS.values():
        found = {}
        for attention in ("sdpa", name):
            choose(model, attention)
            stock = two_tokens(model, inputs)
            with attnctl.patch(model, control):
                found[attention] = two_tokens(model, inputs)
            assert torch.equal(two_tokens(model, inputs), stock)
        effect = (found["sdpa"] - stock).norm(dim=2)  # of each row and token
        assert ((found[name] - found["sdpa"]).norm(dim=2) < 0.1 * effect).all()


def wide() -> Any:
    """Return a model with heads that every FlashAttention takes."""
    text = {"model_type": "llama", **TEXT, "head_dim": 64}
    eyes = {"model_type": "clip_vision_model", **EYES}
    family = dataclasses.replace(
        VLMS["llava"], model=lambda: _llava("Llava", text, eyes, vision_feature_layer=-2)
    )
    return family.build()


def test_in_half_precision() -> None:
    check_against_sdpa(wide(), "flash_attention_2", "cpu", choose_attention)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_the_real_one(name: str) -> None:
    model = wide().half().cuda()

    def choose(model: Any, attention: str) -> None:
        model.set_attn_implementation({"text_config": attention})

    try:
        choose(model, name)
    except (ImportError, OSError, ValueError) as error:
        pytest.skip(f"{name} is not here: {str(error).splitlines()[0]}")
    check_against_sdpa(model, name, "cuda", choose)
