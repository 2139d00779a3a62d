"""Test files that need a process of their own: for Triton's interpreter, or to fork."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

__all__ = ["INTERPRETED", "run_alone", "set_up_interpreter"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether this process asked for Triton's interpreter, which must be before triton's import."""
DEADLINE = 480.0


def run_alone(file: str, *options: str, **environment: str) -> None:
    """Run a test file by pytest in a process of its own.

    Args:
        file: the test file.
        options: of pytest.
        environment: variables to set; for the interpreter TRITON_INTERPRET="1".

    Raises:
        AssertionError: with the end of what pytest said, if not all passed or none ran.
        subprocess.TimeoutExpired: after 480 seconds.
    """
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *options, file], env={**os.environ, **environment},
        capture_output=True, text=True, timeout=DEADLINE,
    )  # fmt: skip
    if done.returncode or " passed" not in done.stdout:
        raise AssertionError(done.stdout[-4000:] + done.stderr[-1000:])


def set_up_interpreter() -> None:
    """Let the interpreter read loop bounds as numpy 2.4 wants it.

    Triton 3.6 converts arrays of one element to int, which numpy now refuses.
    """
    from triton.runtime import interpreter

    stock = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        stock(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
