"""tiny-sd3's folder: weights rounded to float16, in the layout diffusers saves and loads."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline

from attnctl.assets.train.clip_text import tokenizer
from attnctl.assets.train.folders import change, tidy
from attnctl.assets.train.null_t5 import null_encoder, null_tokenizer
from attnctl.assets.train.sd3_parts import WIDTHS, scheduler
from attnctl.assets.train.weights import rounded
from attnctl.assets.world.captions import WORDS


def save_pipeline(folder: Path, **trained: torch.nn.Module) -> Path:
    """Write the pipeline's folder.

    Args:
        folder: where to; replaced if it exists.
        trained: transformer, vae, text_encoder and text_encoder_2.
    """
    shutil.rmtree(folder, ignore_errors=True)
    words = tokenizer(folder / "tokenizer")
    silent = null_tokenizer(folder / "tokenizer_3", WORDS)
    pipeline = StableDiffusion3Pipeline(
        **{name: rounded(model) for name, model in trained.items()},
        scheduler=scheduler(),
        tokenizer=words,
        tokenizer_2=words,
        text_encoder_3=rounded(null_encoder(len(silent), sum(WIDTHS))),
        tokenizer_3=silent,
    )
    pipeline.save_pretrained(folder)
    _tidy(folder)
    return folder


def _tidy(folder: Path) -> None:
    """Keep the tokenizers' plain files, and name the class of the third."""
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        shutil.rmtree(folder / name)
    tokenizer(folder / "tokenizer")
    tokenizer(folder / "tokenizer_2")
    null_tokenizer(folder / "tokenizer_3", WORDS)
    change(folder / "model_index.json", tokenizer_3=["transformers", "T5TokenizerFast"])
    tidy(folder)
