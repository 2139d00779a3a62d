"""Vision-language models: what the answer attends to."""

from .pai import PAI

__all__ = ["PAI"]
