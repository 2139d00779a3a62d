"""A UNet that is given the pooled embeddings which a pipeline leaves out.

In a module of its own: classes of a bench that is run by `python -m` belong to `__main__`, whose
code latent controls do not know and do not record (`attnctl.processors.latent.recordable`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from diffusers import UNet2DConditionModel

__all__ = ["Pooled"]


class Pooled(UNet2DConditionModel):
    """A UNet with pooled embeddings.

    Attributes:
        pooled: makes `added_cond_kwargs` for so many rows; to be set before a call.
    """

    pooled: Callable[[int], dict[str, Any]]

    @functools.wraps(UNet2DConditionModel.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run it, with the same embeddings for so many rows every time."""
        rows = len(args[0] if args else kwargs["sample"])
        given = kwargs.pop("added_cond_kwargs", None) or self.pooled(rows)
        return super().forward(*args, added_cond_kwargs=given, **kwargs)
