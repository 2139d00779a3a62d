"""Further tiny image families."""

from __future__ import annotations

from typing import Any

import torch

from attnctl.testing.zoo.core import Text, family, make
from attnctl.testing.zoo.parts import (
    IMAGE,
    IMAGES,
    MASK,
    SEPARATE,
    SHIFT,
    ddim,
    flow,
    pipeline,
    shifted_vae,
)


@family(
    "chroma",
    text=Text(11, 32, mask=MASK, mask_dtype=torch.bool),
    fixed=IMAGE,
    notes="FLUX.1 blocks with a text mask and modulations from an approximator",
    **SEPARATE,
)
def chroma() -> Any:
    """Chroma."""
    transformer = make(
        "ChromaTransformer2DModel",
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    return pipeline(
        "ChromaPipeline",
        transformer=transformer,
        vae=shifted_vae(),
        scheduler=flow(use_dynamic_shifting=True),
    )


@family(
    "lumina2",
    text=Text(11, 20, mask=MASK),
    fixed=IMAGE,
    notes="norm-preserving guidance; grouped keys; refiners; ragged rows in one stream",
    **SEPARATE,
)
def lumina2() -> Any:
    """Lumina-Image 2.0: four query heads on two key heads."""
    transformer = make(
        "Lumina2Transformer2DModel",
        sample_size=12,
        in_channels=4,
        hidden_size=48,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=8,
        scaling_factor=1.0,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(32, 16, 16),
        cap_feat_dim=20,
    )
    return pipeline(
        "Lumina2Pipeline", transformer=transformer, scheduler=flow(use_dynamic_shifting=True)
    )


@family(
    "auraflow",
    cfg="batched",
    images=IMAGES,
    text=Text(11, 20, mask=MASK),
    fixed=IMAGE,
    notes="the text mask is taken and not used; learnt register tokens precede the text",
)
def auraflow() -> Any:
    """AuraFlow."""
    transformer = make(
        "AuraFlowTransformer2DModel",
        sample_size=12,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=20,
        caption_projection_dim=24,
        pos_embed_max_size=64,
    )
    transformer.time_step_proj.linear_2.weight.data.mul_(4.0)  # else its gates are almost shut
    return pipeline("AuraFlowPipeline", transformer=transformer, scheduler=flow(shift=SHIFT))


def _t5_inputs(pipe: Any, batch: int, seed: int) -> dict[str, Any]:
    """The inputs of the second text encoder, under keywords ending in ``_2``."""
    made = Text(7, 16, mask=MASK).inputs(seed + 1, batch, negative=True)
    return {f"{name}_2": value for name, value in made.items()}


@family(
    "hunyuandit",
    cfg="batched",
    text=Text(11, 20, mask=MASK),
    fixed={**IMAGE, "use_resolution_binning": False},
    extra=_t5_inputs,
    notes="two texts in one cross-attention, masked tokens become learnt padding; long skips",
)
def hunyuandit() -> Any:
    """Hunyuan-DiT."""
    transformer = make(
        "HunyuanDiT2DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=32,
        num_layers=4,
        cross_attention_dim=20,
        cross_attention_dim_t5=16,
        pooled_projection_dim=8,
        text_len=11,
        text_len_t5=7,
        use_style_cond_and_image_meta_size=False,
    )
    return pipeline(
        "HunyuanDiTPipeline",
        encoders=2,
        transformer=transformer,
        scheduler=ddim(clip_sample=False, prediction_type="v_prediction"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@family("cogview4", text=Text(11, 20), fixed=IMAGE, **SEPARATE)
def cogview4() -> Any:
    """CogView4."""
    transformer = make(
        "CogView4Transformer2DModel",
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=20,
        time_embed_dim=16,
        condition_dim=8,
        pos_embed_max_size=16,
        sample_size=12,
        rope_axes_dim=(16, 16),
    )
    scheduler = flow(use_dynamic_shifting=True, base_shift=6.0)
    return pipeline("CogView4Pipeline", transformer=transformer, scheduler=scheduler)


@family(
    "zimage",
    cfg="batched",
    cond_first=True,
    off=0.0,
    text=Text(11, 20, listed=True),
    fixed=IMAGE,
    notes="cond rows first; cond + s * (cond - uncond), so on above 0; embeddings are lists",
)
def zimage() -> Any:
    """Z-Image."""
    transformer = make(
        "ZImageTransformer2DModel",
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=20,
        axes_dims=[4, 6, 6],
        axes_lens=[64, 16, 16],
    )
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(token)  # old versions leave them uninitialised
    return pipeline("ZImagePipeline", transformer=transformer, scheduler=flow(shift=3.0))
