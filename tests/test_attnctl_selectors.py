"""The selector grammar: whole-token match, ranges, and errors where nothing matches."""

from __future__ import annotations

import pytest
import torch

from attnctl.errors import SelectorError
from attnctl.records import Site
from attnctl.selectors import select
from attnctl.sites import Sites

KINDS = ("self", "joint", "cross")


def site(index: int, name: str, kind: str = "joint", layer: int | None = None) -> Site:
    return Site(index, name, kind, layer, heads=4, head_dim=8, kv_heads=4)  # type: ignore[arg-type]


DIT = Sites(site(i, f"transformer_blocks.{i}.attn", layer=i) for i in range(12))
UNET = Sites(
    [
        site(0, "down_blocks.0.attentions.0.transformer_blocks.0.attn1", "self", 0),
        site(1, "down_blocks.0.attentions.0.transformer_blocks.0.attn2", "cross", 0),
        site(2, "down_blocks.2.attentions.0.transformer_blocks.0.attn1", "self", 1),
        site(3, "down_blocks.2.attentions.1.transformer_blocks.0.attn1", "self", 2),
        site(4, "mid_block.attentions.0.transformer_blocks.0.attn1", "self", 3),
        site(5, "up_blocks.1.attentions.0.transformer_blocks.0.attn1", "self", 4),
    ]
)


def chosen(
    spec: object, sites: Sites = DIT, kinds: tuple[str, ...] = KINDS
) -> dict[int, list[int]]:
    picked = select(spec, sites, kinds)  # type: ignore[arg-type]
    return {i: m.nonzero().flatten().tolist() for i, m in picked.items()}


ALL = [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("spec", "want"),
    [
        ("L3", {3: ALL}),
        ("L3H1", {3: [1]}),
        ("L3H1-2", {3: [1, 2]}),
        ("L3-4H0", {3: [0], 4: [0]}),
        ("L3H1,L3H2 L5H0+L6", {3: [1, 2], 5: [0], 6: ALL}),
        ([(3, 1), (10, 2)], {3: [1], 10: [2]}),
        (["L3", (4, 0)], {3: ALL, 4: [0]}),
        ("transformer_blocks.1", {1: ALL}),
        ("transformer_blocks.1.attn:H3", {1: [3]}),
        ("transformer_blocks.9-11", {9: ALL, 10: ALL, 11: ALL}),
        ("transformer_blocks.*.attn", {i: ALL for i in range(12)}),
        ("all", {i: ALL for i in range(12)}),
        ("joint !L1-11", {0: ALL}),
        ("!L0-10", {11: ALL}),
        ("L2 !L2H0", {2: [1, 2, 3]}),
    ],
)
def test_what_a_selector_means(spec: object, want: dict[int, list[int]]) -> None:
    assert chosen(spec) == want


def test_a_block_number_is_matched_whole() -> None:
    """diffusers' regular expression would take blocks 1, 10 and 11 here."""
    assert list(
        chosen("blocks.1", Sites(site(i, f"blocks.{i}.attn", layer=i) for i in range(12)))
    ) == [1]


@pytest.mark.parametrize(
    ("spec", "want"),
    [
        ("mid", [4]),
        ("down", [0, 1, 2, 3]),
        ("up", [5]),
        ("m0", [4]),
        ("d2", [2, 3]),
        ("d2.1", [3]),
        ("d2.0-1", [2, 3]),
        ("u1.0", [5]),
        ("attn2", [1]),
        ("cross", [1]),
        ("self", [0, 2, 3, 4, 5]),
        ("down_blocks.2.attentions.1", [3]),
        ("L0", [0, 1]),
    ],
)
def test_unet_names(spec: str, want: list[int]) -> None:
    assert list(chosen(spec, UNET)) == want


def test_head_alone_means_that_head_everywhere() -> None:
    assert chosen("H2") == {i: [2] for i in range(12)}


@pytest.mark.parametrize(
    ("spec", "kinds", "message"),
    [
        ("L12", KINDS, "layers 0 to 11"),
        ("L3H4", KINDS, "heads 0 to 3"),
        ("L3H2-7", KINDS, "heads 0 to 3"),
        ("blocks.1", KINDS, "matches nothing"),
        ("transformer_block.1", KINDS, "Did you mean"),
        ("attn1", KINDS, "matches nothing"),
        ("L5-3", KINDS, "backwards"),
        ("", KINDS, "empty"),
        ([], KINDS, "empty"),
        ("L2 !L2", KINDS, "takes away everything"),
        ("transformer_blocks.1:Hx", KINDS, "expected heads"),
        ("all", ("cross",), "only joint sites"),
    ],
)
def test_nothing_selected_is_an_error(spec: object, kinds: tuple[str, ...], message: str) -> None:
    with pytest.raises(SelectorError, match=message):
        chosen(spec, kinds=kinds)


def test_a_site_of_another_kind_is_named() -> None:
    with pytest.raises(SelectorError, match=r"attn2 \(cross attention\)"):
        chosen("attn2", UNET, ("self",))


def test_unnumbered_sites_go_by_name_only() -> None:
    sites = Sites([*DIT, site(12, "token_refiner.0.attn", "self", None)])
    assert 12 not in chosen("L0-11", sites)
    assert list(chosen("token_refiner", sites)) == [12]


def test_heads_lists_pairs_in_order() -> None:
    assert DIT.heads()[:5] == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)]
    assert UNET.heads(("cross",)) == [(0, h) for h in range(4)]


def test_masks_are_bool_per_head() -> None:
    mask = DIT.select("L3H1")[3]
    assert mask.dtype == torch.bool and mask.tolist() == [False, True, False, False]
