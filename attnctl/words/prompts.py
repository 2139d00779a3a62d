"""The prompts of a run, and which tokens of each are words or mark its beginning and end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .find import Found, Words, find_words
from .layout import placed_tokenizers
from .pieces import piece_spans

if TYPE_CHECKING:
    from ..hosts.run import Run

__all__ = ["Prompt", "border_tokens", "prompts_of"]


@dataclass(frozen=True)
class Prompt:
    """One prompt of a run.

    Args:
        pipe: the pipeline.
        text: the prompt; None if the run was given embeddings.
        call: further arguments of the pipeline's call that bear on the text.
    """

    pipe: Any
    text: str | None
    call: dict[str, Any] = field(default_factory=dict)

    def find(self, words: Words | None) -> list[Found]:
        """Return where words are; arguments and errors as in `attnctl.find_words`."""
        return find_words(self.pipe, self.text, words, **self.call)

    def borders(self) -> tuple[int, ...]:
        """Return the positions of the tokens that begin and end the prompt; () without text."""
        return () if self.text is None else border_tokens(self.pipe, self.text, **self.call)

    def length(self) -> int:
        """Return the number of tokens of the denoiser's text sequence."""
        places = placed_tokenizers(self.pipe, self.text or "", self.call)
        return max(p.offset + (p.length or 0) for p in places if p.offset is not None)


def prompts_of(run: Run) -> list[Prompt]:
    """Return the prompts of a run, one per text it was called with."""
    texts = {key: run.args.get(key) for key in ("prompt", "prompt_2", "prompt_3")}
    many = next((len(t) for t in texts.values() if isinstance(t, (list, tuple))), 1)
    found = []
    for i in range(many):
        one = {key: t[i] if isinstance(t, (list, tuple)) else t for key, t in texts.items()}
        text = one.pop("prompt")
        length = run.args.get("max_sequence_length")
        found.append(Prompt(run.pipe, text, {"max_sequence_length": length, **one}))
    return found


def border_tokens(pipe: Any, prompt: str, **call: Any) -> tuple[int, ...]:
    """Return where a prompt begins and ends in a denoiser's text sequence.

    Args:
        pipe: a diffusers pipeline with its tokenizers.
        prompt: the prompt.
        **call: as in `attnctl.find_words`.

    Returns:
        The positions, sorted, of the special token before the first word (CLIP's start of
        text) and of the first one after the last word (end of text), of every encoder that
        has them.

    Raises:
        HostError: if the pipeline has no tokenizer, or lays out its text in an unknown way.
    """
    positions = set()
    for place in placed_tokenizers(pipe, prompt, call):
        if place.offset is None:
            continue
        spans = piece_spans(place.tokenizer, place.text, place.length)
        words = [i for i, span in enumerate(spans) if span is not None]
        first, last = (words[0], words[-1]) if words else (1, 0)
        around = [i for i in (first - 1, last + 1) if 0 <= i < len(spans)]
        positions |= {place.offset + i for i in around}
    return tuple(sorted(positions))
