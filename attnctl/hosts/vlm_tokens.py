"""Which tokens of a language model's sequence are what, row by row.

The prompt is labelled once, when it is read; what comes after it in the cache is text that the
model wrote. Labels are found from the token ids: rows may be padded, hold several images, or
none.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import HostError
from ..records import Tokens
from .run import Run

if TYPE_CHECKING:
    from ..records import WrittenRow
    from ..stack import Entry

__all__ = ["Sequence", "fit_rows", "image_ids", "label", "marks_of", "tokens_of"]

_TEXT, _IMAGE, _PAD = 0, 1, 2  # as in `Tokens`


def image_ids(config: Any) -> tuple[int, ...]:
    """Return the token ids that stand for image or video features, from a model's config."""
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    known = vars(config)  # to ask for what a config lacks takes it long
    found = [known.get(name) for name in names]
    if found.count(None) == len(names):
        found = [getattr(config, name, None) for name in names]
    return tuple(dict.fromkeys(int(one) for one in found if one is not None))


def marks_of(config: Any) -> tuple[int, ...]:
    """Return the token ids around images that a model's config names."""
    names = ("vision_start_token_id", "vision_end_token_id", "boi_token_index", "eoi_token_index")
    found = (getattr(config, name, None) for name in names)
    return tuple(int(one) for one in found if one is not None)


def label(ids: NDArray[Any], mask: NDArray[Any] | None, images: tuple[int, ...]) -> Tensor:
    """Return labels [B, N] of a prompt; by numpy, which begins in less time than torch.

    Args:
        ids: [B, N] token ids.
        mask: [B, N], 0 at padding; None for none.
        images: ids of image tokens.
    """
    one, *others = images or (-1,)
    found: NDArray[np.bool_] = ids == one
    for other in others:
        found |= ids == other
    labels = found.view(np.uint8)  # _IMAGE is 1, _TEXT 0
    if mask is not None:
        labels[mask == 0] = _PAD
    return torch.from_numpy(labels)


class Fillings(dict[Any, Any]):
    """What compiled code was told of a prompt; copies of a cache begin without it."""

    def __deepcopy__(self, memo: Any) -> Fillings:
        return Fillings()

    def __reduce__(self) -> Any:
        return Fillings, ()


@dataclass(eq=False)
class Sequence:
    """What is known of the sequences in one cache; goes where the cache goes.

    Args:
        labels: [B, P] of the prompt on the CPU, None if its token ids were never seen.
        prompt: tokens of the prompt, padding included.
        run: states of the controls.
        steps: forwards so far.
        rows: what is done to written tokens, by active controls and batch size, and site.
        fillings: the same for compiled code, by active controls, batch size and model.
    """

    labels: Tensor | None = None
    prompt: int = 0
    run: Run = field(default_factory=Run)
    steps: int = 0
    seen: int = 0
    padded_right: bool = False
    rows: dict[Any, dict[int, tuple[Entry, WrittenRow]]] = field(default_factory=dict)
    fillings: Fillings = field(default_factory=lambda: Fillings())

    def read(self, labels: Tensor | None, past: int, n: int) -> None:
        """Add the labels [B, n] of prompt tokens that follow `past` tokens."""
        old = self.labels
        self.rows.clear()
        self.fillings.clear()
        if labels is None or (past and old is None):
            self.labels = None
        elif past and old is not None:
            old = fit_rows(_wide(old, past), labels.shape[0])
            self.labels = torch.cat([old, labels], dim=1)
        else:
            self.labels = labels
        self.padded_right = labels is not None and _PAD in labels.numpy()[:, -1].tolist()


def _wide(labels: Tensor, n: int) -> Tensor:
    """Cut labels to n tokens, or add text."""
    if labels.shape[1] >= n:
        return labels if labels.shape[1] == n else labels[:, :n]
    return torch.nn.functional.pad(labels, (0, n - labels.shape[1]), value=_TEXT)


def fit_rows(labels: Tensor, rows: int) -> Tensor:
    """Repeat what is known of a prompt's rows for beams and for several answers to it.

    Raises:
        HostError: if the number of rows is no multiple.
    """
    if labels.shape[0] == rows:
        return labels
    if rows % labels.shape[0]:
        raise HostError(
            f"the prompt had {labels.shape[0]} rows and this forward has {rows}: which row is "
            "which is not known"
        )
    return labels.repeat_interleave(rows // labels.shape[0], dim=0)


def tokens_of(
    sequence: Sequence, past: int, rows: int, nq: int, nk: int, device: torch.device
) -> Tokens:
    """Return the roles of an attention call's tokens.

    Args:
        sequence: what is known of the prompt.
        past: tokens in the cache before this forward.
        rows: batch size.
        nq: queries.
        nk: keys; fewer than there are tokens in a sliding window, more in a static cache.
        device: where the masks go.

    Raises:
        HostError: if the prompt's token ids were never seen.
    """
    if sequence.labels is None:
        raise HostError(
            "which tokens are image and text is not known: the model was called without "
            "input_ids, was compiled before the patch, or goes on with a cache that was filled "
            "before it. Patch and call the whole model, with input_ids, from the prompt on"
        )
    total = past + nq
    labels = fit_rows(_wide(sequence.labels, total), rows)

    def slots() -> Tensor:
        return torch.arange(total, device=labels.device)

    def answered() -> Tensor:
        return (slots() >= sequence.prompt).expand(rows, -1)

    def role_of(role: str) -> Tensor:
        if role == "question":
            return (labels == _TEXT) & ~answered() & (_images_after(labels) == 0)
        value = {"image": _IMAGE, "text": _TEXT, "pad": _PAD}[role]
        return labels == value

    def queries(role: str) -> Tensor:
        found = _answering(sequence, labels) if role == "answer" else role_of(role)
        return found[:, past:]

    def among_all(role: str) -> Tensor:
        return answered() if role == "answer" else role_of(role)

    def keys(role: str) -> Tensor:
        found = among_all(role)
        if nk < total:
            return found[:, total - nk :]
        return torch.nn.functional.pad(found, (0, nk - total))

    written = past >= sequence.prompt
    answering = None if sequence.padded_right else max(0, sequence.prompt - 1 - past)
    return Tokens(queries, keys, among_all, max(0, total - nk), written, device, labels, answering)


def _images_after(labels: Tensor) -> Tensor:
    """Count the image tokens from each token on."""
    return (labels == _IMAGE).flip(1).cumsum(1).flip(1)


def _answering(sequence: Sequence, labels: Tensor) -> Tensor:
    """Return the tokens [B, N] from the last real one of each row's prompt on."""
    if not sequence.padded_right:
        found = np.zeros(labels.shape, dtype=np.bool_)  # a model waits: torch takes much longer
        found[:, sequence.prompt - 1 :] = True
        return torch.from_numpy(found)
    slots = torch.arange(labels.shape[1], device=labels.device)
    real = (labels != _PAD) & (slots < sequence.prompt)
    last = (real * slots).amax(dim=1, keepdim=True)
    return (slots >= last) & (labels != _PAD)
