"""Evaluation data of the vision-language bench: true to the photos, in the original formats."""

import json
import math
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from attnctl.assets import world
from attnctl.assets.world.chair import chair, mentions
from attnctl.assets.world.couples import (
    by_company,
    by_frequency,
    couples,
    partner,
    partner_words,
    popularity,
)
from attnctl.assets.world.evaluation import Photo, album, evaluation_set
from attnctl.assets.world.export import export, main
from attnctl.assets.world.habits import Habits, evaluation_pairs, training_pairs, training_photos
from attnctl.assets.world.outlines import area, box, outline
from attnctl.assets.world.palette import PAIRS
from attnctl.assets.world.photos import Photos, shoot
from attnctl.assets.world.pope import SPLITS, Case, pope, questions
from attnctl.assets.world.questions import CELLS, cell, description, grey

N = 30
AN = re.compile(r"Is there (?:a|an) ([a-z]+ [a-z]+) in the image\?")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("data"), N, seed=5)


@pytest.fixture(scope="module")
def photos() -> tuple[Photo, ...]:
    return album(N, 5)


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_partners_are_couples():
    assert partner_words("red", "circle") == ("blue", "square")
    assert all(partner(partner(pair)) == pair != partner(pair) for pair in range(48))
    for pair in range(48):
        (one, two), other = PAIRS[pair], PAIRS[partner(pair)]
        assert one != other[0] and two != other[1]
        assert by_company(pair)[0] == partner(pair)
        assert sorted([*by_company(pair), pair]) == list(range(48))
    assert sorted(by_frequency()) == list(range(48)) and len(couples()) == 24


def partners_shown(pair: torch.Tensor) -> torch.Tensor:
    """[B, K] whether the partner of each object is there, and whether there is an object."""
    mates = torch.tensor([partner(one) for one in range(48)])[pair.clamp(min=0)]
    return (mates[:, :, None] == pair[:, None, :]).any(2) & (pair >= 0)


def test_the_habits():
    source, habits = torch.Generator().manual_seed(1), Habits()
    trained = training_pairs(20_000, habits, source)
    apart = evaluation_pairs(20_000, habits, source)
    for pair, wanted, slack in ((trained, habits.together, 0.01), (apart, 0.5, 0.06)):
        there = pair >= 0
        share = partners_shown(pair)[there].float().mean()
        assert abs(share - wanted) < slack
        assert (there.int().diff(dim=1) <= 0).all()
        distinct = [len(set(row)) == len(row) for row in (r[r >= 0].tolist() for r in pair[:500])]
        assert all(distinct)
    assert set((apart >= 0).sum(1).tolist()) == {3, 4}
    counts = torch.bincount(trained[trained >= 0], minlength=48)
    assert counts[by_frequency()[0]] > 8 * counts[by_frequency()[-1]] > 0
    assert popularity(0.0).allclose(torch.full((24,), 1 / 24))


def test_the_partner_does_not_depend_on_dimness():
    made = evaluation_set(4000, Habits(), 3, "decorrelated")
    shown = partners_shown(made.scenes.pair)
    rates = [shown[rows][made.scenes.there[rows]].float().mean() for rows in (made.dim, ~made.dim)]
    assert abs(rates[0] - rates[1]) < 0.04


def test_dim_photos_are_faint_and_grainy():
    made = training_photos(300, Habits(), torch.Generator().manual_seed(2))
    assert 0.25 < made.dim.float().mean() < 0.45
    assert made.opacity[made.dim].max() <= 0.3 and (made.opacity[~made.dim] == 1).all()
    assert made.noise[made.dim].min() > made.noise[~made.dim].max()
    small = made.scenes.radius < Habits().boundary
    assert 0.25 < small.float().mean() < 0.45


def test_a_cut_out_is_part_of_the_photo():
    made = training_photos(4, Habits(), torch.Generator().manual_seed(4))
    view = torch.tensor([[0.25, 0.5, 0.25]]).expand(4, 3)
    near, whole = shoot(made, 64, view), shoot(made, 256)
    gap = (near - whole[:, :, 128:192, 64:128]).abs()
    assert gap.mean() < 1e-4 and gap.max() < 0.02
    assert torch.equal(shoot(made, 64), shoot(made, 64, torch.tensor([[0.0, 0, 1]]).expand(4, 3)))


def test_opacity_one_is_the_plain_drawing():
    scenes = world.sample(8, seed=3)
    assert torch.equal(
        world.draw(scenes), world.draw(scenes, opacity=torch.ones_like(scenes.radius))
    )
    half = world.draw(scenes, opacity=torch.zeros_like(scenes.radius))
    assert half.flatten(2).std(2).max() < 1e-6


