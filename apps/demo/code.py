"""The settings of a run as Python that does the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attnctl.apps.chosen import Chosen
from attnctl.apps.control_syntax import options_text

__all__ = ["answer_code", "draw_code"]


def draw_code(
    model: str, arguments: Mapping[str, Any], seed: int, chosen: Sequence[Chosen], video: bool
) -> str:
    """Return the code for a picture or a video; without its comment it needs `pipe` only."""
    call = "".join(f"    {key}={value!r},\n" for key, value in arguments.items())
    noise = f'    generator=torch.Generator("cpu").manual_seed({seed}),\n'
    made = ".frames[0]" if video else ".images[0]"
    name = "video" if video else "image"
    return (
        f"# pipe = DiffusionPipeline.from_pretrained(...)  # {model}\n"
        f"import torch\n{_patch('pipe', chosen)}\n{name} = pipe(\n{call}{noise}){made}"
    )


def answer_code(model: str, tokens: int, chosen: Sequence[Chosen]) -> str:
    """Return the code for an answer."""
    return (
        f"# model = AutoModelForImageTextToText.from_pretrained(...)  # {model}\n"
        f"{_patch('model', chosen)}\n"
        f"model.generate(**inputs, do_sample=False, max_new_tokens={tokens})"
    )


def _patch(target: str, chosen: Sequence[Chosen]) -> str:
    """Return the two lines."""
    if not chosen:
        return "import attnctl"
    made = ", ".join(map(_control, chosen))
    return f"import attnctl\nhandle = attnctl.patch({target}, {made})"


def _control(chosen: Chosen) -> str:
    options = [f", {key}={_literal(key, value)}" for key, value in chosen.changed.items()]
    return f"attnctl.control({chosen.control.name!r}{''.join(options)})"


def _literal(key: str, value: Any) -> str:
    if isinstance(value, (bool, int, float, str)) or value is None:
        return repr(value)
    return repr(options_text({key: value}).removeprefix(f"{key}="))
