"""Learned scorers with weights on this machine: CLIP, PickScore, HPS v2, LAION aesthetic.

Nothing is downloaded. Pictures are resized and normalised as tensors, so gradients flow; the
resizing is bicubic with antialiasing, as the original pre-processing does on 8-bit pictures.

References:
    Radford et al., 2021 (CLIP, arXiv 2103.00020); Kirstain et al., "Pick-a-Pic", 2023 (arXiv
    2305.01569); Wu et al., "Human Preference Score v2", 2023 (arXiv 2306.09341); Schuhmann,
    LAION aesthetic predictor, 2022 (linear layers 768-1024-128-64-16-1 on CLIP ViT-L/14).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from attnctl.errors import MissingExtra, OptionError

from .objective import Objective

__all__ = ["Aesthetic", "Clip", "HPSv2", "PickScore"]

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def prepared(images: Tensor, side: int) -> Tensor:
    """Return pictures [n, 3, H, W] in 0 to 1 as CLIP takes them: [n, 3, side, side].

    The shorter side becomes `side`, the middle is cut out, channels are normalised.
    """
    height, width = images.shape[-2:]
    scale = side / min(height, width)
    size = [max(side, round(height * scale)), max(side, round(width * scale))]
    small = interpolate(images.float(), size, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    small = small[..., top : top + side, left : left + side]
    mean, std = (small.new_tensor(x)[:, None, None] for x in (MEAN, STD))
    return (small - mean) / std


def _folder(text: str, what: str) -> Path:
    folder = Path(text).expanduser()
    if not (folder / "config.json").is_file():
        raise OptionError(f"{what}: {text!r} is no folder of a CLIP model (no config.json in it)")
    return folder


@lru_cache(maxsize=2)
def _clip(folder: Path, device: torch.device) -> tuple[Any, Any]:
    from transformers import AutoTokenizer, CLIPModel

    model = CLIPModel.from_pretrained(folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model.to(device).eval().requires_grad_(False), tokenizer


class Clip(Objective):
    """100 x the cosine between picture and prompt.

    Args:
        folder: a CLIP model with its tokenizer, as transformers saves them.
    """

    name: ClassVar[str] = "clip"
    takes: ClassVar[str] = "FOLDER"

    def __init__(self, folder: str) -> None:
        self.folder = _folder(folder, self.name)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return [n]."""
        return 100 * self.cosine(images, prompts)

    def cosine(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the cosines [n]."""
        model, tokenizer = _clip(self.folder, images.device)
        words = tokenizer(
            list(prompts),
            padding=True,
            truncation=True,
            max_length=model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(images.device)
        inputs = prepared(images, model.config.vision_config.image_size)
        seen = model.visual_projection(model.vision_model(pixel_values=inputs).pooler_output)
        read = model.text_projection(model.text_model(**words).pooler_output)
        return (normalize(seen, dim=-1) * normalize(read, dim=-1)).sum(-1)

    def __str__(self) -> str:
        return f"{self.name}:{self.folder.name}"


class PickScore(Clip):
    """PickScore v1: the cosine times the model's learned scale, about 20 for good pictures."""

    name: ClassVar[str] = "pickscore"

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return [n]."""
        scale = _clip(self.folder, images.device)[0].logit_scale.exp()
        return scale * self.cosine(images, prompts)


class Aesthetic(Objective):
    """LAION aesthetic score, about 1 to 10; the prompt does not matter.

    Args:
        places: folder of CLIP ViT-L/14, "+", file of the head's weights (.pth or .safetensors).
    """

    name: ClassVar[str] = "aesthetic"
    takes: ClassVar[str] = "FOLDER+FILE"

    def __init__(self, places: str) -> None:
        folder, plus, file = places.rpartition("+")
        if not plus or not Path(file).is_file():
            raise OptionError(f"aesthetic: expected FOLDER+FILE, got {places!r}")
        self.folder, self.file = _folder(folder, self.name), Path(file)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return [n]."""
        model, _ = _clip(self.folder, images.device)
        inputs = prepared(images, model.config.vision_config.image_size)
        seen = model.visual_projection(model.vision_model(pixel_values=inputs).pooler_output)
        return _linear_layers(self.file, normalize(seen, dim=-1)).squeeze(-1)


@lru_cache(maxsize=2)
def _layers(file: Path) -> list[tuple[Tensor, Tensor]]:
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(file)
    else:
        state = torch.load(file, map_location="cpu", weights_only=True)
    names = [name.removesuffix(".weight") for name in state if name.endswith(".weight")]
    names.sort(key=lambda name: [int(p) if p.isdigit() else 0 for p in name.split(".")])
    return [(state[f"{name}.weight"].float(), state[f"{name}.bias"].float()) for name in names]


def _linear_layers(file: Path, x: Tensor) -> Tensor:
    """The head has no activations between its layers (dropout only)."""
    for weight, bias in _layers(file):
        x = torch.nn.functional.linear(x, weight.to(x), bias.to(x))
    return x


class HPSv2(Objective):
    """HPS v2: 100 x the cosine of its ViT-H-14.

    Args:
        file: HPS_v2_compressed.pt or HPS_v2.1_compressed.pt.
    """

    name: ClassVar[str] = "hpsv2"
    takes: ClassVar[str] = "FILE"

    def __init__(self, file: str) -> None:
        if not Path(file).is_file():
            raise OptionError(f"hpsv2: there is no file {file!r}")
        self.file = Path(file)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return [n].

        Raises:
            MissingExtra: without open_clip.
        """
        model, tokenizer = _hps(self.file, images.device)
        inputs = prepared(images, 224)
        seen = normalize(model.encode_image(inputs), dim=-1)
        read = normalize(model.encode_text(tokenizer(list(prompts)).to(images.device)), dim=-1)
        scores: Tensor = 100 * (seen * read).sum(-1)
        return scores


@lru_cache(maxsize=1)
def _hps(file: Path, device: torch.device) -> tuple[Any, Any]:
    try:
        import open_clip
    except ImportError as error:
        raise MissingExtra("open_clip_torch", "eval", "the objective hpsv2") from error
    model = open_clip.create_model("ViT-H-14", pretrained=None)
    state = torch.load(file, map_location="cpu", weights_only=True)
    model.load_state_dict(state.get("state_dict", state))
    model = model.to(device).eval().requires_grad_(False)
    return model, open_clip.get_tokenizer("ViT-H-14")
