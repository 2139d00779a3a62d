"""Written tokens of a patched decoder in compiled code: as eager, in one graph, undone exactly."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import inspect
import weakref
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
import transformers
from torch import Tensor

import attnctl
import attnctl.assets
from attnctl.assets.world.evaluation import album
from attnctl.schedule import Schedule, Window
from attnctl.testing.vlms import VLMS, generate

torch.set_num_threads(1)
TOKENS = 4
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
PAI = attnctl.PAI(alpha=1.0, first_layer=0)
SOME = attnctl.PAI(heads="L0 L1H1 L2H0", alpha=1.5, first_layer=0)
VAR = attnctl.VAR(sink_dims=(0, 1), tau=1.2, rho_nonsink=0.0, image_mass=0.1)


@pytest.fixture(autouse=True)
def no_compiled_code() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Graphs:
    """Compiles nothing, and notes the graphs that it was given."""

    def __init__(self, fullgraph: bool = True) -> None:
        self.made: list[torch.fx.GraphModule] = []
        self.stop = False

        def compiler(graph: torch.fx.GraphModule, example: Any) -> Any:
            self.made.append(graph)

            def run(*inputs: Any) -> Any:
                if self.stop:
                    raise KeyboardInterrupt
                return graph.forward(*inputs)

            return run

        how = transformers.CompileConfig(backend=compiler, fullgraph=fullgraph, mode=None)
        how._compile_all_devices = True  # as it does on a GPU
        self.static = {"cache_implementation": "static", "compile_config": how}

    def edits(self) -> list[int]:
        """Return the number of edited rows in each graph."""
        edited = torch.ops.attnctl.edited_row.default
        return [sum(node.target is edited for node in g.graph.nodes) for g in self.made]


@functools.cache
def built(name: str) -> Any:
    return VLMS[name].build()


def held(model: Any) -> dict[str, Any]:
    names = {n: {k for k in vars(m) if "attnctl" in k} for n, m in model.named_modules()}
    return {n: (type(m), names[n]) for n, m in model.named_modules()}


# -- the same as eager -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "control"),
    [("llava", SOME), ("llava", VAR), ("qwen2.5-vl", VAR), ("instructblip", SOME)],
)
def test_one_graph_for_all_prompts_equals_eager(name: str, control: Any) -> None:
    """Padded rows, other pictures in other places, undone and patched again."""
    model, graphs = VLMS[name].build(), Graphs()
    prompts = [VLMS[name].inputs((0, 1)), VLMS[name].inputs((4, 3))]  # padding changes its row
    stocks = [generate(model, inputs, TOKENS) for inputs in prompts]
    before = held(model)
    for _ in range(2):
        with attnctl.patch(model, control) as handle:
            for inputs, stock in zip(prompts, stocks, strict=True):
                wanted = generate(model, inputs, TOKENS)
                calls = handle.report().calls
                assert (wanted - stock).abs().amax((0, 2)).min() > 1e-3  # at every token
                found = generate(model, inputs, TOKENS, **graphs.static)
                torch.testing.assert_close(found, wanted, **CLOSE)
                assert handle.report().calls == calls + TOKENS * (3 if control is SOME else 2)
                assert handle.report().lines[0].steps == tuple(range(TOKENS))
        assert graphs.edits() == [3 if control is SOME else 2]
        assert held(model) == before and "_compiled_call" not in vars(model)
        for inputs, stock in zip(prompts, stocks, strict=True):
            assert torch.equal(generate(model, inputs, TOKENS), stock)


def test_the_shipped_model() -> None:
    folder = attnctl.assets.path("tiny-llava")
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor = transformers.LlavaProcessor.from_pretrained(folder)
    dims = {"sink_dims": (0, 1), "tau": 1.0, "rho_nonsink": 0.0, "image_mass": 0.01}
    early, late = attnctl.PAI(alpha=0.5, last_layer=3), attnctl.VAR(first_layer=4, **dims)
    texts = ["USER: <image>\nHow many? ASSISTANT:", "USER: <image>\nIs there? ASSISTANT:"]
    images = [photo.image for photo in album(2)]
    inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
    stock, graphs = generate(model, inputs, 3), Graphs()
    with attnctl.patch(model, early):
        without = generate(model, inputs, 3)
    with attnctl.patch(model, early, late):
        wanted = generate(model, inputs, 3)
        found = generate(model, inputs, 3, **graphs.static)
    assert (wanted - without).abs().amax((0, 2)).min() > 1e-3
    assert (without - stock).abs().amax((0, 2)).min() > 1e-3
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    assert graphs.edits() == [5]


def test_what_generate_compiled_before_is_there_after() -> None:
    """The stock model's compiled call is neither used nor lost, to the bit."""
    model, inputs, graphs = VLMS["llava"].build(), VLMS["llava"].inputs(), Graphs()
    stock = generate(model, inputs, TOKENS, **graphs.static)
    kept = model._compiled_call
    with attnctl.patch(model, PAI):
        wanted = generate(model, inputs, TOKENS)
        found = generate(model, inputs, TOKENS, **graphs.static)
        assert model._compiled_call is kept
    torch.testing.assert_close(found, wanted, **CLOSE)
    assert torch.equal(generate(model, inputs, TOKENS, **graphs.static), stock)
    assert graphs.edits() == [0, 3]


