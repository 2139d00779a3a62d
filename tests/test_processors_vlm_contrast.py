"""Contrastive decoding: formulas in float64, and second passes against runs of their own."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import attnctl
from attnctl.processors.vlm.contrast import plausible
from attnctl.processors.vlm.m3id import forgetting
from attnctl.processors.vlm.vcd import noised, signal_and_noise
from attnctl.testing.vlms import VLMS, FamilyUnavailable, generate
from attnctl.testing.vlms.core import WORDS

TOKENS = 4
PAD, IMAGE, MARKS = 0, 10, (11, 12)
NAMED = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl", "gemma3")
"""Families whose config names the tokens around an image."""
FEW = ["llava", "qwen2.5-vl", "gemma3", "instructblip"]
SPEAKING = list(VLMS)
NEUTRAL = [attnctl.VCD(alpha=0, beta=0), attnctl.M3ID(lam=0, beta=0), attnctl.PAICFG(gamma=1)]
STRONG = [attnctl.VCD(), attnctl.M3ID(lam=0.5), attnctl.PAICFG(gamma=2.0)]


@functools.cache
def built(name: str) -> Any:
    try:
        return VLMS[name].build()
    except FamilyUnavailable as error:
        pytest.skip(str(error))


@functools.cache
def stock(name: str) -> Tensor:
    return generate(built(name), VLMS[name].inputs(), TOKENS)


class Force:
    """Makes an answer come out as given, whatever the scores."""

    def __init__(self, answer: Tensor) -> None:
        self.answer, self.t = answer, 0

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.t += 1
        forced = torch.full_like(scores, -1e9)
        return forced.scatter_(1, self.answer[:, self.t - 1 : self.t], 0.0)


def forced(model: Any, inputs: dict[str, Any], answer: Tensor, **options: Any) -> Tensor:
    """Return the logits [B, T, V] along a given answer [B, T]."""
    from transformers import LogitsProcessorList

    given = LogitsProcessorList([Force(answer)])
    return generate(model, inputs, answer.shape[1], logits_processor=given, **options)


def answered(model: Any, inputs: dict[str, Any], **options: Any) -> Tensor:
    """Return the answer's tokens [B, T]."""
    with torch.no_grad():
        ask = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, **options}
        return model.generate(**inputs, **ask)[:, -TOKENS:]


def blind(model: Any, inputs: dict[str, Any], row: int) -> dict[str, Any]:
    """Return the inputs of one prompt's text alone, token by token."""
    named = any(model is built(name) for name in NAMED)
    left_out = {PAD, IMAGE, *(MARKS if named else ())}
    words = [t for t in inputs["input_ids"][row].tolist() if t not in left_out]
    ids = torch.tensor([words])
    kinds = {"token_type_ids": torch.zeros_like(ids)} if "token_type_ids" in inputs else {}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **kinds}


def noisy(inputs: dict[str, Any], control: attnctl.VCD) -> dict[str, Any]:
    """Return the inputs with the noise of a control on every image, one after another."""
    pixels, grid = inputs["pixel_values"], inputs.get("image_grid_thw")
    sizes = grid.prod(1).tolist() if grid is not None else [1] * len(pixels)
    new = []
    for one in pixels.split(sizes):
        source = torch.Generator().manual_seed(control.seed)
        shape = one.shape if grid is not None else one.shape[1:]
        noise = torch.randn(shape, generator=source)
        new.append(noised(one, noise, control.noise_step))
    return {**inputs, "pixel_values": torch.cat(new)}


def weak_logits(model: Any, inputs: dict[str, Any], control: Any, answer: Tensor) -> Tensor:
    """Return the second pass's logits from stock runs of their own."""
    if control.name == "vcd":
        return forced(model, noisy(inputs, control), answer)
    reader = model.language_model if hasattr(model, "qformer") else model
    rows = [forced(reader, blind(model, inputs, r), answer[r : r + 1]) for r in range(len(answer))]
    return torch.cat(rows)


