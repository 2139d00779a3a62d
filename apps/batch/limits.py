"""What a batch refuses because it is too much: slips and hostile files, found before any work."""

from __future__ import annotations

__all__ = ["FILE_BYTES", "ITEMS", "PROMPT_LETTERS"]

FILE_BYTES = 64 * 2**20
"""Size of a file of jobs."""
ITEMS = 100_000
"""Pictures of one batch."""
PROMPT_LETTERS = 20_000
"""Letters of a prompt; text encoders read a few hundred."""
