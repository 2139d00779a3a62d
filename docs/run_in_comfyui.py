"""Runs the nodes inside ComfyUI's own code: its samplers, patcher, attention and tiny models.

    python -P docs/run_in_comfyui.py FOLDER_OF_COMFYUI

Models of ComfyUI's own classes with random weights (a UNet of SD 1.5, Flux, Wan) are sampled by
its `CFGGuider` without a node, with each node made from `comfy_entrypoint`, and without it again.
A node must act, give finite pictures, and leave the model it was given alone, bit for bit; a
neutral one must change nothing. The term of `uniform` is checked against ComfyUI's own predictions
with attention written out here in float64. Prints a table; whatever is not as it should be ends
the run. Needs what ComfyUI needs.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnctl.apps.comfy import comfy_entrypoint
from attnctl.apps.comfy.eligible import eligible
from attnctl.errors import AttnctlError

OVERRIDE = "optimized_attention_override"
HEADS, STEPS, CFG = 2, 3, 3.0
ACT = {"slg": {"start": 0.0, "stop": 1.0}}
"""Options without which a control would not act in three steps."""


def comfy(name: str) -> Any:
    """Return a module of ComfyUI."""
    return importlib.import_module(f"comfy.{name}")


# -- tiny models of ComfyUI's classes ------------------------------------------------------------


def unet() -> tuple[Any, Tensor, Tensor]:
    """Return a UNet, the shape of its latents and a prompt's embedding."""
    config = {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32,
        "num_res_blocks": [1, 1], "channel_mult": [1, 2], "transformer_depth": [1, 1],
        "transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 1,
        "context_dim": 16, "num_heads": HEADS, "num_head_channels": -1, "use_checkpoint": False,
        "use_spatial_transformer": True, "legacy": False, "adm_in_channels": None,
        "use_linear_in_transformer": False, "use_temporal_attention": False,
    }  # fmt: skip
    return model("SD15", config), torch.zeros(1, 4, 8, 8), torch.randn(1, 5, 16)


def flux() -> tuple[Any, Tensor, Tensor]:
    """Return Flux with two double and two single blocks."""
    config = {
        "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 8,
        "context_in_dim": 16, "hidden_size": 32, "mlp_ratio": 2.0, "num_heads": HEADS, "depth": 2,
        "depth_single_blocks": 2, "axes_dim": [4, 6, 6], "theta": 10000, "patch_size": 2,
        "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": [],
    }  # fmt: skip
    return model("Flux", config), torch.zeros(1, 16, 8, 8), torch.randn(1, 5, 16)


def wan() -> tuple[Any, Tensor, Tensor]:
    """Return Wan 2.1 with two blocks."""
    config = {
        "image_model": "wan2.1", "model_type": "t2v", "dim": 64, "ffn_dim": 64, "text_dim": 16,
        "num_heads": HEADS, "num_layers": 2, "in_dim": 16, "out_dim": 16, "freq_dim": 32,
        "text_len": 8,
    }  # fmt: skip
    return model("WAN21_T2V", config), torch.zeros(1, 16, 2, 8, 8), torch.randn(1, 5, 16)


def model(kind: str, config: dict[str, Any]) -> Any:
    """Return a ModelPatcher around a model with random weights."""
    described = getattr(comfy("supported_models"), kind)({**config})
    described.set_inference_dtype(torch.float32, None)
    made = described.get_model({}, "", torch.device("cpu"))
    made.diffusion_model.float()
    for name, weight in made.diffusion_model.named_parameters():
        if weight.ndim < 2 and ("norm" in name or name.endswith("scale")):
            torch.nn.init.ones_(weight)
        else:
            torch.nn.init.normal_(weight, std=0.2)
    cpu = torch.device("cpu")
    return comfy("model_patcher").ModelPatcher(made, load_device=cpu, offload_device=cpu)


def sampled(patcher: Any, latents: Tensor, text: Tensor) -> Tensor:
    """Return what ComfyUI's own sampler makes of a patcher."""
    samplers = comfy("samplers")
    guider = samplers.CFGGuider(patcher)
    pooled = {"pooled_output": text.mean(1)[:, :8]}
    guider.set_conds([[text, pooled]], [[-text, pooled]])
    guider.set_cfg(CFG)
    sigmas = samplers.calculate_sigmas(patcher.get_model_object("model_sampling"), "simple", STEPS)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    out: Tensor = guider.sample(
        noise, latents, samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=0
    )
    return out


# -- what is checked -----------------------------------------------------------------------------


