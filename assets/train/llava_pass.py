"""One pass over photos with many turns each, every turn as if it were the only one.

The turns of a photo stand side by side behind the shared picture. Each sees the picture and
itself, and its positions go on from the picture's, so it is exactly a single-turn prompt; the
picture is computed once. Everything has fixed shapes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Layout:
    """Positions and mask of a header, a number of slots, and perhaps a longer last slot.

    Args:
        header: tokens before the turns, pictures included.
        slots: length of each turn.
        device: where the tensors are.
    """

    def __init__(self, header: int, slots: list[int], device: torch.device) -> None:
        group = torch.tensor([0] * header + [i + 1 for i, n in enumerate(slots) for _ in range(n)])
        inside = torch.cat([torch.arange(header), *(header + torch.arange(n) for n in slots)])
        row = torch.arange(len(group))
        own = group[:, None] == group[None, :]
        mask = (own | (group == 0)[None, :]) & (row[:, None] >= row[None, :])
        self.header = header
        self.positions = inside[None].to(device)
        self.mask = mask[None, None].to(device)


def vision(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """States ``[B, 1 + 144, 128]`` before and after the vision tower's last layer.

    Args:
        model: the vision-language model.
        pixels: ``[B, 3, side, side]`` normalised.
    """
    tower = getattr(model.model.vision_tower, "vision_model", model.model.vision_tower)
    states = before = tower.pre_layrnorm(tower.embeddings(pixels))
    for layer in tower.encoder.layers:
        before, states = states, layer(states, attention_mask=None)
        states = states[0] if isinstance(states, tuple) else states
    return before, states


def logits(model: Any, header: Tensor, pictures: Tensor, turns: Tensor, layout: Layout) -> Tensor:
    """Logits ``[B, T, vocabulary]`` at the turns' tokens.

    Args:
        model: the vision-language model.
        header: ``[H]`` token ids; those of the pictures are the placeholder, 144 in a row each.
        pictures: ``[B, I, 144, 128]`` vision states without the class token.
        turns: ``[B, T]`` token ids of all slots.
        layout: of header and slots.
    """
    embed = model.model.language_model.embed_tokens
    shown = model.model.multi_modal_projector(pictures)
    batch, images, tokens, _ = shown.shape
    words = embed(header)[None].expand(batch, -1, -1)
    shown = shown.to(words.dtype)  # the residual stream stays in full precision
    first = int(layout.header - images * (tokens + 1))
    parts = [words[:, :first]]
    for image in range(images):
        newline = first + image * (tokens + 1) + tokens
        parts += [shown[:, image], words[:, newline : newline + 1]]
    states = torch.cat([*parts, embed(turns)], dim=1)
    out = model.model.language_model(
        inputs_embeds=states,
        attention_mask=layout.mask,
        position_ids=layout.positions.expand(batch, -1),
        use_cache=False,
    ).last_hidden_state
    answers: Tensor = model.lm_head(out[:, layout.header :])
    return answers


class Helpers(nn.Module):
    """Linear heads that teach the vision tower directly; they are not part of the model.

    One tells the pair each patch shows, from the states the language model gets; the other tells
    which pairs the picture shows, from the class token of the last layer.
    """

    def __init__(self, width: int, pairs: int) -> None:
        super().__init__()
        self.patch = nn.Linear(width, pairs + 1)
        self.whole = nn.Linear(width, pairs)
