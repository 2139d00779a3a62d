"""Entry point of the group `lmms_eval.models`: makes `lmms-eval --model attnctl` known.

lmms-eval loads every plug-in's entry point at the start and hides all of them if one fails, so
nothing but its registry is imported here.
"""

from __future__ import annotations

from typing import Any

__all__ = ["manifest"]


def manifest() -> Any:
    """Return lmms-eval's description of the model."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="attnctl",
        chat_class_path="attnctl.apps.plugins.lmms_eval_model.AttnctlModel",
    )
