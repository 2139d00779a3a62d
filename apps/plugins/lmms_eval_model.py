"""lmms-eval's model `attnctl`: any vision-language model of transformers, with any control.

    lmms-eval --model attnctl --tasks pope \\
        --model_args 'pretrained=llava-hf/llava-1.5-7b-hf,control="pai:alpha=0.5,rows=answer"'

Written for lmms-eval 0.7 (chat models). One process; images only; no log-likelihoods and no
rounds. An error stops the run: lmms-eval's own classes turn it into an empty answer.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages

from attnctl.errors import HostError

from .loading import answerer_with

__all__ = ["AttnctlModel", "cut", "decoding"]

LONGEST = 1024
"""lmms-eval's default for the most new tokens."""
_KNOWN = ("temperature", "top_p", "num_beams", "do_sample", "repetition_penalty")


class AttnctlModel(lmms):
    """A chat model for lmms-eval.

    Args:
        pretrained: a shipped model, a folder, or a hub id.
        control: text form of the controls, " + " between them.
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: "auto", "float32", "float16" or "bfloat16".
        batch_size: questions per call.
        max_batch_size: of lmms-eval; not used.

    Raises:
        HostError: if several processes were started.
        AttnctlError: if the model cannot be loaded or a control not be installed.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        control: str = "",
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise HostError("the model attnctl runs in one process; start lmms-eval without more")
        self.batch_size = int(batch_size)
        self.answerer = answerer_with(pretrained, control, device or "auto", dtype)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer requests (context, doc_to_messages, gen_kwargs, doc_id, task, split)."""
        answers: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(request.args[2]), []).append(index)
        for indices in groups.values():  # one call of generate has one set of options
            for start in range(0, len(indices), self.batch_size):
                part = indices[start : start + self.batch_size]
                texts = self._answer([requests[i].args for i in part])
                answers.update(zip(part, texts, strict=True))
        return [answers[i] for i in range(len(requests))]

    def _answer(self, calls: Sequence[tuple[Any, ...]]) -> list[str]:
        chats, images = [], []
        for _, to_messages, _, doc_id, task, split in calls:
            messages = ChatMessages(messages=to_messages(self.task_dict[task][split][doc_id]))
            pictures, videos, sounds = messages.extract_media()
            if videos or sounds:
                raise HostError(f"the model attnctl reads images only; {task} has video or sound")
            chats.append(messages.to_hf_messages())
            images.append(pictures)
        options = calls[0][2]
        length, settings = decoding(options)
        replies = self.answerer.reply(chats, images, length, **settings)
        texts = [cut(reply.text, options.get("until")) for reply in replies]
        for call, text in zip(calls, texts, strict=True):
            self.cache_hook.add_partial("generate_until", (call[0], call[2]), text)
        return texts

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not offered.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("the model attnctl generates answers; it gives no likelihoods")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not offered.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("the model attnctl answers single rounds only")


def decoding(options: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """Return the most new tokens and the options of `generate` that a task's options stand for.

    A temperature of 0 is greedy decoding; what is not an option of decoding is left out.
    """
    settings = {k: options[k] for k in _KNOWN if options.get(k) is not None}
    settings.setdefault("do_sample", bool(settings.get("temperature")))
    if not settings["do_sample"]:
        settings = {k: v for k, v in settings.items() if k not in ("temperature", "top_p")}
    return int(options.get("max_new_tokens", LONGEST)), settings


def cut(text: str, until: str | Sequence[str] | None) -> str:
    """Return a text up to the first of some marks."""
    marks = [until] if isinstance(until, str) else list(until or ())
    places = [text.find(mark) for mark in marks if mark and mark in text]
    return text[: min(places)] if places else text
