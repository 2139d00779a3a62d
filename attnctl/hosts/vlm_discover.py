"""Finding the decoder of a transformers model and its attention sites."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from ..errors import HostError
from ..records import Site
from ..sites import Sites
from .adopt import original_class

__all__ = [
    "attention_forward",
    "decoder_of",
    "discover_decoder",
    "is_language_model",
    "speaker_of",
]

_LIST = ".layers."


def is_language_model(target: Any) -> bool:
    """Whether the target is a model of transformers, which is not imported for the question."""
    module = sys.modules.get("transformers.modeling_utils")
    return module is not None and isinstance(target, module.PreTrainedModel)


def discover_decoder(module: nn.Module, name: str = "model") -> tuple[Sites, list[nn.Module]]:
    """Return the attention sites of a model's decoder in execution order, and their modules.

    Args:
        module: a vision-language model, a language model, or the text decoder inside one.
        name: what the sites say they belong to.

    Raises:
        HostError: if it has no decoder whose attention goes through the attention interface.
    """
    found = _attentions(module)
    sites = Sites()
    for index, (path, attention) in enumerate(found):
        heads, head_dim, kv_heads = _shape(attention)
        layer = attention.layer_idx
        sites.append(Site(index, path, "causal", layer, heads, head_dim, kv_heads, name))
    return sites, [m for _, m in found]


def decoder_of(module: nn.Module) -> nn.Module:
    """Return the module that holds the decoder's list of layers.

    Raises:
        HostError: if there is none.
    """
    path = "." + _attentions(module)[0][0]
    return module.get_submodule(path[: path.rindex(_LIST)].lstrip("."))


def speaker_of(model: Any) -> Any:
    """Return the language model that generates for a whole one, from embeddings; None if none.

    Models with a Q-Former work so: what they give to `generate` is made into embeddings.
    """
    return getattr(model, "language_model", None) if hasattr(model, "qformer") else None


def attention_forward(attention: nn.Module) -> Callable[..., Any]:
    """Return the stock forward function of an attention module, out of its decorators."""
    cls: Any = original_class(attention)
    forward: Callable[..., Any] = inspect.unwrap(cls.forward)
    return forward


def _attentions(module: Any) -> list[tuple[str, Any]]:
    name = original_class(module).__name__
    if getattr(module.config, "is_encoder_decoder", False) or _is_seq2seq(module):
        raise HostError(
            f"{name} is an encoder and a decoder with cross-attention, which attnctl does not "
            "support; expected a decoder-only model such as LLaVA or Qwen2.5-VL"
        )
    inside = _subtree(module)
    found = [(n, m) for n, m in module.named_modules() if m in inside and _is_attention(m)]
    found = [(n, m) for n, m in found if _LIST in f".{n}."]
    if not found:
        raise HostError(
            f"{name} has no decoder layers whose attention goes through the attention interface "
            "of transformers; expected a vision-language model, or the text decoder inside one"
        )
    return sorted(found, key=lambda item: item[1].layer_idx)


def _is_seq2seq(module: Any) -> bool:
    text = getattr(module.config, "text_config", None)
    return bool(getattr(text, "is_encoder_decoder", False))


def _subtree(module: Any) -> set[nn.Module]:
    """Return the modules of the text decoder, so that towers with layers of their own stay out."""
    decoder = module.get_decoder() if hasattr(module, "get_decoder") else module
    return set((decoder if isinstance(decoder, nn.Module) else module).modules())


def _is_attention(module: Any) -> bool:
    if not isinstance(getattr(module, "layer_idx", None), int):
        return False
    return "ALL_ATTENTION_FUNCTIONS" in attention_forward(module).__code__.co_names


def _shape(attention: Any) -> tuple[int, int, int]:
    """Return (query heads, head dim, key heads)."""
    heads = int(attention.config.num_attention_heads)
    return heads, int(attention.head_dim), heads // getattr(attention, "num_key_value_groups", 1)