def test_batches_of_other_sizes_and_several_answers() -> None:
    """Shapes compile anew as those of the stock model do, and each is right."""
    model, graphs = built("llava"), Graphs()
    several = {"do_sample": True, "num_return_sequences": 3}
    with attnctl.patch(model, VAR):
        for samples, ask in (((0, 1, 2), {}), ((1,), {}), ((2, 0, 1), {}), ((0,), several)):
            inputs = VLMS["llava"].inputs(samples)
            found = []
            for how in ({}, graphs.static):
                torch.manual_seed(0)
                found.append(generate(model, inputs, TOKENS, **ask, **how))
            torch.testing.assert_close(found[1], found[0], **CLOSE)
    assert len(graphs.made) <= 3


def test_two_answers_in_turn_keep_their_own_prompts() -> None:
    """The tensors of one form are filled again whenever the sequence changes."""
    model, graphs = built("llava"), Graphs()
    prompts = [VLMS["llava"].inputs((0, 1)), VLMS["llava"].inputs((1, 0))]
    with attnctl.patch(model, PAI), torch.no_grad():
        wanted = [generate(model, inputs, 3) for inputs in prompts]
        room = prompts[0]["input_ids"].shape[1] + 3
        call = model.get_compiled_call(graphs.static["compile_config"])
        outs, caches, masks, more = [], [], [], {}
        for inputs in prompts:
            caches.append(transformers.StaticCache(model.config.text_config, max_cache_len=room))
            positions = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
            outs.append([model(**inputs, past_key_values=caches[-1], position_ids=positions)])
            masks.append(inputs["attention_mask"])
        for step in range(2):
            for i in (0, 1):
                if "cache_position" in inspect.signature(type(model).forward).parameters:
                    more = {"cache_position": torch.tensor([room - 3 + step])}
                masks[i] = torch.cat([masks[i], torch.ones_like(masks[i][:, :1])], dim=1)
                ids = outs[i][-1].logits[:, -1:].argmax(-1)
                outs[i].append(
                    call(
                        input_ids=ids, attention_mask=masks[i], past_key_values=caches[i],
                        position_ids=masks[i].sum(1, keepdim=True) - 1, return_dict=True, **more,
                    )
                )  # fmt: skip
    for found, each in zip(outs, wanted, strict=True):
        logits = torch.stack([out.logits[:, -1] for out in found], dim=1)
        torch.testing.assert_close(logits, each, **CLOSE)
    assert sum(graphs.edits()) > 0


def test_two_patched_models_and_several_controls() -> None:
    """One control of them works on logits: around compiled code, as around eager code."""
    inputs, graphs = VLMS["llava"].inputs(), Graphs()
    first, second = VLMS["llava"].build(), VLMS["llava"].build()
    early = attnctl.PAI(alpha=2.0, first_layer=0, last_layer=0)
    late = dataclasses.replace(VAR, first_layer=1)
    with attnctl.patch(first, PAI), attnctl.patch(second, attnctl.M3ID(), early, late):
        for model in (first, second, first):
            wanted = generate(model, inputs, TOKENS)
            found = generate(model, inputs, TOKENS, **graphs.static)
            torch.testing.assert_close(found, wanted, **CLOSE)
    assert graphs.edits() == [3, 2]


@dataclasses.dataclass(frozen=True)
class Early(attnctl.PAI):
    """Acts on the first forwards only."""

    name: ClassVar[str] = "early"

    @property
    def schedule(self) -> Schedule:
        return Schedule((Window(0, 2, "step"),))


def test_who_acts_changes_from_token_to_token() -> None:
    """Another set of controls that act is another form."""
    model, inputs, graphs = built("llava"), VLMS["llava"].inputs(), Graphs()
    early = Early(alpha=2.0, first_layer=0, last_layer=1)
    with attnctl.patch(model, early, attnctl.PAI(alpha=1.0, first_layer=2)) as handle:
        wanted = generate(model, inputs, TOKENS)
        found = generate(model, inputs, TOKENS, **graphs.static)
        assert [line.steps for line in handle.report().lines] == [(0, 1), tuple(range(TOKENS))]
    torch.testing.assert_close(found, wanted, **CLOSE)
    assert graphs.edits() == [3, 1]


