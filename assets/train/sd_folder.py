"""tiny-sd's folder: weights rounded to float16, in the layout diffusers saves and loads."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from attnctl.assets.train.clip_text import tokenizer
from attnctl.assets.train.folders import tidy
from attnctl.assets.train.sd_parts import scheduler
from attnctl.assets.train.weights import rounded

PREFIX = "text_model."


def pipeline(**parts: Any) -> Any:
    """The stock pipeline of given parts, without a safety checker.

    Args:
        parts: unet, vae, text_encoder and tokenizer.
    """
    return StableDiffusionPipeline(
        **parts,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_pipeline(folder: Path, **trained: torch.nn.Module) -> Path:
    """Write the pipeline's folder.

    Args:
        folder: where to; replaced if it exists.
        trained: unet, vae and text_encoder.
    """
    shutil.rmtree(folder, ignore_errors=True)
    parts = {name: rounded(model) for name, model in trained.items()}
    pipeline(**parts, tokenizer=tokenizer(folder / "tokenizer")).save_pretrained(folder)
    shutil.rmtree(folder / "tokenizer")
    tokenizer(folder / "tokenizer")  # its plain files, not those of one version
    _name_for_all_versions(folder / "text_encoder" / "model.safetensors")
    tidy(folder)
    return folder


def _name_for_all_versions(path: Path) -> None:
    """Name the text encoder's weights as every version of transformers reads them.

    Version 5 saves a CLIPTextModel without the prefix that version 4 looks for.
    """
    state = load_file(path)
    named = {PREFIX + name.removeprefix(PREFIX): value for name, value in state.items()}
    save_file(named, path, metadata={"format": "pt"})
