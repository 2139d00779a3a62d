"""Answers of a vision-language model of transformers, in batches, greedily."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from attnctl import assets
from attnctl.apps.fingerprint import fingerprint
from attnctl.apps.models import ModelError, first_line, placed
from attnctl.hosts.adopt import original_class
from attnctl.processors.vlm.prompts import begun

from .bad_data import EvalError

__all__ = ["Answerer", "Reply", "chat", "model_facts"]


@dataclass(frozen=True)
class Reply:
    """What a model said.

    Attributes:
        text: the words.
        ended: whether it ended by itself.
    """

    text: str
    ended: bool


def chat(question: str, images: int = 1) -> list[dict[str, Any]]:
    """Return a conversation for the model's template: images, then a question."""
    content: list[dict[str, str]] = [{"type": "image"}] * images
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


class Answerer:
    """A model and its processor.

    Args:
        model: any image-text-to-text model of transformers.
        processor: its processor; padding is put on the left.
        name: what the user called it.
    """

    def __init__(self, model: Any, processor: Any, name: str) -> None:
        self.model, self.processor, self.name = model.eval(), processor, name
        tokenizer = getattr(processor, "tokenizer", processor)
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.pad = tokenizer.pad_token_id

    @classmethod
    def load(cls, model: str, device: str = "auto", dtype: str = "auto") -> Answerer:
        """Load a model.

        Args:
            model: a shipped model, a folder, or a hub id.
            device: "auto", "cpu", "cuda" or "cuda:N".
            dtype: "auto", "float32", "float16" or "bfloat16".

        Raises:
            ModelError: if that is not possible.
        """
        place, kind = placed(device, dtype)
        where = str(folder(model) or model)
        from transformers import AutoModelForImageTextToText, AutoProcessor

        try:
            loaded = AutoModelForImageTextToText.from_pretrained(where).to(place, kind)
            processor = AutoProcessor.from_pretrained(where)
        except Exception as error:
            raise ModelError(
                f"the model {model!r} cannot be loaded: {first_line(error)}"
            ) from error
        if not getattr(processor, "chat_template", None):
            raise ModelError(
                f"the processor of {model!r} has no chat template, so that there is no telling "
                "how to ask it; add one to its folder (chat_template.jinja)"
            )
        return cls(loaded, processor, model)

    @torch.inference_mode()
    def reply(
        self,
        chats: Sequence[Sequence[Mapping[str, Any]]],
        images: Sequence[Sequence[Any]],
        max_new_tokens: int,
        **options: Any,
    ) -> list[Reply]:
        """Answer conversations, greedily unless options say otherwise.

        Args:
            chats: conversations in the form of transformers' chat templates.
            images: the pictures of each, in the order in which it names them.
            max_new_tokens: most tokens per answer.
            options: of `generate`.

        Raises:
            EvalError: if the model does not return its prompt and what follows it.
        """
        template = self.processor.apply_chat_template
        prompts = [template(list(one), add_generation_prompt=True) for one in chats]
        flat = [picture for some in images for picture in some]
        pictures = {"images": flat} if flat else {}
        how = {"padding": True, **begun(self.processor, prompts)}
        inputs = self.processor(text=prompts, **pictures, return_tensors="pt", **how)
        inputs = {k: self._placed(v) for k, v in inputs.items()}
        settings = {"do_sample": False, "num_beams": 1, "pad_token_id": self.pad, **options}
        ids = self.model.generate(**inputs, max_new_tokens=max_new_tokens, **settings)
        asked = inputs["input_ids"]
        if not torch.equal(ids[:, : asked.shape[1]], asked):
            raise EvalError(
                f"{type(self.model).__name__} does not return its prompt, so that the answer "
                "cannot be told from it; models whose generate returns new tokens only are not "
                "supported here"
            )
        new = ids[:, asked.shape[1] :]
        texts = self.processor.batch_decode(new, skip_special_tokens=True)
        ends = self._ends()
        return [
            Reply(text.strip(), bool(ends & {*row}))
            for text, row in zip(texts, new.tolist(), strict=True)
        ]

    def _placed(self, value: Any) -> Any:
        """Move to the model's device, numbers with a fraction to its type too."""
        if not isinstance(value, torch.Tensor):
            return value
        kind = self.model.dtype if value.is_floating_point() else None
        return value.to(self.model.device, kind)

    def _ends(self) -> set[int]:
        """Return the tokens that end an answer."""
        found = self.model.generation_config.eos_token_id
        return {found} if isinstance(found, int) else {*(found or ())}


def folder(model: str) -> Path | None:
    """Return the folder of a model; None for a hub id.

    Raises:
        ModelError: if it is neither.
    """
    path = assets.path(model) if model in assets.names() else Path(model).expanduser()
    if (path / "config.json").is_file():
        return path
    if path.is_dir():
        raise ModelError(f"the folder {path} holds no model of transformers: no config.json")
    if path.exists() or model.count("/") != 1 or model.startswith((".", "/", "~")):
        shipped = ", ".join(assets.names())
        raise ModelError(
            f"there is no model {model!r}; give a shipped one ({shipped}), a folder, or a hub id "
            "such as org/name"
        )
    return None


def model_facts(answerer: Answerer) -> dict[str, Any]:
    """Return what tells a model from any other: its files, or its commit on the hub; its place."""
    place = folder(answerer.name)
    model = answerer.model
    commit = getattr(model.config, "_commit_hash", None)
    return {
        "model": answerer.name,
        "files": None if place is None else fingerprint(place),
        "commit": commit,
        "class": original_class(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": _device_name(model.device),
        "template": hashlib.sha256(str(answerer.processor.chat_template).encode()).hexdigest()[
            :16
        ],
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
