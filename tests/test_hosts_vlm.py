"""Language models of transformers: every family reached, undone exactly, tokens known."""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import attnctl
import attnctl.assets
from attnctl.assets.world.evaluation import album
from attnctl.hosts.vlm_given import Given
from attnctl.records import Tokens
from attnctl.testing import zoo
from attnctl.testing.vlms import VLMS, FamilyUnavailable, generate

TOKENS = 3
IMAGE = 10
FEW = ["llava", "qwen2.5-vl", "gemma3"]


@functools.cache
def built(name: str, attention: str = "sdpa") -> Any:
    try:
        return VLMS[name].build(attention=attention)
    except FamilyUnavailable as error:
        pytest.skip(str(error))


@functools.cache
def stock(name: str, attention: str = "sdpa") -> Tensor:
    return generate(built(name, attention), VLMS[name].inputs(), TOKENS)


@dataclasses.dataclass(frozen=True)
class Watch(attnctl.Control):
    """Notes what calls look like; changes nothing."""

    heads: Any = "all"
    see: Callable[[attnctl.AttentionCall], Any] = lambda call: call.q.shape[2]
    seen: list[Any] = dataclasses.field(default_factory=list)
    begun: list[Any] = dataclasses.field(default_factory=list)

    name: ClassVar[str] = "watch"
    kinds: ClassVar[tuple[str, ...]] = ("causal",)

    @property
    def selector(self) -> Any:
        return self.heads

    def begin(self, run: Any, selection: Any) -> Any:
        self.begun.append(len(self.begun))
        return self.begun[-1]

    def attend(self, call: attnctl.AttentionCall) -> Tensor:
        assert call.state == self.begun[-1]
        self.seen.append(self.see(call))
        return call.proceed()


@dataclasses.dataclass(frozen=True)
class Double(Watch):
    """Doubles what attention gives."""

    name: ClassVar[str] = "double"

    def attend(self, call: attnctl.AttentionCall) -> Tensor:
        return 2 * super().attend(call)


# -- the matrix ------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", VLMS)
def test_neutral_and_undo_are_bit_exact(name: str, attention: str) -> None:
    model, before = built(name, attention), stock(name, attention)
    inputs = VLMS[name].inputs()
    held = {n: (type(m), set(vars(m))) for n, m in model.named_modules()}
    with attnctl.patch(model, attnctl.PAI(alpha=0.0)):
        assert torch.equal(generate(model, inputs, TOKENS), before)
    handle = attnctl.patch(model, attnctl.PAI(alpha=1.0, first_layer=0))
    changed = generate(model, inputs, TOKENS)
    assert (changed[:, 0] - before[:, 0]).abs().max() > 1e-4  # the first word too
    handle.undo()
    assert torch.equal(generate(model, inputs, TOKENS), before)
    assert {n: (type(m), set(vars(m))) for n, m in model.named_modules()} == held
    assert model.config.text_config._attn_implementation == attention


@pytest.mark.parametrize("name", VLMS)
def test_prompt_and_written_tokens_are_seen(name: str) -> None:
    model, family = built(name), VLMS[name]
    inputs = family.inputs()

    def see(call: attnctl.AttentionCall) -> Any:
        tokens = call.spans.tokens
        assert tokens is not None
        inside = call.k.shape[2] >= inputs["input_ids"].shape[1]  # not in a sliding window
        images = tokens.keys("image").sum(1).tolist() if inside else None
        return call.q.shape[2], images, tokens.queries("answer").sum(1).tolist()

    watch = Watch(see=see)
    with attnctl.patch(model, watch) as handle:
        assert torch.equal(generate(model, inputs, TOKENS), stock(name))
        line = handle.report().lines[0]
    many = (inputs["input_ids"] == IMAGE).sum(1).tolist()
    assert many[0] == family.image.count(IMAGE)
    assert len(watch.begun) == 1
    n, layers = inputs["input_ids"].shape[1], family.layers
    assert watch.seen[:layers] == [(n, many, [1, 1])] * layers
    for written in watch.seen[layers:]:
        assert written in [(1, many, [1, 1]), (1, None, [1, 1])]
    assert (line.sites, line.sites_hit, line.heads) == (layers, layers, 4 * layers)
    assert line.calls == layers * TOKENS and line.steps == tuple(range(TOKENS))
    assert f"{line.calls} attention calls at {layers} sites" in str(handle.report())


