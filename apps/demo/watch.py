"""Progress, cancelling and a time limit for a run of any model."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from attnctl.errors import AttnctlError
from attnctl.hosts import survey, targets

__all__ = ["Cancelled", "TooLong", "Watch"]

Tell = Callable[[int, int], None]


class Cancelled(AttnctlError):
    """The visitor has cancelled the run."""


class TooLong(AttnctlError):
    """The run took too long."""


class Watch:
    """Looks after one run.

    Args:
        seconds: the run may take, counted from its own begin.
        tell: is given (steps done, steps in all).
    """

    def __init__(self, seconds: float, tell: Tell = lambda done, total: None) -> None:
        self.seconds, self.tell = seconds, tell
        self._cancelled, self._end = threading.Event(), float("inf")

    def cancel(self) -> None:
        """End the run at its next attention call; may be called from any thread."""
        self._cancelled.set()

    def start(self) -> None:
        """Begin to count the time."""
        self._end = time.monotonic() + self.seconds
        self.check()

    def check(self, *_: Any) -> None:
        """Do nothing, or end the run.

        Raises:
            Cancelled: if it was cancelled.
            TooLong: if its time is over.
        """
        if self._cancelled.is_set():
            raise Cancelled("cancelled")
        if time.monotonic() > self._end:
            raise TooLong(f"stopped: a run may take {self.seconds:g} seconds on this page")

    @contextlib.contextmanager
    def over(self, target: Any, total: int = 0) -> Iterator[None]:
        """Watch the runs of a model inside a `with` block; afterwards it is as it was.

        Args:
            target: a pipeline, whose steps are counted, or a language model, whose calls are.
            total: calls of a language model, at most.

        Raises:
            Cancelled: inside the block, out of the model's call.
            TooLong: likewise.
        """
        modules = [m for name, model in targets(target).items() for m in survey(model, name)[1]]
        hooks = [module.register_forward_pre_hook(self.check) for module in modules]
        if total:
            calls = _Steps(total, self)
            models = targets(target).values()
            hooks += [m.register_forward_pre_hook(lambda *_: calls.update()) for m in models]
        else:
            # every pipeline of diffusers counts its steps on the bar that this returns
            target.progress_bar = lambda iterable=None, total=0: _Steps(total, self, iterable)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            if not total:
                del target.progress_bar


class _Steps:
    """Stands in for the progress bar of a pipeline."""

    def __init__(self, total: int, watch: Watch, things: Any = None) -> None:
        self.total, self.done, self.watch = total or len(things or ()), 0, watch
        self.things = things

    def __enter__(self) -> _Steps:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        for thing in self.things or ():
            yield thing
            self.update()

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None  # set_description and the like

    def update(self, n: int = 1) -> None:
        """Count steps."""
        self.done = min(self.total, self.done + n)
        self.watch.check()
        self.watch.tell(self.done, self.total)
