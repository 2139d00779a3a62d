"""Codes of a prompt's keys in one launch: which tokens have spikes in the sink dimensions."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import MOST_KNOWN, UNIT, Again, Launch

__all__ = ["CodesCall"]


@triton.jit(
    do_not_specialize=["limit", "sl_b", "n_tokens"],
    do_not_specialize_on_alignment=["Dims", "Labels", "Codes"],
)
def sink_codes_kernel(
    X, Dims, Labels, Codes, limit, tau, sx_b, sx_n, sl_b, n_tokens, tiny,
    N_DIMS: tl.constexpr, WIDTH: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Write the code of one token."""
    i_n, i_b = tl.program_id(0), tl.program_id(1)
    p_x = X + i_b.to(tl.int64) * sx_b + i_n.to(tl.int64) * sx_n
    o_d, o_s = tl.arange(0, BD), tl.arange(0, BS)
    # what is waited for longest comes first
    dim = tl.load(Dims + o_s, mask=o_s < N_DIMS, other=0)
    label = tl.load(Labels + i_b * sl_b + i_n).to(tl.int32)
    spike = tl.load(p_x + dim, mask=o_s < N_DIMS, other=0.0)
    square = tl.zeros([BD], tl.float32)
    for start in tl.static_range(0, WIDTH, BD):
        x = tl.load(p_x + start + o_d, mask=start + o_d < WIDTH, other=0.0).to(tl.float32)
        square += x * x
    rms = tl.sqrt(tl.maximum(tl.sum(square, 0) / WIDTH, tiny))
    phi = tl.max(tl.abs(spike.to(tl.float32)), 0) / rms
    image = (label == 1) | (label == 3)
    sink = (phi >= tau) & (label < 2) & (i_n < limit)
    code = tl.where(image, tl.where(sink, 2, 3), tl.where(sink, 1, 0))
    tl.store(Codes + i_b * n_tokens + i_n, code.to(tl.uint8))


def _power_of_two(n: int) -> int:
    """Return the first one from n on; Triton's own takes longer than all else of a call."""
    return 1 << (n - 1).bit_length()


@functools.lru_cache(MOST_KNOWN)
def _launch(
    batch: int, n: int, width: int, steps: tuple[int, ...], dtype: torch.dtype,
    device: torch.device, n_dims: int, index: torch.dtype, step: int,
) -> Launch:  # fmt: skip
    """Return the launch for streams of such a shape and layout, whatever the prompt."""
    return Launch(
        sink_codes_kernel, (n, batch, 1), device, (dtype, index), 1, steps,
        (step, n, torch.finfo(torch.float32).tiny),
        {
            "N_DIMS": n_dims, "WIDTH": width,
            "BS": _power_of_two(n_dims), "BD": min(1024, _power_of_two(width)),
        },
    )  # fmt: skip


FIRST = 4
"""Layers that are made room for at first: until some have run, a GPU waits for the host."""


class CodesCall:
    """Writes the codes of tokens, at one layer after another that reads a stream of one shape.

    Args:
        hidden: [B, N, width], what a layer reads, unit stride last.
        dims: the sink dimensions, a whole-number tensor.
        labels: uint8 [B, N]: 0 text, 1 image, 2 padding, 3 image tokens that are never sinks.
        tau: least phi of a sink.
        limit: tokens from this one on are never sinks.
        layers: how many will ask, to make room for their codes at once.
    """

    def __init__(
        self, hidden: Tensor, dims: Tensor, labels: Tensor, tau: float, limit: int, layers: int
    ) -> None:
        batch, n, width = hidden.shape
        self.layers, self.room, self.begun = layers, list[Tensor](), False
        self.kind = hidden.shape, hidden.stride(), hidden.dtype, hidden.device
        self.given, self.numbers = (dims, labels), (limit, float(tau))
        self.launch = _launch(
            batch, n, width, hidden.stride()[:2], hidden.dtype, hidden.device, dims.shape[0],
            dims.dtype, labels.stride(0),
        )  # fmt: skip
        self.again: Again | None = None

    def takes(self, hidden: Tensor) -> bool:
        """Whether a layer's stream is of the shape and layout that this was made for."""
        return (hidden.shape, hidden.stride(), hidden.dtype, hidden.device) == self.kind

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the codes [B, N]: 1 text sink, 2 image sink, 3 other image token, else 0.

        Args:
            hidden: [B, N, width], of a shape that `takes` takes.
        """
        if not self.room:
            self._make_room(hidden)
        if self.again is None:
            self.again = self.launch.again(self.given, *self.numbers)
        done = self.next(hidden)
        if done is None:
            done = self.room.pop()
            self.launch((hidden, *self.given, done), *self.numbers)
        return done

    def _make_room(self, hidden: Tensor) -> None:
        """Make room for the codes of the first layers, which are waited for; then of others."""
        layers = self.layers if self.begun else min(self.layers, FIRST)
        self.begun = True
        shape = (layers, *hidden.shape[:2])
        self.room += torch.empty(shape, dtype=torch.uint8, device=hidden.device).unbind()

    def next(self, hidden: Tensor) -> Tensor | None:
        """Return the same with less to look at, as a layer after another can have it.

        None, with nothing done, where this cannot be.
        """
        again, kind = self.again, self.kind
        if (
            again is None
            or hidden.shape != kind[0] or hidden.stride() != kind[1]
            or hidden.dtype is not kind[2] or hidden.device != kind[3]
            or again.stream_now() != again.stream
        ):  # fmt: skip
            return None
        at = hidden.data_ptr()
        if at % UNIT:
            return None
        if not self.room:
            self._make_room(hidden)
        out = self.room.pop()
        again.run(*again.front, at, *again.fixed, out.data_ptr(), *again.rest)
        return out
