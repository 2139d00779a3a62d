"""The record of one tiny vision-language family, the registry of them, and running them."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnctl.testing.zoo.core import FamilyUnavailable, rows

__all__ = ["VLM", "VLMS", "generate", "need", "prompt_ids", "vlm"]

BOS, PAD, FIRST_WORD, WORDS = 1, 0, 20, 128
"""Token ids of the tiny vocabularies: special ones below `FIRST_WORD`, `WORDS` in all."""


def need(name: str) -> Any:
    """The transformers class ``name``; FamilyUnavailable where it cannot be had."""
    import transformers

    try:
        cls = getattr(transformers, name, None)
    except (ImportError, RuntimeError) as error:
        raise FamilyUnavailable(f"transformers {transformers.__version__}: {error}") from error
    if cls is None or type(cls).__name__ == "DummyObject":
        raise FamilyUnavailable(f"transformers {transformers.__version__} has no usable {name}")
    return cls


@dataclass(frozen=True)
class VLM:
    """One tiny stock model and inputs for it.

    Args:
        name: name of the family.
        model: makes the model.
        image: token ids that stand for one image in a prompt.
        pixels: returns the model's inputs for images of these seeds.
        extra: returns more inputs from the token ids and the padding mask.
        layers: decoder layers.
        several: whether a prompt may hold several images.
        leading: whether the image comes before any other token.
    """

    name: str
    model: Callable[[], Any]
    image: tuple[int, ...]
    pixels: Callable[[Sequence[int]], dict[str, Tensor]]
    extra: Callable[[Tensor, Tensor], dict[str, Tensor]] | None = None
    layers: int = 3
    several: bool = True
    leading: bool = False

    def build(self, seed: int = 0, attention: str = "sdpa") -> Any:
        """The model with seeded random weights, fp32, in eval mode."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.model().float().eval()
            _sharpen(model)
        model.set_attn_implementation({"text_config": attention})
        # no end token: every answer has the length that is asked for
        for config in (model.generation_config, _inner(model).generation_config):
            config.eos_token_id, config.pad_token_id, config.do_sample = None, PAD, False
        return model

    def inputs(self, samples: Sequence[int] = (0, 1), images: int = 1) -> dict[str, Any]:
        """Inputs of a batch, padded on the left; sample i is the same in every batch."""
        prompts = [prompt_ids(self, sample, images) for sample in samples]
        most = max(map(len, prompts))
        ids = torch.tensor([[PAD] * (most - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (most - len(p)) + [1] * len(p) for p in prompts])
        seeds = [10 * sample + i for sample in samples for i in range(images)]
        made = {"input_ids": ids, "attention_mask": mask, **self.pixels(seeds)}
        return made | (self.extra(ids, mask) if self.extra else {})


VLMS: dict[str, VLM] = {}
"""The registered families by name."""


def vlm(name: str, **facts: Any) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Register the decorated model builder as the family ``name``."""

    def add(builder: Callable[[], Any]) -> Callable[[], Any]:
        VLMS[name] = VLM(name=name, model=builder, **facts)
        return builder

    return add


def prompt_ids(family: VLM, sample: int, images: int = 1) -> list[int]:
    """Token ids of one prompt: text, images, a question; its length depends on the sample."""
    draw = torch.Generator().manual_seed(zlib.crc32(f"prompt/{sample}".encode()))
    words = torch.randint(FIRST_WORD, WORDS, (12,), generator=draw).tolist()
    before = [] if family.leading else [BOS, words[0]]
    after = [BOS] if family.leading else []
    middle = [token for i in range(images) for token in (*family.image, words[1 + i])]
    return [*before, *middle, *after, *words[4 : 7 + 2 * (sample % 3)]]


def generate(model: Any, inputs: dict[str, Any], tokens: int = 4, **options: Any) -> Tensor:
    """The scores [B, tokens, V] of a greedy answer (or of what the options ask for)."""
    with torch.no_grad():
        out = model.generate(
            **inputs, max_new_tokens=tokens, min_new_tokens=tokens,
            return_dict_in_generate=True, output_logits=True, **options,
        )  # fmt: skip
    return torch.stack(out.logits, dim=1)


def pictures(seeds: Sequence[int], *shape: int) -> Tensor:
    """Seeded normal pixels, one a seed."""
    return torch.cat([rows("pixels", seed, 1, *shape) for seed in seeds])


def _inner(model: Any) -> Any:
    inner: Any = getattr(model, "language_model", None)
    return inner if getattr(inner, "generation_config", None) else model


def _sharpen(model: Any) -> None:
    """Make attention uneven and zeros random, so that a change of image or attention shows."""
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.ndim >= 2 and not param.any():
                param.normal_(std=0.3)
            elif param.ndim >= 2:
                param.mul_(4.0)
            if ("q_proj" in name or "k_proj" in name) and param.ndim == 2:
                param.mul_(3.0)