@pytest.mark.parametrize("rows", ["answer", "text", "all"])
@pytest.mark.parametrize("name", VLMS)
def test_padded_batches_equal_single_runs(name: str, rows: Any) -> None:
    model, family = built(name), VLMS[name]
    with attnctl.patch(model, attnctl.PAI(alpha=1.0, rows=rows, first_layer=1)):
        both = generate(model, family.inputs((0, 1)), TOKENS)
        for i in (0, 1):
            alone = generate(model, family.inputs((i,)), TOKENS)[0]
            torch.testing.assert_close(both[i], alone, rtol=1e-4, atol=1e-5)
    assert (both - stock(name)).abs().max() > 1e-3


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("name", FEW)
def test_undo_after_an_exception_inside_the_model(name: str, error: type) -> None:
    model, inputs = built(name), VLMS[name].inputs()

    def fail(call: Any) -> None:
        raise error("stop")

    with pytest.raises(error), attnctl.patch(model, Watch(heads="L2", see=fail)):
        generate(model, inputs, TOKENS)
    assert torch.equal(generate(model, inputs, TOKENS), stock(name))


def test_sites() -> None:
    sites = attnctl.sites(built("llava"))
    assert [s.layer for s in sites] == [0, 1, 2]
    first = sites[0]
    assert first.name == "model.language_model.layers.0.self_attn" and first.kind == "causal"
    assert (first.heads, first.kv_heads, first.head_dim) == (4, 2, 8)
    assert len(attnctl.sites(built("llava")).select("L1H2 causal:H0", ["causal"])) == 3
    assert attnctl.sites(built("idefics3"))[0].name.startswith("model.text_model.layers")


# -- which tokens are what -------------------------------------------------------------------


def roles(model: Any, inputs: dict[str, Any], run: Callable[[], Any], role: str) -> list[Any]:
    watch = Watch(heads="L0", see=lambda call: call.spans.tokens.queries(role).tolist())
    with attnctl.patch(model, watch), torch.no_grad():
        run()
    return watch.seen


def test_several_images_and_the_question() -> None:
    model, inputs = built("llava"), VLMS["llava"].inputs((0, 2), images=2)
    ids = inputs["input_ids"]
    found = {
        role: torch.tensor(roles(model, inputs, lambda: model(**inputs), role)[0])
        for role in ("image", "text", "question", "pad", "answer")
    }
    assert torch.equal(found["image"], ids == IMAGE)
    assert torch.equal(found["pad"], inputs["attention_mask"] == 0)
    assert torch.equal(found["text"], ~found["image"] & ~found["pad"])
    after = torch.stack([torch.arange(len(r)) > (r == IMAGE).nonzero().max() for r in ids])
    assert torch.equal(found["question"], after)
    assert found["answer"].sum(1).tolist() == [1, 1] and found["answer"][:, -1].all()


def test_padding_on_the_right_of_a_bare_forward() -> None:
    model, inputs = built("llava"), VLMS["llava"].inputs((0, 1))
    lengths = inputs["attention_mask"].sum(1)
    flipped = [
        torch.stack(
            [row.roll(int(length)) for row, length in zip(inputs[k], lengths, strict=True)]
        )
        for k in ("input_ids", "attention_mask")
    ]
    inputs |= {"input_ids": flipped[0], "attention_mask": flipped[1]}
    answer = torch.tensor(roles(model, inputs, lambda: model(**inputs), "answer")[0])
    assert answer.int().argmax(1).tolist() == (lengths - 1).tolist()
    assert answer.sum(1).tolist() == [1, 1]


def test_text_alone_has_no_image() -> None:
    model = built("llava")
    inputs = {"input_ids": torch.tensor([[1, 30, 31, 32]])}
    before = generate(model, inputs, TOKENS)
    assert not any(map(any, roles(model, inputs, lambda: model(**inputs), "image")[0]))
    with attnctl.patch(model, attnctl.PAI(alpha=1.0, first_layer=0)):
        torch.testing.assert_close(generate(model, inputs, TOKENS), before)


