"""The parts of tiny-llava: vision transformer, projector, Llama decoder, processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)

from attnctl.assets.train.llama_tokenizer import IMAGE, LENGTH
from attnctl.assets.train.llava_words import tokenizer

GRID = 12
TOKENS = GRID * GRID
MEAN = STD = 0.5
BICUBIC = 3
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ 'ASSISTANT: ' }}"
    "{% elif message['role'] == 'user' %}{{ 'USER: ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '</s>' }}{% else %}{{ ' ' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def build(words: PreTrainedTokenizerBase, patch: int, std: float) -> LlavaForConditionalGeneration:
    """The model with fresh weights.

    Args:
        words: the tokenizer.
        patch: side of a patch in pixels; the picture has 12 x 12 of them.
        std: spread of the fresh weights.
    """
    config = LlavaConfig(
        vision_config=vision_config(patch, std),
        text_config=text_config(words, std),
        image_token_index=words.convert_tokens_to_ids(IMAGE),
        image_seq_length=TOKENS,
        projector_hidden_act="gelu",
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config = generation_config(words)
    return model


def vision_config(patch: int, std: float) -> CLIPVisionConfig:
    """Five layers of width 128 with four heads, and a class token."""
    return CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        projection_dim=128,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=GRID * patch,
        patch_size=patch,
        hidden_act="gelu",
        initializer_range=std,
    )


def text_config(words: PreTrainedTokenizerBase, std: float) -> LlamaConfig:
    """Eight layers of width 192: six heads of 32 that share two key-value heads."""
    return LlamaConfig(
        vocab_size=len(words),
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=LENGTH,
        initializer_range=std,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        tie_word_embeddings=True,
    )


def generation_config(words: PreTrainedTokenizerBase) -> GenerationConfig:
    """Greedy, until the end token."""
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=96,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )


def processor(folder: Path, patch: int) -> LlavaProcessor:
    """The processor, all its files written to ``folder`` as every version of the library reads.

    Args:
        folder: where to.
        patch: side of a patch in pixels.
    """
    tokenizer(folder)
    _write(folder / "preprocessor_config.json", image_processing(GRID * patch))
    names = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE,
        "patch_size": patch,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    }
    _write(folder / "processor_config.json", names)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    made: LlavaProcessor = LlavaProcessor.from_pretrained(folder)
    return made


def image_processing(side: int) -> dict[str, Any]:
    """Settings of the CLIP image processor: shortest edge to ``side``, then the middle square."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [MEAN] * 3,
        "image_std": [STD] * 3,
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