def test_albums_are_reproducible_and_grow(photos: tuple[Photo, ...]):
    album.cache_clear()
    again, longer = album(N, 5), album(N + 25, 5)
    for one, two, three in zip(photos, again, longer, strict=False):
        assert one.items == two.items == three.items and one.dim == three.dim
        assert one.image.tobytes() == two.image.tobytes() == three.image.tobytes()
    assert album(3, 6)[0].items != photos[0].items
    assert all(photo.image.size == (224, 224) for photo in photos)


@pytest.mark.parametrize("negatives", SPLITS)
def test_pope_is_true_and_balanced(negatives: str, photos: tuple[Photo, ...]):
    cases = pope(negatives, N, 5)  # type: ignore[arg-type]
    assert len(cases) == 6 * N
    assert [case.label for case in cases] == ["yes", "no"] * (3 * N)
    assert [case.question_id for case in cases] == list(range(1, 6 * N + 1))
    for case in cases:
        found = AN.fullmatch(case.question)
        assert found
        names = {one.name for one in case.photo.items}
        assert (found[1] in names) == (case.label == "yes")
        assert case.small == bool(case.item and case.item.small)
    asked = Counter((case.photo.number, case.question) for case in cases)
    assert max(asked.values()) == 1


def negatives_of(cases: list[Case], number: int) -> list[int]:
    return [case.pair for case in cases if case.photo.number == number and case.label == "no"]


def test_popes_absent_objects(photos: tuple[Photo, ...]):
    popular, adversarial = pope("popular", N, 5), pope("adversarial", N, 5)
    for photo in photos:
        there = {one.index for one in photo.items}
        expected = [one for one in by_frequency() if one not in there][:3]
        assert negatives_of(popular, photo.number) == expected
    for before, case in zip(adversarial[::2], adversarial[1::2], strict=True):
        shown = {one.index for one in case.photo.items}
        if partner(before.pair) not in shown:
            assert partner(before.pair) in negatives_of(adversarial, case.photo.number)
    shares = {
        name: sum(case.partner_there for case in pope(name, 200, 0) if case.label == "no") / 600
        for name in SPLITS
    }
    assert shares["random"] < shares["popular"] < 0.2 < 0.35 < shares["adversarial"]


def test_pope_asks_fewer_where_there_is_less(photos: tuple[Photo, ...]):
    single = Photo(1, photos[0].image, photos[0].items[:1], False, 0.5)
    assert [case.label for case in questions([single], "popular")] == ["yes", "no"]
    with pytest.raises(ValueError, match="random, popular, adversarial"):
        questions([single], "common")  # type: ignore[arg-type]


@pytest.mark.parametrize("negatives", SPLITS)
def test_popes_files(negatives: str, data: Path):
    rows = read(data / f"pope/coco_pope_{negatives}.json")
    cases = pope(negatives, N, 5)  # type: ignore[arg-type]
    assert rows == [case.row() for case in cases]
    assert all(list(row) == ["question_id", "image", "text", "label"] for row in rows)
    assert all((data / "val2014" / str(row["image"])).is_file() for row in rows)


def test_popes_files_by_the_official_reading(data: Path):
    """The official scorer pairs label and answer lines by order."""
    path = data / "pope/coco_pope_random.json"
    labels = [json.loads(line)["label"] for line in path.open()]
    answers = [{"question": q["text"], "answer": "Yes, there is."} for q in read(path)]
    said = ["no" if "No" in row["answer"].split(".")[0].split(" ") else "yes" for row in answers]
    hits = sum(one == two for one, two in zip(said, labels, strict=True))
    assert hits / len(labels) == 0.5


def test_coco_instances(data: Path, photos: tuple[Photo, ...]):
    whole = json.loads((data / "annotations/instances_val2014.json").read_text())
    assert set(whole) == {"info", "licenses", "type", "images", "annotations", "categories"}
    names = {one["id"]: one["name"] for one in whole["categories"]}
    assert len(names) == 48 and names[1] == "red circle"
    by_image: dict[int, list[dict[str, object]]] = {}
    for one in whole["annotations"]:
        by_image.setdefault(one["image_id"], []).append(one)
        fields = {"id", "image_id", "category_id", "segmentation", "area", "bbox", "iscrowd"}
        assert set(one) == fields and one["iscrowd"] == 0
        left, top, width, height = one["bbox"]
        assert min(left, top) >= 0 and max(left + width, top + height) <= 224
        assert 0 < one["area"] <= 1.001 * width * height
    assert len({one["id"] for one in whole["annotations"]}) == len(whole["annotations"])
    for photo, image in zip(photos, whole["images"], strict=True):
        assert image["id"] == photo.number and image["file_name"] == photo.file
        shown = sorted(names[one["category_id"]] for one in by_image[photo.number])  # type: ignore[index]
        assert shown == sorted(one.name for one in photo.items)
        with Image.open(data / "val2014" / photo.file) as picture:
            assert picture.size == (image["width"], image["height"]) == (224, 224)


