"""tiny-sd3's folder: weights rounded to float16, in the layout diffusers saves and loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline

from attnctl.assets.train.null_t5 import null_encoder, null_tokenizer
from attnctl.assets.train.sd3_parts import WIDTHS, scheduler, tokenizer
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
    """Keep the tokenizers' plain files, and let every version load the encoders in float32.

    Also drop where the autoencoder was loaded from.
    """
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        shutil.rmtree(folder / name)
    tokenizer(folder / "tokenizer")
    tokenizer(folder / "tokenizer_2")
    null_tokenizer(folder / "tokenizer_3", WORDS)
    for config in folder.glob("text_encoder*/config.json"):
        _change(config, dtype="float32")
    _change(folder / "vae/config.json", _name_or_path=None)
    _change(folder / "model_index.json", tokenizer_3=["transformers", "T5TokenizerFast"])
    for file in folder.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)


def _change(path: Path, **values: object) -> None:
    content = json.loads(path.read_text()) | values
    kept = {name: value for name, value in content.items() if name not in values or value}
    path.write_text(json.dumps(kept, indent=2) + "\n")
