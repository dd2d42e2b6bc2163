"""The label ids of Cityscapes: the classes that are evaluated, as label spaces and as lookup tables."""

import numpy as np
from numpy.typing import NDArray

from visionmtl.structures import IGNORE, LabelSpace

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
