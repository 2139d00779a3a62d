"""What CUDA graphs cannot hold, and models of which it is not known whether they can.

A replay repeats the GPU's work and runs no Python. What a pass reads from the GPU to decide on,
or copies to it, is known only while it runs; what Python does besides (counts steps, changes a
scale) would be left out without a word. `replay="auto"` therefore records only models all of
whose parts are known: those of PyTorch, diffusers, transformers and attnctl, without hooks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Watch", "unknown"]

_KNOWN = ("torch", "diffusers", "transformers", "attnctl")
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_COPIES = ("_to_copy", "copy_")
_SPREAD = ("torch.distributed", "torch.nn.parallel")


class Watch(TorchDispatchMode):
    """Notes the first operation that a CUDA graph cannot hold.

    Args:
        device: that of the graph.

    Attributes:
        found: what it was, "" if there was none.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.found = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self.found:
            given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
            self.found = _copy(func, given, tree_leaves(out))
            if any(one.device == self.device for one in given):
                self.found = self.found or _decision(func, given)
        return out


def _copy(func: Any, given: list[Tensor], made: Iterable[Any]) -> str:
    """Return what an operation copies between CPU and GPU, "" if nothing."""
    name = func._schema.name
    plain = name.removeprefix("aten::")
    sides = [*given, *(one for one in made if isinstance(one, Tensor))]
    if plain not in _COPIES:
        # a number on the CPU is read when it is launched, anything else is copied; attention
        # gets the seed of its dropout there, where it is not recorded
        copied = any(one.device.type == "cpu" and one.ndim for one in given)
        sides = given if copied and "attention" not in plain else []
    if len({one.device.type for one in sides}) > 1:
        return f"{name} copies between devices"
    if plain == "lift_fresh" and given[0].device.type != "cpu":
        return "torch.tensor copies to the device"
    return ""


def _decision(func: Any, given: list[Tensor]) -> str:
    """Return what an operation on the GPU leaves to Python, "" if nothing."""
    name = func._schema.name
    if torch.Tag.data_dependent_output in func.tags:
        return f"{name} reads what the GPU has computed"
    if torch.Tag.dynamic_output_shape in func.tags:
        # of indexing, only by a mask
        masks = any(one.dtype in (torch.bool, torch.uint8) for one in given[1:])
        if name != "aten::index" or masks:
            return f"{name} has a size that depends on values"
    return ""


def unknown(args: Mapping[str, Any], model: nn.Module) -> str:
    """Return what may do more than a model's operations say, "" if all parts are known.

    Args:
        args: of the pipeline's call.
        model: the denoiser.
    """
    if torch.version.hip is not None:
        return "it has not been tried on AMD GPUs"
    if args.get("callback_on_step_end") is not None or args.get("callback") is not None:
        return "a callback may change the model between steps"
    for name, module in model.named_modules():
        why = _unknown_state(module) or _unknown_code(module, "forward")
        processor = getattr(module, "processor", None)
        if processor is not None:
            why = why or _unknown_code(processor, "__call__")
        if why:
            return f"{name or 'the denoiser'} {why}"
    return ""


def _unknown_state(module: nn.Module) -> str:
    """Return what was done to a module."""
    if getattr(module, "_compiled_call_impl", None) is not None:
        return "is compiled"
    if any(getattr(module, hooks, None) for hooks in _HOOKS):
        return "has a hook"
    for key, value in vars(module).items():
        if key == "forward" or isinstance(value, (FunctionType, MethodType)):
            return f"has another {key} than its class"
    if isinstance(module, _DropoutNd) and module.training and module.p:
        return "draws random numbers"
    return ""


def _unknown_code(part: Any, method: str) -> str:
    """Return what is said against the class of a module or processor."""
    cls = type(part)
    if "_dynamo" in cls.__module__:
        return "is compiled"
    if cls.__module__.startswith(_SPREAD):
        return "is spread over processes"
    # a method may come from elsewhere than its class, which somebody has changed
    for code in (cls, getattr(cls, method, cls)):
        home = str(getattr(code, "__module__", cls.__module__))
        if home.partition(".")[0] not in _KNOWN:
            return f"has code of its own, {home}.{getattr(code, '__qualname__', method)}"
    if "IPAdapter" in cls.__name__:
        return "has an IP-Adapter, whose scale may change"
    return ""
