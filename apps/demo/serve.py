"""Start the page's server, with the gate before it and its files in one folder."""

from __future__ import annotations

import os
from typing import Any

import gradio as gr
from PIL import Image
from starlette.middleware import Middleware

from .gate import Gate
from .page import CSS, HEAD, THEME, page
from .service import Service

__all__ = ["launch"]


def launch(
    service: Service,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    root_path: str | None = None,
    block: bool = True,
) -> gr.Blocks:
    """Serve the page.

    Args:
        service: what does its work.
        host: address to listen on.
        port: None for the first free one from 7860 on.
        share: have gradio make a public address that leads here.
        root_path: path under which a proxy shows the page, such as "/attnctl".
        block: return only when the server ends.
    """
    # before any widget is made: uploads, and what is served, go into the output folder
    os.environ["GRADIO_TEMP_DIR"] = str(service.shelf.folder)
    Image.MAX_IMAGE_PIXELS = service.limits.upload_pixels
    blocks = page(service)
    gate = Middleware(
        Gate,
        limits=service.limits,
        heavy=lambda number: _is_heavy(blocks, number),
        waiting=lambda client: _waiting(blocks, client),
    )
    blocks.launch(
        server_name=host,
        server_port=port,
        share=share,
        root_path=root_path,
        prevent_thread_lock=not block,
        max_file_size=service.limits.upload_bytes,
        app_kwargs={"middleware": [gate]},
        state_session_capacity=100,
        enable_monitoring=False,
        mcp_server=False,
        ssr_mode=False,
        pwa=False,
        run_history=False,
        footer_links=["api"],
        theme=THEME,
        css=CSS,
        head=HEAD,
        quiet=not block,
    )
    return blocks


def _is_heavy(blocks: gr.Blocks, number: int) -> bool:
    function: Any = blocks.fns.get(number)
    return function is not None and function.concurrency_id == "gpu"


def _waiting(blocks: gr.Blocks, client: str) -> int:
    """Return how many runs of a visitor are in the queue."""
    queues = blocks._queue.event_queue_per_concurrency_id
    events = list(queues["gpu"].queue) if "gpu" in queues else []
    return sum(_address(event) == client for event in events)


def _address(event: Any) -> str:
    client = getattr(event.request, "client", None)
    return str(client.host) if client else ""
