"""The ComfyUI nodes, against a stub of the interface that ComfyUI documents.

The stub has ComfyUI's calling conventions and nothing of its code: an attention function that
gives way to an override, a model patcher, a sampler step with guidance, and V3 node classes.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import functools
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnctl
from attnctl.apps import comfy
from attnctl.apps.comfy.eligible import eligible, refusal
from attnctl.apps.comfy.nodes import node_options
from attnctl.apps.comfy.patches import Node, patched
from attnctl.apps.comfy.places import spans_in
from attnctl.errors import OptionError, SelectorError
from attnctl.records import Spans, Step
from attnctl.testing import oracles

HEADS, DIM, WIDTH = 3, 4, 12
SIGMAS = torch.tensor([9.0, 4.0, 2.0, 1.0, 0.0])

# -- the stub ------------------------------------------------------------------------------------


def overridable(function: Any) -> Any:
    """An attention backend: `transformer_options` may name an override that gets the backend."""

    @functools.wraps(function)
    def attention(*args: Any, **options: Any) -> Tensor:
        chosen = (options.get("transformer_options") or {}).get("optimized_attention_override")
        if chosen is None or options.get("_inside_attn_wrapper"):
            return function(*args, **options)
        return chosen(function, *args, **{**options, "_inside_attn_wrapper": True})

    return attention


@overridable
def backend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    attn_precision: Any = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **options: Any,
) -> Tensor:
    if not skip_reshape:
        q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    if mask is not None and mask.ndim == 3:
        mask = mask.unsqueeze(1)
    out = nn.functional.scaled_dot_product_attention(q, k, v, mask)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def linear(seed: int) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(WIDTH, 3 * WIDTH, generator=made, dtype=torch.float64) / WIDTH**0.5


class UNet:
    """Self- and cross-attention in three blocks, [B, C, 2, 3] latents, flat tensors."""

    blocks = (("input", 1), ("middle", 0), ("output", 2))
    shape = (1, WIDTH, 2, 3)

    def __call__(self, x: Tensor, context: Tensor, options: dict[str, Any]) -> Tensor:
        h = x.flatten(2).transpose(1, 2)
        for i, block in enumerate(self.blocks):
            options["block"], options["block_index"] = block, 0
            options["activations_shape"] = list(x.shape)
            for other in (None, context):
                q, k, v = project(h, h if other is None else other, i)
                h = h + backend(q, k, v, HEADS, transformer_options=options)
        return h.transpose(1, 2).unflatten(2, x.shape[2:])


@dataclasses.dataclass
class Transformer:
    """Text and image in one sequence: two double blocks, two single ones, tensors with heads.

    A text refiner comes first. `says` which tokens are image tokens.
    """

    says: bool = True
    shape: tuple[int, ...] = (1, WIDTH, 2, 3)

    def __call__(self, x: Tensor, context: Tensor, options: dict[str, Any]) -> Tensor:
        refined = backend(*project(context, context, 9), HEADS, transformer_options=options)
        h = torch.cat([context + refined, x.flatten(2).transpose(1, 2)], dim=1)
        text = context.shape[1]
        if self.says:
            options["img_slice"] = [text, h.shape[1]]
        for kind in ("double", "single"):
            options["block_type"] = kind
            for i in range(2):
                options["block_index"] = i
                q, k, v = (
                    t.unflatten(2, (HEADS, -1)).transpose(1, 2)
                    for t in project(h, h, 2 * (kind == "single") + i)
                )
                h = h + backend(
                    q, k, v, HEADS, None, skip_reshape=True, transformer_options=options
                )
        return h[:, text:].transpose(1, 2).unflatten(2, x.shape[2:])


def project(h: Tensor, other: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    matrix = linear(seed).to(h.dtype)
    q, (k, v) = h @ matrix[:, :WIDTH], (other @ matrix[:, WIDTH:]).chunk(2, -1)
    return 2 * q, k, v


class Patcher:
    """A model with options, as nodes get it; versions differ in how deep `clone` copies."""

    def __init__(self, model: Any, copied: Any = copy.copy) -> None:
        self.model, self.model_options = model, {"transformer_options": {}}
        self.copied = copied

    def clone(self) -> Patcher:
        new = Patcher(self.model, self.copied)
        new.model_options = self.copied(self.model_options)
        return new

    def set_model_sampler_post_cfg_function(self, function: Any) -> None:
        known = self.model_options.get("sampler_post_cfg_function", [])
        self.model_options["sampler_post_cfg_function"] = [*known, function]

    def set_model_unet_function_wrapper(self, function: Any) -> None:
        self.model_options["model_function_wrapper"] = function


def calc_cond_batch(
    model: Any, conds: list[Any], x: Tensor, sigma: Tensor, model_options: dict[str, Any]
) -> list[Tensor]:
    """Denoised predictions x - sigma e, each cond in a call of its own."""
    results = []
    for cond in conds:
        options = {**model_options["transformer_options"], "sigmas": sigma}
        c = {"c_crossattn": cond, "transformer_options": options}

        def apply_model(x: Tensor, timestep: Tensor, **c: Any) -> Tensor:
            e = model(x, c["c_crossattn"].expand(len(x), -1, -1), c["transformer_options"])
            return x - timestep[:, None, None, None] * e

        wrapper = model_options.get("model_function_wrapper")
        args = {"input": x, "timestep": sigma, "c": c, "cond_or_uncond": [0]}
        results.append(wrapper(apply_model, args) if wrapper else apply_model(x, sigma, **c))
    return results


def sample_step(
    patcher: Patcher, cfg: float = 2.0, step: int = 0, batch: int = 2, dtype: Any = torch.float64
) -> Tensor:
    """The guided prediction of one step."""
    x, cond, uncond = inputs(batch, patcher.model, dtype)
    options = copy.copy(patcher.model_options)
    options["transformer_options"] = {
        **options["transformer_options"],
        "sample_sigmas": SIGMAS,
    }
    sigma = SIGMAS[step].expand(batch).to(dtype)
    c, u = calc_cond_batch(patcher.model, [cond, uncond], x, sigma, options)
    out = u + cfg * (c - u)
    for function in options.get("sampler_post_cfg_function", []):
        out = function(
            {
                "denoised": out, "cond_denoised": c, "uncond_denoised": u, "cond": cond,
                "uncond": uncond, "input": x, "sigma": sigma, "model": patcher.model,
                "model_options": options, "cond_scale": cfg,
            }
        )  # fmt: skip
    return out


def inputs(batch: int, model: Any, dtype: Any = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    made = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randn, generator=made, dtype=torch.float64)
    x, cond, uncond = draw(2, *model.shape[1:]), draw(1, 5, WIDTH), draw(1, 5, WIDTH)
    return x[:batch].to(dtype), cond.to(dtype), uncond.to(dtype)


@dataclasses.dataclass
class Widget:
    kind: str
    id: str
    options: dict[str, Any]


def widget(kind: str) -> Any:
    return types.SimpleNamespace(
        Input=lambda id, **options: Widget(kind, id, options), Output=lambda: Widget(kind, "", {})
    )


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the stub's modules in the place of ComfyUI's."""
    api, latest = types.ModuleType("comfy_api"), types.ModuleType("comfy_api.latest")
    kinds = ("Model", "Float", "Int", "Boolean", "String", "Combo")
    io = types.SimpleNamespace(
        ComfyNode=type("ComfyNode", (), {}),
        Schema=lambda **fields: types.SimpleNamespace(**fields),
        NodeOutput=lambda *values: values,
        **{kind: widget(kind) for kind in kinds},
    )
    vars(latest).update(io=io, ComfyExtension=type("ComfyExtension", (), {}))
    samplers = types.ModuleType("comfy.samplers")
    vars(samplers)["calc_cond_batch"] = calc_cond_batch
    top = types.ModuleType("comfy")
    vars(top)["samplers"] = samplers
    modules = {"comfy_api": api, "comfy_api.latest": latest, "comfy": top}
    for name, module in {**modules, "comfy.samplers": samplers}.items():
        monkeypatch.setitem(sys.modules, name, module)


