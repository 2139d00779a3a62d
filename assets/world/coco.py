"""The evaluation photos in COCO's annotation formats of 2014."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attnctl.assets.world.evaluation import Item, Photo
from attnctl.assets.world.outlines import area, box, outline
from attnctl.assets.world.palette import PAIRS
from attnctl.assets.world.photos import SIZE

INFO = {
    "description": "attnctl shape world, evaluation photos",
    "version": "1.0",
    "year": 2014,
    "contributor": "attnctl",
    "url": "",
    "date_created": "",
}
LICENSES = [{"id": 1, "name": "Apache-2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"}]


def instances(photos: Sequence[Photo]) -> dict[str, Any]:
    """Content of ``instances_val2014.json``: 48 categories such as "red circle", 1 to 48."""
    found = [(photo, item) for photo in photos for item in photo.items]
    return {
        **_head(photos),
        "annotations": [annotation(i, *one) for i, one in enumerate(found, start=1)],
        "categories": [
            {"id": i, "name": " ".join(pair), "supercategory": pair[1]}
            for i, pair in enumerate(PAIRS, start=1)
        ],
    }


def captions(photos: Sequence[Photo]) -> dict[str, Any]:
    """Content of ``captions_val2014.json``: five captions per photo."""
    said = [(photo.number, words) for photo in photos for words in photo.captions()]
    return {
        **_head(photos),
        "annotations": [
            {"image_id": number, "id": i, "caption": words}
            for i, (number, words) in enumerate(said, start=1)
        ],
    }


def _head(photos: Sequence[Photo]) -> dict[str, Any]:
    images = [
        {"id": one.number, "file_name": one.file, "height": SIZE, "width": SIZE, "license": 1}
        for one in photos
    ]
    return {"info": INFO, "licenses": LICENSES, "type": "instances", "images": images}


def annotation(number: int, photo: Photo, item: Item) -> dict[str, Any]:
    """One object: outline, area and box in pixels; what covers it is not taken off."""
    corners = outline(item.pair[1], SIZE * item.x, SIZE * item.y, SIZE * item.radius)
    return {
        "id": number,
        "image_id": photo.number,
        "category_id": item.index + 1,
        "segmentation": [[round(value, 2) for corner in corners for value in corner]],
        "area": round(area(corners), 2),
        "bbox": [round(value, 2) for value in box(corners)],
        "iscrowd": 0,
    }
