"""Training of the detector: drawn pictures, some with doubled or malformed objects."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, binary_cross_entropy_with_logits, cross_entropy, pad

from attnctl.assets.train.flaws import KINDS, draw_flawed
from attnctl.assets.train.numbers import proportion
from attnctl.assets.train.recipe import Plan, Recipe, Run
from attnctl.assets.train.weights import millions, on_device, save_rounded
from attnctl.assets.world.captions import caption
from attnctl.assets.world.detector import WEIGHTS, Detector, exact, load
from attnctl.assets.world.draw import SIZE, draw
from attnctl.assets.world.palette import PAIRS
from attnctl.assets.world.sampling import sample, uniform
from attnctl.assets.world.scenes import Scenes

OBJECTS = (2, 3, 3, 2)
RADIUS = (0.12, 0.21)


def recipe(run: Run) -> Recipe:
    """The detector's recipe."""
    return DetectorRecipe(run)


class DetectorRecipe(Recipe):
    """Presence of pairs, number of objects and malformed objects, from drawn pictures."""

    name = "detector"
    plan = Plan(steps=1500, batch=512, lr=2e-3)

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.model = on_device(Detector(), run.device)

    def batch(self, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pictures, presence ``[B, 48]``, malformed ``[B]`` and count ``[B]``."""
        source = self.run.source
        scenes = doubled(sample(size, objects=OBJECTS, seed=source, radius=RADIUS), source)
        kind = torch.randint(4 * KINDS, (size,), generator=source, device=source.device)
        images = disturbed(draw_flawed(scenes, kind, SIZE, source), source)
        flawed = (kind < KINDS) & shown_flaw(scenes, kind)
        return images, presence(scenes, flawed), flawed.float(), scenes.there.sum(1)

    def loss(self, batch: Sequence[Tensor]) -> Tensor:
        """Cross-entropies of the three answers."""
        images, wanted, flawed, count = batch
        seen = self.model(images)
        pairs = binary_cross_entropy_with_logits(seen.presence.float(), wanted)
        wrong = binary_cross_entropy_with_logits(seen.malformed.float(), flawed)
        return 10 * pairs + wrong + 0.5 * cross_entropy(seen.number.float(), count)

    def write(self) -> Path:
        """``detector.safetensors``."""
        return save_rounded(self.model, self.run.out / WEIGHTS)

    def figures(self, place: Path) -> dict[str, Any]:
        """Exactness on clean pictures, and how often a wrong picture is refused."""
        judge = load(place).to(self.run.device)
        n = max(2, 4 * self.run.prompts)
        return {
            "millions": millions(judge),
            "clean pictures": [clean(judge, n, objects) for objects in (1, 2, 3)],
            "malformed refused": refused(judge, n, self.run.source, _with_flaw),
            "doubled refused": refused(judge, n, self.run.source, _with_double),
        }


def doubled(scenes: Scenes, source: torch.Generator, chance: float = 0.15) -> Scenes:
    """Some scenes with the second object made equal to the first."""
    which = torch.rand(len(scenes), generator=source, device=source.device) < chance
    pair = scenes.pair.clone()
    pair[:, 1] = torch.where(which & scenes.there[:, 1], pair[:, 0], pair[:, 1])
    return Scenes(pair, scenes.centre, scenes.radius, scenes.background)


def shown_flaw(scenes: Scenes, kind: Tensor) -> Tensor:
    """A covered object is only a flaw where there is a second one to cover."""
    return (kind < KINDS - 1) | scenes.there[:, 1]


def presence(scenes: Scenes, flawed: Tensor) -> Tensor:
    """``[B, 48]`` which pairs are there; a malformed first object is not."""
    there = scenes.there.clone()
    there[:, 0] &= ~flawed
    wanted = torch.zeros(len(scenes), len(PAIRS) + 1, device=there.device)
    wanted.scatter_(1, torch.where(there, scenes.pair, len(PAIRS)), 1.0)
    return wanted[:, :-1]


def disturbed(images: Tensor, source: torch.Generator) -> Tensor:
    """Slight blur, tint and noise, such as a decoder leaves."""
    few = (len(images), 1, 1, 1)
    blurred = avg_pool2d(pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    images = torch.lerp(images, blurred, uniform(few, (-0.2, 0.6), source))
    images = images + uniform((len(images), 3, 1, 1), (-0.03, 0.03), source)
    noise = torch.randn(images.shape, generator=source, device=images.device)
    return images + noise * uniform(few, (0.0, 0.04), source)


def clean(judge: Detector, n: int, objects: int) -> dict[str, Any]:
    """Share of undisturbed pictures judged exact for their own caption."""
    scenes = sample(n, objects=objects, seed=77 + objects)
    return _exactness(judge, draw(scenes), scenes)


def _exactness(judge: Detector, images: Tensor, scenes: Scenes) -> dict[str, Any]:
    prompts = [caption(dict.fromkeys(pairs)) for pairs in scenes.pairs()]
    device = next(judge.parameters()).device
    return proportion(exact(images.to(device), prompts, judge).cpu())


def refused(judge: Detector, n: int, source: torch.Generator, spoil: Any) -> dict[str, Any]:
    """Share of spoilt pictures of two or three objects that are not judged exact."""
    scenes = sample(n, objects=(0, 1, 1), seed=source)
    images, scenes = spoil(scenes, source)
    hits = _exactness(judge, images, scenes)
    return {"rate": round(1 - hits["rate"], 4), "n": n}


def _with_flaw(scenes: Scenes, source: torch.Generator) -> tuple[Tensor, Scenes]:
    kind = torch.randint(KINDS, (len(scenes),), generator=source, device=source.device)
    return draw_flawed(scenes, kind, SIZE, source), scenes


def _with_double(scenes: Scenes, source: torch.Generator) -> tuple[Tensor, Scenes]:
    twice = doubled(scenes, source, chance=1.0)
    return draw(twice), twice
