"""What only a CUDA device can show: its kernels, CUDA graphs, offloading."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnctl
from attnctl.kernels import BlockMask, block_sparse_attention, block_sparse_backend
from attnctl.testing import zoo
from attnctl.testing.blocks import exact, poisoned, random_blocks, random_map
from attnctl.testing.calls import tensors

pytestmark = pytest.mark.gpu
FAMILIES = ["sd1", "sdxl", "sd3", "sd35", "flux", "qwenimage", "wan", "hunyuanvideo", "mochi"]


def call(pipe: Any, dtype: torch.dtype = torch.float32, **options: Any) -> torch.Tensor:
    made = zoo.get_family(pipe).call(pipe, **options)
    return pipe(**zoo.placed(made, "cuda", dtype))[0].cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_neutral_undo_and_effect(name: str, dtype: torch.dtype) -> None:
    pipe = zoo.FAMILIES[name].build().to("cuda", dtype)
    before = call(pipe, dtype)
    with attnctl.patch(pipe, attnctl.SoftPAG(scale=0.0)):
        assert torch.equal(call(pipe, dtype), before)
    with attnctl.patch(pipe, attnctl.SoftPAG()):
        assert not torch.equal(call(pipe, dtype), before)
    assert torch.equal(call(pipe, dtype), before)


@pytest.mark.parametrize("name", FAMILIES)
def test_same_as_on_the_cpu(name: str) -> None:
    pipe = zoo.FAMILIES[name].build()
    with attnctl.patch(pipe, attnctl.SoftPAG(scale=0.5)):
        expected = zoo.run(pipe)
        found = call(pipe.to("cuda"))
    assert (found - expected).norm() / expected.norm() < 2e-2


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("name", ["sd3", "flux", "wan", "sd1"])
def test_compiled_equals_eager_and_follows_changes(name: str, mode: str) -> None:
    """CUDA graphs must not freeze what a control does at another step or after undo."""
    torch._dynamo.reset()
    # with CUDA graphs a second call overwrites the output of the first, so stock pipelines that
    # call the denoiser twice a step go wrong by themselves: there without guidance
    options = {"steps": 4, "cfg": mode == "default" or zoo.FAMILIES[name].cfg == "batched"}
    pipe = zoo.FAMILIES[name].build().to("cuda")
    control = attnctl.SoftPAG(scale=0.5, stop=0.5)
    stock = call(pipe, **options)
    handle = attnctl.patch(pipe, control)
    eager = call(pipe, **options)
    for attr in zoo.FAMILIES[name].denoisers:
        getattr(pipe, attr).compile(mode=mode, fullgraph=True)
    for _ in range(3):
        compiled = call(pipe, **options)
    assert (compiled - eager).norm() / eager.norm() < 1e-2
    assert (compiled - stock).norm() > 10 * (compiled - eager).norm()
    handle.undo()
    back = call(pipe, **options)
    assert (back - stock).norm() / stock.norm() < 1e-2


@pytest.mark.parametrize("how", ["model", "sequential", "group"])
@pytest.mark.parametrize("first", ["patch", "offload"])
def test_cpu_offload(how: str, first: str) -> None:
    pipe = zoo.FAMILIES["sd3"].build()
    with attnctl.patch(pipe, attnctl.SoftPAG(scale=0.5)):
        expected = call(pipe.to("cuda"))
    pipe = zoo.FAMILIES["sd3"].build()
    control = attnctl.SoftPAG(scale=0.5)
    if first == "patch":
        attnctl.patch(pipe, control)
    if how == "model":
        pipe.enable_model_cpu_offload()
    elif how == "sequential":
        pipe.enable_sequential_cpu_offload()
    else:
        pipe.transformer.enable_group_offload(
            onload_device=torch.device("cuda"), offload_type="leaf_level"
        )
        pipe.vae.to("cuda")
    if first == "offload":
        attnctl.patch(pipe, control)
    torch.testing.assert_close(call(pipe), expected, rtol=1e-3, atol=1e-3)


def test_memory_stays_that_of_one_more_row() -> None:
    """No N x N map: at 4096 tokens a perturbed row costs no more than a stock row."""
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=128, num_layers=2, num_attention_heads=8, caption_projection_dim=512,
        pos_embed_max_size=192,
    ).to("cuda", torch.bfloat16)  # fmt: skip

    def peak(rows: int) -> int:
        torch.cuda.reset_peak_memory_stats()
        with torch.no_grad():
            model(
                hidden_states=torch.randn(rows, 16, 128, 128, device="cuda").bfloat16(),
                encoder_hidden_states=torch.randn(rows, 333, 4096, device="cuda").bfloat16(),
                pooled_projections=torch.randn(rows, 2048, device="cuda").bfloat16(),
                timestep=torch.full((rows,), 500.0, device="cuda"),
            )
        return torch.cuda.max_memory_allocated()

    stock = peak(3)
    for control in (attnctl.SoftPAG(), attnctl.SEG(sigma=4.0), attnctl.PAG(block="image_logit")):
        with attnctl.patch(model, control, rows=("uncond", "cond")):
            used = peak(2)
        # one row's 4096 x 4429 map for 8 heads in bf16 would be 290 MB
        assert used - stock < 200 * 2**20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("kind", ["blocks", "partial", "heads", "all"])
@pytest.mark.parametrize("backend", ["gluon", "triton", "flex", "fa4"])
def test_block_sparse_backends(backend: str, kind: str, width: int, dtype: torch.dtype) -> None:
    """Against explicit float64 maps, at most twice the error of stock attention."""
    nq, nk = 500, 717
    mask = {
        "blocks": lambda: random_blocks(nq, nk, 128),
        "partial": lambda: BlockMask.from_dense(random_map(nq, nk, block=64), 128),
        "heads": lambda: random_blocks(nq, nk, 128, 2, 4),
        "all": lambda: BlockMask.full(nq, nk),
    }[kind]()
    q, k, v = (x.to("cuda") for x in tensors(2, 4, nq, width, keys=nk, kv_heads=2, dtype=dtype))
    try:
        block_sparse_backend(q, k, v, mask.to("cuda"), backend)
    except ValueError as error:
        pytest.skip(str(error))
    last = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    # torch.compile, which FlexAttention needs, does not bear poisoned memory: compile before
    block_sparse_attention(q, k, v, mask, backend=backend)
    with poisoned():
        runs = [
            block_sparse_attention(q, k, v, mask, return_lse=True, backend=backend)
            for _ in range(3)
        ]
        other = block_sparse_attention(*last, mask, layout="bnhd", backend=backend)
    (out, lse), *more = runs
    assert all(torch.equal(out, x) and torch.equal(lse, y) for x, y in more)
    assert torch.equal(other.transpose(1, 2), out)
    want, want_lse = exact(q.double(), k.double(), v.double(), mask.to("cuda"))
    wide = (x.repeat_interleave(2, 1) for x in (k, v))
    seen = mask.to("cuda").dense()
    stock = torch.nn.functional.scaled_dot_product_attention(q, *wide, attn_mask=seen)
    stock = stock.masked_fill(~seen.any(-1)[..., None], 0.0)
    worst = (stock.double() - want).abs().max()
    assert (out.double() - want).abs().max() <= 2 * worst
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-3, rtol=0)


def test_block_sparse_attention_compiles_on_the_gpu() -> None:
    mask = random_blocks(500, 717, 128)
    q, k, v = (x.to("cuda") for x in tensors(1, 2, 500, 64, keys=717, dtype=torch.bfloat16))

    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return block_sparse_attention(q * 2, k, v, mask) + 1

    compiled = torch.compile(step, fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), step(q, k, v), atol=1e-2, rtol=1e-2)
