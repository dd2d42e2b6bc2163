"""Cityscapes' files: label ids as label spaces and lookup tables, and the boxes of the panoptic json."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from visionmtl.io.coco.annotations import OTHER_KIND, Annotations, BoxColumns, BoxIndex, kept_order, text_array
from visionmtl.io.coco.panoptic import check_segments
from visionmtl.io.paths import composed
from visionmtl.structures import IGNORE, Boxes, LabelSpace

# the 19 classes that the official evaluation counts: id in labelIds, category, colour
_CLASSES: dict[str, tuple[int, str, tuple[int, int, int]]] = {
    "road": (7, "flat", (128, 64, 128)),
    "sidewalk": (8, "flat", (244, 35, 232)),
    "building": (11, "construction", (70, 70, 70)),
    "wall": (12, "construction", (102, 102, 156)),
    "fence": (13, "construction", (190, 153, 153)),
    "pole": (17, "object", (153, 153, 153)),
    "traffic light": (19, "object", (250, 170, 30)),
    "traffic sign": (20, "object", (220, 220, 0)),
    "vegetation": (21, "nature", (107, 142, 35)),
    "terrain": (22, "nature", (152, 251, 152)),
    "sky": (23, "sky", (70, 130, 180)),
    "person": (24, "human", (220, 20, 60)),
    "rider": (25, "human", (255, 0, 0)),
    "car": (26, "vehicle", (0, 0, 142)),
    "truck": (27, "vehicle", (0, 0, 70)),
    "bus": (28, "vehicle", (0, 60, 100)),
    "train": (31, "vehicle", (0, 80, 100)),
    "motorcycle": (32, "vehicle", (0, 0, 230)),
    "bicycle": (33, "vehicle", (119, 11, 32)),
}
_THINGS = tuple(_CLASSES)[11:]  # caravan 29 and trailer 30 have instances too, and are evaluated nowhere
_CATEGORIES = ("flat", "construction", "object", "nature", "sky", "human", "vehicle")
_COLOUR_OF = {category: colour for _, category, colour in reversed(_CLASSES.values())}  # that of its first class

CITYSCAPES19 = LabelSpace(
    "cityscapes19",
    tuple(_CLASSES),
    tuple(colour for _, _, colour in _CLASSES.values()),
    tuple(number for number, _, _ in _CLASSES.values()),
)
CITYSCAPES7 = LabelSpace("cityscapes7", _CATEGORIES, tuple(_COLOUR_OF[category] for category in _CATEGORIES))
THINGS8 = LabelSpace(
    "cityscapes_things8",
    _THINGS,
    tuple(_CLASSES[name][2] for name in _THINGS),
    tuple(_CLASSES[name][0] for name in _THINGS),
)

UNKNOWN = 254  # no id of the official files; licence plates are -1, which 8 bits hold as 255


def class_table(space: LabelSpace) -> NDArray[np.uint8]:
    """uint8 [256]: class id in CITYSCAPES19 or CITYSCAPES7 by value in labelIds; UNKNOWN for what no file holds."""
    assert space in (CITYSCAPES19, CITYSCAPES7), space.name
    table = np.full(256, UNKNOWN, np.uint8)
    table[[*range(34), 255]] = IGNORE
    for number, (official, category, _) in enumerate(_CLASSES.values()):
        table[official] = number if space is CITYSCAPES19 else _CATEGORIES.index(category)
    return table


def _thing_of_code() -> NDArray[np.int8]:
    codes = np.arange(65536)
    official = np.where(codes < 1000, codes, codes // 1000)
    table = np.full(65536, -1, np.int8)
    for number, thing in enumerate(THINGS8.ids):
        table[official == thing] = number
    return table


THING_OF_CODE = _thing_of_code()
"""int8 [65536]: class id in THINGS8 by value in instanceIds (class * 1000 + number, or the class alone for a group of
objects), -1 for everything else."""


class PanopticBoxes(BoxIndex):
    """The things of some images, from the json that csCreatePanopticImgs of cityscapesscripts makes."""

    def __init__(self, file: Path, image_ids: Sequence[str]) -> None:
        """image_ids: "aachen_000000_000019" and the like.

        Raises ValueError naming the entry that lacks what it needs, and for a file of train ids.
        """
        listed = Annotations(file, named=False)
        _check_names(file, dict(zip(listed.category_ids, listed.category_names, strict=True)))
        size_of = dict(zip(listed.image_ids, listed.sizes.tolist(), strict=True))
        index_of = {composed(image_id): index for index, image_id in enumerate(image_ids)}
        indices = [index_of.get(image_id, -1) for image_id in listed.image_ids_of_entries(unique=True)]
        check_segments(file, listed.entries)

        known = [(at, entry["segments_info"]) for at, entry in zip(indices, listed.entries, strict=True) if at >= 0]
        segments = [segment for _, of_image in known for segment in of_image]
        rows = np.repeat(np.array([index for index, _ in known], np.int64), [len(of_image) for _, of_image in known])
        sizes = np.array([size_of.get(composed(image_id), (0, 0)) for image_id in image_ids], np.int32).reshape(-1, 2)
        thing_of = {str(number): label for label, number in enumerate(THINGS8.ids)}
        thing_of_label = np.array([thing_of.get(category_id, -1) for category_id in listed.category_ids], np.int64)
        things = thing_of_label[listed.labels("segments_info", segments)]
        boxes = BoxColumns(file, "segments_info", segments, sizes[rows])
        reasons = np.where(things < 0, OTHER_KIND, boxes.reasons(rows))
        order = kept_order(reasons, rows)
        self.listed = np.zeros(len(image_ids), np.bool_)
        """bool [N]: which images have an entry, be it without things."""
        self.listed[[index for index, _ in known]] = True
        arrays = {
            "image_ids": text_array(image_ids),
            "names": text_array(image_ids),
            "sizes": sizes,
            **boxes.pack(order, rows, len(image_ids)),
            "labels": things[order],
            "notes": text_array(boxes.notes(reasons)),
        }
        super().__init__(file, arrays)

    def of_image(self, index: int, image: Path, size: tuple[int, ...]) -> Boxes:
        """Boxes of an image, in the file's order. image, size: its file, and (H, W) as read; these must fit."""
        self.check_size(index, image, size, "make the json anew with csCreatePanopticImgs")
        return self.of(index, size)


def _check_names(file: Path, name_of: dict[str, str]) -> None:
    names = {number: name_of.get(str(number)) for number in sorted(THINGS8.ids)}
    if any(names[number] != name for number, name in zip(THINGS8.ids, THINGS8.classes, strict=True)):
        raise ValueError(
            f"{file} calls categories {list(names)} {list(names.values())}; needed are the official ids, not train "
            "ids; make it with csCreatePanopticImgs without --use-train-id"
        )
