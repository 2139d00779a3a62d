"""Starting a Triton kernel with little work on the host.

At one token a time the host is what a decoder waits for. Triton looks at every argument of every
launch to find the compiled kernel that fits, which for forty arguments takes longer than all
other work on a layer's attention. What the choice depends on (types, constants, and whether
sizes and addresses are multiples of 16) is the same at almost every launch, so it is asked once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver

from attnctl.kernels.devices import is_here, several_gpus

try:
    from triton import knobs
except ImportError:  # before Triton 3.4
    knobs = None

__all__ = ["MOST_KNOWN", "UNIT", "Again", "Launch", "mask_fits", "mask_steps", "stream_of"]

MOST_KNOWN = 64
"""Launches that a kernel keeps, before all are made anew."""

UNIT = 16
"""Triton compiles for addresses and sizes that are multiples of this."""

_ADDRESS = Tensor.data_ptr

_VERSION = ".".join(triton.__version__.split(".")[:2])

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
        usual = all(size % UNIT == 0 and size < 2**31 for size in sizes)
        self.key = None
        if usual:
            self.key = kernel, device, types, *constants.values(), *options.values()
        self._known(_COMPILED.get(self.key))

    def _known(self, compiled: CompiledKernel | None) -> None:
        self.run: Callable[..., Any] | None = None
        if compiled is not None:
            self.run, self.head = _start_of(compiled)

    def again(self, fixed: tuple[Tensor, ...], *numbers: float) -> Again | None:
        """Return what starts the kernel again, where only the first and last tensors differ.

        Args:
            fixed: the tensors in between.
            *numbers: its numbers that change, which do not here.

        Returns:
            None where Triton or a profiler must be asked at each start, or another GPU is the
            current one.
        """
        if self.run is None or _watched():
            return None
        made = Again(self, fixed, numbers)
        return None if made.stream is None else made

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
        usual, here = bits % UNIT == 0, is_here(tensors[0])
        if usual and here and self.run is not None and not _watched():
            stream = stream_of(self.device)
            self.run(*self.grid, stream, *self.head, *at, *numbers, *self.rest)
            return
        with nullcontext() if here else torch.cuda.device_of(tensors[0]):
            made = self.kernel[self.grid](*tensors, *numbers, *self.fixed, **self.constants)
        if usual and self.key is not None and isinstance(made, CompiledKernel):
            _COMPILED[self.key] = made
            self._known(made)


def _start_of(compiled: CompiledKernel) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return what starts a compiled kernel, and its arguments between stream and tensors."""
    run, metadata = compiled.run, (compiled.packed_metadata, None, None, None)  # no hooks
    known = _VERSION == "3.6" and type(run).__name__ == "CudaLauncher"
    if known and not run.global_scratch_size and not run.profile_scratch_size:
        # past its call in Python, which takes as long as the C function behind it
        ways = run.launch_cooperative_grid, run.launch_pdl
        return run.launch, (compiled.function, *ways, None, None, *metadata)
    return run, (compiled.function, *metadata)


class Again:
    """A launch that has been made, for those who start it on one layer after another.

    For them every call into Python counts: while a model runs in between, the processor forgets
    our code. So the caller puts the arguments together itself,

        if again.stream_now() == again.stream:
            again.run(*again.front, *addresses, *again.fixed, *addresses, *again.rest)

    and sees to it that the addresses are multiples of `UNIT` where the launch looks at that.

    Args:
        launch: the launch.
        fixed: tensors between the first and the last ones; they are kept.
        numbers: its numbers that change, which do not here.
    """

    def __init__(
        self, launch: Launch, fixed: tuple[Tensor, ...], numbers: tuple[float, ...]
    ) -> None:
        assert launch.run is not None
        self.stream_now = _stream_here(launch.device)
        self.stream = self.stream_now()
        self.run: Callable[..., Any] = launch.run
        self.front = (*launch.grid, self.stream, *launch.head)
        self.kept = fixed
        self.fixed = tuple(map(_ADDRESS, fixed))
        self.rest = (*numbers, *launch.rest)


def _stream_here(device: torch.device) -> Callable[[], int | None]:
    """Return what tells the current stream of a GPU, None while another GPU is the current one."""
    if device.type != "cuda":
        return int
    if not several_gpus():
        return functools.partial(driver.active.get_current_stream, device.index)

    def stream() -> int | None:
        return stream_of(device) if torch.cuda.current_device() == device.index else None

    return stream


def _watched() -> bool:
    """Whether a profiler wants to hear of launches, or may want to."""
    if knobs is None:
        return True
    hooks = knobs.runtime.launch_enter_hook
    return hooks is not None and bool(getattr(hooks, "calls", True))
