"""Keep the libraries' own chatter off a person's screen, and let what matters through."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator

__all__ = ["hush", "notes"]


def hush(say: Callable[[str], None]) -> None:
    """Silence the advice, warnings and loading bars of torch, diffusers and transformers.

    To be called before they are imported. What the user has set in the environment stays.

    Args:
        say: is given the text of every `AttnctlWarning`.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from attnctl.errors import AttnctlWarning

    warnings.simplefilter("ignore")
    warnings.simplefilter("default", AttnctlWarning)

    def show(message: Warning | str, *_: object, **__: object) -> None:
        say(str(message))

    warnings.showwarning = show
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


@contextlib.contextmanager
def notes(say: Callable[[str], None]) -> Iterator[None]:
    """Pass on what diffusers warns of while it draws (a prompt cut short), each text once."""
    logger = logging.getLogger("diffusers")
    handlers, level = logger.handlers[:], logger.level
    logger.handlers = [_Once(say)]
    logger.setLevel(min(level, logging.WARNING) if level else logging.WARNING)
    try:
        yield
    finally:
        logger.handlers = handlers
        logger.setLevel(level)


class _Once(logging.Handler):
    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self.say = say
        self.said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(record.getMessage().split())
        if text not in self.said:
            self.said.add(text)
            self.say(text)
