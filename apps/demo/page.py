"""The page: a tab for each kind of model that is there."""

from __future__ import annotations

from typing import Any

import gradio as gr

from .drawing import session_of
from .house import Kind
from .pictures_tab import PicturesTab
from .questions_tab import QuestionsTab
from .service import Service
from .videos_tab import VideosTab

__all__ = ["CSS", "HEAD", "THEME", "page"]

TABS: dict[Kind, tuple[str, Any]] = {
    "image": ("Pictures", PicturesTab),
    "video": ("Videos", VideosTab),
    "vlm": ("Questions", QuestionsTab),
}
_HEAD = (
    "# attnctl\nControl attention in pretrained models without training: add controls to the "
    "stack, run, and compare with the stock model under the same seed."
)
_FONTS = ("system-ui", "sans-serif")
THEME = gr.themes.Default(font=_FONTS, font_mono=("ui-monospace", "monospace"))
"""Without fonts from far away: the page works offline, and tells nobody of its visitors."""

CSS = """
.attnctl-name input { text-overflow: ellipsis; padding-right: 1.5em; }
.attnctl-visit .grid-container {
    grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)) !important;
}
"""
"""Keeps long names clear of a choice's arrow, and a visit's first pictures small."""
HEAD = "<script>document.querySelector('link[rel=manifest]')?.remove()</script>"
"""Gradio names a manifest at the root of the host, which is not ours behind a proxy's path."""


def page(service: Service) -> gr.Blocks:
    """Return the page.

    Args:
        service: what does its work.
    """
    with gr.Blocks(title="attnctl", analytics_enabled=False) as blocks:
        gr.Markdown(_HEAD)
        with gr.Tabs():
            for kind, (label, tab) in TABS.items():
                if service.house.named(kind):
                    with gr.Tab(label, id=kind):
                        tab(service)

        def gone(request: gr.Request) -> None:
            """End the runs of a visitor who has left."""
            service.cancel(session_of(request))

        blocks.unload(gone)
    blocks.queue(max_size=service.limits.waiting, api_open=False)
    return blocks
