"""Small constructors that several families share."""

from __future__ import annotations

from typing import Any

from attnctl.testing.zoo.core import make, rows

__all__ = [
    "BETAS",
    "IMAGE",
    "IMAGES",
    "MASK",
    "SEPARATE",
    "SHIFT",
    "TRUE_CFG",
    "VIDEO",
    "ddim",
    "dpm",
    "flow",
    "image_vae",
    "picture",
    "pipeline",
    "shifted_vae",
]

IMAGES = "num_images_per_prompt"
"""The keyword of the number of images a prompt."""

MASK = "prompt_attention_mask"
"""The usual keyword of the text mask."""

SEPARATE = {"cfg": "separate", "cond_first": True}
"""Guidance by two calls, the conditional one first."""

TRUE_CFG = {**SEPARATE, "scale": "true_cfg_scale"}
"""The same beside a possible embedded guidance."""

IMAGE = {"height": 64, "width": 96}
"""Not square, so that a mix-up of height and width shows."""

VIDEO = {**IMAGE, "num_frames": 9}

BETAS = {
    "beta_start": 0.00085,
    "beta_end": 0.004,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
"""A schedule that ends at less noise than the usual ones, so that latents stay of order one."""

SHIFT = 30.0
"""A flow shift with which the second of two steps is near sigma 0.5, not 0.01."""


def pipeline(name: str, *, encoders: int = 1, **parts: Any) -> Any:
    """A stock pipeline without its text encoders and, unless given, without a VAE."""
    empty = {"vae": None}
    for end in ("", "_2", "_3")[:encoders]:
        empty |= {f"text_encoder{end}": None, f"tokenizer{end}": None}
    return make(name, **(empty | parts))


def flow(**config: Any) -> Any:
    """The Euler scheduler of flow-matching models."""
    return make("FlowMatchEulerDiscreteScheduler", **config)


def ddim(scheduler: str = "DDIMScheduler", **config: Any) -> Any:
    """A scheduler whose two steps are at times 999 and 499."""
    return make(scheduler, timestep_spacing="trailing", **{**BETAS, **config})


def dpm(**config: Any) -> Any:
    """The multistep DPM-Solver++ scheduler."""
    return make("DPMSolverMultistepScheduler", **{**BETAS, **config})


def image_vae(vae: str = "AutoencoderKL", **config: Any) -> Any:
    """A tiny image VAE with 8x downsampling and 4 latent channels."""
    return make(
        vae,
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        **config,
    )


def shifted_vae() -> Any:
    """The image VAE of SD3 and FLUX.1: a latent shift and no quantisation convolutions."""
    return image_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1)


def picture(seed: int, height: int, width: int) -> Any:
    """A seeded PIL picture."""
    from PIL import Image

    pixels = rows("picture", seed, 1, height, width, 3)[0].sigmoid()
    return Image.fromarray((255 * pixels).byte().numpy())
