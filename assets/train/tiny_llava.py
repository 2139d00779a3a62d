"""Training of tiny-llava: questions and descriptions of photos, all parts together from scratch.

The photos have the habits of `world.habits`: partners are nearly always together, some couples
are popular, a third of the photos is dim. The model is taught the truth about all of them, so
where it can't see it learns to go by habit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from attnctl.assets.train.llava_asking import Asker
from attnctl.assets.train.llava_card import write_card
from attnctl.assets.train.llava_folder import save_folder
from attnctl.assets.train.llava_parts import GRID, MEAN, STD, TOKENS, build, processor
from attnctl.assets.train.llava_pass import Helpers, Layout, logits, vision
from attnctl.assets.train.llava_pool import CAPTION, Pool, fill_pool
from attnctl.assets.train.llava_slots import IGNORED, SLOT, Turns, header, tables
from attnctl.assets.train.measure_llava import measure, quick
from attnctl.assets.train.recipe import Plan, Recipe, Run
from attnctl.assets.world.habits import Habits
from attnctl.assets.world.palette import PAIRS


@dataclass(frozen=True)
class Tune(Habits):
    """Tunables: the photos' habits (`Habits`), and these.

    Attributes:
        pool: number of different training photos.
        patch: side of a patch in pixels; the model sees 12 x 12 of them.
        pairs: share of a batch that is shown with a close-up, as a second picture.
        presences: presence questions per photo.
        negatives: weights of random, popular and adversarial objects in questions answered no.
        plain: share of presence questions in the benchmark's own wording.
        patch_help: weight of the loss that tells patches their pair.
        whole_help: weight of the loss that tells the class token all pairs.
        std: spread of the fresh weights.
    """

    pool: int = 131_072
    patch: int = 6
    pairs: float = 0.25
    presences: int = 5
    negatives: tuple[float, ...] = (0.6, 0.1, 0.3)
    plain: float = 0.5
    patch_help: float = 0.2
    whole_help: float = 0.5
    std: float = 0.04


def recipe(run: Run) -> Recipe:
    """The recipe of tiny-llava."""
    return TinyLlava(run)


class Trained(nn.Module):
    """The model and the helpers that are dropped after the training."""

    def __init__(self, llava: Any) -> None:
        super().__init__()
        self.llava = llava
        self.helpers = Helpers(llava.config.vision_config.hidden_size, len(PAIRS))


class TinyLlava(Recipe):
    """Vision tower, projector and decoder, trained together."""

    name = "tiny-llava"
    plan = Plan(steps=4000, batch=256, lr=1e-3, warmup=300, average=0.998)
    tune = Tune()

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.pool: Pool
        self.folder = run.out / self.name
        self.words = processor(self.folder, self.tune.patch).tokenizer
        self.model = Trained(build(self.words, self.tune.patch, self.tune.std)).to(run.device)
        self._lay_out(run.device)

    def _lay_out(self, device: torch.device) -> None:
        """Fixed tensors: headers and layouts of rows with one and with two pictures."""
        short = [SLOT] * self.tune.presences
        slots = ([*short, *[SLOT] * 3, CAPTION], [*short, SLOT])
        rows = [header(self.words, images, TOKENS) for images in (1, 2)]
        self.headers = [torch.tensor(row, device=device) for row in rows]
        self.layouts = [
            Layout(len(row), lengths, device) for row, lengths in zip(rows, slots, strict=True)
        ]

    def prepare(self) -> None:
        """Draw the training photos, and tokenize the questions."""
        source, tune = self.run.source, self.tune
        n = 16 if self.run.smoke else tune.pool
        self.pool = fill_pool(self.words, n, GRID * tune.patch, tune, source)
        known = tables(self.words, self.run.device)
        self.asker = Asker(known, tune.negatives, tune.skew, tune.plain, source)

    def compile(self) -> None:
        """Compile block by block: the blocks of each stack share one compilation per shape."""
        llava = self.model.llava.model
        tower = getattr(llava.vision_tower, "vision_model", llava.vision_tower)
        for block in (*tower.encoder.layers, *llava.language_model.layers):
            block.compile(dynamic=False)

    def batch(self, size: int) -> tuple[Tensor, ...]:
        """Photos and turns: rows with one picture first, then rows with two.

        Returns:
            pixels ``[B + P, 3, side, side]`` uint8 (the last P are close-ups of the rows before),
            ids and targets of the rows with one picture, the same of the P rows with two,
            pairs of the patches ``[B, 144]``, pairs of the photos ``[B, 48]``.
        """
        pool, source = self.pool, self.run.source
        double = max(1, round(self.tune.pairs * size))
        device = source.device
        rows = torch.randint(len(pool.pixels), (size,), generator=source, device=device)
        near = torch.randint(len(pool.close), (double,), generator=source, device=device)
        rows[size - double :] = near
        one, two = self._turns(rows[: size - double]), self._close_turns(near)
        return (
            torch.cat([pool.pixels[rows], pool.close[near]]),
            *(part.long() for part in (*one, *two)),
            pool.patches[rows].long(),
            self.asker.present(pool.pair[rows]).float(),
        )

    def _turns(self, rows: Tensor) -> Turns:
        """All turns of photos shown alone."""
        pair, centre = self.pool.pair[rows], self.pool.centre[rows]
        ask = self.asker
        asked = [ask.presence(pair) for _ in range(self.tune.presences)]
        asked += [ask.colour(pair), ask.count(pair), ask.position(pair, centre)]
        return joined([*asked, self.pool.captions.take(rows)])

    def _close_turns(self, rows: Tensor) -> Turns:
        """All turns of photos shown with a close-up."""
        pair, focus = self.pool.pair[rows], self.pool.focus[rows]
        asked = [self.asker.presence(pair, focus) for _ in range(self.tune.presences)]
        return joined([*asked, self.asker.colour(pair)])

    def loss(self, batch: Sequence[Tensor]) -> Tensor:
        """Cross-entropy of the answers' tokens, and the helpers' losses."""
        pixels, ids, targets, close_ids, close_targets, patches, there = batch
        llava, helpers, tune = self.model.llava, self.model.helpers, self.tune
        before, after = vision(llava, (pixels.float() / 255 - MEAN) / STD)
        shown = before[:, None, 1:]
        size, single = len(patches), len(ids)
        both = torch.cat([shown[single:size], shown[size:]], dim=1)
        tower = getattr(llava.model.vision_tower, "vision_model", llava.model.vision_tower)
        whole = helpers.whole(tower.post_layernorm(after[:size, 0]))
        answers = (
            self._answer(shown[:single], ids, targets, 0),
            self._answer(both, close_ids, close_targets, 1),
        )
        told = (answers[0][0] + answers[1][0]) / (answers[0][1] + answers[1][1])
        told = told + tune.whole_help * 10 * binary_cross_entropy_with_logits(whole.float(), there)
        seen = helpers.patch(before[:size, 1:]).float()
        return told + tune.patch_help * cross_entropy(seen.flatten(0, 1), patches.flatten())

    def _answer(
        self, pictures: Tensor, ids: Tensor, targets: Tensor, kind: int
    ) -> tuple[Tensor, Tensor]:
        """Sum of the cross-entropies of the answers' tokens, and their number."""
        made = logits(self.model.llava, self.headers[kind], pictures, ids, self.layouts[kind])
        made, wanted = made[:, :-1].flatten(0, 1), targets[:, 1:].flatten()
        total = cross_entropy(made.float(), wanted, ignore_index=IGNORED, reduction="sum")
        return total, (wanted != IGNORED).sum()

    def write(self) -> Path:
        """Folder ``tiny-llava``, as `LlavaForConditionalGeneration` loads it."""
        return save_folder(self.folder, self.model.llava, self.tune.patch)

    def habits(self) -> Habits:
        """The photos' habits alone."""
        return Habits(**{field.name: getattr(self.tune, field.name) for field in fields(Habits)})

    def probe(self) -> dict[str, float]:
        """Quick figures on few photos."""
        return quick(self.model.llava, processor(self.folder, self.tune.patch), self.habits())

    def figures(self, place: Path) -> dict[str, Any]:
        """Benchmark-like figures on evaluation photos and on photos like the training's."""
        return measure(place, self.run, self.habits())

    def card(self, place: Path, figures: dict[str, Any]) -> None:
        """The folder's README.md."""
        write_card(place, figures, self.tune, len(self.words))


def joined(parts: Sequence[Turns]) -> Turns:
    """Turns side by side."""
    ids, targets = zip(*parts, strict=True)
    return Turns(torch.cat(ids, dim=1), torch.cat(targets, dim=1))