@pytest.mark.parametrize("name", ["llava", "gemma3", "instructblip"])
def test_beams_and_sampling_follow_their_prompt(name: str) -> None:
    """Each beam is treated as the prompt it belongs to: as in a batch of that prompt alone."""
    model, family = built(name), VLMS[name]
    ask = {"max_new_tokens": 4, "min_new_tokens": 4}
    with attnctl.patch(model, attnctl.PAI(alpha=1.0, first_layer=0)), torch.no_grad():
        both = model.generate(**family.inputs(), **ask, num_beams=3)
        for i in (0, 1):
            alone = model.generate(**family.inputs((i,)), **ask, num_beams=3)
            assert torch.equal(both[i, -4:], alone[0, -4:])
        torch.manual_seed(0)
        many = model.generate(**family.inputs(), **ask, do_sample=True, num_return_sequences=2)
    assert len(many) == 4


@pytest.mark.parametrize("name", FEW)
def test_without_a_cache_the_same_rows_are_raised(name: str) -> None:
    model, inputs = built(name), VLMS[name].inputs()
    with attnctl.patch(model, attnctl.PAI(alpha=1.0, first_layer=0)):
        cached = generate(model, inputs, TOKENS)
        whole = generate(model, inputs, TOKENS, use_cache=False)
    torch.testing.assert_close(cached, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FEW)
def test_a_static_cache_gives_the_same(name: str) -> None:
    model, inputs = built(name), VLMS[name].inputs()
    with attnctl.patch(model, attnctl.PAI(alpha=1.0, first_layer=0)):
        dynamic = generate(model, inputs, TOKENS)
        static = generate(
            model, inputs, TOKENS, cache_implementation="static", disable_compile=True
        )
    torch.testing.assert_close(dynamic, static, rtol=1e-4, atol=1e-5)


def compile_forward(model: Any) -> None:
    model.forward = torch.compile(model.forward, backend="eager")


def compile_layers(model: Any) -> None:
    for layer in model.model.language_model.layers:
        layer.compile(backend="eager")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("how", "control"),
    [(compile_forward, attnctl.VCD()),
     (compile_layers, attnctl.VAR(sink_dims=(0, 1), tau=1.2, rho_nonsink=0.0))],
    ids=["forward", "layers"],
)  # fmt: skip
def test_a_patch_acts_in_a_model_that_was_compiled_and_used(how: Any, control: Any) -> None:
    """What a user compiled by hand runs eagerly, wholly or in part, while it is patched."""
    inputs, close = VLMS["llava"].inputs(), {"rtol": 1e-4, "atol": 1e-5}
    stock = generate(built("llava"), inputs, 2)
    with attnctl.patch(built("llava"), control):
        wanted = generate(built("llava"), inputs, 2)
    assert (wanted - stock).abs().max() > 1e-3
    model = VLMS["llava"].build()
    how(model)
    torch.testing.assert_close(generate(model, inputs, 2), stock, **close)
    with attnctl.patch(model, control):
        torch.testing.assert_close(generate(model, inputs, 2), wanted, **close)
    torch.testing.assert_close(generate(model, inputs, 2), stock, **close)
    torch._dynamo.reset()


def test_a_loop_by_hand_equals_generate() -> None:
    """The cache that a bare forward returns knows its prompt; a copy of it does too."""
    model, inputs = built("llava"), VLMS["llava"].inputs()
    watch = Watch(heads="L0")
    pai = attnctl.PAI(alpha=1.0, first_layer=0)
    with attnctl.patch(model, pai, watch), torch.no_grad():
        wanted = generate(model, inputs, TOKENS)
        mask, told = inputs["attention_mask"], []
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        out = model(**inputs, position_ids=positions, use_cache=True)
        for _ in range(TOKENS):
            told.append(out.logits[:, -1])
            mask = torch.cat([mask, mask[:, :1] * 0 + 1], dim=1)
            cache = copy.deepcopy(out.past_key_values)
            out = model(
                input_ids=told[-1].argmax(-1)[:, None], attention_mask=mask,
                past_key_values=cache, use_cache=True,
                position_ids=mask.sum(1, keepdim=True) - 1,
            )  # fmt: skip
    torch.testing.assert_close(torch.stack(told, 1), wanted, rtol=1e-4, atol=1e-5)
    # the answer's row once in the whole prompt and once for it, as the outer control asks
    assert len(watch.seen) == (TOKENS + 1) + (TOKENS + 2)


