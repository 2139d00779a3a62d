"""Losses and maps of the latent controls against second implementations in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attnctl.processors.latent.a_star import overlap, peak_mask, retention, segregation
from attnctl.processors.latent.attend_and_excite import excite
from attnctl.processors.latent.conform import contrast
from attnctl.processors.latent.disendiff import min_max, soft_iou
from attnctl.processors.latent.divide_and_bind import divergence, total_variation
from attnctl.processors.latent.engine import Maps
from attnctl.processors.latent.maps import Seen, mean_map, smoothed, text_maps
from attnctl.processors.latent.syngen import binding, symmetric_kl
from attnctl.processors.latent.targets import Target
from attnctl.records import Step
from attnctl.testing import oracles
from attnctl.testing.calls import tensors


def random_maps(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def same(got: Tensor, want: float | Tensor) -> None:
    wanted = torch.as_tensor(want, dtype=torch.float64)
    torch.testing.assert_close(got.detach(), wanted.detach(), rtol=0, atol=1e-12)


# -- maps -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [None, "bool", "float", "heads"])
@pytest.mark.parametrize(("tokens", "keys"), [(1, 3), (35, 13), (63, 111)])
def test_mean_maps_and_their_gradients_equal_the_explicit_ones(
    tokens: int, keys: int, masked: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attnctl.processors.latent import maps as module

    q, k, _ = tensors(batch=2, heads=3, tokens=tokens, keys=keys, dim=7)
    mask = None
    if masked:
        heads = 3 if masked == "heads" else 1
        generator = torch.Generator().manual_seed(1)
        mask = torch.rand(2, heads, 1, keys, generator=generator) > 0.3
        mask[..., 0] = True
        mask = torch.where(mask, 0.3, -torch.inf).double() if masked == "float" else mask
    weights = random_maps(2, tokens, keys)
    grads = []
    for most in (1, 1 << 24):  # head by head, and all at once
        monkeypatch.setattr(module, "_CHUNK_ELEMENTS", most)
        leaves = q.clone().requires_grad_(True), k.clone().requires_grad_(True)
        got = mean_map(*leaves, mask, 0.4)
        same(got.detach(), oracles.softmax_map(q, k, mask, 0.4).mean(1))
        grads.append(torch.autograd.grad((got * weights).sum(), leaves))
    leaves = q.clone().requires_grad_(True), k.clone().requires_grad_(True)
    explicit = oracles.softmax_map(*leaves, mask, 0.4).mean(1)
    for one, two, want in zip(
        *grads, torch.autograd.grad((explicit * weights).sum(), leaves), strict=True
    ):
        same(one, want)
        same(two, want)


def test_maps_of_several_sites_weigh_every_head_alike() -> None:
    grid = (1, 5, 7)
    calls, explicit = [], []
    for seed, heads in enumerate((2, 3)):
        q, k, _ = tensors(batch=2, heads=heads, tokens=35, keys=11, dim=5, seed=seed)
        calls.append([Seen(q, k, None, 0.5, grid)])
        explicit.append(oracles.softmax_map(q, k, scale=0.5))
    want = torch.cat(explicit, 1).mean(1).transpose(1, 2).reshape(2, 11, *grid)
    same(text_maps(calls, 2), want)


def test_joint_maps_are_the_image_to_text_block_divided_by_its_rows() -> None:
    """The log-sum-exp over image keys cancels."""
    q, k, _ = tensors(heads=2, tokens=12, keys=12, dim=6)  # 9 image tokens, then 3 of text
    whole = oracles.softmax_map(q, k)
    block = whole[:, :, :9, 9:]
    want = (block / block.sum(-1, keepdim=True)).mean(1)
    same(mean_map(q[:, :, :9], k[:, :, 9:], None, 6**-0.5), want)


def test_smoothing_equals_the_kernel_by_hand() -> None:
    """Attend-and-Excite's kernel is exp(-(x / (2 sigma))^2); the border is a mirror."""
    maps = random_maps(2, 5, 4)
    weights = [math.exp(-((x / (2 * 0.5)) ** 2)) for x in (-1, 0, 1)]
    total = sum(weights) ** 2
    want = torch.zeros_like(maps)
    for y, x in itertools.product(range(5), range(4)):
        for dy, dx in itertools.product((-1, 0, 1), repeat=2):
            at = maps[:, mirror(y + dy, 5), mirror(x + dx, 4)]
            want[:, y, x] += weights[dy + 1] * weights[dx + 1] / total * at
    same(smoothed(maps), want)
    assert smoothed(random_maps(2, 1, 1)).shape == (2, 1, 1)


