"""Write the evaluation data in the original formats, for scripts made for the real files.

``python -m attnctl.assets.world.export --out DIR --images 500 --seed 0`` writes

- ``val2014/COCO_val2014_000000000001.jpg`` and so on, 224 x 224;
- ``annotations/instances_val2014.json`` and ``captions_val2014.json`` as COCO's, and empty ones
  of train2014, which some scripts open as well;
- ``pope/coco_pope_{random,popular,adversarial}.json``, POPE's JSON lines;
- ``synonyms.txt``, the words of CHAIR's objects, one object a line;
- ``facts.jsonl``, what no original file tells: which photos are dim and which objects small.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from attnctl.assets.world.coco import captions, instances
from attnctl.assets.world.evaluation import Photo, album
from attnctl.assets.world.palette import PAIRS
from attnctl.assets.world.pope import SPLITS, questions


def export(out: Path, n_images: int = 500, seed: int = 0) -> Path:
    """Write all files; the same arguments give the same files.

    Args:
        out: folder, made if need be.
        n_images: number of photos.
        seed: of photos and questions.

    Returns:
        ``out``.

    Raises:
        ValueError: no photo was asked for.
    """
    if n_images < 1:
        raise ValueError(f"asked for {n_images} images; there must be one at least")
    photos = album(n_images, seed)
    save_images(photos, out / "val2014")
    for split, some in (("val", photos), ("train", ())):
        _write_json(out / f"annotations/instances_{split}2014.json", instances(some))
        _write_json(out / f"annotations/captions_{split}2014.json", captions(some))
    for name in SPLITS:
        rows = (case.row() for case in questions(photos, name, seed))
        _write_lines(out / f"pope/coco_pope_{name}.json", rows)
    (out / "synonyms.txt").write_text("".join(" ".join(pair) + "\n" for pair in PAIRS))
    _write_lines(out / "facts.jsonl", map(facts, photos))
    return out


def save_images(photos: Sequence[Photo], folder: Path) -> None:
    """Write the pictures as JPEG files of high quality."""
    folder.mkdir(parents=True, exist_ok=True)
    for photo in tqdm(photos, desc="photos", mininterval=2.0):
        photo.image.save(folder / photo.file, quality=95, subsampling=0)


def facts(photo: Photo) -> dict[str, Any]:
    """What the original formats have no field for."""
    objects = [{"name": one.name, "small": one.small} for one in photo.items]
    return {"image_id": photo.number, "image": photo.file, "dim": photo.dim, "objects": objects}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m attnctl.assets.world.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    parser.add_argument("--images", type=int, default=500, help="number of photos")
    parser.add_argument("--seed", type=int, default=0, help="of photos and questions")
    chosen = parser.parse_args(arguments)
    print(export(chosen.out, chosen.images, chosen.seed))


if __name__ == "__main__":
    main()