def expected(control: Any, z: Tensor, weak: Tensor) -> Tensor:
    """Return the formula, token by token and step by step, in float64."""
    z, weak, out = z.double(), weak.double(), torch.empty(z.shape, dtype=torch.float64)
    seen, unseen = z.log_softmax(-1), weak.log_softmax(-1)
    for row in range(z.shape[0]):
        for t in range(z.shape[1]):
            least = math.log(control.beta) + float(z[row, t].max())
            for v in range(z.shape[2]):
                a, b = float(z[row, t, v]), float(weak[row, t, v])
                c, d = float(seen[row, t, v]), float(unseen[row, t, v])
                if control.name == "vcd":
                    value = a + control.alpha * (a - b)
                elif control.name == "m3id":
                    gamma = math.exp(-control.lam * (t + 1))
                    value = c + (1 - gamma) / gamma * (c - d)
                else:
                    value = d + control.gamma * (c - d)
                out[row, t, v] = value if a >= least else -math.inf
    return out


# -- formulas --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "signal", "noise"),
    [(0, 0.99999, 0.00473), (500, 0.86302, 0.50517), (900, 0.36489, 0.93105),
     (999, 0.28504, 0.95851)],
)  # fmt: skip
def test_the_schedule_of_the_noise(step: int, signal: float, noise: float) -> None:
    assert signal_and_noise(step) == pytest.approx((signal, noise), abs=1e-5)
    x, eps = torch.randn(2, 3, 50, 50), torch.randn(3, 50, 50)
    assert float(noised(x, eps, step).pow(2).mean()) == pytest.approx(1, abs=0.1)


def test_weights_of_m3id() -> None:
    known = {1: 0.0202, 10: 0.2214, 50: 1.718, 100: 6.389}
    for t, weight in known.items():
        assert forgetting(0.02, t) == pytest.approx(weight, rel=1e-3)


def test_the_cut_off_is_nested_and_never_empty() -> None:
    z = torch.randn(5, 40, dtype=torch.float64) * 3
    kept = [plausible(z, beta) for beta in (1.0, 0.5, 0.1, 0.01, 0.0)]
    assert kept[0].sum(1).tolist() == [1] * 5 and kept[-1].all()
    assert all((more | few).equal(more) for few, more in itertools.pairwise(kept))
    wanted = z.softmax(-1) >= 0.1 * z.softmax(-1).amax(-1, keepdim=True)
    assert torch.equal(kept[2], wanted)


@pytest.mark.parametrize("control", STRONG, ids=str)
def test_a_pass_that_says_the_same_changes_nothing(control: Any) -> None:
    z = torch.randn(3, 17, dtype=torch.float64)
    for shift in (0.0, 5.0):
        out = control.fuse(z, z + shift, 3)
        torch.testing.assert_close(out.softmax(-1), z.softmax(-1), rtol=1e-12, atol=1e-12)


def test_where_m3id_is_sure_it_leaves_out_the_contrast() -> None:
    z = torch.tensor([[9.0, 0, 0], [1, 0, 0]])
    weak = torch.tensor([[0.0, 3, 0], [0, 3, 0]])
    out = attnctl.M3ID(lam=1.0, confidence=0.9).fuse(z, weak, 5)
    torch.testing.assert_close(out[0], z[0].log_softmax(-1))
    assert out[1, 1] < z[1].log_softmax(-1)[1] - 1
    capped = attnctl.M3ID(lam=1.0, cap=0.5).fuse(z, weak, 5)
    seen, unseen = z.log_softmax(-1), weak.log_softmax(-1)
    torch.testing.assert_close(capped, seen + 0.5 * (seen - unseen))


# -- inside models ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPEAKING)
def test_neutral_and_undo_are_bit_exact(name: str) -> None:
    model, inputs, before = built(name), VLMS[name].inputs(), stock(name)
    held = {n: (type(m), set(vars(m))) for n, m in model.named_modules()}
    with attnctl.patch(model, *NEUTRAL):
        assert torch.equal(generate(model, inputs, TOKENS), before)
    handle = attnctl.patch(model, STRONG[0])
    assert (generate(model, inputs, TOKENS)[:, 0] - before[:, 0]).abs().max() > 0.01
    handle.undo()
    assert torch.equal(generate(model, inputs, TOKENS), before)
    assert {n: (type(m), set(vars(m))) for n, m in model.named_modules()} == held