def mirror(i: int, size: int) -> int:
    return -i if i < 0 else 2 * (size - 1) - i if i >= size else i


def test_sharp_maps_are_a_softmax_over_the_inner_tokens() -> None:
    text = random_maps(7, 1, 3, 2).softmax(0)
    sharp = Maps(text, (Target((2, 3)),), Step(0, 10)).sharp()
    inner = torch.exp(100 * text[1:-1])
    same(sharp[1:-1], inner / inner.sum(0))
    assert not sharp[0].any() and not sharp[-1].any()


# -- losses ---------------------------------------------------------------------------------------


def test_excite_is_the_weakest_peak() -> None:
    maps = random_maps(3, 1, 5, 7)
    same(excite(maps), max(max(0.0, 1 - float(one.max())) for one in maps))
    assert excite(maps + 1) == 0


def test_segregation_and_retention_by_hand() -> None:
    a, b = random_maps(3, 1, 5, 7), (random_maps(3, 1, 5, 7, seed=1) > 0.5).double()

    def term(x: Tensor, y: Tensor) -> float:
        pairs = list(zip(x.flatten().tolist(), y.flatten().tolist(), strict=True))
        return sum(min(p) for p in pairs) / sum(sum(p) for p in pairs)

    same(segregation(a), term(a[0], a[1]) + term(a[0], a[2]) + term(a[1], a[2]))
    same(retention(a, b), sum(1 - term(x, y) for x, y in zip(a, b, strict=True)))


def test_ranges_of_the_overlap() -> None:
    a = random_maps(1, 4, 4)
    same(overlap(a, a)[0], 0.5)
    left, right = torch.zeros(1, 4, 4), torch.zeros(1, 4, 4)
    left[..., :2] = right[..., 2:] = 1.0
    assert overlap(left, right) == 0 and overlap(left, left) == 0.5
    assert overlap(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2)) == 0
    same(overlap(a, left.double()), overlap(left.double(), a))
    assert overlap(torch.cat([left, left]), torch.cat([right, left])).tolist() == [0, 0.5]
    order = torch.tensor([2, 0, 1])
    maps = random_maps(3, 1, 4, 4)
    same(segregation(maps[order]), segregation(maps))


def test_masks_are_constants() -> None:
    maps = random_maps(2, 1, 4, 4).requires_grad_(True)
    masks = peak_mask(maps, 0.5)
    assert not masks.requires_grad and set(masks.unique().tolist()) <= {0.0, 1.0}
    assert masks.flatten(1).amax(1).tolist() == [1.0, 1.0]
    (grad,) = torch.autograd.grad(retention(maps, masks), maps)
    assert torch.isfinite(grad).all() and grad.any()


def test_contrast_by_hand() -> None:
    maps, classes, tau = random_maps(5, 3, 3), [0, 0, 1, 1, 2], 0.5
    unit = [one.flatten() / one.norm() for one in maps]
    losses = []
    for a, p in itertools.permutations(range(5), 2):
        if classes[a] != classes[p]:
            continue
        top = math.exp(float(unit[a] @ unit[p]) / tau)
        rest = [n for n in range(5) if classes[n] != classes[a]]
        below = top + sum(math.exp(float(unit[a] @ unit[n]) / tau) for n in rest)
        losses.append(-math.log(top / below))
    same(contrast(maps, torch.tensor(classes), tau), sum(losses) / len(losses))
    assert contrast(maps, torch.arange(5)) == 0


@pytest.mark.parametrize("released", [False, True])
def test_total_variation_by_hand(released: bool) -> None:
    m = random_maps(1, 4, 5)
    across = [abs(m[0, y, x + 1] - m[0, y, x]) for y in range(4) for x in range(4)]
    down = [
        abs(m[0, y, x] - m[0, 3 if released else y - 1, x]) for y in (1, 2, 3) for x in range(5)
    ]
    want = sum(across) / len(across) + sum(down) / len(down)
    same(total_variation(m, released)[0], want)


