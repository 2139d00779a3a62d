"""Sinks planted where it is known: found, calibrated, mapped, drawn, and made up for."""

from __future__ import annotations

import dataclasses
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import attnctl
from attnctl.apps.bench.placebo import other_tokens
from attnctl.apps.bench.planted import TAU, arms, table
from attnctl.apps.bench.planted import main as planted_main
from attnctl.apps.bench.tasks.answers import one_per_photo
from attnctl.apps.cli import app
from attnctl.assets.train.measure_llava import Teller
from attnctl.assets.world.evaluation import album
from attnctl.assets.world.pope import pope
from attnctl.hosts.vlm_discover import decoder_of
from attnctl.testing.vlms import VLMS, generate
from attnctl.testing.vlms.planted import Planting, planted, quiet_dims

PLANT = Planting()


@pytest.fixture(scope="module")
def teller() -> Teller:
    pytest.importorskip("transformers")
    return Teller.load(attnctl.assets.path("tiny-llava"), torch.device("cpu"))


@pytest.fixture(scope="module")
def inputs(teller: Teller) -> dict[str, Any]:
    """Two prompts of unequal length about two photos."""
    photos = album(2)
    pixels = teller.pixels(photos)
    words = teller.words(["Is there a red circle in the image?", "How many?"])
    return {**words, "pixel_values": torch.stack([pixels[photo] for photo in photos])}


def test_planted_dimensions_and_positions_are_found_exactly(
    teller: Teller, inputs: dict[str, Any]
) -> None:
    """Label-free calibration, then phi: the planted tokens and the first one, none before."""
    model, ids = teller.model, inputs["input_ids"]
    assert attnctl.calibrate_sink_dims(model, [inputs]) == ()  # it has none of its own
    with planted(model, PLANT):
        found = attnctl.sink_map(model, inputs)
    assert set(found.sink_dims) == set(PLANT.dims)
    sinks = found.sinks(TAU)
    wanted = torch.zeros_like(ids, dtype=torch.bool)
    for row, one in enumerate(ids):
        image = (one == 4).nonzero()[:, 0]
        wanted[row, image[list(PLANT.tokens)]] = True
        wanted[row, int((one == 1).int().argmax())] = True
    assert not sinks[: PLANT.layer].any()
    # layer 1 reads the stream before this test's hook when its probe comes first: from 2 on
    assert (sinks[PLANT.layer + 1 :] == wanted).all()
    assert (found.cosine[3][wanted] > 0.9).all()
    others = found.image & ~wanted
    assert (found.cosine[3][others] < 0.9).all()
    # the question looks at them more than at any other token of the image
    assert found.mass[4][wanted & found.image].min() > found.mass[4][others].max()


def test_masses_norms_and_the_class_token(teller: Teller, inputs: dict[str, Any]) -> None:
    model = teller.model
    found = attnctl.sink_map(model, inputs, (3, 5))
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            eyes = model.model.vision_tower(
                inputs["pixel_values"], output_hidden_states=True, output_attentions=True
            )
            out = model(**inputs, output_attentions=True, output_hidden_states=True)
    finally:
        model.set_attn_implementation("sdpa")
    number = model.config.vision_feature_layer
    norms = eyes.hidden_states[number][:, 1:].norm(dim=-1)
    torch.testing.assert_close(found.norms, norms, rtol=1e-4, atol=1e-4)
    cls = eyes.attentions[number].mean(1)[:, 0, 1:]
    torch.testing.assert_close(found.cls, cls, rtol=1e-4, atol=1e-6)
    ids = inputs["input_ids"]
    for layer in (0, 5):
        a = out.attentions[layer].mean(1)
        x = out.hidden_states[layer].double()
        strength = x[..., [3, 5]].abs().amax(-1) / x.square().mean(-1).sqrt()
        for row, one in enumerate(ids):
            asked = a[row, int((one == 4).nonzero().max()) + 1 :].mean(0)
            torch.testing.assert_close(found.mass[layer, row], asked, rtol=1e-4, atol=1e-6)
            real = one != 3
            assert found.phi is not None
            torch.testing.assert_close(
                found.phi[layer, row][real].double(), strength[row][real], rtol=1e-4, atol=1e-4
            )


def test_no_dimension_stands_out_of_random_weights() -> None:
    model, inputs = VLMS["qwen2.5-vl"].build(), VLMS["qwen2.5-vl"].inputs()
    found = attnctl.sink_map(model, inputs)
    assert found.sink_dims == () and found.phi is None and not found.sinks().any()
    assert found.norms is None and found.cls is None  # patches are merged before the decoder
    total = found.mass.sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total))
    with pytest.raises(attnctl.OptionError, match="prompts"):
        attnctl.calibrate_sink_dims(model, [])


