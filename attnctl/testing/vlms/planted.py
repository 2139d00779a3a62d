"""Sinks planted into a vision-language model, so that it is known where they are.

Random and small models have no attention sinks of their own. Here chosen image tokens and the
first token get a spike in a few dimensions of the residual stream, as sinks have it, and the
image tokens' keys a bonus on their logits, as if every query liked them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...control import Control
from ...hosts.vlm_discover import decoder_of
from ...hosts.vlm_tokens import fit_rows, image_ids
from ...patch import patch
from ...records import AttentionCall

__all__ = ["Planting", "planted", "quiet_dims"]

BOS = 1
"""Id of the first token of a text, in Llama's vocabularies and the tiny ones."""


@dataclass(frozen=True)
class Planting:
    """What to plant.

    Args:
        dims: dimensions of the spike.
        tokens: image tokens, by number within a prompt's.
        layer: first layer that reads the spike.
        spike: its size.
        bonus: added to the tokens' logits in the text's rows from that layer on.
    """

    dims: tuple[int, ...] = (7, 101)
    tokens: tuple[int, ...] = (0, 11)
    layer: int = 1
    spike: float = 200.0
    bonus: float = 8.0


def quiet_dims(model: Any, first: int = Planting.layer, n: int = 2) -> tuple[int, ...]:
    """Return the dimensions that the layers' values read least.

    Sinks of trained models have small values: they take attention and add little. A spike in
    any other dimension of a small model also adds a large value to every head that looks at it.

    Args:
        model: a vision-language model whose decoder has Llama's layers.
        first: first layer that counts.
        n: how many dimensions.
    """
    layers: Any = decoder_of(model).layers
    read = [
        layer.input_layernorm.weight.abs() * layer.self_attn.v_proj.weight.norm(dim=0)
        for layer in layers[first:]
    ]
    order = torch.stack(read).float().amax(dim=0).argsort()
    return tuple(int(dim) for dim in order[:n])


@contextlib.contextmanager
def planted(model: Any, planting: Planting, *controls: Control) -> Iterator[None]:
    """Have planted sinks in a model, with controls inside, for as long as the block lasts.

    Args:
        model: a vision-language model.
        planting: what to plant.
        *controls: controls that see the planted model.
    """
    ids: list[Tensor] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        given = kwargs.get("input_ids")
        if given is not None and given.shape[1] > 1:
            ids[:] = [given]

    def spike(module: Any, args: Any, kwargs: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        if x.shape[1] > 1:
            x = _spiked(x, ids[0], image_ids(model.config), planting)
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

    layer: Any = decoder_of(model).layers[planting.layer]  # type: ignore[index]
    hooks = [
        model.register_forward_pre_hook(note, with_kwargs=True),
        layer.register_forward_pre_hook(spike, with_kwargs=True),
    ]
    try:
        with patch(model, Bonus(planting), *controls):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _spiked(x: Tensor, ids: Tensor, images: tuple[int, ...], planting: Planting) -> Tensor:
    ids = fit_rows(ids, x.shape[0])
    image = torch.isin(ids, torch.tensor(images, device=ids.device))
    number = torch.tensor(planting.tokens, device=ids.device)
    there = image & torch.isin(image.cumsum(1) - 1, number)
    first = (ids == BOS).int().argmax(1)  # 0 in prompts without it
    there |= torch.arange(ids.shape[1], device=ids.device) == first[:, None]
    x = x.clone()
    for dim in planting.dims:
        x[..., dim].masked_fill_(there, planting.spike)
    return x


@dataclass(frozen=True)
class Bonus(Control):
    """Adds to the logits of the planted image tokens."""

    planting: Planting = Planting()

    name: ClassVar[str] = "planted"
    kinds: ClassVar[tuple[str, ...]] = ("causal",)

    @property
    def selector(self) -> str:
        """All heads from the first layer that reads the spike."""
        return f"!L0-{self.planting.layer - 1}" if self.planting.layer else "all"

    def attend(self, call: AttentionCall) -> Tensor:
        """Add the bonus to the mask."""
        tokens = call.spans.tokens
        assert tokens is not None
        image = tokens.slots("image")
        number = torch.tensor(self.planting.tokens, device=image.device)
        there = (image & torch.isin(image.cumsum(1) - 1, number))[:, tokens.first :]
        there = torch.nn.functional.pad(there, (0, call.k.shape[2] - there.shape[1]))
        asking = tokens.queries("text")[:, None, :, None]
        bonus = self.planting.bonus * (there[:, None, None] & asking).to(call.q.dtype)
        mask, low = call.mask, torch.finfo(call.q.dtype).min
        if mask is None and call.is_causal:
            n = call.q.shape[2]
            mask = torch.ones(n, n, dtype=torch.bool, device=image.device).tril()
        if mask is None:
            return call.proceed(mask=bonus, is_causal=False)
        both = bonus.masked_fill(~mask, low) if mask.dtype == torch.bool else bonus + mask
        return call.proceed(mask=both, is_causal=False)
