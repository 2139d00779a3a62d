"""From what a user calls a model to a pipeline, or to one clear line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import attnctl
from attnctl import assets
from attnctl.apps import models
from attnctl.apps.models import ModelError, find_folder, load, skeleton
from attnctl.apps.sites_table import count_tokens, sites_text


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder of links to tiny-sd3, in which single files can be replaced."""
    source = assets.path("tiny-sd3")
    shutil.copytree(source, tmp_path / "model", copy_function=lambda a, b: Path(b).symlink_to(a))
    return tmp_path / "model"


def rewrite(path: Path, text: str) -> None:
    path.unlink()
    path.write_text(text)


def test_names_and_folders_are_found(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_folder("tiny-sd3") == assets.path("tiny-sd3")
    assert find_folder(str(copy)) == copy
    monkeypatch.chdir(copy.parent)
    assert find_folder("model") == Path("model")


def test_loading_gives_the_stock_class_and_the_dtype(copy: Path) -> None:
    pipe = load(str(copy), device="cpu", dtype="bfloat16")
    assert type(pipe).__name__ == "StableDiffusion3Pipeline"
    assert pipe.transformer.dtype == torch.bfloat16
    assert models.model_name(pipe) == str(copy)


@pytest.mark.parametrize(
    ("model", "part"),
    [
        ("nope", "Give a shipped model .*tiny-sd3.*, a folder, or a hub id"),
        ("tiny-sd4", "Did you mean .*'tiny-sd3'"),
        ("./nope/nope", "there is no model"),
        ("/nope/nope", "there is no model"),
        ("a/b/c", "there is no model"),
        ("", "there is no model"),
    ],
)
def test_unknown_models_are_explained(model: str, part: str) -> None:
    with pytest.raises(ModelError, match=part):
        find_folder(model)


def test_files_and_other_folders_are_explained(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(ModelError, match="is a file; expected a folder"):
        find_folder(str(file))
    with pytest.raises(ModelError, match=r"no model_index\.json"):
        find_folder(str(tmp_path))


def test_hub_ids_are_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    folder, asked = assets.path("tiny-sd3"), []

    def fetch(model: str, only_configs: bool) -> Path:
        asked.append((model, only_configs))
        return folder

    monkeypatch.setattr(models, "_fetch", fetch)
    assert find_folder("org/name") == folder
    assert find_folder("org/name", only_configs=True) == folder
    assert asked == [("org/name", False), ("org/name", True)]


def test_a_hub_out_of_reach_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*_: object) -> Path:
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr(models, "_fetch", fetch)
    with pytest.raises(ModelError, match=r"not to be had from the hub.*OSError.*tiny-sd3") as e:
        find_folder("org/name")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("model_index.json", "{"),
        ("model_index.json", "[]"),
        ("model_index.json", '{"_class_name": "NoSuchPipeline"}'),
        ("transformer/config.json", "{"),
        ("transformer/config.json", '{"_class_name": "SD3Transformer2DModel", "num_layers": 1}'),
        ("transformer/diffusion_pytorch_model.safetensors", "garbage"),
        ("tokenizer/tokenizer_config.json", "["),
    ],
)
def test_broken_folders_are_explained_in_one_line(copy: Path, file: str, text: str) -> None:
    rewrite(copy / file, text)
    with pytest.raises(ModelError) as caught:
        load(str(copy), device="cpu")
    assert "\n" not in str(caught.value)
    assert str(copy) in str(caught.value)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"device": "tpu"}, "expected auto, cpu or cuda"),
        ({"device": "cuda:99"}, "torch sees"),
        ({"dtype": "int8"}, "expected auto, float32"),
    ],
)
def test_devices_and_types_are_checked(options: dict[str, str], part: str) -> None:
    with pytest.raises(ModelError, match=part):
        load("tiny-sd3", **options)


def test_skeletons_have_the_sites_of_the_model_and_no_weights() -> None:
    bare, full = skeleton("tiny-sd3"), load("tiny-sd3", device="cpu")
    assert attnctl.sites(bare) == attnctl.sites(full)
    assert {p.device.type for p in bare.transformer.parameters()} == {"meta"}


def test_skeletons_need_no_weight_files(copy: Path) -> None:
    for file in copy.rglob("*.safetensors"):
        file.unlink()
    assert len(attnctl.sites(skeleton(str(copy)))) == len(attnctl.sites(skeleton("tiny-sd3")))
    rewrite(copy / "transformer/config.json", "{")
    with pytest.raises(ModelError, match="configuration of"):
        skeleton(str(copy))


def test_tokens_are_counted_on_the_skeleton() -> None:
    pipe = skeleton("tiny-sd3")
    counted = count_tokens(pipe)
    assert set(counted) == {("transformer", s.index) for s in attnctl.sites(pipe)}
    config = pipe.transformer.config
    image = (config.sample_size // config.patch_size) ** 2
    (both,) = set(counted.values())
    assert both[0] == both[1] > image


def test_the_table_survives_a_pipeline_that_cannot_be_run() -> None:
    pipe = skeleton("tiny-sd3")
    pipe.tokenizer = None
    lines = sites_text(pipe, None, None, 80).split("\n")
    assert lines[1].split()[4] == "-"


def test_the_table_counts_selected_heads() -> None:
    text = sites_text(skeleton("tiny-sd3"), "joint", "L0H1-2,L2", 80)
    heads = json.loads((assets.path("tiny-sd3") / "transformer/config.json").read_text())[
        "num_attention_heads"
    ]
    rows = [line.split() for line in text.split("\n")[1:3]]
    assert [row[3] for row in rows] == ["2", str(heads)]
    assert f"{2 * heads} heads, {heads + 2} of them selected" in text


def test_whole_names_or_short_ones() -> None:
    pipe = skeleton("tiny-sd3")
    name = attnctl.sites(pipe)[0].name
    assert name in sites_text(pipe, None, None, None)
    narrow = sites_text(pipe, None, None, 45)
    assert name not in narrow
    assert "--wide" in narrow
    assert max(map(len, narrow.split("\n"))) <= 45
