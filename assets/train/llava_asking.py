"""Picks questions about photos, on the device and without waiting for it.

Presence is asked in balance: as many objects that are there as not. Those that are not there are
drawn at random, by popularity, or as missing partners, as the benchmark's three splits do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnctl.assets.train.llava_slots import Tables, Turns
from attnctl.assets.world.couples import partner, popularity, ranks
from attnctl.assets.world.palette import PAIRS, SHAPES
from attnctl.assets.world.questions import COLOUR, COUNT, POSITION, PRESENCE

FAR = 100.0


class Asker:
    """Draws turns of every kind about batches of photos.

    Args:
        tables: token tables.
        negatives: weights of random, popular and adversarial objects in questions answered no.
        skew: of the popularity that "popular" goes by.
        plain: share of presence questions in the benchmark's own wording.
        source: random numbers; everything is on its device.
    """

    def __init__(
        self,
        tables: Tables,
        negatives: tuple[float, ...],
        skew: float,
        plain: float,
        source: torch.Generator,
    ) -> None:
        device = source.device
        self.tables, self.plain, self.source = tables, plain, source
        self.negatives = torch.tensor(negatives, device=device)
        self.partner = torch.tensor([partner(pair) for pair in range(len(PAIRS))], device=device)
        self.frequency = popularity(skew)[torch.tensor(ranks())].to(device)

    def presence(self, pair: Tensor, focus: Tensor | None = None) -> Turns:
        """Is it there? ``[B, SLOT]``.

        Args:
            pair: ``[B, K]`` pair indices, -1 where there is no object.
            focus: ``[B]`` place of the object that half of the questions answered yes are about.
        """
        yes = self._random(len(pair)) < 0.5
        asked = torch.where(yes, self.shown(pair, focus), self.absent(pair))
        odd = torch.randint(1, len(PRESENCE), yes.shape, generator=self.source, device=yes.device)
        wording = torch.where(self._random(len(pair)) < self.plain, 0, odd)
        return self.tables.presence(wording, asked, yes.long())

    def shown(self, pair: Tensor, focus: Tensor | None = None) -> Tensor:
        """``[B]`` a random object that is there."""
        noise = self._random(*pair.shape).masked_fill(pair < 0, -1)
        if focus is not None:
            half = (self._random(len(pair), 1) < 0.5).float()
            noise = noise.scatter_add(1, focus[:, None], half)
        return pair.gather(1, noise.argmax(1, keepdim=True))[:, 0]

    def absent(self, pair: Tensor) -> Tensor:
        """``[B]`` an object that is not there, of one of the three sorts."""
        there = self.present(pair)
        sort = torch.multinomial(
            self.negatives, len(pair), replacement=True, generator=self.source
        )[:, None]
        noise = self._random(len(pair), len(PAIRS))
        # the largest of log(u) / weight is a draw by weight
        weight = torch.where(sort == 1, self.frequency, torch.ones_like(self.frequency))
        score = noise.clamp(min=1e-9).log() / weight
        missing = self.present(torch.where(pair >= 0, self.partner[pair.clamp(min=0)], -1))
        score = score + FAR * ((sort == 2) & missing)
        return score.masked_fill(there, -torch.inf).argmax(1)

    def colour(self, pair: Tensor) -> Turns:
        """What colour is the ...? About a shape seen once; else the place of an object."""
        shape = torch.where(pair >= 0, pair.clamp(min=0) % len(SHAPES), -1)
        alike = (shape[:, :, None] == shape[:, None, :]).sum(2)
        score = self._random(*pair.shape).masked_fill((alike > 1) | (pair < 0), -1)
        best, place = score.max(1)
        chosen = pair.gather(1, place[:, None])[:, 0].clamp(min=0)
        wording = self._wording(len(COLOUR), len(pair))
        told = self.tables.colour(wording, chosen % len(SHAPES), chosen // len(SHAPES))
        unique = (best >= 0)[:, None]
        return Turns(told.ids, told.targets.masked_fill(~unique, -100))

    def count(self, pair: Tensor) -> Turns:
        """How many objects are there?"""
        number = (pair >= 0).sum(1) - 1
        return self.tables.count(self._wording(len(COUNT), len(pair)), number)

    def position(self, pair: Tensor, centre: Tensor) -> Turns:
        """Where is the ...? ``centre`` ``[B, K, 2]``."""
        noise = self._random(*pair.shape).masked_fill(pair < 0, -1)
        place = noise.argmax(1)
        chosen = pair.gather(1, place[:, None])[:, 0]
        spot = centre.gather(1, place[:, None, None].expand(-1, 1, 2))[:, 0]
        third = (3 * spot).long().clamp(0, 2)
        wording = self._wording(len(POSITION), len(pair))
        return self.tables.position(wording, chosen, 3 * third[:, 1] + third[:, 0])

    def present(self, pair: Tensor) -> Tensor:
        """``[B, 48]`` bool: which pairs are among ``pair``."""
        found = torch.zeros(len(pair), len(PAIRS) + 1, dtype=torch.bool, device=pair.device)
        return found.scatter(1, torch.where(pair >= 0, pair, len(PAIRS)), True)[:, :-1]

    def _wording(self, n: int, size: int) -> Tensor:
        device = self.source.device
        return torch.randint(n, (size,), generator=self.source, device=device)

    def _random(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.source, device=self.source.device)