@pytest.mark.parametrize("control", STRONG, ids=lambda c: c.name)
@pytest.mark.parametrize("name", SPEAKING)
def test_logits_equal_the_formula_on_runs_of_their_own(name: str, control: Any) -> None:
    """Every family, padded prompts of three lengths, two images, second pass with its cache."""
    model, family = built(name), VLMS[name]
    inputs = family.inputs((0, 1, 2), images=2 if family.several else 1)
    with attnctl.patch(model, control) as handle:
        answer = answered(model, inputs)
        ours = forced(model, inputs, answer)
        assert handle.report().lines[0].forwards == 2 * TOKENS
    wanted = expected(control, forced(model, inputs, answer),
                      weak_logits(model, inputs, control, answer))  # fmt: skip
    assert torch.equal(ours.isinf(), wanted.isinf())
    kept = ~wanted.isinf()
    torch.testing.assert_close(ours[kept].double(), wanted[kept], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("control", STRONG, ids=lambda c: c.name)
@pytest.mark.parametrize("name", FEW)
def test_beams_score_by_the_contrast(name: str, control: Any) -> None:
    """A beam's score is the sum of the contrast's log-probabilities along its answer."""
    model, inputs = built(name), VLMS[name].inputs()
    ask = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.0}
    ask |= {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS}
    with attnctl.patch(model, control), torch.no_grad():
        out = model.generate(**inputs, **ask, output_scores=True, return_dict_in_generate=True)
        for rank in range(2):
            answer = out.sequences[rank::2, -TOKENS:]
            logp = forced(model, inputs, answer).log_softmax(-1)
            total = logp.gather(2, answer[..., None]).sum((1, 2))
            torch.testing.assert_close(total, out.sequences_scores[rank::2], rtol=1e-4, atol=1e-4)
        alone = model.generate(**VLMS[name].inputs((1,)), **ask)
    assert torch.equal(alone[:, -TOKENS:], out.sequences[2:, -TOKENS:])


@pytest.mark.parametrize("name", FEW)
def test_caches_of_every_kind_give_the_same(name: str) -> None:
    model, inputs = built(name), VLMS[name].inputs()
    for control in STRONG:
        with attnctl.patch(model, control):
            dynamic = generate(model, inputs, TOKENS)
            whole = generate(model, inputs, TOKENS, use_cache=False)
            static = generate(
                model, inputs, TOKENS, cache_implementation="static", disable_compile=True
            )
        torch.testing.assert_close(whole, dynamic, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(static, dynamic, rtol=1e-4, atol=1e-4)


def test_sampling_draws_from_the_contrast() -> None:
    model, inputs = built("llava"), VLMS["llava"].inputs()
    with attnctl.patch(model, attnctl.VCD(beta=1.0)):  # one token is left
        greedy = answered(model, inputs)
        drawn = answered(model, inputs, do_sample=True, num_return_sequences=2)
    assert torch.equal(drawn, greedy.repeat_interleave(2, dim=0))
    assert torch.equal(greedy, answered(model, inputs))  # beta 1 is greedy, whatever the contrast


def test_every_generation_begins_anew() -> None:
    model, family = built("llava"), VLMS["llava"]
    with attnctl.patch(model, *copy.deepcopy(STRONG[1:])):
        first = generate(model, family.inputs((0,)), TOKENS)
        generate(model, family.inputs((1, 2), images=2), TOKENS + 2)
        assert torch.equal(generate(model, family.inputs((0,)), TOKENS), first)


def test_a_loop_by_hand_and_a_second_turn_equal_generate() -> None:
    """A copied cache takes its second pass along; a second turn goes on in both."""
    model, inputs = built("llava"), VLMS["llava"].inputs((0,))
    with attnctl.patch(model, attnctl.VCD(beta=0.0)), torch.no_grad():
        wanted = generate(model, inputs, TOKENS)
        out, told = model(**inputs, use_cache=True), []
        for _ in range(TOKENS):
            told.append(out.logits[:, -1])
            cache = copy.deepcopy(out.past_key_values)
            token = told[-1].argmax(-1)[:, None]
            out = model(input_ids=token, past_key_values=cache, use_cache=True)
        torch.testing.assert_close(torch.stack(told, 1), wanted, rtol=1e-4, atol=1e-4)
        first = model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, torch.tensor([[40, 41, 42]])], dim=1)
        both = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        later = generate(model, both, 2, past_key_values=first.past_key_values)
        anew = generate(model, {**inputs, **both}, 2)
    torch.testing.assert_close(later, anew, rtol=1e-4, atol=1e-4)


