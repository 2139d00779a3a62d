"""Copying rows of a denoiser's inputs: every per-sample input must follow the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["extend_inputs", "take_inputs"]


def extend_inputs(
    inputs: dict[str, Any], batch: int, rows: slice, unbatched: tuple[str, ...]
) -> dict[str, Any]:
    """Return the inputs with copies of some rows appended to every per-sample value.

    Args:
        inputs: denoiser arguments by name.
        batch: rows of the call.
        rows: which of them to append.
        unbatched: arguments whose first dimension is never the batch.
    """
    return _map(inputs, batch, unbatched, lambda t: _append(t, rows), lambda s: s + s[rows])


def _append(t: Tensor, rows: slice) -> Tensor:
    more = t[rows]
    if t.stride(0) == 0 and t.shape[0] > 1:
        # one value for all rows, such as a time; kept so, for compiled code looks at strides
        return t[:1].expand(t.shape[0] + more.shape[0], *t.shape[1:])
    return torch.cat([t, more])


def take_inputs(
    inputs: dict[str, Any], batch: int, rows: slice, unbatched: tuple[str, ...]
) -> dict[str, Any]:
    """Return the inputs of some rows alone; arguments as in `extend_inputs`."""
    return _map(inputs, batch, unbatched, lambda t: t[rows], lambda s: s[rows])


def _map(
    inputs: dict[str, Any],
    batch: int,
    unbatched: tuple[str, ...],
    tensor: Callable[[Tensor], Tensor],
    sequence: Callable[[list[Any]], list[Any]],
) -> dict[str, Any]:
    def walk(value: Any) -> Any:
        if isinstance(value, Tensor):
            return tensor(value) if value.ndim and value.shape[0] == batch else value
        if isinstance(value, dict):
            return {k: walk(v) for k, v in value.items()}
        if isinstance(value, list) and len(value) == batch and not _per_sample_tensors(value):
            return sequence(value)
        if isinstance(value, (list, tuple)):
            return type(value)(walk(v) for v in value)
        return value

    def _per_sample_tensors(value: list[Any]) -> bool:
        return all(isinstance(v, Tensor) and v.ndim and v.shape[0] == batch for v in value)

    return {k: v if _shared(k, v, unbatched) else walk(v) for k, v in inputs.items()}


def _shared(name: str, value: Any, unbatched: tuple[str, ...]) -> bool:
    """Position ids without a batch dimension are [N, columns]."""
    return name in unbatched or (
        name.endswith("_ids") and getattr(value, "ndim", 0) == 2 and name in ("img_ids", "txt_ids")
    )
