"""Finding the attention sites of a denoiser."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from ..errors import HostError
from ..records import Kind, Site
from ..sites import Sites
from .adopt import original_class
from .families import Family, family_of

__all__ = ["discover"]

_TEXT_ONLY = re.compile(r"token_refiner|context_refiner|text_transformer_blocks|text_encoder")


def discover(module: nn.Module, denoiser: str = "model") -> tuple[Sites, list[nn.Module]]:
    """Return the attention sites of a denoiser in execution order, and their modules.

    Args:
        module: the denoiser.
        denoiser: its attribute in the pipeline.

    Raises:
        HostError: if it has no attention module with a processor.
    """
    family = family_of(original_class(module))
    named = [
        (n.replace("_orig_mod.", ""), m) for n, m in module.named_modules() if _is_attention(m)
    ]
    if not named:
        raise HostError(
            f"{original_class(module).__name__} has no attention module with a processor; "
            "expected a diffusers UNet or transformer"
        )
    named.sort(key=lambda item: _order(item[0], family))
    numbers = _Numbers(family)
    sites = Sites()
    for index, (name, attention) in enumerate(named):
        kind = _kind(name, attention, family)
        heads, head_dim, kv_heads = _shape(attention)
        layer = numbers.layer(name, kind)
        sites.append(Site(index, name, kind, layer, heads, head_dim, kv_heads, denoiser))
    return sites, [m for _, m in named]


def _is_attention(module: nn.Module) -> bool:
    return hasattr(module, "processor") and hasattr(module, "heads")


def _order(name: str, family: Family) -> int:
    """Block lists in execution order; everything else (refiners) before them."""
    first = name.split(".")[0]
    return family.blocks.index(first) if first in family.blocks else -1


class _Numbers:
    """Numbers the blocks: one number per block, for its first mixing and cross attention."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.blocks: dict[str, int] = {}
        self.taken: set[tuple[str, bool]] = set()

    def layer(self, name: str, kind: Kind) -> int | None:
        if kind == "text" or (self.family.blocks and name.split(".")[0] not in self.family.blocks):
            return None
        block = name.rsplit(".", 1)[0]
        number = self.blocks.setdefault(block, len(self.blocks))
        key = (block, kind == "cross")
        if key in self.taken:
            return None
        self.taken.add(key)
        return number


def _kind(name: str, module: Any, family: Family) -> Kind:
    if _TEXT_ONLY.search(name):
        return "text"
    if "Linear" in type(module.processor).__name__:
        return "linear"
    known = family.kinds.get(name.rsplit(".", 1)[-1])
    if known is not None:
        return known
    if getattr(module, "is_cross_attention", False):
        return "cross"
    joint = getattr(module, "added_kv_proj_dim", None) is not None
    return "joint" if joint else "self"


def _shape(module: Any) -> tuple[int, int, int]:
    """Return (query heads, head dim, key heads)."""
    heads = int(module.heads)
    inner = getattr(module, "inner_dim", None)
    head_dim = int(inner // heads if inner else getattr(module, "head_dim", 0))
    inner_kv = getattr(module, "inner_kv_dim", None) or inner
    kv_heads = int(inner_kv // head_dim) if inner_kv and head_dim else heads
    return heads, head_dim, kv_heads
