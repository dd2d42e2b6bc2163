"""Boxes and masks of annotation files in COCO's instances format, as flat arrays that every worker shares.

What cannot be meant is an error that names the entry; a box that could teach nothing is dropped and counted.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as rle

from visionmtl.ops.coco_entries import (
    Entry,
    Packed,
    areas,
    bad,
    corners,
    crowds,
    found,
    integers,
    load,
    look_up,
    pack_labels,
)
from visionmtl.ops.index_cache import cached
from visionmtl.structures import Boxes

_DROPPED = (
    "with NaN or infinite coordinates",
    "without width or height",
    "outside their image",
    "of images the file does not list",
)
_NOTED = (
    "boxes reach more than 1 px beyond their image (kept as they are, as official evaluation does)",
    "areas are negative or no number (the box's own is taken)",
    "annotation ids repeat an earlier one (harmless here; tools that look up by id see only the last)",
    "annotations have id 0 (harmless here; pycocotools takes a match with it for no match)",
)
_MAX_COORDINATE = 1e5  # polygons are rasterised point by point: one at 1e9 would fill the memory


class PackedBoxes(Packed):
    """Boxes of an instances file; `arrays` hold xyxy, labels, crowd and area of all images, one after the other."""

    def of(self, row: int, size: tuple[int, ...] | None = None) -> Boxes:
        """Boxes of image `row`, in the file's order; none means that the image was looked at and shows none.

        size: (H, W) of the image as it was read; where the file gave none, a box outside it raises ValueError.
        """
        part, arrays = self.part(row), self.arrays
        boxes = Boxes(*(arrays[name][part].copy() for name in ("xyxy", "labels", "crowd", "area")))
        if size is not None and self.size(row) == (0, 0) and (outside := boxes.xyxy[:, :2] >= size[::-1]).any():
            first = boxes.xyxy[int(np.argmax(outside.any(axis=1)))].tolist()
            raise ValueError(
                f"{self.file}: a box of {self.name(row)!r} is {first} (xyxy), the image {size} (height, width); boxes "
                "lie in their image; correct it, or add height and width to `images`: such boxes are dropped then"
            )
        return boxes

    def masks(self, row: int) -> list[NDArray[np.bool_]]:
        """[H, W] for each box of image `row`; only after `read_boxes(file, masks=True)`."""
        part, size = self.part(row), list(self.size(row))
        ends, content = self.arrays["mask_ends"][part.start : part.stop + 1].tolist(), self.arrays["mask_rle"]
        codes = [{"size": size, "counts": content[a:b].tobytes()} for a, b in itertools.pairwise(ends)]
        return list(rle.decode(codes).astype(bool).transpose(2, 0, 1)) if codes else []

    def report(self) -> list[str]:
        """What was dropped and what is odd, a sentence each; empty for a sound file."""
        dropped, noted = np.split(self.arrays["counts"], [len(_DROPPED)])
        lines = []
        if not dropped.any() and not len(self.arrays["labels"]):
            lines.append(f"{self.file} lists no box at all; all {len(self)} images count as looked at and empty")
        if dropped.any():
            reasons = ", ".join(f"{count} {why}" for count, why in zip(dropped, _DROPPED, strict=True) if count)
            total = dropped.sum() + len(self.arrays["labels"])
            lines.append(f"{self.file}: dropped {dropped.sum()} of {total} boxes: {reasons}; correct or remove them")
        return lines + [f"{self.file}: {count} {what}" for count, what in zip(noted, _NOTED, strict=True) if count]


def read_boxes(file: Path, masks: bool = False) -> PackedBoxes:
    """An instances file; with `masks`, its polygons and RLEs as well.

    Raises ValueError naming the entry for: no file, incomplete JSON, an entry without what it needs, an id of an image
    or category given twice, a category that is not listed, a file name that leaves the folder of the images.
    """
    kind = "boxes+masks-2" if masks else "boxes-2"
    return PackedBoxes(file, cached(found(file), kind, lambda: _pack(file, masks)))


def _pack(file: Path, masks: bool) -> dict[str, NDArray]:
    columns, entries = load(file)
    labels = pack_labels(file, "annotations", entries, columns["category_ids"])
    rows = look_up(columns["image_ids"], integers(file, "annotations", entries, "image_id"))
    sizes = np.concatenate([columns["sizes"], [[0, 0]]])[rows]  # [A, 2]; the last for images that are not listed

    xyxy, crowd = corners(file, "annotations", entries), crowds(file, "annotations", entries)
    edges = np.where(sizes > 0, sizes, np.inf)[:, ::-1]  # a size that is not given limits nothing
    reasons = (
        ~np.isfinite(xyxy).all(axis=1),
        ~(xyxy[:, 2:] > xyxy[:, :2]).all(axis=1),
        (xyxy[:, 2:] <= 0).any(axis=1) | (xyxy[:, :2] >= edges).any(axis=1),
        rows < 0,
    )
    reason = np.select(reasons, range(len(reasons)), -1)
    order = np.argsort(rows, kind="stable")  # the file's order within an image
    order = order[reason[order] < 0]
    kept = [entries[i] for i in order]

    boxes = xyxy[order]
    beyond = (boxes[:, :2] < -1).any(axis=1) | (boxes[:, 2:] > edges[order] + 1).any(axis=1)
    area, wrong = areas(kept, boxes)
    ids = [entry["id"] for entry in entries if isinstance(entry.get("id"), int | str)]
    noted = (np.count_nonzero(beyond), wrong, len(ids) - len(set(ids)), ids.count(0))
    packed = {
        **columns,
        "start": np.searchsorted(rows[order], np.arange(len(columns["image_ids"]) + 1)),
        "xyxy": boxes,
        "labels": labels[order],
        "crowd": crowd[order],
        "area": area,
        "counts": np.array([*(np.count_nonzero(reason == n) for n in range(len(reasons))), *noted], np.int64),
    }
    if masks:
        codes = [_encode(file, i, entries, sizes[i].tolist()) for i in order.tolist()]
        packed["mask_ends"] = np.cumsum([0, *map(len, codes)])
        packed["mask_rle"] = np.frombuffer(b"".join(codes), np.uint8)
    return packed


def _encode(file: Path, number: int, entries: Sequence[Entry], size: list[int]) -> bytes:
    """The mask of an annotation as COCO's compressed run lengths."""
    given = entries[number].get("segmentation")
    needed = "a segmentation (polygons, or an RLE of its image's size), and an image with height and width"
    if 0 in size:
        raise bad(file, "annotations", number, entries, needed)

    if isinstance(given, dict) and given.get("size") == size:
        counts, pixels = given.get("counts"), size[0] * size[1]
        if isinstance(counts, str) and counts.isascii() and _covers(counts.encode(), pixels):
            return counts.encode()
        if isinstance(counts, list) and all(type(run) is int and run >= 0 for run in counts) and sum(counts) == pixels:
            return bytes(rle.frPyObjects(given, *size)["counts"])
    elif isinstance(given, list) and all(map(_is_polygon, given)):
        polygons = [one for one in given if len(one) >= 6]  # pycocotools would take four numbers for a box
        if polygons:
            return bytes(rle.merge(rle.frPyObjects(polygons, *size))["counts"])
        return bytes(rle.frPyObjects({"size": size, "counts": [size[0] * size[1]]}, *size)["counts"])
    raise bad(file, "annotations", number, entries, needed)


