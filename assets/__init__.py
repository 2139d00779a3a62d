"""Models trained on the shape world, shipped with the package, and where to find them.

The environment variable ``ATTNCTL_ASSETS`` names a folder that is looked at first, so that
another training of the same models can be put in without touching the package.
"""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["locate", "names", "path"]

SHIPPED = Path(__file__).parent
VARIABLE = "ATTNCTL_ASSETS"


def folders() -> tuple[Path, ...]:
    """Folders searched, in order: ``$ATTNCTL_ASSETS`` if set, then the package's own.

    Raises:
        FileNotFoundError: the variable names no folder.
    """
    named = os.environ.get(VARIABLE)
    if not named:
        return (SHIPPED,)
    if not Path(named).is_dir():
        raise FileNotFoundError(f"{VARIABLE}={named} is no folder; unset it or correct it")
    return (Path(named), SHIPPED)


def locate(entry: str) -> Path | None:
    """First existing file or folder called ``entry`` in `folders()`, or None."""
    found = (folder / entry for folder in folders())
    return next((one for one in found if one.exists()), None)


def names() -> list[str]:
    """Names of the models there are, sorted, e.g. ``["tiny-sd3"]``."""
    found = (child for folder in folders() for child in folder.glob("tiny-*") if child.is_dir())
    return sorted({child.name for child in found})


def path(name: str) -> Path:
    """Folder of the model ``name``, in the layout of the library that loads it.

    Raises:
        KeyError: there is no such model; the message lists those there are.
    """
    known = names()
    if name not in known:
        raise KeyError(f"no model called {name!r} in the package; there are: {', '.join(known)}")
    found = locate(name)
    assert found is not None
    return found