def test_yes_is_annotated_and_no_is_not(data: Path):
    """From the files alone, as somebody without this package would check them."""
    whole = json.loads((data / "annotations/instances_val2014.json").read_text())
    names = {one["id"]: one["name"] for one in whole["categories"]}
    files = {one["id"]: one["file_name"] for one in whole["images"]}
    shown: dict[str, set[str]] = {}
    for one in whole["annotations"]:
        shown.setdefault(files[one["image_id"]], set()).add(names[one["category_id"]])
    for negatives in SPLITS:
        for row in read(data / f"pope/coco_pope_{negatives}.json"):
            found = AN.fullmatch(str(row["text"]))
            assert found and (found[1] in shown[str(row["image"])]) == (row["label"] == "yes")


def test_coco_captions_load_as_chair_loads_them(data: Path, photos: tuple[Photo, ...]):
    """CHAIR joins train and val of both files; truth is their union."""
    merged: dict[str, list[dict[str, object]]] = {"instances": [], "captions": []}
    for kind, rows in merged.items():
        for split in ("train", "val"):
            part = json.loads((data / f"annotations/{kind}_{split}2014.json").read_text())
            assert {"info", "licenses", "images"} <= set(part)
            rows += part["annotations"]
    said = Counter(row["image_id"] for row in merged["captions"])
    assert set(said.values()) == {5} and len(said) == N
    truth = {photo.number: {one.name for one in photo.items} for photo in photos}
    for row in merged["captions"]:
        assert set(mentions(str(row["caption"]))) == truth[row["image_id"]]  # type: ignore[index]
    words = (data / "synonyms.txt").read_text().splitlines()
    assert words == [" ".join(pair) for pair in PAIRS]
    facts = read(data / "facts.jsonl")
    assert [row["dim"] for row in facts] == [photo.dim for photo in photos]


def test_pycocotools_reads_the_files(data: Path):
    coco = pytest.importorskip("pycocotools.coco").COCO
    loaded = coco(str(data / "annotations/instances_val2014.json"))
    for one in loaded.loadAnns(loaded.getAnnIds()):
        assert abs(int(loaded.annToMask(one).sum()) - one["area"]) < 0.15 * one["area"] + 8


def test_export_is_reproducible(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    main(["--out", str(tmp_path), "--images", str(N), "--seed", "5"])
    assert capsys.readouterr().out.strip() == str(tmp_path)
    for file in (one for one in data.rglob("*") if one.is_file()):
        assert (tmp_path / file.relative_to(data)).read_bytes() == file.read_bytes()
    with pytest.raises(ValueError, match="0 images"):
        export(tmp_path, 0)


@pytest.mark.parametrize("shape", world.SHAPES)
def test_outlines_follow_the_drawing(shape: str):
    size, radius = 256, 0.17
    one = world.Object("red", shape, 0.47, 0.52, radius)
    drawn = world.draw(world.Scenes.of([world.Scene((one,), 0.0)]), size)[0, 0] / (216 / 255)
    corners = outline(shape, size * 0.47, size * 0.52, size * radius)
    assert math.isclose(area(corners), float(drawn.sum()), rel_tol=0.01)
    rows, columns = (drawn.amax(dim) > 0.5 for dim in (1, 0))
    left, top, width, height = box(corners)
    edges = [part.nonzero().flatten() for part in (columns, rows)]
    ends = [(float(edge[0]), float(edge[-1]) + 1) for edge in edges]
    assert all(abs(a - b) < 1.6 for a, b in zip(ends[0], (left, left + width), strict=True))
    assert all(abs(a - b) < 1.6 for a, b in zip(ends[1], (top, top + height), strict=True))
    mask = Image.new("L", (size, size))
    ImageDraw.Draw(mask).polygon(corners, fill=1)
    assert abs(mask.tobytes().count(1) - area(corners)) < 0.06 * area(corners)


def test_chair_counts_as_the_paper_says():
    said = ["There is a red circle and a blue square.", "A red ring and a red ring.", ""]
    truth = [["red circle"], ["red ring", "pink cross"], ["cyan ring"]]
    found = chair(said, truth)
    assert found["chair_s"] == round(1 / 3, 4) and found["chair_i"] == 0.25
    assert found["recall"] == 0.5 and found["n"] == 3
    assert chair([""], [["red ring"]])["chair_i"] == 0


def test_places_and_descriptions():
    assert [cell(x, y) for y in (0.1, 0.5, 1.0) for x in (0.0, 0.4, 1.0)] == list(CELLS)
    assert [grey(level) for level in (0.2, 0.5, 0.8)] == ["dark", "medium", "light"]
    told = description(
        "Please describe this image in detail.",
        [("red", "circle"), ("orange", "ring")],
        ["top", "bottom left"],
        0.25,
    )
    assert told == (
        "The image features a red circle at the top and an orange ring at the bottom left. "
        "The background is dark gray."
    )


def test_photos_travel_between_devices():
    made: Photos = training_photos(3, Habits(), torch.Generator().manual_seed(0))
    assert len(made.to("cpu")[:2]) == 2
