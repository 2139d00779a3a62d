"""Builders of the tiny models: configurations of a few thousand weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnctl.testing.vlms.core import BOS, WORDS, need, pictures, vlm

__all__: list[str] = []

IMAGE, START, END, VIDEO = 10, 11, 12, 13
"""Ids of the image token, of what stands around it, and of the video token."""

TEXT: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": BOS,
    "eos_token_id": 2,
}
EYES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}


def _square(size: int) -> Any:
    return lambda seeds: {"pixel_values": pictures(seeds, 3, size, size)}


def _llava(name: str, text: dict[str, Any], eyes: dict[str, Any], **config: Any) -> Any:
    made = need(f"{name}Config")(
        text_config=text, vision_config=eyes, image_token_id=IMAGE, image_token_index=IMAGE,
        tie_word_embeddings=False, **config,
    )  # fmt: skip
    return need(f"{name}ForConditionalGeneration")(made)


@vlm("llava", image=(IMAGE,) * 16, pixels=_square(16))
def llava() -> Any:
    """LLaVA-1.5."""
    text, eyes = {"model_type": "llama", **TEXT}, {"model_type": "clip_vision_model", **EYES}
    return _llava("Llava", text, eyes, vision_feature_layer=-2)


def _tiles(seeds: Any) -> dict[str, Tensor]:
    return {
        "pixel_values": torch.stack([pictures([s, s + 5, s + 6], 3, 16, 16) for s in seeds]),
        "image_sizes": torch.tensor([[32, 16]] * len(seeds)),
    }


# base 4x4, and two tiles of 4x4 with a newline a row
@vlm("llava-next", image=(IMAGE,) * (16 + 8 * 5), pixels=_tiles)
def llava_next() -> Any:
    """LLaVA-NeXT."""
    text, eyes = {"model_type": "mistral", **TEXT}, {"model_type": "clip_vision_model", **EYES}
    text["sliding_window"] = None
    return _llava("LlavaNext", text, eyes, image_grid_pinpoints=[[32, 16], [16, 32]])


@vlm("llava-onevision", image=(IMAGE,) * (16 + 8 * 5), pixels=_tiles)
def llava_onevision() -> Any:
    """LLaVA-OneVision."""
    text, eyes = {"model_type": "qwen2", **TEXT}, {"model_type": "siglip_vision_model", **EYES}
    return _llava(
        "LlavaOnevision", text, eyes | {"vision_use_head": False}, video_token_id=VIDEO,
        video_token_index=VIDEO, image_grid_pinpoints=[[32, 16], [16, 32]],
        vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_9",
    )  # fmt: skip


QWEN = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
ROPE: dict[str, Any] = {
    "rope_type": "default",
    "type": "default",
    "mrope_section": [1, 1, 2],
    "rope_theta": 10000.0,
}


def _patches(seeds: Any) -> dict[str, Tensor]:
    return {
        "pixel_values": torch.cat([pictures([s], 16, 3 * 2 * 4 * 4)[0] for s in seeds]),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * len(seeds)),
    }


def _kinds(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    import transformers

    if int(transformers.__version__.split(".")[0]) < 5:
        return {}
    return {"mm_token_type_ids": (ids == IMAGE).long()}


_QWEN_PROMPT: dict[str, Any] = {"image": (START, *(IMAGE,) * 4, END), "pixels": _patches}


def _qwen(name: str, eyes: dict[str, Any], text: dict[str, Any]) -> Any:
    # transformers 4.57 reads `rope_scaling`, later ones `rope_parameters`
    text = {**TEXT, "rope_scaling": ROPE, "rope_parameters": ROPE, **text}
    made = need(f"{name}Config")(
        text_config=text, vision_config=eyes, **QWEN, tie_word_embeddings=False
    )
    return need(f"{name}ForConditionalGeneration")(made)


@vlm("qwen2-vl", extra=_kinds, **_QWEN_PROMPT)
def qwen2_vl() -> Any:
    """Qwen2-VL."""
    eyes = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    return _qwen("Qwen2VL", eyes | {"patch_size": 4, "in_channels": 3}, {})


@vlm("qwen2.5-vl", extra=_kinds, **_QWEN_PROMPT)
def qwen2_5_vl() -> Any:
    """Qwen2.5-VL."""
    eyes = {"depth": 2, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2}
    eyes |= {"patch_size": 4, "intermediate_size": 24, "window_size": 16}
    return _qwen("Qwen2_5_VL", {**eyes, "fullatt_block_indexes": [1]}, {})


@vlm("qwen3-vl", extra=_kinds, **_QWEN_PROMPT)
def qwen3_vl() -> Any:
    """Qwen3-VL."""
    eyes = {"depth": 2, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2}
    eyes |= {"patch_size": 4, "intermediate_size": 24, "num_position_embeddings": 16}
    return _qwen("Qwen3VL", {**eyes, "deepstack_visual_indexes": [0]}, {})


@vlm("internvl", image=(START, *(IMAGE,) * 4, END), pixels=_square(16))
def internvl() -> Any:
    """InternVL."""
    eyes: dict[str, Any] = {**EYES, "image_size": [16, 16], "patch_size": [4, 4]}
    made = need("InternVLConfig")(
        text_config={"model_type": "qwen2", **TEXT}, vision_config=eyes,
        image_token_id=IMAGE, image_seq_length=4, downsample_ratio=0.5,
        tie_word_embeddings=False,
    )  # fmt: skip
    return need("InternVLForConditionalGeneration")(made)


def _stacked(seeds: Any) -> dict[str, Tensor]:
    return {"pixel_values": pictures(seeds, 3, 16, 16)[:, None]}


def _idefics(name: str) -> Any:
    made = need(f"{name}Config")(
        text_config={"model_type": "llama", **TEXT}, vision_config=EYES, scale_factor=2,
        image_token_id=IMAGE, tie_word_embeddings=False, pad_token_id=0,
    )  # fmt: skip
    return need(f"{name}ForConditionalGeneration")(made)


_IDEFICS: dict[str, Any] = {"image": (START, *(IMAGE,) * 4, END), "pixels": _stacked}


@vlm("idefics3", several=False, **_IDEFICS)
def idefics3() -> Any:
    """Idefics3."""
    return _idefics("Idefics3")


@vlm("smolvlm", several=False, **_IDEFICS)
def smolvlm() -> Any:
    """SmolVLM."""
    return _idefics("SmolVLM")


def _types(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    return {"token_type_ids": (ids == IMAGE).long()}


@vlm("gemma3", image=(START, *(IMAGE,) * 4, END), pixels=_square(16), extra=_types)
def gemma3() -> Any:
    """Gemma3."""
    windows = {"sliding_window": 8, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]}
    made = need("Gemma3Config")(
        text_config={**TEXT, **windows, "query_pre_attn_scalar": 8},
        vision_config={**EYES, "vision_use_head": False}, mm_tokens_per_image=4,
        image_token_index=IMAGE, image_token_id=IMAGE, boi_token_index=START, eoi_token_index=END,
    )  # fmt: skip
    return need("Gemma3ForConditionalGeneration")(made)


def _prefix(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    return {"token_type_ids": torch.zeros_like(ids)}


@vlm(
    "paligemma", image=(IMAGE,) * 16, pixels=_square(16), extra=_prefix, leading=True,
    several=False,
)  # fmt: skip
def paligemma() -> Any:
    """PaliGemma."""
    made = need("PaliGemmaConfig")(
        text_config={"model_type": "gemma", **TEXT},
        vision_config={**EYES, "vision_use_head": False, "projection_dim": 32},
        image_token_index=IMAGE, image_token_id=IMAGE, projection_dim=32, hidden_size=32,
    )  # fmt: skip
    return need("PaliGemmaForConditionalGeneration")(made)


def _questions(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    asked = torch.arange(20, 25).expand(len(ids), -1)
    return {"qformer_input_ids": asked, "qformer_attention_mask": torch.ones_like(asked)}


QFORMER = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "encoder_hidden_size": 16,
}


def _blip(name: str, text: dict[str, Any]) -> Any:
    made = need(f"{name}Config")(
        vision_config={**EYES, "initializer_range": 0.02}, qformer_config=QFORMER,
        text_config=text, num_query_tokens=4,
        image_token_index=IMAGE, image_token_id=IMAGE,
    )  # fmt: skip
    return need(f"{name}ForConditionalGeneration")(made)


_BLIP: dict[str, Any] = {"image": (IMAGE,) * 4, "pixels": _square(16), "leading": True}


@vlm("instructblip", extra=_questions, several=False, **_BLIP)
def instructblip() -> Any:
    """InstructBLIP."""
    return _blip("InstructBlip", {"model_type": "llama", **TEXT})


@vlm("blip-2", several=False, **_BLIP)
def blip2() -> Any:
    """BLIP-2."""
    text = {**TEXT, "model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32}
    return _blip("Blip2", text)
