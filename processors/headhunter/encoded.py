"""Text is encoded once per prompt, however often a search draws it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["encoded_once"]


@contextlib.contextmanager
def encoded_once(pipe: Any) -> Iterator[None]:
    """Within the block, `pipe.encode_prompt` remembers what it returned for each prompt.

    Only for calls whose prompts are given as lists of text; results whose tensors do not go by
    prompt are passed through. The pipeline is restored at the end.
    """
    stock = getattr(pipe, "encode_prompt", None)
    if stock is None or "encode_prompt" in pipe.__dict__:
        yield
        return
    pipe.__dict__["encode_prompt"] = _Memory(stock)
    try:
        yield
    finally:
        pipe.__dict__.pop("encode_prompt", None)


class _Memory:
    """`encode_prompt`, prompt by prompt, with a memory."""

    def __init__(self, stock: Callable[..., Any]) -> None:
        self.stock = stock
        self.known: dict[Any, Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        prompts = kwargs.get("prompt", args[0] if args else None)
        if not isinstance(prompts, list) or not all(isinstance(p, str) for p in prompts):
            return self.stock(*args, **kwargs)
        parts = [self._one(i, len(prompts), args, kwargs) for i in range(len(prompts))]
        joined = [_join(list(column)) for column in zip(*parts, strict=True)]
        return self.stock(*args, **kwargs) if ... in joined else tuple(joined)

    def _one(self, i: int, n: int, args: Any, kwargs: Any) -> Any:
        """Encode row `i` alone: every list of n texts is cut down to its i-th."""
        args = tuple(_cut(value, i, n) for value in args)
        kwargs = {name: _cut(value, i, n) for name, value in kwargs.items()}
        key = repr(args) + repr(sorted(kwargs.items(), key=lambda item: item[0]))
        if key not in self.known:
            found = self.stock(*args, **kwargs)
            self.known[key] = found if isinstance(found, tuple) else (found,)
        return self.known[key]


def _cut(value: Any, i: int, n: int) -> Any:
    return [value[i]] if isinstance(value, list) and len(value) == n else value


def _join(column: list[Any]) -> Any:
    """One row each: stacked. The same for all: kept. Anything else: Ellipsis."""
    first = column[0]
    if all(one is None for one in column):
        return None
    if not all(isinstance(one, Tensor) for one in column):
        return ...
    if all(one.shape == first.shape and one.shape[0] == 1 for one in column):
        return torch.cat(column)
    same = all(one is first or torch.equal(one, first) for one in column)
    return first if same else ...
