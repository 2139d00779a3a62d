"""Where the sinks of a vision-language model are, told in five ways, and in which dimensions.

On one prompt, layer by layer: phi in the sink dimensions, the cosine between a token's residual
stream and the first token's, and the attention that a token gets from the question. Of the
vision tower: the norm of each patch's features and the attention of the class token to it.

References:
    Kang et al., ICLR 2025 (arXiv 2503.03321): phi. Darcet et al., "Vision Transformers Need
    Registers", ICLR 2024: norms. Gong et al., "DAMRO", EMNLP 2024 (arXiv 2410.04514): the class
    token's attention; here the mean over heads, there one softmax over all heads together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnctl.control import Control
from attnctl.errors import OptionError
from attnctl.kernels.group_attention import row_probabilities
from attnctl.patch import patch
from attnctl.records import AttentionCall

from .rows import tokens_of
from .sinks import phi, rms_normed

__all__ = ["SinkMap", "calibrate_sink_dims", "sink_map"]

_TOP = 8
"""Tokens with most attention that are looked at where the first token tells nothing."""
_GAP = 3.0
"""A sink dimension is at least so many times the next."""


@dataclass(frozen=True)
class SinkMap:
    """What tells the sinks of one batch of prompts.

    Args:
        sink_dims: the dimensions, none if there are none.
        phi: [L, B, N], None without sink dimensions.
        cosine: [L, B, N], of the residual stream with the first token's.
        mass: [L, B, N], mean attention from the text after the image, over heads and rows.
        image: bool [B, N], image tokens.
        text: bool [B, N], text tokens: the others are image or padding.
        norms: [B, patches], of the vision tower's features; None where patches are not tokens.
        cls: [B, patches], class token's attention; None without a class token.
    """

    sink_dims: tuple[int, ...]
    phi: Tensor | None
    cosine: Tensor
    mass: Tensor
    image: Tensor
    text: Tensor
    norms: Tensor | None
    cls: Tensor | None

    def sinks(self, tau: float = 20.0) -> Tensor:
        """Return the sinks, bool [L, B, N]: text and image tokens with phi >= tau."""
        if self.phi is None:
            return torch.zeros_like(self.mass, dtype=torch.bool)
        return (self.phi >= tau) & (self.image | self.text)


@dataclass(frozen=True)
class Probe(Control):
    """Reads the residual stream and the question's attention in the prompt.

    Args:
        sink_dims: dimensions of phi.
        found: filled layer by layer.
    """

    sink_dims: tuple[int, ...] = ()
    found: list[dict[str, Tensor]] = field(default_factory=list)

    name: ClassVar[str] = "sink-probe"
    kinds: ClassVar[tuple[str, ...]] = ("causal",)
    reads_residual: ClassVar[bool] = True

    def attend(self, call: AttentionCall) -> Tensor:
        """Note what a layer shows; change nothing."""
        tokens, residual = tokens_of(call, self.name), call.residual
        assert residual is not None and residual.past == 0
        normed = rms_normed(residual.hidden)
        real = ~tokens.slots("pad")
        rows = torch.arange(len(real), device=real.device)
        first = normed[rows, real.int().argmax(1)]
        mass = self._mass(call)
        top = mass.topk(min(_TOP, mass.shape[1])).indices
        note = {
            "first": first.abs(),
            "top": normed[rows[:, None], top].abs().median(1).values,
            "cosine": torch.nn.functional.cosine_similarity(normed, first[:, None], dim=-1),
            "mass": mass,
            "image": tokens.slots("image"),
            "text": tokens.slots("text"),
        }
        if self.sink_dims:
            note["phi"] = phi(residual.hidden, self.sink_dims)
        self.found.append({key: value.detach().cpu() for key, value in note.items()})
        return call.proceed()

    def _mass(self, call: AttentionCall) -> Tensor:
        """Return the mean attention [B, N] from the text after the image; from all without."""
        tokens = tokens_of(call, self.name)
        few = call.queries_at(tokens.columns("question"))
        weights = row_probabilities(few.q, few.k, few.mask, few.scale).mean(1)  # [B, R, N]
        asked = tokens_of(few, self.name).queries("question").to(weights.dtype)[..., None]
        return (weights * asked).sum(1) / asked.sum(1).clamp_min(1)


def sink_map(
    model: Any, inputs: Mapping[str, Any], sink_dims: Sequence[int] | None = None
) -> SinkMap:
    """Return what tells the sinks of prompts, from one forward (two without dimensions).

    Args:
        model: a vision-language model.
        inputs: what its processor returns: prompts with images.
        sink_dims: dimensions of phi; None to calibrate them on these prompts, which may find
            none.
    """
    dims = calibrate_sink_dims(model, [inputs]) if sink_dims is None else tuple(sink_dims)
    with _tower(model) as seen:
        layers = _probed(model, inputs, dims)
    stacked = {k: torch.stack([one[k] for one in layers]) for k in ("cosine", "mass")}
    strengths = torch.stack([one["phi"] for one in layers]) if dims else None
    image, text = layers[0]["image"], layers[0]["text"]
    norms, cls = _patches(seen, image)
    return SinkMap(dims, strengths, stacked["cosine"], stacked["mass"], image, text, norms, cls)


def calibrate_sink_dims(
    model: Any, prompts: Sequence[Mapping[str, Any]], k: int = 2
) -> tuple[int, ...]:
    """Return the dimensions in which a model's sinks are far above all others.

    The residual stream of the middle half of the layers, divided by its RMS, is looked at where
    the first token is, which is a sink in every model that has sinks; the median over layers
    and prompts is ranked. The first m <= k dimensions are taken, m as large as can be with the
    m-th at least three times the one after it. Where there is no such gap, the tokens with most
    attention are looked at in the same way.

    Args:
        model: a vision-language model.
        prompts: what its processor returns, for one or several batches.
        k: most dimensions.

    Returns:
        The dimensions, strongest first; none if no dimension stands out.

    Raises:
        OptionError: if there are no prompts, or k is below 1.
    """
    if not prompts or k < 1:
        raise OptionError(f"calibration needs prompts and k of 1 or above, got k={k}")
    layers = [_probed(model, inputs) for inputs in prompts]
    for place in ("first", "top"):
        seen = [one[place] for found in layers for one in _middle(found)]
        dims = _standing_out(torch.cat(seen).median(0).values, k)
        if dims:
            return dims
    return ()


def _middle(found: Sequence[dict[str, Tensor]]) -> Sequence[dict[str, Tensor]]:
    n = len(found)
    return found[n // 4 : max(n // 4 + 1, n - n // 4)]


def _standing_out(size: Tensor, k: int) -> tuple[int, ...]:
    values, order = size.sort(descending=True)
    for m in range(min(k, len(values) - 1), 0, -1):
        if values[m - 1] >= _GAP * values[m]:
            return tuple(order[:m].tolist())
    return ()


@torch.no_grad()
def _probed(
    model: Any, inputs: Mapping[str, Any], dims: tuple[int, ...] = ()
) -> list[dict[str, Tensor]]:
    probe = Probe(dims)
    with patch(model, probe):
        model(**inputs)
    return probe.found


# -- the vision tower ------------------------------------------------------------------------


@contextlib.contextmanager
def _tower(model: Any) -> Iterator[dict[str, Tensor]]:
    """Note features, queries and keys of the layer whose output the language model gets."""
    seen: dict[str, Tensor] = {}
    layer = _feature_layer(model)
    hooks = []
    if layer is not None:
        hooks.append(layer.register_forward_hook(_noting(seen, "features")))
        for name in ("q_proj", "k_proj"):
            part = getattr(layer.self_attn, name)
            hooks.append(part.register_forward_hook(_noting(seen, name)))
        seen["heads"] = torch.tensor(layer.self_attn.num_heads)
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _noting(seen: dict[str, Tensor], name: str) -> Any:
    def note(module: Any, args: Any, out: Any) -> None:
        seen[name] = (out[0] if isinstance(out, tuple) else out).detach()

    return note


def _feature_layer(model: Any) -> Any:
    """Return the layer of a CLIP-like tower that LLaVA takes its features from, or None."""
    tower = getattr(getattr(model, "model", model), "vision_tower", None)
    layers = getattr(
        getattr(getattr(tower, "vision_model", tower), "encoder", None), "layers", None
    )
    number = getattr(model.config, "vision_feature_layer", None)
    if layers is None or not isinstance(number, int):
        return None
    layer = layers[number if number < 0 else number - 1]
    return layer if hasattr(getattr(layer, "self_attn", None), "q_proj") else None


def _patches(seen: dict[str, Tensor], image: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return norms and class token's attention of the patches, where they are the tokens."""
    features = seen.get("features")
    if features is None or features.shape[0] != image.shape[0]:
        return None, None
    tokens = int(image.sum(1)[0])
    extra = features.shape[1] - tokens  # the class token, or none
    if extra not in (0, 1):
        return None, None
    norms = features[:, extra:].float().norm(dim=-1).cpu()
    return norms, _cls_attention(seen) if extra else None


def _cls_attention(seen: dict[str, Tensor]) -> Tensor:
    heads = int(seen["heads"])
    q, k = (seen[n].unflatten(-1, (heads, -1)).transpose(1, 2) for n in ("q_proj", "k_proj"))
    return row_probabilities(q[:, :, :1], k).mean(1)[:, 0, 1:].cpu()
