"""A gradient pass as CUDA graphs: Python runs it once, and the GPU repeats what it did.

With one picture on a fast GPU a pass takes as long as Python needs to launch its thousands of
operations. A replay is two launches, one for the forward and one for the backward. What changes
from step to step (latents, time, text) goes into the graphs' own memory first; all else has to
be as it was, which the caller sees to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from attnctl.errors import HostError

__all__ = ["Recorder", "possible"]

Forward = Callable[[Tensor, Any], Tensor]
_FORMS = 4
"""Most forms of inputs that are recorded; each keeps its activations on the GPU."""


@dataclass(eq=False)
class Recorder:
    """Passes of one run, recorded by the form of their inputs.

    Args:
        replayed: passes that were replayed so far.
    """

    replayed: int = 0
    _made: list[tuple[Any, Callable[..., Tensor]]] = field(default_factory=list)

    def run(self, forward: Forward, x: Tensor, inputs: Any) -> Tensor:
        """Return forward(x, inputs), with gradients to x; replayed if it can be.

        Args:
            forward: what to record, at the first call with inputs of this form.
            x: latents, of which the gradient is wanted.
            inputs: nested dicts, lists and tuples of tensors and plain values. Tensors may have
                other values at every call.

        Raises:
            HostError: if recording fails.
        """
        leaves, shape = tree_flatten(inputs)
        tensors = [x, *(one.to(x.device) for one in leaves if isinstance(one, Tensor))]
        rest = [None if isinstance(one, Tensor) else one for one in leaves]
        known = all(one is None or isinstance(one, (bool, int, float, str)) for one in rest)
        form = shape, [(one.shape, one.dtype) for one in tensors], rest
        replay = next((made for other, made in self._made if known and other == form), None)
        if replay is None:
            if not known or len(self._made) == _FORMS:
                return forward(x, inputs)
            replay = _record(lambda x, *new: forward(x, _filled(leaves, new, shape)), tensors)
            self._made.append((form, replay))
        self.replayed += 1
        # the graph's own memory holds it, until the next replay
        return replay(*tensors).clone()

    def forget(self) -> None:
        """Give the graphs' memory back."""
        self._made.clear()


def possible(x: Tensor) -> bool:
    """Whether passes with these latents can be recorded."""
    return x.is_cuda and not torch.is_autocast_enabled(x.device.type)


def _filled(leaves: list[Any], tensors: tuple[Tensor, ...], shape: Any) -> Any:
    """Return nested inputs with other tensors."""
    new = iter(tensors)
    return tree_unflatten([next(new) if isinstance(one, Tensor) else one for one in leaves], shape)


def _record(forward: Callable[..., Tensor], tensors: list[Tensor]) -> Callable[..., Tensor]:
    own = tuple(one.detach().clone().requires_grad_(one.requires_grad) for one in tensors)
    try:
        # the run's first pass, which is never recorded, has already warmed up most of it
        made: Any = torch.cuda.make_graphed_callables(forward, own, num_warmup_iters=1)
    except RuntimeError as error:
        raise HostError(
            f"the gradient pass cannot be recorded as a CUDA graph ({error}): give replay=False"
        ) from error
    replay: Callable[..., Tensor] = made
    return replay
