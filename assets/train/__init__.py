"""Training of the shipped models: ``python -m attnctl.assets.train NAME --seed S``.

Each model is one file with a function ``recipe(run) -> Recipe``; `RECIPES` names the files, and
`loop.train` does the rest. A new model is a new file and a new line here.
"""

from __future__ import annotations

import importlib

from attnctl.assets.train.recipe import Recipe, Run

RECIPES = {
    "detector": "attnctl.assets.train.detector",
    "vae": "attnctl.assets.train.vae",
    "tiny-sd": "attnctl.assets.train.tiny_sd",
    "tiny-sd3": "attnctl.assets.train.tiny_sd3",
    "tiny-llava": "attnctl.assets.train.tiny_llava",
    "video-vae": "attnctl.assets.train.video_vae",
    "tiny-wan": "attnctl.assets.train.tiny_wan",
}


def recipe(name: str, run: Run) -> Recipe:
    """Recipe of the model ``name``, ready to be trained.

    Raises:
        KeyError: unknown name; the message lists the known ones.
    """
    if name not in RECIPES:
        raise KeyError(f"no training called {name!r}; there are: {', '.join(RECIPES)}")
    made: Recipe = importlib.import_module(RECIPES[name]).recipe(run)
    return made
