"""Errors as messages on the page: those meant for people in full, others in the server's log."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import gradio as gr
import torch

from attnctl.apps.models import first_line
from attnctl.errors import AttnctlError, MissingExtra

from .watch import Cancelled

__all__ = ["told"]

F = TypeVar("F", bound=Callable[..., Any])
_LOG = logging.getLogger("attnctl.demo")
_LETTERS = 400


def told(function: F) -> F:
    """Decorator of a handler: what it raises is shown to the visitor in one line.

    A run that the visitor has cancelled changes nothing on the page.
    """

    @functools.wraps(function)
    def shown(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Cancelled:
            return gr.skip()  # as was asked for: what is on the page stays
        except (AttnctlError, MissingExtra) as error:
            reason = str(error)
        except torch.OutOfMemoryError:
            reason = "the model ran out of memory: ask for a smaller size, or fewer controls"
        except ValueError as error:  # how diffusers refuses a size or a prompt
            _LOG.info("refused", exc_info=True)
            reason = first_line(error)
        except Exception:
            _LOG.exception("a run failed")
            reason = "the run failed; the server's log says why"
        raise gr.Error(reason[:_LETTERS], print_exception=False)

    return shown  # type: ignore[return-value]
