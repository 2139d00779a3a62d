"""Tiny video families."""

from __future__ import annotations

from typing import Any

from attnctl.testing.zoo.core import Text, family, make
from attnctl.testing.zoo.parts import (
    IMAGE,
    IMAGES,
    MASK,
    SEPARATE,
    SHIFT,
    TRUE_CFG,
    VIDEO,
    ddim,
    dpm,
    flow,
    picture,
    pipeline,
)


def _wan_vae() -> Any:
    """A tiny Wan VAE, 4x in time and 8x in space."""
    return make(
        "AutoencoderKLWan",
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.1, 0.9, 1.0, 1.2],
    )


def _wan_transformer(**config: Any) -> Any:
    """A Wan transformer of two blocks."""
    return make(
        "WanTransformer3DModel",
        **{
            "num_attention_heads": 3,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 20,
            "freq_dim": 16,
            "ffn_dim": 48,
            "num_layers": 2,
            "rope_max_seq_len": 32,
            **config,
        },
    )


def _wan(name: str = "WanPipeline", **parts: Any) -> Any:
    """A Wan pipeline."""
    return pipeline(name, vae=_wan_vae(), scheduler=flow(shift=SHIFT), **parts)


@family("wan", text=Text(11, 20), fixed=VIDEO, **SEPARATE)
def wan() -> Any:
    """Wan 2.1 text to video."""
    return _wan(transformer=_wan_transformer())


@family(
    "wan22",
    text=Text(11, 20),
    fixed=VIDEO,
    denoisers=("transformer", "transformer_2"),
    notes="transformer_2 does the low-noise steps, with guidance_scale_2",
    **SEPARATE,
)
def wan22() -> Any:
    """Wan 2.2 text to video: two transformers, one for each range of noise."""
    return _wan(
        transformer=_wan_transformer(), transformer_2=_wan_transformer(), boundary_ratio=0.9
    )


def _first_frame(pipe: Any, batch: int, seed: int) -> dict[str, Any]:
    """One first frame for the whole batch."""
    return {"image": picture(seed, VIDEO["height"], VIDEO["width"])}


def _image_encoder(width: int) -> dict[str, Any]:
    """A tiny CLIP image encoder of 5 tokens (2 x 2 patches and the class token)."""
    import transformers

    config = transformers.CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    size = {"height": 16, "width": 16}
    processor = transformers.CLIPImageProcessor(size=size, crop_size=size)
    return {"image_encoder": transformers.CLIPVisionModel(config), "image_processor": processor}


@family(
    "wan-i2v",
    text=Text(512, 20),
    fixed=VIDEO,
    extra=_first_frame,
    notes="cross-attention context: 5 image tokens, then 512 of text; two attention calls a site",
    **SEPARATE,
)
def wan_i2v() -> Any:
    """Wan 2.1 image to video: cross-attention to the text and to the image."""
    transformer = _wan_transformer(in_channels=12, image_dim=16, added_kv_proj_dim=36)
    return _wan("WanImageToVideoPipeline", transformer=transformer, **_image_encoder(16))


@family(
    "cogvideox",
    cfg="batched",
    text=Text(11, 20),
    fixed=VIDEO,
    notes="latents are [B, F, C, H, W]",
)
def cogvideox() -> Any:
    """CogVideoX with rotary positions (5B)."""
    transformer = make(
        "CogVideoXTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=20,
        num_layers=2,
        sample_width=12,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=11,
        use_rotary_positional_embeddings=True,
    )
    scheduler = ddim("CogVideoXDDIMScheduler", prediction_type="v_prediction")
    return pipeline("CogVideoXPipeline", transformer=transformer, scheduler=scheduler)


@family(
    "hunyuanvideo",
    text=Text(11, 20, pooled=16, mask=MASK),
    fixed=VIDEO,
    notes="guidance_scale is embedded; a text refiner runs before the blocks",
    **TRUE_CFG,
)
def hunyuanvideo() -> Any:
    """HunyuanVideo."""
    transformer = make(
        "HunyuanVideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=20,
        pooled_projection_dim=16,
        rope_axes_dim=(4, 6, 6),
    )
    return pipeline(
        "HunyuanVideoPipeline", encoders=2, transformer=transformer, scheduler=flow(shift=7.0)
    )


@family(
    "ltx",
    cfg="batched",
    text=Text(11, 20, mask=MASK),
    fixed={"height": 128, "width": 192, "num_frames": 17},
    notes="latents stay packed as [B, S, C]",
)
def ltx() -> Any:
    """LTX-Video."""
    transformer = make(
        "LTXVideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        num_layers=2,
        caption_channels=20,
    )
    return pipeline(
        "LTXPipeline", transformer=transformer, scheduler=flow(use_dynamic_shifting=True)
    )


@family(
    "mochi",
    cfg="batched",
    text=Text(11, 24, mask=MASK),
    fixed={**VIDEO, "num_frames": 13},
    notes="attention runs once per batch row, over its valid text",
)
def mochi() -> Any:
    """Mochi 1."""
    transformer = make(
        "MochiTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=3,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=24,
        time_embed_dim=16,
    )
    return pipeline("MochiPipeline", transformer=transformer, scheduler=flow(invert_sigmas=True))


@family(
    "allegro",
    cfg="batched",
    text=Text(11, 20, mask=MASK),
    fixed={**VIDEO, "negative_prompt": None},
    notes="video self-attention and masked cross-attention",
)
def allegro() -> Any:
    """Allegro."""
    transformer = make(
        "AllegroTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=24,
        sample_width=12,
        sample_height=8,
        sample_frames=3,
        caption_channels=20,
    )
    return pipeline(
        "AllegroPipeline",
        transformer=transformer,
        scheduler=dpm(timestep_spacing="leading"),
    )


@family(
    "latte",
    cfg="batched",
    images=IMAGES,
    text=Text(11, 20),
    fixed={
        **IMAGE,
        "video_length": 3,
        "mask_feature": False,
        "negative_prompt": None,
    },
    notes="spatial blocks with frames in the batch, temporal blocks with pixels in the batch",
)
def latte() -> Any:
    """Latte."""
    transformer = make(
        "LatteTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=24,
        sample_size=8,
        patch_size=2,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        caption_channels=20,
        video_length=3,
    )
    return pipeline("LattePipeline", transformer=transformer, scheduler=ddim(clip_sample=False))
