"""A real T5 encoder and tokenizer that say nothing.

`StableDiffusion3Pipeline.from_pretrained` insists on a third text encoder. This one has all the
classes and files of a T5, but its last normalisation has weight 0, so it returns exactly what the
pipeline uses when the encoder is passed as None: zeros, one per token.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

SPECIAL = ("<pad>", "</s>", "<unk>")
SPACE = "▁"
RARE = -8.0
CONFIGURATION = {
    "tokenizer_class": "T5TokenizerFast",
    "extra_ids": 0,
    "model_max_length": 512,
    "pad_token": SPECIAL[0],
    "eos_token": SPECIAL[1],
    "unk_token": SPECIAL[2],
}


def null_tokenizer(folder: Path, words: Iterable[str], letters: str = "") -> T5TokenizerFast:
    """T5 tokenizer whose vocabulary is the given words; written to ``folder``.

    Args:
        folder: where to.
        words: what becomes one token each, when it begins a word.
        letters: letters into which other words fall apart; the rest is unknown.
    """
    spaced = [(SPACE, -2.0), *((SPACE + word, -1.0) for word in words)]
    spaced += [(letter, RARE) for letter in letters]
    core = Tokenizer(models.Unigram([*((token, 0.0) for token in SPECIAL), *spaced], unk_id=2))
    core.add_special_tokens(list(SPECIAL))
    core.pre_tokenizer = pre_tokenizers.Metaspace(SPACE)
    core.decoder = decoders.Metaspace(SPACE)
    end = (SPECIAL[1], 1)
    core.post_processor = processors.TemplateProcessing(f"$A {end[0]}", special_tokens=[end])
    folder.mkdir(parents=True, exist_ok=True)
    core.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIGURATION, indent=2) + "\n")
    tokenizer: T5TokenizerFast = T5TokenizerFast.from_pretrained(folder)
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
