"""A pipeline without a model, for tests of what lies around drawing."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from PIL import Image

__all__ = ["Brush"]


class Brush:
    """Paints 8 x 8 pixels that depend on prompt, seed, settings and the number of rows.

    On the number of rows, because real models round otherwise in a larger batch. A prompt with
    the word "fail" is refused as long as `broken` is true.
    """

    class Scheduler:
        """Named in the record of a picture."""

    scheduler = Scheduler()

    def __init__(self, model: str = "tiny-sd3") -> None:
        self.config = type("Config", (), {"_name_or_path": model})()
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.broken = True
        self.calls: list[int] = []

    def set_progress_bar_config(self, **_: Any) -> None:
        """Has no bar."""

    def __call__(
        self,
        prompt: str | list[str],
        num_inference_steps: int = 2,
        guidance_scale: float = 3.0,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: Any = None,
    ) -> Any:
        """Return an object with `images`."""
        prompts = [prompt] if isinstance(prompt, str) else prompt
        noise = [generator] if isinstance(generator, torch.Generator) else generator
        self.calls.append(len(prompts))
        if self.broken and any("fail" in text for text in prompts):
            raise RuntimeError("out of paint\n\nand more")
        how = (num_inference_steps, guidance_scale, negative_prompt, height, width, len(prompts))
        images = [_painted(f"{text}{how}", g) for text, g in zip(prompts, noise, strict=True)]
        return type("Output", (), {"images": images})()


def _painted(text: str, generator: torch.Generator) -> Image.Image:
    pixels = torch.randint(0, 256, (8, 8, 3), generator=generator)
    shifted = (pixels + zlib.crc32(text.encode("utf-8", "replace"))) % 256
    return Image.fromarray(shifted.to(torch.uint8).numpy())
