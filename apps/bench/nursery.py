"""Processes that can be killed, born from one that has the libraries and nothing else.

A fork of a process that computes gets no threads of its parent's pools and waits for them forever
at the first parallel loop. Here every child is forked from a small server that has imported what
they need, started no thread and computed nothing.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

__all__ = ["nursery"]

LIBRARIES = [
    "attnctl.apps.cli",
    "attnctl.apps.batch.command",
    "attnctl.apps.eval.command",
    "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3",
    "transformers.models.llava.modeling_llava",
]
"""Imported once, before the first child: seconds that each of them need not spend."""


def nursery() -> ForkServerContext:
    """Return the multiprocessing context of such children.

    Raises:
        ValueError: on a system without fork (Windows).
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    return context
