"""SynGen: an attribute looks where its noun looks, and elsewhere than the rest of the prompt.

With D the symmetric divergence (KL(p, q) + KL(q, p)) / 2 of maps divided by their sums,

    L = sum over pairs (attribute a, noun s) of
        D(a, s) - 1/2 (mean over other words o of D(s, o) + mean over o of D(a, o))

and for a noun without attributes only - mean over o of D(s, o).

References:
    Rassin et al., "Linguistic Binding in Diffusion Models", NeurIPS 2023 (arXiv 2306.08877);
    official code RoyiRa/Linguistic-Binding-in-Diffusion-Models.

Deviations: pairs come from `attnctl.concepts` or from the user, not from a parser; a noun or an
attribute of several tokens has one map, their mean (official: the token that is worst). Every
sample of a batch is moved (the released code keeps the last one only). Where the prompt's other
words are not known (embeddings), the words of the other objects stand for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnctl.control import register

from .engine import LatentControl, Maps

__all__ = ["SynGen", "binding", "symmetric_kl"]


def symmetric_kl(a: Tensor, b: Tensor) -> Tensor:
    """Return (KL(p, q) + KL(q, p)) / 2 of two maps divided by their sums, in nats."""
    p, q = _logs(a), _logs(b)
    return ((p.exp() - q.exp()) * (p - q)).sum() / 2


def _logs(x: Tensor) -> Tensor:
    flat = x.flatten()
    return (flat / flat.sum()).clamp_min(torch.finfo(x.dtype).eps).log()


def binding(noun: Tensor, attributes: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """Return the loss of one object.

    Args:
        noun: its map.
        attributes: maps of its attributes.
        others: maps of the prompt's other words.
    """
    away = _mean(noun, others)
    if not attributes:
        return -away
    each = [symmetric_kl(a, noun) - (_mean(a, others) + away) / 2 for a in attributes]
    return torch.stack(each).sum()


def _mean(one: Tensor, others: Sequence[Tensor]) -> Tensor:
    if not others:
        return one.sum() * 0
    return torch.stack([symmetric_kl(one, o) for o in others]).mean()


@register
@dataclass(frozen=True)
class SynGen(LatentControl):
    """Bind attributes to nouns; options as in `LatentControl`.

    By default as in the paper's code: the first half of the run, a constant step size of 20.
    """

    stop: float = 0.5
    decay: float = 1.0

    name: ClassVar[str] = "syngen"

    def loss(self, maps: Maps, memory: dict[str, Any]) -> Tensor:
        """Return the sum over the objects."""
        terms = []
        for target in maps.targets:
            rest = sorted(set(maps.content) - set(target.tokens))
            others = [maps.text[p] for p in rest]
            attributes = [maps.word(maps.text, word) for word in target.attributes]
            terms.append(binding(maps.word(maps.text, target.noun), attributes, others))
        return torch.stack(terms).sum()