def test_a_second_turn_goes_on_in_the_cache() -> None:
    model, inputs = built("llava"), VLMS["llava"].inputs((0,))
    more = torch.tensor([[40, 41, 42]])
    with attnctl.patch(model, attnctl.PAI(alpha=1.0, first_layer=0)), torch.no_grad():
        first = model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, more], dim=1)
        go_on = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        seen = []
        watch = Watch(heads="L0", see=lambda c: seen.append(c.spans.tokens.queries("answer")))
        with attnctl.patch(model, watch):
            model.generate(**go_on, past_key_values=first.past_key_values, max_new_tokens=2)
    assert [s.shape[1] for s in seen] == [4, 1, 1]
    assert seen[0][0].tolist() == [False] * 3 + [True] and seen[1].all()


def test_every_generation_begins_anew() -> None:
    model, family = built("llava"), VLMS["llava"]
    watch = Watch()
    with attnctl.patch(model, attnctl.PAI(alpha=1.0), watch) as handle:
        first = generate(model, family.inputs((0,)), TOKENS)
        generate(model, family.inputs((1, 2), images=2), TOKENS)
        assert torch.equal(generate(model, family.inputs((0,)), TOKENS), first)
        assert handle.report().lines[0].steps == tuple(range(TOKENS))
    assert len(watch.begun) == 3


def test_unknown_tokens_are_an_error() -> None:
    model, inputs = built("llava"), VLMS["llava"].inputs((0,))
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        with attnctl.patch(model, attnctl.PAI()):
            with pytest.raises(attnctl.HostError, match="cache that was filled before"):
                model(input_ids=torch.tensor([[30]]), past_key_values=cache)
            embeds = model.get_input_embeddings()(torch.tensor([[30, 31]]))
            with pytest.raises(attnctl.HostError, match="without input_ids"):
                model(inputs_embeds=embeds)


# -- stack, handle, refusals -----------------------------------------------------------------


def test_order_conflicts_and_undo_in_any_order() -> None:
    model, inputs = built("llava"), VLMS["llava"].inputs()
    outer, inner = Double(heads="L1"), Double(heads="L1H0")
    first = attnctl.patch(model, outer)
    once = generate(model, inputs, TOKENS)
    second = attnctl.patch(model, inner)
    with pytest.raises(attnctl.ControlConflict, match="already in the stack"):
        attnctl.patch(model, outer)
    assert not torch.equal(generate(model, inputs, TOKENS), once)
    first.undo()
    second.undo()
    second.undo()
    assert torch.equal(generate(model, inputs, TOKENS), stock("llava"))
    assert "_attnctl" not in vars(model.model.language_model)


def test_the_decoder_alone_can_be_patched() -> None:
    model, inputs = built("llava"), VLMS["llava"].inputs()
    with attnctl.patch(model.model.language_model, Double(heads="L0")) as handle:
        inside = generate(model, inputs, TOKENS)
        assert handle.report().lines[0].sites_hit == 1
    with attnctl.patch(model, Double(heads="L0")):
        assert torch.equal(generate(model, inputs, TOKENS), inside)


def test_a_language_model_without_eyes_can_be_patched() -> None:
    transformers = pytest.importorskip("transformers")
    config = built("llava").config.text_config
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.tensor([[1, 30, 31]])
    with torch.no_grad():
        before = model(ids).logits
        with attnctl.patch(model, Double()):
            assert not torch.equal(model(ids).logits, before)
        assert torch.equal(model(ids).logits, before)


def test_the_shipped_model() -> None:
    """Trained weights, a real processor: undone exactly, changed when asked to."""
    transformers = pytest.importorskip("transformers")
    folder = attnctl.assets.path("tiny-llava")
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor = transformers.LlavaProcessor.from_pretrained(folder)
    photos = [photo.image for photo in album(2)]
    texts = ["USER: <image>\nHow many? ASSISTANT:", "USER: <image>\nIs there? ASSISTANT:"]
    inputs = processor(images=photos, text=texts, padding=True, return_tensors="pt")
    assert len(attnctl.sites(model)) == 8
    before = generate(model, inputs, TOKENS)
    with attnctl.patch(model, attnctl.PAI(alpha=0.5)) as handle:
        changed = generate(model, inputs, TOKENS)
        assert handle.report().lines[0].calls == 6 * TOKENS
    assert (changed - before).abs().amax((1, 2)).min() > 1e-3
    assert torch.equal(generate(model, inputs, TOKENS), before)