# -- what the formulas say -----------------------------------------------------------------------


def by_hand(model: Any, x: Tensor, cond: Tensor, attention: Any) -> Tensor:
    """One denoised prediction at the first step with attention(q, k, v, site number)."""
    numbers = iter(range(99))

    def replace(function: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **o: Any):
        if not o.get("skip_reshape"):
            q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        return attention(q, k, v, next(numbers)).transpose(1, 2).flatten(2)

    context = cond.expand(len(x), -1, -1)
    return x - SIGMAS[0] * model(x, context, {"optimized_attention_override": replace})


def stock(q: Tensor, k: Tensor, v: Tensor, site: int = 0) -> Tensor:
    return oracles.apply_map(oracles.softmax_map(q, k), v)


def extrapolated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PLADIS with lambda 2."""
    dense = stock(q, k, v)
    return dense + 2 * (oracles.apply_map(oracles.entmax15(oracles.logits(q, k)), v) - dense)


def identity_in_the_middle(q: Tensor, k: Tensor, v: Tensor, site: int) -> Tensor:
    out = stock(q, k, v)
    if site == 2:  # of (self, cross) x 3 blocks
        out[:, [0, 2]] = v[:, [0, 2]]
    return out


def flat_second_double(q: Tensor, k: Tensor, v: Tensor, site: int) -> Tensor:
    scale = 0.5 * DIM**-0.5 if site == 2 else None  # after the refiner
    return oracles.apply_map(oracles.softmax_map(q, k, scale=scale), v)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize(
    ("model", "control", "weak"),
    [
        (UNet(), attnctl.PAG(heads="middle.0:H0 middle.0:H2", scale=1.5), identity_in_the_middle),
        (
            Transformer(),
            attnctl.control("temperature", heads="double.1", scale=1.5, tau=2.0),
            flat_second_double,
        ),
    ],
    ids=["pag-unet", "temperature-transformer"],
)
def test_guidance_is_the_formula(model: Any, control: Any, weak: Any, cfg: float) -> None:
    x, cond, uncond = inputs(2, model)
    c, u = by_hand(model, x, cond, stock), by_hand(model, x, uncond, stock)
    want = u + cfg * (c - u) + 1.5 * (c - by_hand(model, x, cond, weak))
    got = sample_step(patched(Patcher(model), control), cfg)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


def test_main_pass_control_is_the_formula() -> None:
    def pladis(q: Tensor, k: Tensor, v: Tensor, site: int) -> Tensor:
        # site 5 is the cross-attention of the output block
        return extrapolated(q, k, v) if site == 5 else stock(q, k, v)

    model = UNet()
    x, cond, uncond = inputs(2, model)
    c, u = by_hand(model, x, cond, pladis), by_hand(model, x, uncond, pladis)
    got = sample_step(patched(Patcher(model), attnctl.PLADIS(heads="output")), 2.0)
    torch.testing.assert_close(got, u + 2 * (c - u), rtol=0, atol=1e-11)


# -- every eligible control ----------------------------------------------------------------------


def test_the_registry_decides() -> None:
    assert {"pag", "softpag", "uniform", "temperature", "slg", "seg", "tpg", "pladis"} <= set(
        eligible()
    )
    others = {name: refusal(cls) for name, cls in attnctl.controls().items()}
    assert {name for name, why in others.items() if why is None} == set(eligible())
    assert "language models" in str(others["pai"])
    assert "prompt" in str(others["regulation"])
    assert "denoiser" in str(others["nag"])


def test_the_page_names_them() -> None:
    page = Path(__file__).resolve().parents[1] / "docs" / "comfyui.md"
    first = page.read_text(encoding="utf-8").split("## Install")[0]
    assert set(eligible()) == set(re.findall(r"`([a-z-]+)`", first))


def acting(name: str) -> Any:
    return attnctl.control(name, start=0.0, stop=1.0)


@pytest.mark.parametrize("model", [UNet(), Transformer()], ids=["unet", "transformer"])
@pytest.mark.parametrize("name", eligible())
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["f64", "bf16"])
def test_every_control_acts_and_leaves_the_model_alone(name: str, model: Any, dtype: Any) -> None:
    base = Patcher(model)
    before = sample_step(base, dtype=dtype)
    new = patched(base, acting(name))
    if model.__class__ is Transformer and set(eligible()[name].kinds) == {"cross"}:
        with pytest.raises(SelectorError, match="cross"):
            sample_step(new, dtype=dtype)
        return
    after = sample_step(new, dtype=dtype)
    assert after.dtype == dtype and after.isfinite().all()
    assert not torch.equal(after, before)
    assert torch.equal(sample_step(base, dtype=dtype), before)
    assert base.model_options == {"transformer_options": {}}


@pytest.mark.parametrize("name", eligible())
def test_a_batch_gives_what_its_samples_give(name: str) -> None:
    new = patched(Patcher(UNet()), acting(name))
    both = sample_step(new, batch=2)
    torch.testing.assert_close(both[:1], sample_step(new, batch=1), rtol=0, atol=1e-12)


def test_neutral_is_the_stock_model() -> None:
    base = Patcher(UNet())
    new = patched(base, attnctl.PAG(scale=0))
    assert new is not base and new.model_options == base.model_options


# -- where and when ------------------------------------------------------------------------------


def logged(caplog: pytest.LogCaptureFixture, patcher: Patcher) -> str:
    with caplog.at_level("INFO", "attnctl"):
        sample_step(patcher)
    return caplog.messages[-1]


@pytest.mark.parametrize(
    ("model", "heads", "found"),
    [
        (UNet(), "middle", "3 heads at 1 of 6"),
        (UNet(), "all !output.2:H1", "8 heads at 3 of 6"),
        (Transformer(), "L1", "3 heads at 1 of 5"),
        (Transformer(), "single.0-1:H0 double.0", "5 heads at 3 of 5"),
    ],
)
def test_selectors(model: Any, heads: str, found: str, caplog: pytest.LogCaptureFixture) -> None:
    assert found in logged(caplog, patched(Patcher(model), attnctl.PAG(heads=heads)))


def test_a_selector_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(SelectorError, match=r"input\.1\.0\.attn1"):
        sample_step(patched(Patcher(UNet()), attnctl.PAG(heads="double.3")))


def test_window() -> None:
    base = Patcher(UNet())
    new = patched(base, attnctl.PAG(start=0.5, stop=1))
    same = [torch.equal(sample_step(new, step=i), sample_step(base, step=i)) for i in range(4)]
    assert same == [True, True, False, False]
    new = patched(base, attnctl.PAG(sigmas=(4.0, 1.0)))
    same = [torch.equal(sample_step(new, step=i), sample_step(base, step=i)) for i in range(4)]
    assert same == [True, False, False, True]


def test_unknown_image_tokens_are_refused() -> None:
    with pytest.raises(attnctl.AttnctlError, match="not known"):
        sample_step(patched(Patcher(Transformer(says=False)), attnctl.TPG()))


def test_attention_past_the_override_is_an_error() -> None:
    def deaf(x: Tensor, context: Tensor, options: dict[str, Any]) -> Tensor:
        return UNet()(x, context, {})

    deaf.shape = UNet.shape  # type: ignore[attr-defined]
    with pytest.raises(attnctl.AttnctlError, match="past ComfyUI's"):
        sample_step(patched(Patcher(deaf), attnctl.PAG()))


@pytest.mark.parametrize("control", [attnctl.PAG(heads="middle"), attnctl.PLADIS()])
def test_an_override_put_over_ours_is_an_error(control: Any) -> None:
    """Such as that of a node which sets another backend for the whole model."""
    new = patched(Patcher(UNet()), control)
    sample_step(new)  # the sites are known from here on
    inside = new.model_options["transformer_options"]
    inside["optimized_attention_override"] = lambda function, *args, **o: function(*args, **o)
    with pytest.raises(attnctl.AttnctlError, match="no attention call reached it"):
        sample_step(new)


def test_a_video_grid_says_that_all_tokens_are_image_tokens() -> None:
    spans = spans_in({"block_index": 0, "grid_sizes": (2, 2, 3)}, "joint", 12, 12)
    assert spans == Spans((("image", 0, 12),), (("image", 0, 12),), (2, 2, 3))
    assert spans_in({"block_index": 0, "grid_sizes": (2, 2, 3)}, "joint", 17, 17) == Spans((), ())


# -- composition ---------------------------------------------------------------------------------


def test_an_earlier_override_goes_on_working() -> None:
    calls = []

    def half(function: Any, *args: Any, **options: Any) -> Tensor:
        calls.append(options["transformer_options"]["block"])
        return function(*args, **options) / 2

    def half_by_hand(q: Tensor, k: Tensor, v: Tensor, site: int) -> Tensor:
        return stock(q, k, v) / 2

    def weak(q: Tensor, k: Tensor, v: Tensor, site: int) -> Tensor:
        return v if site == 2 else stock(q, k, v) / 2

    model = UNet()
    base = Patcher(model)
    base.model_options["transformer_options"]["optimized_attention_override"] = half
    got = sample_step(patched(base, attnctl.PAG(heads="middle", scale=1)), 1.0)
    x, cond, _ = inputs(2, model)
    c = by_hand(model, x, cond, half_by_hand)
    torch.testing.assert_close(got, 2 * c - by_hand(model, x, cond, weak), rtol=0, atol=1e-11)
    assert len(calls) == 18


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_two_guidances_add_up_in_any_order(copied: Any) -> None:
    base = Patcher(UNet(), copied)
    a, b = attnctl.PAG(heads="middle"), attnctl.SLG(start=0, stop=1)
    plain = sample_step(base)
    terms = [sample_step(patched(base, control)) - plain for control in (a, b)]
    for first, second in ((a, b), (b, a)):
        got = sample_step(patched(patched(base, first), second))
        torch.testing.assert_close(got, plain + sum(terms), rtol=0, atol=1e-10)


def test_an_earlier_wrapper_goes_on_working() -> None:
    def doubled(apply_model: Any, args: dict[str, Any]) -> Tensor:
        return 2 * apply_model(args["input"], args["timestep"], **args["c"])

    control, base = attnctl.PLADIS(), Patcher(UNet())
    want = 2 * sample_step(patched(base, control))
    base.set_model_unet_function_wrapper(doubled)
    torch.testing.assert_close(sample_step(patched(base, control)), want)


def test_main_pass_control_acts_in_perturbed_passes_too() -> None:
    base = patched(Patcher(UNet()), attnctl.PLADIS())
    model, (x, cond, _) = UNet(), inputs(2, UNet())

    def both(q: Tensor, k: Tensor, v: Tensor, site: int) -> Tensor:
        if site % 2:
            return extrapolated(q, k, v)
        return v if site == 2 else stock(q, k, v)

    c = sample_step(base, 1.0)
    got = sample_step(patched(base, attnctl.PAG(heads="middle", scale=1)), 1.0)
    want = 2 * c - by_hand(model, x, cond, both)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


# -- layouts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("flat_out", [True, False])
@pytest.mark.parametrize("shape", [(7, 7), (2, 7, 7), (2, 1, 7, 7)])
@pytest.mark.parametrize("bias", [True, False])
def test_layouts_and_masks(flat: bool, flat_out: bool, shape: tuple[int, ...], bias: bool) -> None:
    made = torch.Generator().manual_seed(1)
    q, k, v = torch.randn(3, 2, HEADS, 7, DIM, generator=made, dtype=torch.float64)
    mask = torch.randn(shape, generator=made, dtype=torch.float64)
    mask = mask if bias else (mask > 0) | torch.eye(7, dtype=torch.bool)
    node = Node(attnctl.control("uniform", heads="double.0:H1"), None, None)
    options = {"block_type": "double", "block_index": 0, node.key: Step(0, 4)}
    given = [x.transpose(1, 2).flatten(2) if flat else x for x in (q, k, v)]
    got = node.attend(
        backend, *given, HEADS, mask, skip_reshape=not flat, skip_output_reshape=not flat_out,
        transformer_options=options,
    )  # fmt: skip
    got = got.unflatten(2, (HEADS, -1)).transpose(1, 2) if flat_out else got
    four = mask[None, None] if mask.ndim == 2 else mask[:, None] if mask.ndim == 3 else mask
    want = oracles.apply_map(oracles.softmax_map(q, k, four), v)
    want[:, 1] = oracles.apply_map(oracles.softmax_map(0 * q, k, four), v)[:, 1]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


# -- the nodes -----------------------------------------------------------------------------------


@pytest.fixture
def nodes() -> Iterator[dict[str, Any]]:
    extension = asyncio.run(comfy.comfy_entrypoint())
    classes = asyncio.run(extension.get_node_list())
    yield {cls.define_schema().node_id: cls for cls in classes}


def test_every_option_is_a_widget_with_its_default(nodes: dict[str, Any]) -> None:
    assert set(nodes) == {f"attnctl_{name}" for name in eligible()}
    for name, cls in eligible().items():
        schema = nodes[f"attnctl_{name}"].define_schema()
        model, *widgets = schema.inputs
        assert model.kind == "Model" and schema.outputs[0].kind == "Model"
        assert [w.id for w in widgets] == [f.name for f in node_options(cls)]
        assert all(w.options["tooltip"] for w in widgets), name
        # the widgets' defaults make the control's defaults
        _, made = nodes[schema.node_id], {w.id: w.options["default"] for w in widgets}
        assert attnctl.control(name, **made) == cls()


def test_a_node_patches_a_clone(nodes: dict[str, Any]) -> None:
    base = Patcher(UNet())
    node = nodes["attnctl_softpag"]
    (new,) = node.execute(model=base, heads="middle", scale=2.0, u=0.25, sigmas="9-1")
    want = patched(base, attnctl.SoftPAG(heads="middle", scale=2.0, u=0.25, sigmas=(9, 1)))
    assert torch.equal(sample_step(new), sample_step(want))
    with pytest.raises(OptionError, match="u=2"):
        node.execute(model=base, u=2.0)


def test_the_pack_needs_no_diffusers() -> None:
    """ComfyUI's Python need not have what the pipelines need."""
    absent = ["diffusers", "transformers", "accelerate", "safetensors", "typer", "tqdm"]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent}))\n"
        "from attnctl.apps.comfy import comfy_entrypoint\n"
        "from attnctl.apps.comfy.eligible import eligible\n"
        "assert 'pag' in eligible()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