def test_answers_come_back(teller: Teller) -> None:
    """How far planted sinks move the first word's probabilities, and what moves them back."""
    model = teller.model
    cases = one_per_photo(pope("adversarial", n_images=40, seed=0))
    pixels = teller.pixels(dict.fromkeys(case.photo for case in cases))
    inputs: dict[str, Any] = {
        **teller.words([case.question for case in cases]),
        "pixel_values": torch.stack([pixels[case.photo] for case in cases]),
    }

    def answers(*controls: attnctl.Control, plant: bool = True) -> torch.Tensor:
        if not plant:
            return generate(model, inputs, 1)[:, 0].softmax(-1)
        with planted(model, PLANT, *controls):
            return generate(model, inputs, 1)[:, 0].softmax(-1)

    def distance(found: torch.Tensor) -> float:
        return float((found - stock).abs().sum(-1).mean())

    stock, sick = answers(plant=False), answers()
    made = arms(PLANT, attnctl.sites(model), seed=0)
    lost = distance(sick)
    judged = ("VAR", "VAR, rho 0.5", "random tokens for sinks")
    back = {name: 1 - distance(answers(made[name])) / lost for name in judged}
    assert lost > 0.1
    assert back["VAR"] > 0.5
    assert back["random tokens for sinks"] < 0.1
    assert back["VAR, rho 0.5"] < back["VAR"]


def test_random_tokens_are_as_many_image_tokens(teller: Teller, inputs: dict[str, Any]) -> None:
    model = teller.model
    var = attnctl.VAR(sink_dims=PLANT.dims, tau=TAU, rho_nonsink=0.0)
    placebo = other_tokens(var, attnctl.sites(model), seed=1)
    assert isinstance(placebo, attnctl.VAR)
    seen = []

    class Look(type(placebo)):  # type: ignore[misc]
        def attend(self, call: Any) -> Any:
            out = super().attend(call)
            seen.append(call.state.groups(call, call.spans.tokens).clone())
            return out

    options = {
        name: getattr(placebo, name)
        for name in map(attrgetter("name"), dataclasses.fields(placebo))
    }
    with planted(model, PLANT, Look(**options)):
        generate(model, inputs, 1)
    image = inputs["input_ids"] == 4
    drawn = seen[3][:, 1].bool()
    assert drawn.sum(1).tolist() == [2, 2] and not (drawn & ~image).any()
    assert not torch.equal(seen[3], seen[4])
    raised = other_tokens(attnctl.PAI(), attnctl.sites(model), seed=1)
    assert raised is not None
    with attnctl.patch(model, attnctl.PAI()):
        image_up = generate(model, inputs, 1)
    with attnctl.patch(model, raised):
        assert (generate(model, inputs, 1) - image_up).abs().max() > 1e-3
    assert other_tokens(attnctl.SoftPAG(), attnctl.sites(model), seed=1) is None


def test_quiet_dimensions_are_those_that_values_read_least(teller: Teller) -> None:
    found, layers = quiet_dims(teller.model), decoder_of(teller.model).layers
    x = torch.zeros(192, 192).fill_diagonal_(200.0)  # a spike in each dimension
    with torch.no_grad():
        made = [layer.self_attn.v_proj(layer.input_layernorm(x)).norm(dim=1) for layer in layers]
    loud = torch.stack(made[1:]).amax(0)
    assert set(found) == set(loud.argsort()[:2].tolist()) and len(found) == 2


def test_the_bench_runs_and_its_table_is_of_its_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import json

    out = tmp_path / "planted.json"
    planted_main(["--n", "4", "--quiet", "--var", "p_moved=1,image_mass=0.5", "--out", str(out)])
    data = json.loads(out.read_text())
    assert capsys.readouterr().out.strip() == table(data["arms"])
    assert data["n"] == 4 and set(data["arms"]) > {"stock", "planted", "VAR"}
    assert "VAR, p_moved=1,image_mass=0.5" in data["arms"]
    assert data["arms"]["planted"]["to_planted"]["value"] == 0


# -- the command -----------------------------------------------------------------------------


def test_the_command_tells_and_draws(tmp_path: Path) -> None:
    album(1)[0].image.save(tmp_path / "photo.png")
    command = ["sinks", "tiny-llava", "--image", str(tmp_path / "photo.png"), "--out"]
    done = CliRunner().invoke(app, [*command, str(tmp_path / "a.png")])
    assert done.exit_code == 0 and "no dimension" in done.output
    done = CliRunner().invoke(
        app, [*command, str(tmp_path / "b.png"), "--dims", "96-156", "--tau", "2.2"]
    )
    assert done.exit_code == 0 and "sink dimensions: 96, 156" in done.output
    assert "image token" in done.output and (tmp_path / "b.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("more", "message"),
    [(["--dims", "a"], "no list such as"), (["--image", "no.png"], "cannot read the picture")],
)
def test_the_command_refuses(more: list[str], message: str, tmp_path: Path) -> None:
    album(1)[0].image.save(tmp_path / "photo.png")
    words = ["sinks", "tiny-llava", "--image", str(tmp_path / "photo.png"), *more]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "a.png")])
    assert done.exit_code != 0
    assert message in str(done.exception) + done.output
