"""The registry, options from strings, presets, and what a bad option says."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import pytest

import attnctl
from attnctl.presets import find, presets
from attnctl.testing import zoo


def test_registry_and_attributes_agree() -> None:
    known = attnctl.controls()
    assert {"pag", "softpag", "seg", "slg", "tpg", "nag", "pladis"} <= set(known)
    assert list(known) == sorted(known)
    for cls in known.values():
        assert getattr(attnctl, cls.__name__) is cls
        assert cls.__name__ in dir(attnctl)


def test_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="NoSuchControl"):
        _ = attnctl.NoSuchControl


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({"u": "0.25", "scale": "2"}, {"u": 0.25, "scale": 2.0}),
        ({"heads": "L1H2,L3"}, {"heads": "L1H2,L3"}),
        ({"block": "image"}, {"block": "image"}),
        ({"sigmas": "14.6-0.7"}, {"sigmas": (14.6, 0.7)}),
        ({"sigmas": "14-1e-3"}, {"sigmas": (14.0, 0.001)}),
        ({"sigmas": "none"}, {"sigmas": None}),
        ({"passes": "calls"}, {"passes": "calls"}),
    ],
)
def test_options_from_strings(options: dict[str, str], want: dict[str, Any]) -> None:
    made = attnctl.control("softpag", **options)
    assert {k: getattr(made, k) for k in want} == want


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sofpag", {}, "Did you mean 'softpag'"),
        ("softpag", {"uu": 1}, "no option 'uu'.*Its options"),
        ("softpag", {"u": "high"}, "u='high' is not a number"),
        ("softpag", {"sigmas": "1"}, "sigmas='1' is not number-number or none"),
        ("softpag", {"sigmas": "1-2-3"}, "is not number-number"),
        ("softpag", {"u": 2.0}, r"outside \[0, 1\]"),
        ("softpag", {"block": "text"}, "one of joint, image, image_logit"),
        ("softpag", {"start": 0.5, "stop": 0.2}, "start <= stop"),
        ("softpag", {"sigmas": (1.0, 7.0)}, "start >= stop"),
        ("softpag", {"passes": "both"}, "one of rows, calls"),
        ("seg", {"sigma": 0.0}, "above 0"),
        ("nag", {"scale": 0.5}, "at least 1"),
        ("pladis", {"lam": -1.0}, "lam=-1"),
        ("temperature", {"tau": 0.0}, "above 0"),
    ],
)
def test_bad_options_are_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(attnctl.OptionError, match=message):
        attnctl.control(name, **options)


def test_text_shows_only_what_was_changed() -> None:
    assert str(attnctl.SoftPAG(u=0.25)) == "softpag(u=0.25)"


def test_a_name_cannot_be_taken_twice() -> None:
    with pytest.raises(ValueError, match="taken"):

        @attnctl.register
        @dataclasses.dataclass(frozen=True)
        class Other(attnctl.Control):
            name: ClassVar[str] = "softpag"


@pytest.mark.parametrize("name", list(attnctl.controls()))
def test_presets_are_valid_options_and_say_their_origin(name: str) -> None:
    for preset in presets(name):
        attnctl.control(name, **preset.options)
        assert preset.origin in ("published", "ours") and preset.source
    assert len({p.name for p in presets(name)}) == len(presets(name)) > 0


def test_presets_fit_by_structure() -> None:
    unet = zoo.FAMILIES["sd1"].build()
    assert find("pag", unet).name == "unet-mid"
    assert attnctl.PAG.for_model(unet, scale=2.0) == attnctl.PAG(heads="mid", scale=2.0)
    assert find("pag", unet.unet).name == "unet-mid"
    with pytest.raises(attnctl.OptionError, match="Presets: unet-mid"):
        find("pag", unet, "no-such")


def test_a_model_without_a_preset_is_an_error() -> None:
    with pytest.raises(attnctl.OptionError, match="pladis has no preset 'x'"):
        attnctl.PLADIS.for_model(zoo.FAMILIES["sd1"].build(), preset="x")


@pytest.mark.parametrize(
    ("control", "structure", "name"),
    [
        ("softpag", ("SD3Transformer2DModel", 24, 24), "sd3-medium-layers"),
        ("softpag", ("SD3Transformer2DModel", 24, 38), "sd35-medium-layers"),
        ("softpag", ("SD3Transformer2DModel", 8, 8), "tiny-sd3"),
        ("softpag", ("SD3Transformer2DModel", 38, 38), "any-model"),
        ("softpag", ("FluxTransformer2DModel", 57, 24), "flux1-dev"),
        ("pag", ("PixArtTransformer2DModel", 28, 16), "pixart"),
        ("pag", ("WanTransformer3DModel", 28, 16), "any-model"),
        ("tpg", ("UNet2DConditionModel", 70, 10), "sdxl-down"),
        ("tpg", ("UNet2DConditionModel", 16, 8), "any-model"),
    ],
)
def test_the_first_preset_whose_whole_structure_fits(
    control: str, structure: tuple[str, int, int], name: str
) -> None:
    assert next(p.name for p in presets(control) if p.fits(*structure)) == name


REAL = {
    "SD 1.5": ("UNet2DConditionModel", 16, 8),
    "SD 2.1": ("UNet2DConditionModel", 16, 5),
    "SDXL": ("UNet2DConditionModel", 70, 10),
    "SD3": ("SD3Transformer2DModel", 24, 24),
    "FLUX.1": ("FluxTransformer2DModel", 57, 24),
}
STEERING = [
    "a-star", "attend-and-excite", "conform", "disendiff", "divide-and-bind", "initno",
    "regulation", "syngen",
]  # fmt: skip


@pytest.mark.parametrize("model", list(REAL))
@pytest.mark.parametrize("name", STEERING)
def test_steering_has_a_preset_for_every_model(name: str, model: str) -> None:
    fitting = [preset for preset in presets(name) if preset.fits(*REAL[model])]
    assert len(fitting) == 1 and fitting[0].denoiser
    # no paper of these went beyond the first two
    assert fitting[0].origin == "ours" or model.startswith("SD ")