# -- what stays eager ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Double(attnctl.Control):
    """Doubles what attention gives: no edit of weights."""

    name: ClassVar[str] = "double"
    kinds: ClassVar[tuple[str, ...]] = ("causal",)

    def attend(self, call: attnctl.AttentionCall) -> Tensor:
        return 2 * call.proceed()


@dataclasses.dataclass(frozen=True)
class Others(attnctl.PAI):
    """Raises other keys."""

    name: ClassVar[str] = "others"

    def raised(self, tokens: Any) -> Tensor:
        return tokens.keys("text")


@pytest.mark.parametrize(
    "stack",
    [(Double(),), (Double(), PAI), (Others(alpha=1.0, first_layer=0),)],
    ids=["another", "two at a site", "a subclass"],
)
def test_what_is_no_edit_of_a_row_runs_eagerly(stack: tuple[Any, ...]) -> None:
    model, inputs, graphs = built("llava"), VLMS["llava"].inputs(), Graphs()
    with attnctl.patch(model, *stack):
        wanted = generate(model, inputs, TOKENS)
        found = generate(model, inputs, TOKENS, **graphs.static)
    torch.testing.assert_close(found, wanted, **CLOSE)
    assert graphs.made == []


def test_eager_attention_runs_eagerly() -> None:
    model, graphs = VLMS["llava"].build(attention="eager"), Graphs()
    inputs = VLMS["llava"].inputs()
    with attnctl.patch(model, PAI):
        wanted = generate(model, inputs, TOKENS)
        found = generate(model, inputs, TOKENS, **graphs.static)
    torch.testing.assert_close(found, wanted, **CLOSE)
    assert graphs.made == []


def test_a_window_that_moves_runs_eagerly() -> None:
    """Where a key's place changes from token to token; before that, it is compiled."""
    family, graphs = VLMS["gemma3"], Graphs()
    inputs = family.inputs((0,))
    n = inputs["input_ids"].shape[1]
    model = family.build()
    model.config.text_config.sliding_window = n + 1
    model.model.language_model.config.sliding_window = n + 1
    for layer in model.model.language_model.layers:
        if layer.self_attn.sliding_window is not None:
            layer.self_attn.sliding_window = n + 1
    with attnctl.patch(model, PAI):
        wanted = generate(model, inputs, 3)
        found = generate(model, inputs, 3, **graphs.static)
    torch.testing.assert_close(found, wanted, **CLOSE)
    assert graphs.edits() == [family.layers]


# -- when something goes wrong ---------------------------------------------------------------


def test_after_an_exception_and_after_the_model() -> None:
    model, inputs, graphs = VLMS["llava"].build(), VLMS["llava"].inputs(), Graphs()
    stock = generate(model, inputs, TOKENS)
    with attnctl.patch(model, PAI):
        lookup = model.model.language_model.__dict__["_attnctl"].compiled.lookup
        wanted = generate(model, inputs, TOKENS)
        graphs.stop = True
        with pytest.raises(KeyboardInterrupt):
            generate(model, inputs, TOKENS, **graphs.static)
        assert lookup.form is None  # what a user compiles by hand is not taken for a form
        assert torch.equal(generate(model, inputs, TOKENS), wanted)
        graphs.stop = False
        with torch.no_grad():
            out = model.generate(
                **inputs, max_new_tokens=TOKENS, min_new_tokens=TOKENS, output_logits=True,
                return_dict_in_generate=True, **graphs.static,
            )  # fmt: skip
        torch.testing.assert_close(torch.stack(out.logits, dim=1), wanted, **CLOSE)
        known = out.past_key_values.__dict__["_attnctl"]
        assert len(known.fillings) == 1
        assert not copy.deepcopy(out.past_key_values).__dict__["_attnctl"].fillings
    assert torch.equal(generate(model, inputs, TOKENS), stock)
    gone = weakref.ref(model)
    del model, out, known, lookup
    torch._dynamo.reset()
    graphs.made.clear()
    gc.collect()
    assert gone() is None  # what was compiled for it has not kept it


def test_code_that_torch_runs_eagerly_after_all() -> None:
    """Past a recompile limit or by a stance: the same results, and every call counted once."""
    model, inputs, graphs = built("llava"), VLMS["llava"].inputs(), Graphs(fullgraph=False)
    with attnctl.patch(model, VAR) as handle:
        wanted = generate(model, inputs, TOKENS)
        calls = handle.report().calls
        with torch.compiler.set_stance("force_eager"):
            found = generate(model, inputs, TOKENS, **graphs.static)
        assert handle.report().calls == 2 * calls
    torch.testing.assert_close(found, wanted, **CLOSE)
    assert graphs.made == []