def test_copies_and_saved_files_are_stock(tmp_path: Any) -> None:
    model, inputs = VLMS["llava"].build(), VLMS["llava"].inputs()
    with attnctl.patch(model, Double()):
        twin = copy.deepcopy(model)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        model.save_pretrained(tmp_path)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    fresh = type(model).from_pretrained(tmp_path)
    fresh.generation_config = model.generation_config
    for one in (twin, loaded, fresh):
        assert type(one) is type(model)
        assert torch.equal(generate(one, inputs, TOKENS), stock("llava"))
        with attnctl.patch(one, Double()):
            assert not torch.equal(generate(one, inputs, TOKENS), stock("llava"))


def test_gradients_flow() -> None:
    model, inputs = built("llava"), VLMS["llava"].inputs((0,))
    pixels = inputs["pixel_values"].clone().requires_grad_()
    with attnctl.patch(model, attnctl.PAI(alpha=1.0, rows="text")):
        model(**{**inputs, "pixel_values": pixels}).logits[:, -1].sum().backward()
    assert pixels.grad is not None and pixels.grad.abs().max() > 0


def test_what_is_for_the_other_library_is_refused() -> None:
    model = built("llava")
    with pytest.raises(attnctl.SelectorError, match="it is for diffusion models"):
        attnctl.patch(model, attnctl.SoftPAG())
    with pytest.raises(attnctl.SelectorError, match="it is for vision-language models"):
        attnctl.patch(zoo.FAMILIES["sd3"].build(), attnctl.PAI())

    @dataclasses.dataclass(frozen=True)
    class Between(attnctl.Control):
        name: ClassVar[str] = "between"

        def between(self, call: attnctl.StepCall) -> Tensor:
            return call.latents

    with pytest.raises(attnctl.HostError, match="attention and the decode plane"):
        attnctl.patch(model, Between())
    with pytest.raises(attnctl.OptionError, match="bare denoisers"):
        attnctl.patch(model, Watch(), rows=("uncond", "cond"))
    with (
        attnctl.patch(model, Watch()) as handle,
        pytest.raises(attnctl.HostError, match="bare denoiser"),
        handle.rows("cond"),
    ):
        pass
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert torch.equal(generate(model, VLMS["llava"].inputs(), TOKENS), stock("llava"))


def test_models_without_such_a_decoder_are_refused() -> None:
    transformers = pytest.importorskip("transformers")
    small = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=32, **small))
    with pytest.raises(attnctl.HostError, match="cross-attention"):
        attnctl.patch(t5, Watch())
    eyes = built("llava").model.vision_tower
    with pytest.raises(attnctl.HostError, match="no decoder layers"):
        attnctl.patch(eyes, Watch())


def test_calls_past_the_patch_are_refused() -> None:
    model, inputs = built("llava"), VLMS["llava"].inputs()
    decoder = model.model.language_model
    embeds = torch.randn(1, 3, 32)
    with attnctl.patch(model, Watch()), pytest.raises(attnctl.HostError, match="past the patch"):
        decoder.forward(inputs_embeds=embeds)
    model = VLMS["llava"].build()
    with attnctl.patch(model, Watch()):
        model.model.language_model.config._attn_implementation_internal = "flex_attention"
        with pytest.raises(attnctl.HostError, match="set_attn_implementation"):
            generate(model, inputs, 1)


@pytest.mark.filterwarnings("ignore")
def test_compiled_after_the_patch_it_runs_eagerly() -> None:
    model, inputs = VLMS["llava"].build(), VLMS["llava"].inputs()
    with torch.no_grad(), attnctl.patch(model, attnctl.PAI(alpha=1.0)) as handle:
        wanted = model(**inputs).logits
        compiled: Any = torch.compile(model, backend="eager")
        assert torch.equal(compiled(**inputs).logits, wanted)
        assert handle.report().calls == 2
    compiled = torch.compile(VLMS["llava"].build(), backend="eager")
    with (
        attnctl.patch(compiled, attnctl.PAI(alpha=1.0)),
        pytest.raises(attnctl.HostError, match="compiled before the patch"),
    ):
        compiled(**inputs)
    torch._dynamo.reset()


