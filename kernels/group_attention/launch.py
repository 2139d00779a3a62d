"""Starting a Triton kernel with little work on the host.

At one token a time the host is what a decoder waits for. Triton looks at every argument of every
launch to find the compiled kernel that fits, which for forty arguments takes longer than all
other work on a layer's attention. What the choice depends on (types, constants, and whether
sizes and addresses are multiples of 16) is the same at almost every launch, so it is asked once.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton.compiler import CompiledKernel

__all__ = ["MOST_KNOWN", "Launch"]

MOST_KNOWN = 64
"""Launches that a kernel keeps, before all are made anew."""

_UNIT = 16
"""Triton compiles for addresses and sizes that are multiples of this."""

_COMPILED: dict[Any, CompiledKernel] = {}


class Launch:
    """A kernel with its grid, sizes and constants, to be started on changing tensors.

    The kernel's parameters are, in this order: tensors, numbers that change, sizes that Triton
    may specialise on, numbers that it may not, constants. Of the tensors it may assume only the
    first `aligned` to be aligned (`do_not_specialize_on_alignment`).

    Args:
        kernel: what triton.jit returned.
        grid: its three sizes.
        types: whatever else the compiled kernel depends on: device and types of the tensors.
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
        types: Any,
        aligned: int,
        sizes: tuple[int, ...],
        numbers: tuple[float, ...],
        constants: dict[str, Any],
        options: dict[str, Any] | None = None,
    ) -> None:
        options = options or {}
        self.kernel, self.grid, self.aligned = kernel, grid, aligned
        self.fixed, self.constants = (*sizes, *numbers), {**constants, **options}
        self.rest = (*sizes, *numbers, *constants.values())
        usual = all(size % _UNIT == 0 and size < 2**31 for size in sizes)
        self.key = (kernel, types, *constants.values(), *options.values()) if usual else None
        self._known(_COMPILED.get(self.key))

    def _known(self, compiled: CompiledKernel | None) -> None:
        self.start = None if compiled is None else compiled[self.grid]

    def __call__(self, tensors: tuple[Tensor, ...], *numbers: float) -> None:
        """Start the kernel.

        Args:
            tensors: its tensors; their devices, types and shapes are always the same.
            *numbers: its numbers that change.
        """
        at = [x.data_ptr() for x in tensors]
        bits = 0
        for address in at[: self.aligned]:
            bits |= address
        usual = bits % _UNIT == 0
        if usual and self.start is not None:
            self.start(*at, *numbers, *self.rest)
            return
        made = self.kernel[self.grid](*tensors, *numbers, *self.fixed, **self.constants)
        if usual and self.key is not None and isinstance(made, CompiledKernel):
            _COMPILED[self.key] = made
            self._known(made)