def test_divergences() -> None:
    a, b = random_maps(3, 4), random_maps(3, 4, seed=1)
    p, q = a.flatten() / a.sum(), b.flatten() / b.sum()
    m = (p + q) / 2
    js = ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2
    same(divergence(a, b), js)
    same(divergence(b, a), js)
    same(divergence(a, 3 * a), 0.0)
    left, right = torch.zeros(2, 2).double(), torch.zeros(2, 2).double()
    left[0], right[1] = 1.0, 1.0
    same(divergence(left, right), math.log(2))
    kl = ((p * (p / q).log()).sum() + (q * (q / p).log()).sum()) / 2
    same(symmetric_kl(a, b), kl)
    same(symmetric_kl(a, 2 * a), 0.0)


def test_binding_by_hand() -> None:
    noun, red, big, other, third = random_maps(5, 3, 4)
    d = symmetric_kl
    away = (d(noun, other) + d(noun, third)) / 2
    want = sum(d(x, noun) - ((d(x, other) + d(x, third)) / 2 + away) / 2 for x in (red, big))
    same(binding(noun, [red, big], [other, third]), want)
    same(binding(noun, [], [other, third]), -away)
    same(binding(noun, [red], []), d(red, noun))


def test_soft_iou() -> None:
    a, b = random_maps(4, 5), random_maps(4, 5, seed=1)
    shared = float((a * b).sum())
    same(soft_iou(a, b), (shared + 1) / (float(a.sum() + b.sum()) - shared + 1))
    same(soft_iou(b, a), soft_iou(a, b))
    box = torch.zeros(4, 5).double()
    box[:2] = 1
    same(soft_iou(box, box), 1.0)
    same(soft_iou(box, 1 - box), 1 / 21)
    scaled = min_max(torch.stack([a, torch.full_like(a, 0.3)]))
    assert float(scaled[0].min()) == 0 and float(scaled[0].max()) == pytest.approx(1)
    assert not scaled[1].any()


# -- the controls' losses on maps made by hand ----------------------------------------------------


def control_loss(
    cls: Any, text: Tensor, memory: dict[str, Any] | None = None, **options: Any
) -> Tensor:
    targets = (Target((3,), ((2,),)), Target((6, 7), ((5,),)))
    maps = Maps(text, targets, Step(0, 10), content=tuple(range(1, 9)))
    loss: Tensor = cls(**options).loss(maps, {} if memory is None else memory)
    return loss


@pytest.mark.parametrize(
    "name", ["AStar", "AttendAndExcite", "Conform", "DisenDiff", "DivideAndBind", "SynGen"]
)
def test_every_loss_is_lower_where_objects_are_apart(name: str) -> None:
    """Two objects with their attributes in two corners, against all words everywhere."""
    import attnctl

    cls = getattr(attnctl, name)
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    blob = [torch.exp(-((y - c) ** 2 + (x - c) ** 2) / 4).double() for c in (1.5, 5.5)]
    apart, mixed = (
        torch.full((10, 1, 8, 8), 0.05).double(),
        torch.full((10, 1, 8, 8), 0.05).double(),
    )
    for tokens, one in (((2, 3), blob[0]), ((5, 6, 7), blob[1])):
        apart[list(tokens)] += one
        # not quite alike: two equal maps are where the overlap's gradient is 0
        mixed[list(tokens)] += 0.03 * (blob[0] + blob[1]) + 0.005 * one
    apart, mixed = (m / m.sum(0) for m in (apart, mixed))
    mixed.requires_grad_(True)
    worse = control_loss(cls, mixed)
    assert float(control_loss(cls, apart)) < float(worse)
    (grad,) = torch.autograd.grad(worse, mixed)
    assert torch.isfinite(grad).all() and grad.any()


def test_binding_pulls_the_attribute_only() -> None:
    import attnctl

    text = random_maps(10, 1, 5, 5).softmax(0).requires_grad_(True)
    (grad,) = torch.autograd.grad(control_loss(attnctl.DisenDiff, text, separate=0.0), text)
    assert grad[2].any() and grad[5].any()
    assert not grad[3].any() and not grad[6].any()
