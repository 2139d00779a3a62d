"""Changes to the folders that diffusers writes, so that every version loads them alike."""

from __future__ import annotations

import json
from pathlib import Path


def change(path: Path, **values: object) -> None:
    """Set entries of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | values
    kept = {name: value for name, value in content.items() if name not in values or value}
    path.write_text(json.dumps(kept, indent=2) + "\n")


def tidy(folder: Path) -> None:
    """Let text encoders load in float32, and drop where the autoencoder was loaded from.

    The files become readable for everybody.
    """
    for config in folder.glob("text_encoder*/config.json"):
        change(config, dtype="float32")
    change(folder / "vae/config.json", _name_or_path=None)
    for file in folder.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)
