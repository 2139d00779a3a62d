"""Starting a Triton kernel with little work on the host.

At one token a time the host is what a decoder waits for. Triton looks at every argument of every
launch to find the compiled kernel that fits, which for forty arguments takes longer than all
other work on a layer's attention. What the choice depends on (types, constants, and whether
sizes and addresses are multiples of 16) is the same at almost every launch, so it is asked once.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver

from attnctl.kernels.devices import is_here

try:
    from triton import knobs
except ImportError:  # before Triton 3.4
    knobs = None

__all__ = ["MOST_KNOWN", "Launch", "mask_fits", "mask_steps", "stream_of"]

MOST_KNOWN = 64
"""Launches that a kernel keeps, before all are made anew."""

_UNIT = 16
"""Triton compiles for addresses and sizes that are multiples of this."""

_ADDRESS = Tensor.data_ptr

_COMPILED: dict[Any, CompiledKernel] = {}


def mask_fits(mask: Tensor | None, n_keys: int) -> bool:
    """Whether a kernel can read a mask of attention [b, h, n, keys], sizes of 1 broadcast."""
    if mask is None:
        return True
    return mask.ndim == 4 and mask.stride(3) == 1 and mask.shape[3] == n_keys


def mask_steps(mask: Tensor | None) -> tuple[int, ...]:
    """Return the strides of a mask's rows, heads and queries, 0 where it is broadcast."""
    if mask is None:
        return 0, 0, 0
    sizes, steps = mask.shape[:3], mask.stride()[:3]
    return tuple(0 if size == 1 else step for size, step in zip(sizes, steps, strict=True))


def stream_of(device: torch.device) -> int:
    """Return the current stream of a GPU, 0 for other devices."""
    if device.type != "cuda":
        return 0
    stream: int = driver.active.get_current_stream(device.index)
    return stream


class Launch:
    """A kernel with its grid, sizes and constants, to be started on changing tensors.

    The kernel's parameters are, in this order: tensors, numbers that change, sizes that Triton
    may specialise on, numbers that it may not, constants. Of the tensors it may assume only the
    first `aligned` to be aligned (`do_not_specialize_on_alignment`).

    Args:
        kernel: what triton.jit returned.
        grid: its three sizes.
        device: where the tensors are.
        types: whatever else the compiled kernel depends on: types of the tensors.
        aligned: number of tensors whose alignment matters.
        sizes: sizes that Triton may specialise on.
        numbers: numbers that it may not.
        constants: the constants, in the order of the kernel's parameters.
        options: of the compiler, such as num_warps.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        device: torch.device,
        types: Any,
        aligned: int,
        sizes: tuple[int, ...],
        numbers: tuple[float, ...],
        constants: dict[str, Any],
        options: dict[str, Any] | None = None,
    ) -> None:
        options = options or {}
        self.kernel, self.grid, self.device, self.aligned = kernel, grid, device, aligned
        self.fixed, self.constants = (*sizes, *numbers), {**constants, **options}
        self.rest = (*sizes, *numbers, *constants.values())
        usual = all(size % _UNIT == 0 and size < 2**31 for size in sizes)
        self.key = None
        if usual:
            self.key = kernel, device, types, *constants.values(), *options.values()
        self._known(_COMPILED.get(self.key))

    def _known(self, compiled: CompiledKernel | None) -> None:
        self.run = None
        if compiled is not None:
            self.run = compiled.run
            none = None, None, None  # no hooks, and nothing to tell them
            self.head = compiled.function, compiled.packed_metadata, *none

    def __call__(self, tensors: tuple[Tensor, ...], *numbers: float) -> None:
        """Start the kernel.

        Args:
            tensors: its tensors; their devices, types and shapes are always the same.
            *numbers: its numbers that change.
        """
        at = [*map(_ADDRESS, tensors)]
        bits = 0
        for address in at[: self.aligned]:
            bits |= address
        usual, here = bits % _UNIT == 0, is_here(tensors[0])
        if usual and here and self.run is not None and not _watched():
            stream = stream_of(self.device)
            self.run(*self.grid, stream, *self.head, *at, *numbers, *self.rest)
            return
        with nullcontext() if here else torch.cuda.device_of(tensors[0]):
            made = self.kernel[self.grid](*tensors, *numbers, *self.fixed, **self.constants)
        if usual and self.key is not None and isinstance(made, CompiledKernel):
            _COMPILED[self.key] = made
            self._known(made)


def _watched() -> bool:
    """Whether a profiler wants to hear of launches, or may want to."""
    if knobs is None:
        return True
    hooks = knobs.runtime.launch_enter_hook
    return hooks is not None and bool(getattr(hooks, "calls", True))
