"""LabelMe's annotation files: JSON with the shapes drawn on one image."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

from visionmtl.config.text_files import read_json
from visionmtl.io.objects import MAX_COORDINATE, ImageObjects, LabelledObject, Point, bad_entry, is_side, of_polygons
from visionmtl.io.paths import composed
from visionmtl.structures import has_controls

_LEAST_POINTS = {"polygon": 3, "rectangle": 2, "circle": 2, "mask": 2}
_CIRCLE_POINTS = 64
_NO_BOX = ("point", "points", "line", "linestrip")


def read_objects(file: Path) -> ImageObjects:
    """The objects of one file (https://github.com/wkentaro/labelme): polygons, rectangles, circles and masks.

    Polygons of one label and `group_id` are parts of one object. Points and lines have no box: they are counted.
    """
    content = read_json(file)
    shapes = content.get("shapes") if isinstance(content, dict) else None
    if not isinstance(shapes, list):
        raise ValueError(f"{file} has no list `shapes`; a file of LabelMe has one; name the folder of its files")
    size = content.get("imageHeight"), content.get("imageWidth")
    if not all(is_side(side) for side in size):
        raise bad_entry(file, "imageHeight, imageWidth", size, "whole pixels are needed", "save it again with LabelMe")
    objects: list[LabelledObject] = []
    groups: dict[tuple[str, Any], list[list[Point]]] = {}
    left_out: Counter[str] = Counter()
    without_area: list[str] = []
    for number, shape in enumerate(shapes):
        place = f"shapes[{number}]"
        label = shape.get("label") if isinstance(shape, dict) else None
        if not isinstance(label, str) or not label or has_controls(label):
            raise bad_entry(file, place, shape, "a shape has a label, without control characters")
        kind, name = shape.get("shape_type") or "polygon", composed(shape["label"])
        if kind in _NO_BOX:
            left_out[f"shapes of kind {kind} have no box (left out)"] += 1
            without_area.append(name)
            continue
        if not isinstance(kind, str) or kind not in _LEAST_POINTS:
            known = ", ".join([*_LEAST_POINTS, *_NO_BOX])
            raise bad_entry(file, f"{place}.shape_type", kind, f"known are {known}")
        points = _points(file, place, shape.get("points"), _LEAST_POINTS[kind])
        if kind == "polygon":
            if shape.get("group_id") is not None:
                groups.setdefault((name, str(shape["group_id"])), []).append(points)
            else:
                objects.append(of_polygons(name, [points]))
        elif kind == "circle":
            (cx, cy), (x, y) = points[:2]
            radius = math.hypot(x - cx, y - cy)
            box = (cx - radius, cy - radius, cx + radius, cy + radius)
            angles = [2 * math.pi * step / _CIRCLE_POINTS for step in range(_CIRCLE_POINTS)]
            outline = tuple((cx + radius * math.cos(angle), cy + radius * math.sin(angle)) for angle in angles)
            objects.append(LabelledObject(name, box, math.pi * radius**2, polygons=(outline,)))
        else:  # two corners, or four
            xs, ys = zip(*points, strict=True)
            last = 1 if kind == "mask" else 0  # a mask names its last pixel
            x1, y1, x2, y2 = box = (min(xs), min(ys), max(xs) + last, max(ys) + last)
            corners = () if last else (((x1, y1), (x2, y1), (x2, y2), (x1, y2)),)
            objects.append(LabelledObject(name, box, (x2 - x1) * (y2 - y1), polygons=corners))
    objects += [of_polygons(name, polygons) for (name, _), polygons in groups.items()]
    return ImageObjects((int(size[0]), int(size[1])), objects, left_out, without_area)


def _points(file: Path, place: str, points: object, least: int) -> list[Point]:
    sound = isinstance(points, list) and len(points) >= least and all(map(_is_point, points))
    if not sound or not isinstance(points, list):
        raise bad_entry(
            file, f"{place}.points", points, f"{least} or more points [x, y] are needed, below {MAX_COORDINATE:,.0f} px"
        )
    return [(float(x), float(y)) for x, y in points]


def _is_point(point: object) -> bool:
    return (
        isinstance(point, list)
        and len(point) == 2
        and all(type(value) in (int, float) and abs(value) < MAX_COORDINATE for value in point)
    )
