"""PAG beside diffusers' own: its attention processors, and its whole PAG pipelines."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

import attnctl
from attnctl.testing import zoo
from attnctl.testing.calls import attention_call, joint_spans

processors = pytest.importorskip("diffusers.models.attention_processor")

ROUNDING = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def built(name: str) -> Any:
    return zoo.FAMILIES[name].build()


# -- one module ------------------------------------------------------------------------------


def split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


@pytest.mark.parametrize("tokens", [35, 63])
@pytest.mark.parametrize("cfg", [True, False])
def test_image_block_equals_the_self_attention_processors(cfg, tokens):
    torch.manual_seed(0)
    module = processors.Attention(query_dim=24, heads=3, dim_head=8).double().eval()
    x = torch.randn(6 if cfg else 4, tokens, 24, dtype=torch.float64)
    name = f"PAG{'CFG' if cfg else ''}IdentitySelfAttnProcessor2_0"
    with torch.no_grad():
        want = getattr(processors, name)()(module, x)
        q, k, v = (split_heads(p(x), 3) for p in (module.to_q, module.to_k, module.to_v))
        groups = ("uncond", "cond", "pag/0")[0 if cfg else 1 :]
        call = attention_call(q, k, v, groups=groups, role="pag/0")
        out = attnctl.PAG(block="image").attend(call)
        got = module.to_out[0](out.transpose(1, 2).flatten(2))
    torch.testing.assert_close(got, want, atol=1e-13, rtol=0)


@pytest.mark.parametrize("image,text", [(35, 11), (63, 5)])
@pytest.mark.parametrize("cfg", [True, False])
def test_image_logit_block_equals_the_joint_processors(cfg, image, text):
    torch.manual_seed(0)
    module = processors.Attention(
        query_dim=24, added_kv_proj_dim=24, heads=3, dim_head=8, out_dim=24,
        context_pre_only=False, bias=True,
    ).double().eval()  # fmt: skip
    rows = 6 if cfg else 4
    x = torch.randn(rows, image, 24, dtype=torch.float64)
    y = torch.randn(rows, text, 24, dtype=torch.float64)
    name = f"PAG{'CFG' if cfg else ''}JointAttnProcessor2_0"
    with torch.no_grad():
        want = getattr(processors, name)()(module, x, y)
        streams = ("to_q", "add_q_proj"), ("to_k", "add_k_proj"), ("to_v", "add_v_proj")
        q, k, v = (
            split_heads(torch.cat([getattr(module, a)(x), getattr(module, b)(y)], 1), 3)
            for a, b in streams
        )
        groups = ("uncond", "cond", "pag/0")[0 if cfg else 1 :]
        call = attention_call(
            q, k, v, kind="joint", groups=groups, role="pag/0", spans=joint_spans(image, text)
        )
        out = attnctl.PAG(block="image_logit").attend(call).transpose(1, 2).flatten(2)
        got = module.to_out[0](out[:, :image]), module.to_add_out(out[:, image:])
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-13, rtol=0)


# -- whole pipelines ---------------------------------------------------------------------------


def pag_pipeline(name: str, pipe: Any, layers: list[str]) -> Any:
    """diffusers' PAG pipeline on the components of a stock one."""
    cls = zoo.core.need(name)
    parts = {**pipe.components, "pag_applied_layers": layers, "requires_safety_checker": False}
    unet = parts.pop("unet", None)  # put in later: __init__ wants a square sample_size
    known = inspect.signature(cls.__init__).parameters
    made = cls(**{"unet": None} if unet else {}, **{k: v for k, v in parts.items() if k in known})
    if unet is not None:
        made.register_modules(unet=unet)
    made.set_progress_bar_config(disable=True)
    return made


def theirs(pipe: Any, made: Any, **kwargs: Any) -> Tensor:
    """Latents of the PAG pipeline, called as the stock one is."""
    cfg = kwargs.pop("cfg")
    call = zoo.get_family(pipe).call(pipe, cfg=cfg, steps=3)
    processor = dict(_denoiser(pipe).attn_processors)
    try:
        with torch.no_grad():
            return made(**{**call, **kwargs}, return_dict=False)[0]
    finally:
        _denoiser(pipe).set_attn_processor(processor)


def _denoiser(pipe: Any) -> Any:
    return getattr(pipe, "unet", None) or pipe.transformer


def ours(pipe: Any, control: Any, cfg: bool) -> Tensor:
    with attnctl.patch(pipe, control) as handle:
        latents = zoo.run(pipe, cfg=cfg, steps=3)
        assert handle.report().calls > 0
    return latents


def compare(got: Tensor, want: Tensor, stock: Tensor) -> None:
    torch.testing.assert_close(got, want, **ROUNDING)
    assert (want - stock).norm() > 1e-2 * stock.norm()


@pytest.mark.parametrize("passes", ["rows", "calls"])
@pytest.mark.parametrize("cfg", [True, False])
def test_sd1_equals_the_pag_pipeline(cfg, passes):
    pipe = built("sd1")
    made = pag_pipeline("StableDiffusionPAGPipeline", pipe, ["mid"])
    want = theirs(pipe, made, cfg=cfg, pag_scale=3.0)
    got = ours(pipe, attnctl.PAG(heads="mid", scale=3.0, passes=passes), cfg)
    compare(got, want, zoo.run(pipe, cfg=cfg, steps=3))


@pytest.mark.parametrize("cfg", [True, False])
def test_sd1_equals_the_pag_pipeline_with_adaptive_scale(cfg):
    pipe = built("sd1")
    made = pag_pipeline("StableDiffusionPAGPipeline", pipe, ["mid"])
    want = theirs(pipe, made, cfg=cfg, pag_scale=3.0, pag_adaptive_scale=0.005)
    got = ours(pipe, attnctl.PAG(heads="mid", scale=3.0, adaptive=0.005), cfg)
    compare(got, want, zoo.run(pipe, cfg=cfg, steps=3))


@pytest.mark.parametrize("cfg", [True, False])
def test_sdxl_equals_the_pag_pipeline(cfg):
    pipe = built("sdxl")
    made = pag_pipeline("StableDiffusionXLPAGPipeline", pipe, ["mid", "up"])
    want = theirs(pipe, made, cfg=cfg, pag_scale=2.0)
    got = ours(pipe, attnctl.PAG(heads="mid up", scale=2.0), cfg)
    compare(got, want, zoo.run(pipe, cfg=cfg, steps=3))


@pytest.mark.parametrize("cfg", [True, False])
def test_sd3_equals_the_pag_pipeline(cfg):
    pipe = built("sd3")
    made = pag_pipeline("StableDiffusion3PAGPipeline", pipe, [r"transformer_blocks\.1\."])
    want = theirs(pipe, made, cfg=cfg, pag_scale=3.0)
    control = attnctl.PAG(heads="transformer_blocks.1", scale=3.0, block="image_logit")
    compare(ours(pipe, control, cfg), want, zoo.run(pipe, cfg=cfg, steps=3))


@pytest.mark.parametrize("cfg", [True, False])
def test_pixart_equals_the_pag_pipeline(cfg):
    pipe = built("pixart")
    made = pag_pipeline("PixArtSigmaPAGPipeline", pipe, [r"blocks\.1\."])
    want = theirs(pipe, made, cfg=cfg, pag_scale=3.0)
    got = ours(pipe, attnctl.PAG(heads="transformer_blocks.1", scale=3.0), cfg)
    compare(got, want, zoo.run(pipe, cfg=cfg, steps=3))
