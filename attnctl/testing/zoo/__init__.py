"""Tiny random-weight stock diffusers pipelines, one small builder a model family.

``FAMILIES[name].build()`` makes the pipeline, ``.call(pipe)`` the keywords of a call, and
:func:`run` does both. diffusers is imported when a family is built.
"""

from attnctl.testing.zoo import image, more, video  # noqa: F401  (they register families)
from attnctl.testing.zoo.core import (
    FAMILIES,
    CallRecorder,
    Family,
    FamilyUnavailable,
    Text,
    denoiser_calls,
    denoiser_inputs,
    get_family,
    placed,
    run,
)

__all__ = [
    "FAMILIES",
    "REQUIRED",
    "CallRecorder",
    "Family",
    "FamilyUnavailable",
    "Text",
    "denoiser_calls",
    "denoiser_inputs",
    "get_family",
    "placed",
    "run",
]

REQUIRED: tuple[str, ...] = (
    *("sd1", "sd2", "sdxl", "sd3", "sd35", "flux", "flux2", "qwenimage", "pixart", "sana"),
    *("cogvideox", "wan", "wan-i2v", "hunyuanvideo", "ltx", "mochi"),
)
"""Families that every supported diffusers can build."""