@pytest.mark.parametrize("answers", [1, 2])
def test_the_ids_of_a_prompt_are_fetched_before_the_model_begins(
    answers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the vision tower, a GPU's whole work would be waited for."""
    model, inputs = VLMS["llava"].build(), VLMS["llava"].inputs((0, 1))
    order: list[Any] = []
    here = Given.here.func
    noted = lambda self: (order.append(tuple(self.ids.shape)), here(self))[1]  # noqa: E731
    found = functools.cached_property(noted)
    found.__set_name__(Given, "here")
    monkeypatch.setattr(Given, "here", found)
    monkeypatch.setattr(Given, "fetch", lambda self: self.ids.shape[1] > 1 and self.here)
    model.model.vision_tower.register_forward_pre_hook(lambda *_: order.append("tower"))
    options = {"do_sample": True, "num_return_sequences": answers, "max_new_tokens": 3}
    with attnctl.patch(model, attnctl.PAI(first_layer=0)):
        model.generate(**inputs, **options)
        batch, length = inputs["input_ids"].shape
        assert order.pop(0) == (batch, length)
        order.remove("tower")  # before the model's call in newer transformers
        # a prompt that is repeated is another tensor
        assert order == [(batch * answers, length)] * (answers > 1)
        order.clear()
        with torch.no_grad():
            model(**inputs)
        assert order == [(batch, length), "tower"]


def test_a_copy_of_the_prompt_that_says_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model that shortens it: the call's own ids count."""
    model, inputs = VLMS["llava"].build(), VLMS["llava"].inputs((0,))
    seen: list[Any] = []
    watch = Watch(see=lambda call: seen.append(call.spans.tokens.slots_here("image")[0]))
    cls, pad = type(model), 3
    stock = cls.prepare_inputs_for_generation

    def longer(self: Any, input_ids: Tensor, **kwargs: Any) -> Any:
        made = stock(self, input_ids, **kwargs)
        if made["input_ids"].shape[1] > 1:
            made["input_ids"] = torch.nn.functional.pad(made["input_ids"], (pad, 0), value=1)
            mask = torch.ones_like(made["input_ids"])
            made |= {"attention_mask": mask, "position_ids": None}
            if "cache_position" in made:  # transformers 4
                made["cache_position"] = torch.arange(mask.shape[1])
        return made

    monkeypatch.setattr(cls, "prepare_inputs_for_generation", longer)
    with attnctl.patch(model, watch):
        generate(model, inputs, 1)
    image = (inputs["input_ids"] == IMAGE)[0]
    assert seen and all(
        torch.equal(slots[pad:], image) and not slots[:pad].any() for slots in seen
    )


@pytest.mark.parametrize(("tokens", "asked"), [(5, True), (1, False)])
def test_only_the_ids_of_a_prompt_are_fetched(tokens: int, asked: bool) -> None:
    """A written token would wait for the one before it."""
    given = Given(torch.zeros(1, tokens, dtype=torch.long, device="meta"), None, {})
    with pytest.raises(NotImplementedError) if asked else nullcontext():  # meta has no data
        given.fetch()
    Given(None, None, {}).fetch()


def test_ids_that_begin_like_a_prompt() -> None:
    """Each of its rows once for every beam or answer, and no more than there are of both."""
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    prompt = Given(ids, None, {})

    def begins(other: Tensor, n: int = 9) -> bool:
        return Given(other, None, {}).begins_like(prompt, n)

    beams = ids.repeat_interleave(2, dim=0)
    assert (
        begins(ids) and begins(beams) and not begins(ids.repeat(2, 1)) and not begins(ids.flip(0))
    )
    longer = torch.nn.functional.pad(beams, (0, 2), value=7)
    assert begins(longer) and begins(ids[:, :2], 2) and not begins(ids[:1])
    changed = ids.clone()
    changed[1, 2] = 0
    assert not begins(changed) and begins(changed, 2)


def test_labels_without_ids() -> None:
    masks = {"image": torch.tensor([[0, 1, 1]]).bool(), "pad": torch.tensor([[1, 0, 0]]).bool()}
    tokens = Tokens(masks.__getitem__, masks.__getitem__)
    assert tokens.labels_there().tolist() == [[2, 1, 1]]
    assert tokens.labels_there() is tokens.labels_there()
    known = Tokens(masks.__getitem__, masks.__getitem__, labels=torch.tensor([[0, 1, 2]]))
    assert known.labels_there().tolist() == [[0, 1, 2]]
