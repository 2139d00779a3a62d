"""The beginning of prompts that a chat template made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["begun"]


def begun(processor: Any, prompts: Sequence[str]) -> dict[str, bool]:
    """Return the option with which a processor reads prompts without a second first token.

    Some chat templates (Gemma3's, Idefics3's) write the first token of a text themselves, and
    tokenizers put it before any text that they read.

    Args:
        processor: the processor that will read them.
        prompts: what its chat template made.
    """
    first: str | None = getattr(getattr(processor, "tokenizer", processor), "bos_token", None)
    there = first and all(prompt.startswith(first) for prompt in prompts)
    return {"add_special_tokens": False} if there else {}
