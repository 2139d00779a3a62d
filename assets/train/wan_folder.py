"""tiny-wan's folder: weights rounded to float16, in the layout diffusers saves and loads."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from diffusers import WanPipeline

from attnctl.assets.train.folders import change, tidy
from attnctl.assets.train.wan_parts import scheduler, tokenizer
from attnctl.assets.train.weights import rounded


def save_pipeline(folder: Path, **trained: torch.nn.Module) -> Path:
    """Write the pipeline's folder.

    Args:
        folder: where to; replaced if it exists.
        trained: transformer, vae and text_encoder.
    """
    shutil.rmtree(folder, ignore_errors=True)
    pipeline = WanPipeline(
        **{name: rounded(model) for name, model in trained.items()},
        scheduler=scheduler(),
        tokenizer=tokenizer(folder / "tokenizer"),
    )
    pipeline.save_pretrained(folder)
    _tidy(folder)
    return folder


def _tidy(folder: Path) -> None:
    """Keep the tokenizer's plain files, and name its class as Wan's folders do."""
    shutil.rmtree(folder / "tokenizer")
    tokenizer(folder / "tokenizer")
    change(folder / "model_index.json", tokenizer=["transformers", "T5TokenizerFast"])
    tidy(folder)
