"""The command `attnctl demo`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from attnctl.apps.quiet import hush
from attnctl.errors import MissingExtra, OptionError

from .limits import Limits

__all__ = ["Order", "demo"]


@dataclass(frozen=True)
class Order:
    """What the command line asks for.

    Args:
        models: names, folders or hub ids; none for the shipped ones.
        host: address to listen on.
        port: None for the first free one from 7860 on.
        share: make a public address.
        root_path: path under which a proxy shows the page.
        out: folder of the results; None for one that is removed at the end.
        device: where the models run.
        dtype: their number type.
        limits: what visitors may ask for.
    """

    models: Sequence[str] = ()
    host: str = "127.0.0.1"
    port: int | None = None
    share: bool = False
    root_path: str | None = None
    out: Path | None = None
    device: str = "auto"
    dtype: str = "auto"
    limits: Limits = Limits()  # noqa: RUF009 - frozen


def demo(order: Order, say: Callable[[str], None]) -> None:
    """Load the models and serve the page until it is interrupted.

    Args:
        order: what was asked for.
        say: is given notes for the user.

    Raises:
        MissingExtra: if gradio is not installed.
        AttnctlError: if a model cannot be loaded, or the folder not be used.
    """
    root = order.root_path
    if root is not None and not root.startswith(("/", "http://", "https://")):
        raise OptionError(f"--root-path {root!r} must begin with a slash, or be an address")
    need_gradio()
    hush(say)
    from .house import House
    from .serve import launch
    from .service import Service
    from .shelf import Shelf

    house = House(order.models, order.device, order.dtype)
    for guest in house.guests.values():
        say(f"{guest.name} ({guest.kind}): {len(guest.offered)} controls")
    with tempfile.TemporaryDirectory(prefix="attnctl-demo-") as temporary:
        shelf = Shelf(order.out or Path(temporary), order.limits.folder_bytes)
        service = Service(house, shelf, order.limits)
        launch(service, order.host, order.port, order.share, root)


def need_gradio() -> None:
    """Check that gradio can be had.

    Raises:
        MissingExtra: if it is not installed.
    """
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise MissingExtra("gradio", "demo", "the demo") from None
