"""What a result depends on, as a hash: the same key means the same picture."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from .items import Item

__all__ = ["file_stem", "key_of"]

_DIGITS = 12
"""Of the key, in file names: among 100 000 results two alike are one chance in 50 000."""


def key_of(values: Mapping[str, Any]) -> str:
    """Return the hash of JSON values, 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def file_stem(item: Item, key: str) -> str:
    """Return the file name of an item, without its ending; plain ASCII if made from the prompt."""
    plain = unicodedata.normalize("NFKD", item.prompt[:200]).encode("ascii", "ignore").decode()
    slug = re.sub(r"[^a-z0-9]+", "-", plain.lower())[:40].strip("-")
    return f"{item.name or slug or 'item'}-s{item.settings.seed}-{key[:_DIGITS]}"