def _covers(code: bytes, pixels: int) -> bool:
    """Whether compressed run lengths are sound: pycocotools leaves pixels that none covers as the memory was.

    The format (cocoapi, maskApi.c, rleToString): five bits a character from '0' on, the sixth says that the number goes
    on, the fifth of its last character is the sign; from the fourth number on, differences to the one two before.
    """
    signs = np.frombuffer(code, np.uint8).astype(np.int64) - 48
    goes_on = (signs & 32) > 0
    if not len(signs) or (signs < 0).any() or (signs > 63).any() or goes_on[-1]:
        return False
    first = np.flatnonzero(np.concatenate([[True], ~goes_on[:-1]]))
    place = np.arange(len(signs)) - np.repeat(first, np.diff(first, append=len(signs)))
    if place.max() > 6:  # 35 bits: more than an image has pixels
        return False
    numbers = np.add.reduceat((signs & 31) << 5 * place, first)
    last = np.append(first[1:], len(signs)) - 1
    numbers -= np.where(signs[last] & 16, 1 << 5 * (place[last] + 1), 0)
    runs = numbers.copy()
    for start in (1, 2):
        runs[start::2] = np.cumsum(numbers[start::2])
    return bool((runs >= 0).all()) and int(runs.sum()) == pixels


def _is_polygon(given: object) -> bool:
    if not isinstance(given, list):
        return False
    return all(type(value) in (int, float) and abs(value) < _MAX_COORDINATE for value in given)  # False for NaN
