"""A real T5 encoder and tokenizer that say nothing.

`StableDiffusion3Pipeline.from_pretrained` insists on a third text encoder. This one has all the
classes and files of a T5, but its last normalisation has weight 0, so it returns exactly what the
pipeline uses when the encoder is passed as None: zeros, one per token.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

SPECIAL = ("<pad>", "</s>", "<unk>")
SPACE = "▁"


def null_tokenizer(folder: Path, words: Iterable[str]) -> T5TokenizerFast:
    """T5 tokenizer whose vocabulary is the given words; written to ``folder``."""
    spaced = [(SPACE, -2.0), *((SPACE + word, -1.0) for word in words)]
    vocabulary = [*((token, 0.0) for token in SPECIAL), *spaced]
    tokenizer = T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=512)
    tokenizer.save_pretrained(folder)
    return tokenizer


def null_encoder(vocabulary: int, width: int) -> T5EncoderModel:
    """T5 encoder that returns zeros ``[B, L, width]``."""
    config = T5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=8,
        d_ff=8,
        num_heads=1,
        num_layers=1,
        is_encoder_decoder=False,
        use_cache=False,
    )
    model = T5EncoderModel(config)
    torch.nn.init.zeros_(model.encoder.final_layer_norm.weight)
    return model
