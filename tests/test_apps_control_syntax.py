"""The text form of controls: where values end, what is refused, and the way back."""

from __future__ import annotations

import pytest

import attnctl
from attnctl.apps.chosen import Chosen
from attnctl.apps.control_syntax import control_text, parse_control, split_control


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("softpag", "softpag", {}),
        (" softpag ", "softpag", {}),
        ("softpag:u=0.5", "softpag", {"u": "0.5"}),
        (
            "softpag:u=0.5,heads=L1H2,L3H4,scale=3",
            "softpag",
            {"u": "0.5", "heads": "L1H2,L3H4", "scale": "3"},
        ),
        ("pag:heads=attn1:H0-3,!L2", "pag", {"heads": "attn1:H0-3,!L2"}),
        ("softpag: u = 0.5 , scale = 3", "softpag", {"u": "0.5", "scale": "3"}),
        ("nag:negative=blurry, low contrast,scale=3", "nag",
         {"negative": "blurry, low contrast", "scale": "3"}),
        ("nag:negative=a = b", "nag", {"negative": "a = b"}),
        ("nag:negative=", "nag", {"negative": ""}),
    ],
)  # fmt: skip
def test_commas_end_a_value_only_before_a_key(
    text: str, name: str, options: dict[str, str]
) -> None:
    assert split_control(text) == (name, options)


def test_values_get_the_types_of_the_options() -> None:
    control = parse_control("softpag:u=0.25,heads=L1H2,L3H4,scale=2,sigmas=14-0.5,passes=calls")
    assert control == attnctl.SoftPAG(
        u=0.25, heads="L1H2,L3H4", scale=2.0, sigmas=(14.0, 0.5), passes="calls"
    )


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "lacks a name"),
        (":u=1", "lacks a name"),
        ("softpag:", "lacks options"),
        ("softpag:0.5", "key=value"),
        ("softpag:u=0.5,u=0.6", "u twice"),
        ("softpug", "Did you mean 'softpag'"),
        ("softpag:strength=1", "no option 'strength'"),
        ("softpag:u=much", "u='much'"),
        ("softpag:u=2", "outside [0, 1]"),
        ("pag:block=all", "block='all'"),
        ("pag:sigmas=1-2-3", "sigmas='1-2-3'"),
        ("pag:sigmas=1", "sigmas='1'"),
        ("tpg:seed=1.5", "seed='1.5'"),
    ],
)
def test_wrong_texts_are_refused_in_one_line(text: str, part: str) -> None:
    with pytest.raises(attnctl.OptionError) as caught:
        parse_control(text)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "softpag",
        "softpag:heads=L1H2,L3H4,scale=2,u=0.25",
        "softpag:sigmas=14-0.5",
        "temperature:tau=0.0001",
        "pag:scale=0.1234567",
        "nag:negative=blurry, low contrast",
    ],
)
def test_the_way_back(text: str) -> None:
    assert str(Chosen(parse_control(text))) == text
    assert parse_control(text) == parse_control(str(Chosen(parse_control(text))))


def test_pairs_of_heads_are_written_as_a_selector() -> None:
    assert control_text("pag", {"heads": [(1, 2), (3, 4)]}) == "pag:heads=L1H2,L3H4"
    assert str(Chosen(attnctl.PAG(heads=[(1, 2)], scale=2.0))) == "pag:heads=L1H2,scale=2"


def test_every_control_survives_its_own_defaults() -> None:
    for name, cls in attnctl.controls().items():
        if not cls.__module__.startswith("attnctl."):
            continue  # registered by another test
        chosen = Chosen(cls())
        text = control_text(name, {k: v for k, v in chosen.options.items() if v != ""})
        assert parse_control(text) == chosen.control
