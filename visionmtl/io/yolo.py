"""YOLO label files: a line an object, a class number and fractions of the image's size; and the list of classes."""

import math
from pathlib import Path
from typing import Any

from visionmtl.config.text_files import read_yaml
from visionmtl.io.objects import ImageObjects, LabelledObject, bad_entry, of_polygons
from visionmtl.io.paths import composed, read_lines, read_names
from visionmtl.structures import has_controls

_TOLERANCE = 1e-3
"""Tools round outwards: by this much a fraction may lie outside 0..1."""


def read_objects(file: Path, size: tuple[int, int], classes: tuple[str, ...]) -> ImageObjects:
    """The objects of one file (https://docs.ultralytics.com/datasets/detect, .../segment).

    A line is `class cx cy w h`, a box by its centre, or `class x1 y1 x2 y2 x3 y3 ...`, a polygon of three points or
    more. size: (H, W) of the image, pixels; classes: names by number. An empty file: looked, found none.
    """
    height, width = size
    objects = []
    for number, line in enumerate(read_lines(file), start=1):
        if not line:
            continue
        words, place = line.split(), f"line {number}"
        try:
            values = [float(word) for word in words]
        except ValueError:
            raise bad_entry(
                file, place, line, "numbers are needed: class cx cy w h, or class x1 y1 x2 y2 x3 y3 ..."
            ) from None
        label, numbers = values[0], values[1:]
        if not (label.is_integer() and 0 <= label < len(classes)):
            raise bad_entry(
                file, place, line,
                f"its class must be a whole number, 0 to {len(classes) - 1} ({', '.join(classes[:8])})", "correct it, "
                "or the list of classes",
            )  # fmt: skip
        if len(numbers) == 5:
            raise bad_entry(
                file, place, line, "a label has 4 numbers behind the class (a box) or an even count of 6 or more (a "
                "polygon); a fifth is a confidence, which predictions have", "name the folder of the labels",
            )  # fmt: skip
        if len(numbers) < 4 or len(numbers) % 2:
            raise bad_entry(
                file, place, line, "4 numbers are needed behind the class (cx cy w h), or an even count of 6 or more "
                "(a polygon)",
            )  # fmt: skip
        if not all(math.isfinite(x) and -_TOLERANCE <= x <= 1 + _TOLERANCE for x in numbers):
            pixels = all(math.isfinite(x) for x in numbers) and max(numbers) > 2
            raise bad_entry(
                file, place, line, "coordinates are fractions of the image's width and height, 0..1"
                + ("; these look like pixels" if pixels else ""),
                "divide x by the width and y by the height" if pixels else "correct or remove it",
            )  # fmt: skip
        name = classes[int(label)]
        if len(numbers) == 4:
            cx, cy, w, h = numbers
            box = ((cx - w / 2) * width, (cy - h / 2) * height, (cx + w / 2) * width, (cy + h / 2) * height)
            objects.append(LabelledObject(name, box))
        else:
            points = [(x * width, y * height) for x, y in zip(numbers[::2], numbers[1::2], strict=True)]
            objects.append(of_polygons(name, [points]))
    return ImageObjects(size, objects)


def read_data_yaml(file: Path) -> dict[str, Any]:
    """The content of a data.yaml, `names` as a tuple by number. Raises ValueError for one without sound names."""
    content, _ = read_yaml(file, "a data.yaml with `names`")
    names = content.get("names") if isinstance(content, dict) else None
    if isinstance(names, dict):
        whole = sorted(names) == list(range(len(names))) if all(type(key) is int for key in names) else False
        names = [names[key] for key in range(len(names))] if whole else None
    if not isinstance(names, list) or not names or not all(isinstance(name, str | int) for name in names):
        raise ValueError(
            f"{file} has no `names` of classes; a list, or a mapping from 0, 1, 2, ... to a name, is needed; add it"
        )
    if bools := [name for name in names if isinstance(name, bool)]:
        raise ValueError(
            f"{file} names a class that YAML takes for {str(bools[0]).lower()}, as yes, no, on and off without "
            "quotes; a text is needed; put the name in quotes"
        )
    chosen = tuple(composed(str(name)) for name in names)
    if (count := content.get("nc")) is not None and count != len(chosen):
        raise ValueError(f"{file} says nc: {count}, but names {len(chosen)} classes; both must agree; correct one")
    if content.get("kpt_shape") is not None:
        raise ValueError(
            f"{file} describes keypoints (kpt_shape), whose lines look like polygons; labels of boxes or polygons are "
            "read; export the data set for detection or segmentation"
        )
    return {**content, "names": chosen}


def names_classes(file: Path) -> bool:
    """Whether a YAML file is meant as a data.yaml, sound or not. Raises ValueError for a data.yaml that is no YAML."""
    try:
        content, _ = read_yaml(file, "a data.yaml with `names`")
    except ValueError:
        if file.stem == "data":
            raise
        return False
    return isinstance(content, dict) and not content.keys().isdisjoint(("names", "nc", "kpt_shape"))


def read_classes(file: Path) -> tuple[str, ...]:
    """Class names by number: from a data.yaml, or a text file with one name a line (classes.txt, obj.names)."""
    if file.suffix.lower() in (".yaml", ".yml"):
        names: tuple[str, ...] = read_data_yaml(file)["names"]
    else:
        names = read_names(file)
    if odd := [name for name in names if has_controls(name)]:
        raise ValueError(f"{file} names {odd[0]!r}; a name has no control characters; correct it")
    if not names or len(set(names)) < len(names):
        twice = next((name for name in names if names.count(name) > 1), None)
        found = f"names {twice!r} twice" if twice else "is empty"
        raise ValueError(f"{file} {found}; each class needs a name of its own; correct it")
    return names