def test_attention_controls_act_in_the_first_pass_or_in_both() -> None:
    model, inputs = built("llava"), VLMS["llava"].inputs()
    pai = attnctl.PAI(alpha=1.0, first_layer=0)
    for both in (False, True):
        control = attnctl.PAICFG(gamma=2.0, both=both)
        with attnctl.patch(model, pai, control):
            answer = answered(model, inputs)
            ours = forced(model, inputs, answer)
        weak = weak_logits(model, inputs, control, answer)
        with attnctl.patch(model, attnctl.PAI(alpha=1.0, first_layer=0)):
            z = forced(model, inputs, answer)
            if both:
                weak = weak_logits(model, inputs, control, answer)
        wanted = expected(control, z, weak)
        kept = ~wanted.isinf()
        torch.testing.assert_close(ours[kept].double(), wanted[kept], rtol=1e-4, atol=1e-4)
    # without an image there is nothing that PAI raises, but VCD's noisy image it does raise
    with attnctl.patch(model, pai, attnctl.VCD(beta=0)):
        apart = generate(model, inputs, 1)
    with attnctl.patch(model, pai, attnctl.VCD(beta=0, both=True)):
        assert (generate(model, inputs, 1) - apart).abs().max() > 1e-2


def test_contrasts_work_around_each_other() -> None:
    """The inner one's result goes into the outer one; what it cut off stays out."""
    model, inputs = built("llava"), VLMS["llava"].inputs()
    inner, outer = attnctl.VCD(beta=0.3), attnctl.PAICFG(gamma=2.0, beta=0.01)
    with attnctl.patch(model, outer, inner):
        out = generate(model, inputs, 1)[:, 0]
    answer = out.argmax(-1)[:, None]
    z, plain = generate(model, inputs, 1), outer.beta
    assert plain == 0.01
    first = expected(inner, z, weak_logits(model, inputs, inner, answer))
    wanted = expected(outer, first, weak_logits(model, inputs, outer, answer))[:, 0]
    kept = ~wanted.isinf()
    assert torch.equal(out.isinf(), ~kept)
    torch.testing.assert_close(out[kept].double(), wanted[kept], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model, inputs = VLMS["llava"].build(), VLMS["llava"].inputs()
    control = attnctl.VCD(beta=0.0)
    with attnctl.patch(model, control), torch.no_grad():
        exact = model(**inputs).logits[:, -1]
        pixels = inputs["pixel_values"].to(dtype)
        half = model.to(dtype)(**{**inputs, "pixel_values": pixels}).logits[:, -1]
    assert half.dtype == torch.float32  # what the contrast is computed in
    assert (half - exact).norm() / exact.norm() < 0.2


def test_an_exception_leaves_nothing_behind() -> None:
    model, inputs = built("llava"), VLMS["llava"].inputs()

    class Stop:
        def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
            raise KeyboardInterrupt

    from transformers import LogitsProcessorList

    with pytest.raises(KeyboardInterrupt), attnctl.patch(model, attnctl.VCD()):
        generate(model, inputs, 2, logits_processor=LogitsProcessorList([Stop()]))
    assert torch.equal(generate(model, inputs, TOKENS), stock("llava"))


# -- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["instructblip", "blip-2"])
def test_calls_of_models_that_generate_from_embeddings(name: str) -> None:
    """One call of the whole model, several answers to a prompt, and what has no token ids."""
    model, inputs = built(name), VLMS[name].inputs()
    with torch.no_grad(), attnctl.patch(model, attnctl.M3ID(lam=0.5, beta=0)):
        wanted = generate(model, inputs, TOKENS)
        torch.testing.assert_close(model(**inputs).logits[:, -1], wanted[:, 0])
        many = generate(model, inputs, TOKENS, num_return_sequences=2, num_beams=2)
        assert many.shape[0] == 4
        # without words the model begins by itself, and there is nothing to leave the image out of
        with pytest.raises(attnctl.HostError, match="give input_ids"):
            seen = {k: v for k, v in inputs.items() if k.startswith(("qformer", "pixel"))}
            model.generate(**seen, max_new_tokens=2)
    assert torch.equal(generate(model, inputs, TOKENS), stock(name))


@pytest.mark.parametrize("control", ["m3id", "paicfg", "vcd"])
@pytest.mark.parametrize("family", ["qwen2.5-vl", "gemma3"])
def test_a_prompt_read_in_parts(family: str, control: str) -> None:
    """The first part holds the images."""
    model, inputs = built(family), VLMS[family].inputs((0,))

    def run(**options: Any) -> Tensor:
        torch.manual_seed(0)
        return generate(model, inputs, 3, **options)

    try:
        apart = (run(prefill_chunk_size=8) - run()).abs().max()
    except (RuntimeError, ValueError):
        apart = torch.tensor(torch.inf)
    if apart > 1e-4:
        pytest.skip("this transformers reads no parts of a prompt with images, or wrong ones")
    with attnctl.patch(model, attnctl.control(control)):
        torch.testing.assert_close(run(prefill_chunk_size=8), run(), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_followed_is_refused() -> None:
    transformers = pytest.importorskip("transformers")
    model, inputs = built("llava"), VLMS["llava"].inputs((0, 1))
    with pytest.raises(attnctl.HostError, match="language head"):
        attnctl.patch(model.model.language_model, attnctl.VCD())
    with torch.no_grad(), attnctl.patch(model, attnctl.M3ID()):
        with pytest.raises(attnctl.HostError, match="padded on the left"):
            flipped = {k: inputs[k].flip(1) for k in ("input_ids", "attention_mask")}
            model(**{**inputs, **flipped})
        with pytest.raises(attnctl.HostError, match="without an assistant"):
            ids = torch.tensor([[1, 30, 31, 32, 30, 31, 32, 30, 31]])  # something to look up
            text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            generate(model, text, 6, prompt_lookup_num_tokens=2, eos_token_id=WORDS - 1)
        with pytest.raises(attnctl.HostError, match="return_dict=True"):
            model(**inputs, return_dict=False)
        if not transformers.__version__.startswith("4"):  # which goes past the model's call
            with pytest.raises(attnctl.HostError, match="at token 8 of its 24, before the last"):
                generate(model, inputs, 2, prefill_chunk_size=8)
        with pytest.raises(attnctl.HostError, match="need the cache"):
            model.generate(**inputs, max_new_tokens=3, num_beams=2, use_cache=False)
    with torch.no_grad(), attnctl.patch(model, attnctl.VCD()):
        text = {k: inputs[k] for k in ("input_ids", "attention_mask")}
        with pytest.raises(attnctl.HostError, match="give the images as pixels"):
            generate(model, text, 1)
    cache = model(**VLMS["llava"].inputs((0,)), use_cache=True).past_key_values
    with torch.no_grad(), attnctl.patch(model, attnctl.VCD()):  # noqa: SIM117
        with pytest.raises(attnctl.HostError, match="before the prompt is read"):
            model(input_ids=torch.tensor([[30]]), past_key_values=cache)


@pytest.mark.parametrize(
    ("name", "options"),
    [("vcd", {"alpha": -1.0}), ("vcd", {"beta": 1.5}), ("vcd", {"noise_step": 1000}),
     ("m3id", {"lam": -0.1}), ("m3id", {"confidence": 2.0}), ("m3id", {"cap": -1.0}),
     ("paicfg", {"gamma": math.inf})],
)  # fmt: skip
def test_options_out_of_range(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(attnctl.OptionError, match=f"{name}: {next(iter(options))}="):
        attnctl.control(name, **options)


def test_presets() -> None:
    model = built("llava")
    assert attnctl.VCD.for_model(model, "pope-script").beta == 0.2
    assert attnctl.PAICFG.for_model(model) == attnctl.PAICFG(gamma=1.1)
    assert attnctl.M3ID.for_model(model) == attnctl.M3ID()
    assert attnctl.control("m3id", confidence="none", cap="2") == attnctl.M3ID(cap=2.0)
