"""Nodes for ComfyUI, one per control that needs no more than an attention call.

A folder in ComfyUI's `custom_nodes` whose `__init__.py` holds

    from attnctl.apps.comfy import comfy_entrypoint

is the whole node pack. ComfyUI's models are not diffusers modules, so nothing is patched here:
controls are called from the attention override that ComfyUI documents for its models.
"""

from .nodes import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
