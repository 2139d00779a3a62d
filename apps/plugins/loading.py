"""A model with its controls, for programs that make and keep models of their own."""

from __future__ import annotations

import attnctl
from attnctl.apps.chosen import choose
from attnctl.apps.eval.answering import Answerer

__all__ = ["answerer_with", "control_texts"]

BETWEEN = " + "


def control_texts(text: str) -> list[str]:
    """Return the controls of a text such as `pai:alpha=0.5,rows=answer + var`.

    Quotes around it are taken off: lmms-eval leaves them on arguments that hold commas.
    """
    bare = text.strip().strip("'\"")
    return [part.strip() for part in bare.split(BETWEEN) if part.strip()]


def answerer_with(model: str, control: str, device: str = "auto", dtype: str = "auto") -> Answerer:
    """Load a model and patch it for good.

    Args:
        model: a shipped model, a folder, or a hub id.
        control: text form of the controls, " + " between them; empty for the model as it is.
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: "auto", "float32", "float16" or "bfloat16".

    Raises:
        AttnctlError: if the model cannot be loaded or a control not be installed.
    """
    answerer = Answerer.load(model, device, dtype)
    chosen = [choose(answerer.model, one) for one in control_texts(control)]
    if chosen:
        attnctl.patch(answerer.model, *(one.control for one in chosen))
    return answerer
