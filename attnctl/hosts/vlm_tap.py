"""The interception point in transformers: a controlled module looks up our attention function.

Every decoder attention asks `ALL_ATTENTION_FUNCTIONS` for the function that its own
`config._attn_implementation` names. A controlled module sees its config through a view in
which that name is ours; the model, its masks and all other modules go on with the real one, so
the model stays on its fast attention and nothing of the config is changed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor

from ..errors import HostError
from .adopt import Uncopied, adopt, release
from .vlm_discover import attention_forward
from .vlm_flash import Flash, Seen, flash_of, flash_primitive, seen_by_sdpa

if TYPE_CHECKING:
    from .vlm import DecoderBinding, Local

__all__ = [
    "NAME",
    "DecoderSite",
    "Stock",
    "hook_site",
    "primitive",
    "stock_attention",
    "unhook_site",
]

NAME = "attnctl"
"""Our entry in transformers' attention interface."""

_REF, _VIEW = "_attnctl_ref", "_attnctl_view"


class DecoderSite(Uncopied):
    """Says which site of which binding a module is, and where its forward is found."""

    def __init__(self, binding: DecoderBinding, index: int, local: Local) -> None:
        self.binding, self.lookup = binding, binding.compiled.lookup
        self.index, self.local = index, local


class _ConfigView:
    """A config in which the attention implementation is ours."""

    _attn_implementation = NAME

    def __init__(self, config: Any) -> None:
        self._attnctl_config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attnctl_config, name)


class ConfigOfSite:
    """Mixin put in front of an attention module's class while its site is controlled."""

    _attnctl_view: _ConfigView

    @property
    def config(self) -> Any:
        """The module's config, seen through the view."""
        return self._attnctl_view  # not made here from __dict__: torch 2.11 cannot compile that

    @config.setter
    def config(self, value: Any) -> None:
        self.__dict__["config"], self.__dict__[_VIEW] = value, _ConfigView(value)


def hook_site(module: torch.nn.Module, ref: DecoderSite) -> None:
    """Let a module's attention go through `ref`.

    Raises:
        HostError: if the module is a site of another patched decoder, or if its attention
            implementation takes no mask.
    """
    if _REF in module.__dict__:
        raise HostError(
            f"this {type(module).__name__} is already a site of another patched decoder that "
            "contains it; undo the other patch first"
        )
    _register()
    stock_attention(module)
    module.__dict__[_REF] = ref
    module.__dict__[_VIEW] = _ConfigView(module.__dict__["config"])
    adopt(module, ConfigOfSite)


def unhook_site(module: torch.nn.Module) -> None:
    """Take back what `hook_site` did; nothing is left on the module."""
    release(module)
    module.__dict__.pop(_REF, None)
    module.__dict__.pop(_VIEW, None)


@functools.cache
def _interface() -> Any:
    """Return the attention interface of transformers, imported late and once."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS


def _register() -> None:
    """Make our name known to transformers; without a patch nobody asks for it."""
    if NAME not in _interface().valid_keys():
        _interface().register(NAME, _attend)


def stock_attention(module: torch.nn.Module, name: str = "") -> Callable[..., Any]:
    """Return the attention function that the module uses without us.

    Args:
        module: the module.
        name: what its config calls that; asked for if empty.

    Raises:
        HostError: if it is one whose masks a control cannot read.
    """
    name = name or module.__dict__["config"]._attn_implementation
    if name == "eager":
        stock: Callable[..., Any] = attention_forward(module).__globals__[
            "eager_attention_forward"
        ]
        return stock
    if name == "sdpa":
        found: Callable[..., Any] = _interface()[name]
        return found
    known = name in _interface().valid_keys()
    flash = flash_of(_interface()[name]) if known else None
    if flash is None:
        raise HostError(
            f"this decoder's attention is {name!r}; controls can act on sdpa, eager and "
            "flash_attention_2 to 4: call model.set_attn_implementation('sdpa') first"
        )
    return flash


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Our entry of the interface: q [B, H, N, D], k and v [B, Hkv, Nk, D], out [B, N, H, D]."""
    ref = module.__dict__.get(_REF)
    if ref is None:
        return _unpatched(module, query, key, value, attention_mask, **kwargs)
    call, form = (query, key, value, attention_mask), ref.lookup.form
    if form is not None and torch.compiler.is_compiling():
        out: tuple[Tensor, Tensor | None] = form.attend(ref.index, module, call, kwargs)
        return out
    forward = ref.local.forward
    if forward is None or forward.binding is not ref.binding:
        raise ref.binding.passed()
    done: tuple[Tensor, Tensor | None] | None = None
    if forward.written is not None:
        done = forward.write(ref.index, module, call, kwargs)
    elif forward.reading:
        done = forward.read(ref.index, module, call, kwargs)
    return forward.attend(ref.index, module, call, kwargs) if done is None else done


