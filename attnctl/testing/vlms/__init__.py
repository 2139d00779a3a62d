"""Tiny random-weight vision-language models of transformers, one small builder a family.

``VLMS[name].build()`` makes the model, ``.inputs(samples)`` a padded batch for it, and
:func:`generate` runs both. transformers is imported when a family is built.
"""

from attnctl.testing.vlms import models  # noqa: F401  (it registers families)
from attnctl.testing.vlms.core import VLM, VLMS, generate
from attnctl.testing.zoo.core import FamilyUnavailable

__all__ = ["VLM", "VLMS", "FamilyUnavailable", "generate"]
