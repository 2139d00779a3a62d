"""VLMEvalKit's model: any vision-language model of transformers, with any control.

In a copy of VLMEvalKit's run.py, or a script that ends in running it:

    from attnctl.apps.plugins.vlmevalkit_model import register

    register("llava-pai", "llava-hf/llava-1.5-7b-hf", "pai:alpha=0.5")

and then `--model llava-pai`. Images and text in any order; no video, no rounds, one question per
call, which is how VLMEvalKit asks.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from vlmeval.vlm.base import BaseModel

from attnctl.errors import HostError

from .loading import answerer_with

__all__ = ["AttnctlVLM", "register"]


class AttnctlVLM(BaseModel):
    """A model for VLMEvalKit.

    Args:
        model_path: a shipped model, a folder, or a hub id.
        control: text form of the controls, " + " between them.
        max_new_tokens: most tokens per answer.
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: "auto", "float32", "float16" or "bfloat16".
        options: of `generate`.

    Raises:
        AttnctlError: if the model cannot be loaded or a control not be installed.
    """

    INTERLEAVE = True

    def __init__(
        self,
        model_path: str,
        control: str = "",
        max_new_tokens: int = 512,
        device: str = "auto",
        dtype: str = "auto",
        **options: Any,
    ) -> None:
        super().__init__()
        self.answerer = answerer_with(model_path, control, device, dtype)
        self.max_new_tokens, self.options = max_new_tokens, options

    def generate_inner(self, message: Sequence[Mapping[str, Any]], dataset: Any = None) -> str:
        """Answer a message, a list of {"type": "image" or "text", "value": path or words}.

        Raises:
            HostError: if the message holds something else.
        """
        content: list[dict[str, str]] = []
        images = []
        for part in message:
            if part["type"] == "image":
                images.append(Image.open(part["value"]).convert("RGB"))
                content.append({"type": "image"})
            elif part["type"] == "text":
                content.append({"type": "text", "text": part["value"]})
            else:
                raise HostError(
                    f"the message holds {part['type']!r}; attnctl reads image and text"
                )
        chat = [{"role": "user", "content": content}]
        (reply,) = self.answerer.reply([chat], [images], self.max_new_tokens, **self.options)
        return reply.text


def register(name: str, model_path: str, control: str = "", **options: Any) -> None:
    """Make a model with controls known to VLMEvalKit.

    Args:
        name: what `--model` calls it.
        model_path, control, options: see `AttnctlVLM`.
    """
    from vlmeval.config import supported_VLM

    supported_VLM[name] = functools.partial(AttnctlVLM, model_path, control, **options)
