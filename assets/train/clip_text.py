"""CLIP text encoders over the shape world's words, as the image models use them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import CLIPTextConfig, CLIPTokenizer

from attnctl.assets.train.tokenizer import END, START, save_tokenizer
from attnctl.assets.world.captions import WORDS

LENGTH = 20


def tokenizer(folder: Path) -> CLIPTokenizer:
    """The prompt tokenizer of the shape world, written to ``folder``: 20 tokens a prompt."""
    return save_tokenizer(folder, WORDS, LENGTH)


def text_encoder(kind: type[Any], words: CLIPTokenizer, width: int, layers: int) -> Any:
    """Small CLIP text encoder with heads of 32.

    Args:
        kind: `CLIPTextModel` or `CLIPTextModelWithProjection`.
        words: the tokenizer.
        width: of its states; a multiple of 32.
        layers: how many.
    """
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=LENGTH,
        bos_token_id=words.convert_tokens_to_ids(START),
        eos_token_id=words.convert_tokens_to_ids(END),
        pad_token_id=words.convert_tokens_to_ids(END),
    )
    model = kind(config)
    nn.init.normal_(model.get_input_embeddings().weight, std=0.3)
    return model
