"""Writes a folder data set of drawn JPEGs of several sizes with every kind of label, for tests of decoding."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

ORIENTATION = 0x0112
SIZES = (
    (300, 400),
    (402, 301),
    (97, 129),
    (61, 80),
)  # for an input of 96x128: much larger, standing, as large, smaller


def picture(seed: int, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3]: soft patches under a little noise, as different in each place as in each channel."""
    rng = np.random.default_rng(seed)
    patches = rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)
    soft = cv2.resize(patches, size[::-1], interpolation=cv2.INTER_CUBIC)
    return np.clip(soft + rng.normal(0, 4, soft.shape), 0, 255).astype(np.uint8)


def write_jpeg(file: Path, pixels: np.ndarray, orientation: int = 1, mode: str = "RGB", **options: Any) -> Path:
    """As a camera writes it that was held so."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(file, "JPEG", **{"quality": 95, "exif": exif, **options})
    return file


def write_jpegs(
    root: Path, count: int = 8, sizes: tuple[tuple[int, int], ...] = SIZES, **options: Any
) -> dict[str, Any]:
    """`count` images with boxes, classes and depth; the settings of the data set. options: of `write_jpeg`."""
    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    for number in range(count):
        size, rng = sizes[number % len(sizes)], np.random.default_rng(number)
        write_jpeg(root / f"images/{number}.jpg", picture(number, size), **options)
        height, width = size[::-1] if options.get("orientation") in range(5, 9) else size
        for folder, values in (
            ("labels", rng.integers(0, 3, (height, width), np.uint8)),
            ("depth", rng.integers(500, 9000, (height, width), np.uint16)),
        ):
            (root / folder).mkdir(exist_ok=True)
            assert cv2.imwrite(str(root / folder / f"{number}.png"), values)
        images.append({"id": number, "file_name": f"{number}.jpg", "height": height, "width": width})
        for left, top in rng.uniform(0, 0.6, (3, 2)) * (width, height):
            bbox = [left, top, width * 0.3, height * 0.3]
            objects.append({"id": len(objects), "image_id": number, "category_id": 1, "bbox": bbox, "iscrowd": 0})
    content = {"images": images, "annotations": objects, "categories": [{"id": 1, "name": "cup"}]}
    (root / "boxes.json").write_text(json.dumps(content))
    return {
        "type": "folder", "root": str(root), "images": "images/*", "boxes": {"file": "boxes.json"},
        "segmentation": {"files": "labels/{stem}.png", "classes": ["floor", "wall", "cup"]},
        "depth": {"files": "depth/{stem}.png", "metres_per_unit": 0.001},
    }  # fmt: skip