def nodes() -> dict[str, Any]:
    """Return the node classes as ComfyUI's loader gets them, their schemas validated."""
    extension = asyncio.run(comfy_entrypoint())
    found = {}
    for node in asyncio.run(extension.get_node_list()):
        found[node.GET_SCHEMA().node_id.removeprefix("attnctl_")] = node
        node.VALIDATE_CLASS()
        node.INPUT_TYPES()
    return found


def executed(node: Any, patcher: Any, options: dict[str, Any]) -> Any:
    """Return the model that a node gives, called as ComfyUI calls it, with its widgets' values."""
    schema = node.GET_SCHEMA()
    values = {w.id: w.default for w in schema.inputs if w.id != "model"} | options
    return node.PREPARE_CLASS_CLONE(None).EXECUTE_NORMALIZED(model=patcher, **values).args[0]


def acts(
    name: str, node: Any, made: tuple[Any, Tensor, Tensor], stock: Tensor, log: list[str]
) -> str:
    """Return what the log says that a node does to a model, or why it is refused."""
    patcher, latents, text = made
    log.clear()
    try:
        after = sampled(executed(node, patcher, ACT.get(name, {})), latents, text)
    except AttnctlError as error:
        return f"refused: {str(error)[:88]}"
    assert after.isfinite().all() and not torch.equal(after, stock), name
    assert torch.equal(sampled(patcher, latents, text), stock), name
    if "scale" in eligible()[name].__dataclass_fields__:
        neutral = executed(node, patcher, {"scale": 0.0})
        assert torch.equal(sampled(neutral, latents, text), stock), name
    return next(line for line in log if "heads at" in line).partition("): ")[2]


def explicit(weak: bool, site: str) -> Callable[..., Tensor]:
    """Return an override that writes attention out, uniform at a site if `weak`."""

    def override(
        function: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *_: Any, **options: Any
    ) -> Tensor:
        if not options.get("skip_reshape"):
            q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        logits = q.double() @ k.double().mT / q.shape[-1] ** 0.5
        place = options["transformer_options"]
        here = f"{place.get('block_type')}.{place.get('block_index')}" == site
        uniform = weak and here and q.shape[2] == k.shape[2]
        out = (logits * (not uniform)).softmax(-1) @ v.double()
        return out.to(q.dtype).transpose(1, 2).flatten(2)

    return override


def formula(node: Any, made: tuple[Any, Tensor, Tensor], heads: str) -> float:
    """Return how far predictions with `uniform` are from u + g (c - u) + w (c - p)."""
    patcher, latents, text = made
    off: list[float] = []

    def compare(args: dict[str, Any]) -> Tensor:
        parts = []
        for weak in (False, True):
            options = {"transformer_options": {OVERRIDE: explicit(weak, heads)}}
            parts += comfy("samplers").calc_cond_batch(
                args["model"], [args["cond"]], args["input"], args["sigma"], options
            )
        c, u, got = args["cond_denoised"], args["uncond_denoised"], args["denoised"]
        want = u + CFG * (c - u) + 1.5 * (parts[0] - parts[1])
        off.append(float((got - want).abs().max() / (1.5 * (parts[0] - parts[1])).abs().max()))
        return got

    clone = executed(node, patcher, {"heads": heads, "scale": 1.5})
    clone.set_model_sampler_post_cfg_function(compare)
    sampled(clone, latents, text)
    return max(off)


MODELS = {"unet": (unet, ""), "flux": (flux, "double.1"), "wan": (wan, "double.0")}
"""Each with the site whose attention `formula` exchanges, where it is checked."""


def main() -> None:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("comfyui", type=Path)
    parser.add_argument("--model", choices=list(MODELS), action="append", help="default: all")
    given = parser.parse_args()
    folder = given.comfyui
    sys.path.insert(0, str(folder))
    comfy("cli_args").args.cpu = True
    torch.set_grad_enabled(False)
    log: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: log.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("attnctl").addHandler(handler)
    logging.getLogger("attnctl").setLevel("INFO")
    logging.getLogger("attnctl").propagate = False
    version = importlib.import_module("comfyui_version").__version__
    print(f"ComfyUI {version}, torch {torch.__version__}")
    for build, heads in map(MODELS.__getitem__, given.model or MODELS):
        torch.manual_seed(0)
        made = build()
        stock = sampled(*made)
        for name, node in nodes().items():
            print(f"{build.__name__:5} {name:12} {acts(name, node, made, stock, log)}", flush=True)
        if heads:
            try:
                off = formula(nodes()["uniform"], made, heads)
            except AttnctlError as error:
                print(f"{build.__name__:5} formula      refused: {str(error)[:80]}")
                continue
            assert off < 1e-3, off
            print(f"{build.__name__:5} formula      off by {off:.1e} of the term", flush=True)


if __name__ == "__main__":
    main()
