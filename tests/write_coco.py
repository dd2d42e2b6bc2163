"""Drawn photographs in COCO's official layout: instances, panoptic maps, COCO-Stuff maps; for tests of the reader."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as rle

from visionmtl.datasets.coco import COCO80, COCO133

WALL, FLOOR = 199, 190  # wall-other-merged, floor-other-merged
_WALL_OTHER, _FLOOR_OTHER = 173, 115  # the same in COCO-Stuff


def write_coco(
    root: Path, num_train: int = 4, num_val: int = 2, size: tuple[int, int] = (96, 128), stuffthingmaps: bool = False
) -> None:
    """Write both splits. Image 1 of a split shows no object, image 2 a crowd; each has a void strip on its right."""
    for split, first, count in (("train2017", 1, num_train), ("val2017", 100001, num_val)):
        folder = root / "annotations" / f"panoptic_{split}"
        for made in (root / split, folder, *([root / "stuffthingmaps" / split] if stuffthingmaps else [])):
            made.mkdir(parents=True)
        images: list[dict[str, Any]] = []
        objects: list[dict[str, Any]] = []
        panoptic: list[dict[str, Any]] = []
        for number in range(first, first + count):
            name = f"{number:012d}"
            picture, found, segments, codes, stuff = _draw(number, number - first, size)
            assert cv2.imwrite(str(root / split / f"{name}.jpg"), picture[..., ::-1])
            rgb = np.stack([codes % 256, codes // 256 % 256, codes // 65536], axis=2).astype(np.uint8)
            assert cv2.imwrite(str(folder / f"{name}.png"), rgb[..., ::-1])
            if stuffthingmaps:
                assert cv2.imwrite(str(root / "stuffthingmaps" / split / f"{name}.png"), stuff)
            images.append({"id": number, "file_name": f"{name}.jpg", "height": size[0], "width": size[1]})
            objects += [{"id": len(objects) + i + 1, "image_id": number, **one} for i, one in enumerate(found)]
            panoptic.append({"image_id": number, "file_name": f"{name}.png", "segments_info": segments})

        for kind, entries, space in (("instances", objects, COCO80), ("panoptic", panoptic, COCO133)):
            categories = [{"id": i, "name": text} for i, text in zip(space.ids, space.classes, strict=True)]
            content = {"images": images, "annotations": entries, "categories": categories}
            (root / "annotations" / f"{kind}_{split}.json").write_text(json.dumps(content))


def _draw(seed: int, place: int, size: tuple[int, int]) -> tuple[Any, ...]:
    """The photograph, its annotations and segments_info, and its maps: panoptic ids [H, W], stuffthingmap [H, W]."""
    rng, (height, width) = np.random.default_rng(seed), size
    codes = np.where(np.arange(height)[:, None] < height * 0.6, WALL, FLOOR).repeat(width, axis=1)
    picture = np.where(codes[..., None] == WALL, (180, 185, 200), (120, 100, 80)).astype(np.uint8)
    stuff = np.where(codes == WALL, _WALL_OTHER - 1, _FLOOR_OTHER - 1).astype(np.uint8)
    found, segments = [], {WALL: WALL, FLOOR: FLOOR}
    for number in range(1 + seed % 4 if place else 0):
        which = int(rng.integers(len(COCO80.classes)))
        category, colour = COCO80.ids[which], COCO80.colours[which]
        centre, half = rng.uniform(0.25, 0.75, 2) * (width, height), rng.uniform(0.12, 0.22, 2) * (width, height)
        corners = cv2.boxPoints((tuple(centre), tuple(2 * half), float(rng.uniform(-30, 30)))).round(2)
        polygon = np.clip(corners, 0, [width, height]).astype(float).ravel().tolist()
        code = rle.frPyObjects([polygon], height, width)[0]
        crowd = place == 1 and number == 0
        pixels = rle.decode(code).astype(bool)
        runs = {"size": [height, width], "counts": code["counts"].decode()}
        found.append({
            "category_id": category, "bbox": rle.toBbox(code).tolist(), "area": float(rle.area(code)),
            "iscrowd": int(crowd), "segmentation": runs if crowd else [polygon],
        })  # fmt: skip
        picture[pixels], stuff[pixels] = colour, category - 1
        identity = 1000 + 70000 * (number + 1)  # all three channels take part
        codes[pixels], segments[identity] = identity, category
    codes[:, -2:], stuff[:, -2:] = 0, 255
    infos = [
        {"id": identity, "category_id": category, "iscrowd": 0}
        for identity, category in segments.items()
        if (codes == identity).any()
    ]
    return cv2.add(picture, rng.integers(0, 16, picture.shape, np.uint8)), found, infos, codes, stuff