def _unpatched(module: torch.nn.Module, *call: Any, **kwargs: Any) -> Any:
    """Run the attention of a module that is no site, or was one."""
    config = module.__dict__.get("config")
    if config is None or config._attn_implementation == NAME:
        raise HostError(
            f"{NAME!r} is no attention implementation to choose; call attnctl.patch(model, "
            "...) on a model with 'sdpa', 'eager' or 'flash_attention_2'"
        )
    return stock_attention(module)(module, *call, **kwargs)


class Stock(NamedTuple):
    """The attention function that modules use without us.

    Args:
        run: the function.
        eager: whether it is the model's own eager one.
        flash: whether it is FlashAttention.
    """

    run: Callable[..., Any]
    eager: bool
    flash: bool = False

    @classmethod
    def of(cls, module: torch.nn.Module) -> Stock:
        """Return that of a module; configs are slow to ask, once in a forward is enough."""
        name = module.__dict__["config"]._attn_implementation
        run = stock_attention(module, name)
        return cls(run, name == "eager", isinstance(run, Flash))

    def plain(self, kwargs: dict[str, Any]) -> bool:
        """Whether it computes scaled_dot_product_attention and nothing else."""
        if self.eager or kwargs.get("dropout"):
            return False
        return kwargs.get("position_bias") is None

    def causal(self, module: Any, mask: Tensor | None, kwargs: dict[str, Any]) -> bool:
        """Whether it is asked to be causal without a mask."""
        if mask is not None or self.eager:
            return False
        asked = kwargs.get("is_causal")
        return bool(getattr(module, "is_causal", True) if asked is None else asked)

    def seen(
        self, module: Any, call: tuple[Any, ...], kwargs: dict[str, Any], known: dict[Any, Any]
    ) -> Seen:
        """Return a call as scaled_dot_product_attention would have it.

        Args:
            module: the attention module.
            call: q, k, v and mask that the model gave.
            kwargs: what else it gave.
            known: what the layers of a forward share.
        """
        if self.flash:
            return seen_by_sdpa(module, call, kwargs, known)
        q, k, v, mask = call
        return Seen(q, k, v, mask, self.causal(module, mask, kwargs) and q.shape[2] > 1)


def primitive(
    stock: Stock, module: Any, call: tuple[Any, ...], seen: Seen, kwargs: dict[str, Any]
) -> Callable[..., Tensor]:
    """Return the module's own attention as the `base` of a call.

    Args:
        stock: its function.
        module: the attention module.
        call: q, k, v and mask that the model gave.
        seen: the same, as controls see it.
        kwargs: what else the model gave.
    """
    if stock.flash:
        return flash_primitive(stock.run, module, call, seen, kwargs)
    mask = call[3]
    causal = stock.causal(module, mask, kwargs)

    def base(q: Tensor, k: Tensor, v: Tensor, m: Any, s: Any, c: bool, gqa: bool) -> Tensor:
        if q.shape[1] != k.shape[1] * getattr(module, "num_key_value_groups", 1):  # some heads
            return functional.scaled_dot_product_attention(
                q, k, v, m, 0.0, c, scale=s, enable_gqa=gqa
            )
        given = {**kwargs, "scaling": s}
        if m is not mask or c != causal:
            given["is_causal"] = c
        if stock.eager and m is not None and m.dtype == torch.bool:
            m = torch.zeros_like(m, dtype=q.dtype).masked_fill(~m, torch.finfo(q.dtype).min)
        out: Tensor = stock.run(module, q, k, v, m, **given)[0]
        return out.transpose(1, 2)

    return base
