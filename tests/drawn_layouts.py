"""One small drawn data set in the layout of each reader of files, with the names of its files, for tests to spoil."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import TypeAdapter
from write_cityscapes import part_file, write_cityscapes
from write_coco import write_coco
from write_nyuv2 import drawn_frames, write_official, write_pixels, write_prepared

from visionmtl.datasets import Dataset, DatasetReader
from visionmtl.io.cityscapes import THINGS8
from visionmtl.structures import Sample

SIZE = (24, 32)
_DATASET: TypeAdapter[Any] = TypeAdapter(Dataset)
STREET = "aachen_000000_000019"


@dataclass(frozen=True)
class Layout:
    """How a data set is written and read, and where it has what tests spoil."""

    write: Callable[[Path], None]
    settings: Mapping[str, Any]
    files: Mapping[str, str]
    """By what it holds (photo, classes, depth, boxes, ...): a file, relative to the root."""
    index: int = 0
    """The sample that photo, classes and depth belong to."""

    def open(self, root: Path, **changes: Any) -> DatasetReader:
        """The reader of what lies in `root`; changes: of settings."""
        settings = {**self.settings, "root": str(root), **changes}
        return _DATASET.validate_python(settings).build()

    def read(self, root: Path, **changes: Any) -> list[Sample]:
        """All samples."""
        reader = self.open(root, **changes)
        return [reader.read(index) for index in range(len(reader))]


def smooth(seed: int) -> np.ndarray:
    """A picture that JPEG hardly changes, uint8 [H, W, 3], other at each corner."""
    y, x = np.indices(SIZE)
    return np.stack([60 + 4 * y, 40 + 3 * x, np.full(SIZE, 90 + seed)], axis=2).astype(np.uint8)


def _write_coco(root: Path) -> None:
    write_coco(root, num_train=2, num_val=0, size=SIZE, stuffthingmaps=True)


def _write_cityscapes(root: Path) -> None:
    """The boxes of the first meta are in the panoptic json alone."""
    write_cityscapes(root, num_train=2, num_val=0, size=SIZE)
    part_file(root, "train", "aachen", 0, "instanceIds").unlink()
    segment = {"id": 26001, "category_id": 26, "bbox": [1, 2, 3, 4], "area": 9, "iscrowd": 0}
    content = {
        "images": [{"id": STREET, "file_name": f"{STREET}_leftImg8bit.png", "height": SIZE[0], "width": SIZE[1]}],
        "annotations": [
            {"image_id": STREET, "file_name": f"{STREET}.png", "segments_info": [segment, {**segment, "id": 26002}]}
        ],
        "categories": [{"id": 7, "name": "road"}]
        + [{"id": number, "name": name} for number, name in zip(THINGS8.ids, THINGS8.classes, strict=True)],
    }
    (root / "gtFine/cityscapes_panoptic_train.json").write_text(json.dumps(content))


def _write_folder(root: Path) -> None:
    for number, name in enumerate(("a", "b")):
        (root / "images").mkdir(exist_ok=True)
        Image.fromarray(smooth(number)).save(root / f"images/{name}.jpg", quality=95)
        write_pixels(root / f"labels/{name}.png", np.resize(np.array([0, 1, 2, 255], np.uint8), SIZE))
        write_pixels(root / f"depth/{name}.png", np.full(SIZE, 1500 + number, np.uint16))
    box = {"id": 1, "image_id": 10, "category_id": 5, "bbox": [1, 2, 3, 4], "area": 7, "iscrowd": 0}
    content = {
        "images": [
            {"id": 10 + i, "file_name": f"{name}.jpg", "height": SIZE[0], "width": SIZE[1]}
            for i, name in enumerate(("a", "b"))
        ],
        "annotations": [box, {**box, "id": 2, "image_id": 11}],
        "categories": [{"id": 5, "name": "person"}, {"id": 2, "name": "box"}],
    }
    (root / "boxes.json").write_text(json.dumps(content))
    (root / "classes.yaml").write_text("{0: floor, 1: shelf, 2: person}")
    (root / "list.txt").write_text("a\nb\n")


def _write_nyuv2(root: Path) -> None:
    write_prepared(root, drawn_frames(2, SIZE))
    for number, file in enumerate(sorted((root / "image/train").glob("*.png"))):
        Image.fromarray(smooth(number)).save(file.with_suffix(".jpg"), quality=95)
        file.unlink()


_FOLDER = {
    "type": "folder",
    "images": "images/*.jpg",
    "list_file": "list.txt",
    "boxes": {"file": "boxes.json"},
    "segmentation": {"files": "labels/{stem}.png", "classes": "classes.yaml"},
    "depth": {"files": "depth/{stem}.png", "metres_per_unit": 0.001},
}
_COCO_FILES = {
    "photo": "train2017/000000000002.jpg",
    "classes": "annotations/panoptic_train2017/000000000002.png",
    "stuff": "stuffthingmaps/train2017/000000000002.png",
    "boxes": "annotations/instances_train2017.json",
    "segments": "annotations/panoptic_train2017.json",
}
_CITY = f"train/aachen/{STREET}"
LAYOUTS = {
    "coco": Layout(
        _write_coco, {"type": "coco", "labels": ["boxes", "segmentation"], "maps": "panoptic"}, _COCO_FILES, 1
    ),
    "cityscapes": Layout(
        _write_cityscapes,
        {"type": "cityscapes"},
        {
            "photo": f"leftImg8bit/{_CITY}_leftImg8bit.png",
            "classes": f"gtFine/{_CITY}_gtFine_labelIds.png",
            "depth": f"disparity/{_CITY}_disparity.png",
            "camera": f"camera/{_CITY}_camera.json",
            "boxes": "gtFine/cityscapes_panoptic_train.json",
        },
    ),
    "folder": Layout(
        _write_folder,
        _FOLDER,
        {
            "photo": "images/a.jpg",
            "classes": "labels/a.png",
            "depth": "depth/a.png",
            "boxes": "boxes.json",
            "names": "classes.yaml",
            "list": "list.txt",
        },
    ),
    "nyuv2": Layout(
        _write_nyuv2,
        {"type": "nyuv2"},
        {
            "photo": "image/train/0001.jpg",
            "classes": "seg13/train/0001.png",
            "depth": "depth/train/0001.png",
            "boxes": "annotations/objects37_train.json",
            "list": "train.txt",
            "unit": "meta.json",
        },
    ),
    "nyuv2_mat": Layout(
        lambda root: write_official(root, drawn_frames(2, SIZE)),
        {"type": "nyuv2_mat"},
        {
            "everything": "nyu_depth_v2_labeled.mat",
            "list": "splits.mat",
            "names": "classMapping40.mat",
            "coarse": "class13Mapping.mat",
        },
    ),
}
