"""Objects of one image as annotation tools write them, a file an image, and their way into COCO's instances format."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as rle

from visionmtl.config.suggest import did_you_mean
from visionmtl.config.text_files import shown
from visionmtl.io.paths import composed

Point = tuple[float, float]
MAX_COORDINATE = 1e5
"""Pixels. Polygons are rasterised point by point: one at 1e9 would fill the memory, and kills pycocotools."""


class LabelledObject(NamedTuple):
    """One object: its class, its box in pixels of the image, and its outline where the tool gives one."""

    name: str  # composed (NFC)
    xyxy: tuple[float, float, float, float]  # x2 and y2 exclusive
    area: float | None = None  # px^2 of the outline; None = the box's own
    crowd: bool = False  # neither hit nor miss, as COCO's iscrowd
    polygons: tuple[tuple[Point, ...], ...] = ()


@dataclass(frozen=True)
class ImageObjects:
    """What one file says of its image."""

    size: tuple[int, int]
    """(H, W) of the image, pixels; (0, 0) where the file does not say."""
    objects: list[LabelledObject]
    left_out: Mapping[str, int] = field(default_factory=dict)
    """How many entries are no boxes or count otherwise, by what they are."""
    without_area: Sequence[str] = ()
    """The classes of points and lines."""


def of_polygons(name: str, polygons: Sequence[Sequence[Point]]) -> LabelledObject:
    """The object that some polygons outline: tight box, and the polygons' areas together (shoelace formula)."""
    points = np.array([point for polygon in polygons for point in polygon], np.float64)
    (x1, y1), (x2, y2) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    area = sum(_area(np.array(polygon, np.float64)) for polygon in polygons)
    return LabelledObject(name, (x1, y1, x2, y2), area, polygons=tuple(tuple(polygon) for polygon in polygons))


def _area(points: NDArray[np.float64]) -> float:
    x, y = points.T
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2


def to_coco(
    names: Sequence[str], objects: Sequence[ImageObjects], classes: Sequence[str] | None, where: str
) -> dict[str, Any]:
    """The content of an instances file in COCO's format.

    names: of the images; classes: in their order, None = all that occur, by name; where: the files, for messages.
    Raises ValueError for an object of a class that `classes` does not name.
    """
    occurring = sorted({one.name for of_image in objects for one in of_image.objects})
    chosen = tuple(map(composed, classes)) if classes is not None else tuple(occurring)
    if strange := [name for name in occurring if name not in chosen]:
        raise ValueError(
            f"{where}: objects have the class {strange[0]!r}{did_you_mean(strange[0], chosen)}, which boxes.classes "
            f"does not name; it has {', '.join(chosen)}; add it, or correct the label"
        )
    if not chosen:
        raise ValueError(
            f"{where}: no file holds an object, and `boxes.classes` names none; one class or more is needed; set "
            "boxes.classes, or leave the boxes out"
        )
    number = {name: k for k, name in enumerate(chosen)}
    annotations: list[dict[str, Any]] = []
    for image_id, of_image in enumerate(objects, start=1):
        for one in of_image.objects:
            x1, y1, x2, y2 = one.xyxy
            entry = {
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": number[one.name],
                "bbox": [float(x1), float(y1), float(x2 - x1), float(y2 - y1)],
                "iscrowd": int(one.crowd),
            }
            annotations.append(entry if one.area is None else entry | {"area": float(one.area)})
    sizes = [
        dict(zip(("height", "width"), of_image.size, strict=True)) if any(of_image.size) else {} for of_image in objects
    ]
    named = enumerate(zip(names, sizes, strict=True), start=1)
    images = [{"id": number, "file_name": name, **size} for number, (name, size) in named]
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": k, "name": name} for k, name in enumerate(chosen)],
    }


def to_class_map(
    of_image: ImageObjects, size: tuple[int, int], classes: Sequence[str], outside: int, file: Path
) -> NDArray[np.uint8]:
    """Class ids [H, W] of outlined objects, larger ones below smaller ones; `outside` is the id where there is none.

    Pixels are filled as COCO's own tools do it. Raises ValueError for an object without an outline, or of a class that
    is none, and for a point or line of a class: its pixels would be taught as `outside`.
    """
    class_map = np.full(size, outside, np.uint8)
    classes = [composed(name) for name in classes]
    if thin := [name for name in of_image.without_area if name in classes]:
        raise ValueError(
            f"{file}: {len(thin)} shapes of classes that are learnt are points or lines, the first is {thin[0]!r}; "
            "segmentation needs areas; draw them as polygons, or call them by a name that segmentation.classes lacks"
        )
    for one in sorted(of_image.objects, key=lambda one: -(one.area or 0)):
        if one.name not in classes:
            raise ValueError(
                f"{file}: a shape has the class {one.name!r}{did_you_mean(one.name, classes)}, which "
                "segmentation.classes "
                f"does not name; it has {', '.join(classes)}; add it, or correct the label"
            )
        if not one.polygons:
            raise ValueError(
                f"{file}: an object of class {one.name!r} is a box or mask without an outline; segmentation needs "
                "polygons; draw it as a polygon, or read this file for boxes alone"
            )
        flat = [[float(x) for point in polygon for x in point] for polygon in one.polygons]
        mask = rle.decode(rle.merge(rle.frPyObjects(flat, *size)))
        class_map[mask.astype(bool)] = classes.index(one.name)
    return class_map


def left_out_notes(objects: Iterable[ImageObjects], where: str) -> list[str]:
    """One sentence for each kind of entry that was counted."""
    counts: dict[str, int] = {}
    for of_image in objects:
        for what, count in of_image.left_out.items():
            counts[what] = counts.get(what, 0) + count
    return [f"{where}: {count} {what}" for what, count in counts.items()]


def is_side(value: object) -> bool:
    """Whether a side of an image can be that many pixels; 640.0, as pandas writes it, can."""
    return type(value) in (int, float) and 0 < value < 2**31 and value % 1 == 0  # type: ignore[operator]


def bad_entry(file: Path, place: str, found: object, allowed: str, advice: str = "correct or remove it") -> ValueError:
    """The error for one entry of a label file."""
    text = repr(found[:120]) if isinstance(found, str) else shown(found, 120)
    return ValueError(f"{file}: {place} is {text}; {allowed}; {advice}")
