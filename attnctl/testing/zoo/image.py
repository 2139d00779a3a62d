"""Tiny image families."""

from __future__ import annotations

from typing import Any

from attnctl.testing.zoo.core import Text, family, make, need
from attnctl.testing.zoo.parts import (
    IMAGE,
    IMAGES,
    MASK,
    SEPARATE,
    SHIFT,
    TRUE_CFG,
    ddim,
    dpm,
    flow,
    image_vae,
    picture,
    pipeline,
    shifted_vae,
)


def _unet(**config: Any) -> Any:
    """Two-level UNet with cross-attention on the first level and in the middle."""
    return make(
        "UNet2DConditionModel",
        **{
            "sample_size": (8, 12),
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "attention_head_dim": 2,
            "cross_attention_dim": 24,
            "norm_num_groups": 4,
            **config,
        },
    )


def _stable_diffusion(unet: Any, **scheduler: Any) -> Any:
    """The SD 1.x and 2.x pipeline."""
    return pipeline(
        "StableDiffusionPipeline",
        unet=unet,
        vae=image_vae(),
        scheduler=ddim(clip_sample=False, set_alpha_to_one=False, **scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


UNET = {"cfg": "batched", "denoisers": ("unet",), "images": IMAGES, "fixed": IMAGE}


@family("sd1", text=Text(10, 24), **UNET)
def sd1() -> Any:
    """Stable Diffusion 1.x: heads of 8 and 16 channels."""
    return _stable_diffusion(_unet())


@family("sd2", text=Text(10, 24), notes="v-prediction, linear projections", **UNET)
def sd2() -> Any:
    """Stable Diffusion 2.x: a head count per level."""
    unet = _unet(attention_head_dim=(2, 4), use_linear_projection=True)
    return _stable_diffusion(unet, prediction_type="v_prediction")


@family("sdxl", text=Text(10, 24, pooled=16), **UNET)
def sdxl() -> Any:
    """Stable Diffusion XL: two transformer blocks on the lower level, none on the upper."""
    unet = _unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )
    return pipeline(
        "StableDiffusionXLPipeline",
        encoders=2,
        unet=unet,
        vae=image_vae(),
        scheduler=ddim("EulerDiscreteScheduler"),
        add_watermarker=False,
    )


def _sd3(**config: Any) -> Any:
    """The SD3 pipeline."""
    transformer = make(
        "SD3Transformer2DModel",
        sample_size=12,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_projection_dim=24,
        joint_attention_dim=32,
        pooled_projection_dim=20,
        pos_embed_max_size=16,
        **config,
    )
    return pipeline(
        "StableDiffusion3Pipeline",
        encoders=3,
        transformer=transformer,
        vae=shifted_vae(),
        scheduler=flow(shift=SHIFT),
    )


@family("sd3", cfg="batched", text=Text(11, 32, pooled=20), fixed=IMAGE)
def sd3() -> Any:
    """Stable Diffusion 3."""
    return _sd3()


@family("sd35", cfg="batched", text=Text(11, 32, pooled=20), fixed=IMAGE)
def sd35() -> Any:
    """Stable Diffusion 3.5 medium: QK norm, and image self-attention beside the joint one."""
    return _sd3(qk_norm="rms_norm", dual_attention_layers=(0, 1))


def _flux(transformer: str = "FluxTransformer2DModel", **config: Any) -> Any:
    """A transformer of the Flux kind: two double and two single blocks."""
    return make(
        transformer,
        **{
            "in_channels": 16,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "axes_dims_rope": (4, 4, 8),
            **config,
        },
    )


def _flux1(name: str = "FluxPipeline", *, guidance_embeds: bool = False) -> Any:
    """A FLUX.1 pipeline."""
    return pipeline(
        name,
        encoders=2,
        transformer=_flux(pooled_projection_dim=20, guidance_embeds=guidance_embeds),
        vae=shifted_vae(),
        scheduler=flow(use_dynamic_shifting=True),
    )


FLUX_TEXT = Text(11, 32, pooled=20)


@family("flux", text=FLUX_TEXT, fixed=IMAGE, **TRUE_CFG)
def flux() -> Any:
    """FLUX.1 without a guidance embedding, guided by true CFG."""
    return _flux1()


@family("flux-dev", cfg="none", text=FLUX_TEXT, fixed=IMAGE, notes="embedded guidance")
def flux_dev() -> Any:
    """FLUX.1 dev: the guidance scale is an input of the denoiser."""
    return _flux1(guidance_embeds=True)


def _reference(pipe: Any, batch: int, seed: int) -> dict[str, Any]:
    """One reference image for the whole batch, smaller than the picture."""
    return {"image": picture(seed, 32, 64), "_auto_resize": False, "max_area": 64 * 96}


@family(
    "flux-kontext",
    text=FLUX_TEXT,
    fixed=IMAGE,
    extra=_reference,
    notes="tokens of a clean reference image follow the noisy ones",
    **TRUE_CFG,
)
def flux_kontext() -> Any:
    """FLUX.1 Kontext: edits a reference image."""
    return _flux1("FluxKontextPipeline")


def _flux2(transformer: dict[str, Any], name: str = "Flux2Pipeline", **config: Any) -> Any:
    """A FLUX.2 pipeline."""
    pipeline_class = need(name)
    denoiser = _flux(
        "Flux2Transformer2DModel",
        joint_attention_dim=24,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        **transformer,
    )
    return pipeline_class(
        transformer=denoiser,
        vae=image_vae(vae="AutoencoderKLFlux2", patch_size=(2, 2)),
        scheduler=flow(use_dynamic_shifting=True),
        text_encoder=None,
        tokenizer=None,
        **config,
    )


@family(
    "flux2",
    cfg="none",
    images=IMAGES,
    text=Text(11, 24),
    fixed=IMAGE,
    notes="embedded guidance",
)
def flux2() -> Any:
    """FLUX.2 dev."""
    return _flux2({})


@family(
    "flux2-klein",
    images=IMAGES,
    text=Text(11, 24),
    fixed=IMAGE,
    notes="latents come back unpacked and denormalised",
    **SEPARATE,
)
def flux2_klein() -> Any:
    """FLUX.2 klein, not distilled."""
    return _flux2({"guidance_embeds": False}, "Flux2KleinPipeline", is_distilled=False)


@family(
    "qwenimage",
    images=IMAGES,
    text=Text(11, 24, mask="prompt_embeds_mask", trim=True),
    fixed=IMAGE,
    notes="norm-preserving guidance; a mask that is full everywhere becomes None",
    **TRUE_CFG,
)
def qwenimage() -> Any:
    """Qwen-Image."""
    transformer = make(
        "QwenImageTransformer2DModel",
        in_channels=16,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
    )
    return pipeline(
        "QwenImagePipeline", transformer=transformer, scheduler=flow(use_dynamic_shifting=True)
    )


UNBINNED = {"use_resolution_binning": False, "negative_prompt": None}


@family(
    "pixart",
    cfg="batched",
    images=IMAGES,
    text=Text(11, 20, mask=MASK),
    fixed={**IMAGE, **UNBINNED},
    notes="no do_classifier_free_guidance, no guidance_scale property, no step callback",
)
def pixart() -> Any:
    """PixArt-Sigma."""
    transformer = make(
        "PixArtTransformer2DModel",
        num_attention_heads=3,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        cross_attention_dim=24,
        caption_channels=20,
        sample_size=12,
        use_additional_conditions=False,
    )
    return pipeline(
        "PixArtSigmaPipeline",
        transformer=transformer,
        vae=image_vae(),
        scheduler=dpm(timestep_spacing="leading"),
    )


@family(
    "sana",
    cfg="batched",
    images=IMAGES,
    text=Text(11, 20, mask=MASK),
    fixed={"height": 128, "width": 192, **UNBINNED},
    notes="self-attention is linear; text masks are tiled, not interleaved, over the samples",
)
def sana() -> Any:
    """Sana: linear self-attention, softmax cross-attention."""
    transformer = make(
        "SanaTransformer2DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=3,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=20,
        sample_size=8,
    )
    scheduler = dpm(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return pipeline("SanaPipeline", transformer=transformer, scheduler=scheduler)
