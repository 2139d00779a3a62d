"""tiny-llava's folder: weights rounded to float16, under the names real checkpoints have."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from attnctl.assets.train.llava_parts import processor

DTYPE = "float32"


def save_folder(folder: Path, model: Any, patch: int) -> Path:
    """Write the model's folder.

    Args:
        folder: where to; replaced if it exists.
        model: `LlavaForConditionalGeneration`.
        patch: side of a patch in pixels.
    """
    shutil.rmtree(folder, ignore_errors=True)
    processor(folder, patch)
    model.config.dtype = model.config.text_config.dtype = model.config.vision_config.dtype = DTYPE
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    weights = {
        old_name(name): value.detach().half().cpu().contiguous()
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for file in folder.rglob("*"):
        file.chmod(0o644)
    return folder


def old_name(name: str) -> str:
    """The name a weight has in published Llava checkpoints, which all versions can read."""
    name = name.removeprefix("model.")
    if name.startswith("language_model."):
        return "language_model.model." + name.removeprefix("language_model.")
    if name.startswith("vision_tower.") and "vision_model." not in name:
        return "vision_tower.vision_model." + name.removeprefix("vision_tower.")
    return name
