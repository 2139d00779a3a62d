"""Several processes search together: each draws its share of the batches.

Started by `accelerate launch` (or torchrun); one process alone is a crew of one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

__all__ = ["Crew"]

T = TypeVar("T")


@dataclass(frozen=True)
class Crew:
    """Who takes part.

    Args:
        rank: number of this process, from 0.
        size: processes in all.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> Crew:
        """Return the crew this process was launched in; joins it if that has not happened."""
        group = torch.distributed
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not group.is_initialized():
            from accelerate import PartialState

            PartialState(cpu=not torch.cuda.is_available())
        if group.is_available() and group.is_initialized():
            return cls(group.get_rank(), group.get_world_size())
        return cls()

    @classmethod
    def launched(cls) -> Crew:
        """Return the crew that the launcher's environment names, without joining it.

        Its members know their numbers and cannot talk to each other.
        """
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))

    @property
    def leads(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def share(self, parts: Sequence[T], work: Callable[[T], Any]) -> list[Any]:
        """Return `[work(part) for part in parts]`, at most `size` parts, done by all together.

        Every process gets the whole list. An exception in one is raised in all.
        """
        mine = parts[self.rank] if self.rank < len(parts) else None
        if self.size == 1:
            return [work(part) for part in parts]
        found: list[Any] = [None] * self.size
        try:
            made = ("done", None if mine is None else work(mine))
        except Exception as error:
            made = ("failed", f"{type(error).__name__}: {error}")
        torch.distributed.all_gather_object(found, made)
        for rank, (state, value) in enumerate(found):
            if state == "failed":
                raise RuntimeError(f"process {rank} of the search failed: {value}")
        return [value for _, value in found[: len(parts)]]

    def same(self, value: T) -> T:
        """Return the leader's value in every process."""
        if self.size == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]
