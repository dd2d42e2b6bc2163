"""Annotation files in COCO's instances format: one parser for training, checking and scoring.

What cannot be meant is an error that names the entry; what is odd is counted in the notes. For training, boxes become
flat arrays that every worker shares: a Python object per image or annotation would be copied into every worker.
"""

import itertools
import math
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as rle

from visionmtl.config.text_files import read_json, shown
from visionmtl.io.index import Arrays, cached
from visionmtl.io.objects import MAX_COORDINATE, is_side
from visionmtl.io.paths import check_distinct, composed, is_unicode, stays_inside, without_ending
from visionmtl.structures import MAX_CLASSES, Boxes, has_controls

Entry = dict[str, Any]

_DROPPED = (
    "with NaN or infinite coordinates",
    "of images the file does not list",
    "without width or height",
    "outside their image",
)
_NUM_UNUSABLE = 2  # reasons, from the first, that also hold for scoring; boxes of the others are official truth, if odd
_FEW = 10  # boxes, of which too little can be told
OTHER_KIND = len(_DROPPED)
"""The reason of what is no box of interest; it is left out without a note."""


class AnnotationIndex:
    """The images and categories of a file, images in its order."""

    def __init__(self, file: Path, arrays: Mapping[str, NDArray]) -> None:
        self.file, self.arrays = file, arrays

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def image_ids(self) -> NDArray[np.bytes_]:
        """[I] as `canonical` writes them, in UTF-8."""
        return self.arrays["image_ids"]

    @property
    def names(self) -> NDArray[np.bytes_]:
        """[I] file names in UTF-8: relative, with / and without `..`."""
        return self.arrays["names"]

    def image_id(self, row: int) -> str:
        """The id of image `row`, as `canonical` writes it."""
        return bytes(self.image_ids[row]).decode()

    def name(self, row: int) -> str:
        """The file name of image `row`."""
        return bytes(self.names[row]).decode()

    def size(self, row: int) -> tuple[int, int]:
        """(H, W) as the file says; 0 where it does not."""
        height, width = self.arrays["sizes"][row]
        return int(height), int(width)

    @property
    def categories(self) -> tuple[tuple[int, str], ...]:
        """(official id, name), by id; a label is a position in here. Raises ValueError for ids that are no numbers."""
        ids, names = ([text.decode() for text in self.arrays[f"category_{key}"].tolist()] for key in ("ids", "names"))
        if texts := [text for text in ids if not _is_whole(text)]:
            raise ValueError(
                f"{self.file}: categories has id {texts[0]!r}; whole numbers are needed, since predictions are written "
                "with them; number the categories"
            )
        return tuple((int(text), name) for text, name in zip(ids, names, strict=True))

    def check_size(self, row: int, image: Path, size: tuple[int, ...], advice: str) -> None:
        """Raises ValueError unless the file `image`, whose (H, W) is `size`, is as large as the entry says."""
        if self.size(row) not in (size, (0, 0)):
            raise ValueError(
                f"{image} is {size}, {self.file} says {self.size(row)} (height, width); boxes would not fit; {advice}"
            )

    def part(self, row: int) -> slice:
        """The part of the flat arrays that belongs to image `row`."""
        start = self.arrays["start"]
        return slice(int(start[row]), int(start[row + 1]))


class BoxIndex(AnnotationIndex):
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
                "lie in their image; correct it, or give height and width there: such boxes are dropped then"
            )
        return boxes

    @property
    def most(self) -> int:
        """Boxes in the fullest image."""
        return int(np.diff(self.arrays["start"]).max(initial=0))

    def masks(self, row: int) -> list[NDArray[np.bool_]]:
        """[H, W] for each box of image `row`; only after `read_boxes(file, masks=True)`."""
        part, size = self.part(row), list(self.size(row))
        ends, content = self.arrays["mask_ends"][part.start : part.stop + 1].tolist(), self.arrays["mask_rle"]
        codes = [{"size": size, "counts": content[a:b].tobytes()} for a, b in itertools.pairwise(ends)]
        return list(rle.decode(codes).astype(bool).transpose(2, 0, 1)) if codes else []

    def report(self) -> list[str]:
        """What was dropped and what is odd, a sentence each; empty for a sound file."""
        return [f"{self.file}: {note.decode()}" for note in self.arrays["notes"].tolist()]


class BoxesByStem:
    """The boxes of an instances file for images known by file name without folder and ending, in their order."""

    def __init__(self, file: Path, stems: Sequence[str], advice: str) -> None:
        """stems: file names of the images without folder and ending, each once; advice: how to get a sound file."""
        self.file, self._index, self._advice = file, read_boxes(file), advice
        self.most = self._index.most
        """Boxes in the fullest image of the file."""
        self.ids = tuple(number for number, _ in self._index.categories)
        """Official ids of the classes."""
        self.names = tuple(name for _, name in self._index.categories)
        listed = [composed(Path(self._index.name(row)).stem) for row in range(len(self._index))]
        check_distinct(listed, f"{file}, file_name without folder and ending", "correct or remove an entry")
        row_of = {stem: row for row, stem in enumerate(listed)}
        self._rows = np.array([row_of.get(composed(stem), -1) for stem in stems])

        self.notes = self._index.report()
        """What is odd about the file, a sentence each."""
        missing, others = int((self._rows < 0).sum()), len(listed) - len(stems) + int((self._rows < 0).sum())
        if missing == len(stems):
            raise ValueError(
                f"{file} lists none of the {missing} images of the split; an entry in `images` says that somebody "
                f"looked for boxes; leave boxes out of `labels`, or {advice}"
            )
        if missing:
            self.notes.append(f"{file} does not list {missing} of {len(stems)} images: boxes not labelled there")
        if others:
            self.notes.append(f"{file}: {others} of its {len(listed)} images are not in the split")

    def of(self, index: int, size: tuple[int, ...], image: Path) -> Boxes | None:
        """None for an image that the file does not list: nobody looked. size: (H, W) of the image as it was read."""
        row = int(self._rows[index])
        if row < 0:
            return None
        self._index.check_size(row, image, size, self._advice)
        return self._index.of(row, size)


def read_boxes(file: Path, masks: bool = False) -> BoxIndex:
    """An instances file; with `masks`, its polygons and RLEs as well.

    Raises ValueError naming the entry for: no file, incomplete JSON, an entry without what it needs, an id of an image
    or category given twice, a category that is not listed, a file name that leaves the folder of the images.
    """
    kind = "boxes+masks-3" if masks else "boxes-3"
    return BoxIndex(file, cached(existing(file), kind, lambda: _Instances(file).pack(masks)))


def box_index(content: Mapping[str, Any], where: Path) -> BoxIndex:
    """As `read_boxes`, of the content of such a file; where: the files that it was made from, for messages."""
    return BoxIndex(where, Arrays(_Instances(where, content=content).pack(masks=False)))


@dataclass(frozen=True)
class Truth:
    """An instances file as `metrics.coco_ap` counts it: every box as written, in float64."""

    images: list[Entry]
    """By id: their number from 1 as `id`, height and width where they are given."""
    image_ids: list[str]
    """The id of each, as `canonical` writes it."""
    names: list[str]
    """The file name of each without its ending, as `canonical` writes it; "" where there is none."""
    categories: list[tuple[str, str]]
    """(id as `canonical` writes it, name), by id."""
    annotations: list[Entry]
    """image_id is the image's number, category_id a position in `categories`; `segmentation` is an RLE."""
    notes: list[str]


def read_truth(file: Path, masks: bool = False) -> Truth:
    """An instances file to score results against; images need no file name. Raises ValueError as `read_boxes` does.

    Boxes that have no extent or lie outside their image stay, as in COCO's own evaluation.
    """
    parsed = _Instances(existing(file), named=False)
    boxes, order = parsed.boxes, sorted(range(len(parsed.image_ids)), key=lambda row: id_order(parsed.image_ids[row]))
    number_of = {row: number for number, row in enumerate(order, start=1)}
    annotations: list[Entry] = []
    for at in np.flatnonzero((parsed.reasons < 0) | (parsed.reasons >= _NUM_UNUSABLE)).tolist():
        row = int(parsed.rows[at])
        entry: Entry = {
            "image_id": number_of[row],
            "category_id": int(parsed.box_labels[at]),
            "bbox": boxes.xywh[at].tolist(),
            "area": float(boxes.areas[at]),
            "iscrowd": int(boxes.crowd[at]),
        }
        if masks:
            size = parsed.sizes[row].tolist()
            entry["segmentation"] = {"size": size, "counts": encode(file, "annotations", at, parsed.entries, size)}
            if not boxes.has_area[at]:
                entry["area"] = float(rle.area(entry["segmentation"]))
        annotations.append(entry)
    return Truth(
        images=[{"id": number_of[row], "height": height, "width": width} if height else {"id": number_of[row]}
                for row in order for height, width in [parsed.sizes[row].tolist()]],
        image_ids=[parsed.image_ids[row] for row in order],
        names=[parsed.names[row] for row in order],
        categories=list(zip(parsed.category_ids, parsed.category_names, strict=True)),
        annotations=annotations,
        notes=[f"{file}: {note}" for note in parsed.notes(_NUM_UNUSABLE)],
    )  # fmt: skip


class Annotations:
    """The lists of an annotation file; images and categories are checked, the other entries as they are used."""

    def __init__(self, file: Path, named: bool = True, content: Mapping[str, Any] | None = None) -> None:
        """named: whether images need a file_name and classes must be few enough to learn; content: see `box_index`."""
        lists = read_lists(file, ("images", "annotations", "categories")) if content is None else content
        self.file, self.entries = file, lists["annotations"]
        images, categories = lists["images"], self._classes(lists["categories"])
        self.image_ids = ids_of(file, "images", images, "id", unique=True)
        self.names = file_names(file, "images", images) if named else [_name_of(entry) for entry in images]
        if named:
            _check_once(file, "images", images, "file_name", self.names)
        sizes = [[entry.get("height"), entry.get("width")] for entry in images]
        for number, (height, width) in enumerate(sizes):
            if not (height is None and width is None) and not (is_side(height) and is_side(width)):
                raise bad(file, "images", number, images, "height and width in whole pixels, or neither")
        self.sizes = np.array([[height or 0, width or 0] for height, width in sizes], np.int32).reshape(-1, 2)
        """[I, 2] (H, W); 0 where none is given."""

        if not categories or (named and len(categories) > MAX_CLASSES):
            raise ValueError(
                f"{file}: categories has {len(categories)} entries; allowed are 1 to {MAX_CLASSES}; list the classes "
                "there, or leave the label out"
            )
        ids = ids_of(file, "categories", categories, "id", unique=True)
        for number, entry in enumerate(categories):
            name = entry.get("name")
            if not isinstance(name, str) or not is_unicode(name) or has_controls(name):
                raise bad(file, "categories", number, categories, "a text as name, without control characters")
        names = [composed(entry["name"]) for entry in categories]  # files meet by these names
        _check_once(file, "categories", categories, "name", names)
        by_id = sorted(zip(ids, names, strict=True), key=lambda category: id_order(category[0]))
        self.category_ids, self.category_names = map(list, zip(*by_id, strict=True))

    def _classes(self, categories: list[Entry]) -> list[Entry]:
        return categories

    def image_ids_of_entries(self, unique: bool = False) -> list[str]:
        """The `image_id` of every annotation."""
        return ids_of(self.file, "annotations", self.entries, "image_id", unique)

    def image_rows(self) -> NDArray[np.int64]:
        """[A] position of every annotation's image in `image_ids`; -1 where it is none of them."""
        row_of = {image_id: row for row, image_id in enumerate(self.image_ids)}
        return np.array([row_of.get(text, -1) for text in self.image_ids_of_entries()], np.int64)

    def labels(self, what: str, entries: Sequence[Entry]) -> NDArray[np.int64]:
        """Positions of the `category_id` of entries of the list `what` in `category_ids`."""
        label_of = {category_id: label for label, category_id in enumerate(self.category_ids)}
        labels = [label_of.get(canonical(entry.get("category_id")) or "", -1) for entry in entries]
        if -1 in labels:
            raise bad(self.file, what, labels.index(-1), entries, "a category_id that `categories` lists")
        return np.array(labels, np.int64)

    def columns(self) -> dict[str, NDArray]:
        """What `AnnotationIndex` tells of images and categories."""
        return {
            "image_ids": text_array(self.image_ids),
            "names": text_array(self.names),
            "sizes": self.sizes,
            "category_ids": text_array(self.category_ids),
            "category_names": text_array(self.category_names),
        }


class _Instances(Annotations):
    """An instances file: every annotation is a box."""

    def __init__(self, file: Path, named: bool = True, content: Mapping[str, Any] | None = None) -> None:
        super().__init__(file, named, content)
        self.rows = self.image_rows()
        # the last row: of images that are not listed
        self.boxes = BoxColumns(file, "annotations", self.entries, np.concatenate([self.sizes, [[0, 0]]])[self.rows])
        self.box_labels = self.labels("annotations", self.entries)
        self.reasons = self.boxes.reasons(self.rows)

    def _classes(self, categories: list[Entry]) -> list[Entry]:
        """Without the category 0 of Roboflow, which no annotation has and all others name as their supercategory."""
        first = next((entry for entry in categories if canonical(entry.get("id")) == "0"), None)
        others = [entry for entry in categories if entry is not first]
        self._left_out = (
            first is not None
            and bool(others)
            and all(entry.get("supercategory") == first.get("name") for entry in others)
            and not any(canonical(entry.get("category_id")) == "0" for entry in self.entries)
        )
        return others if self._left_out else categories

    def notes(self, num_dropped: int = len(_DROPPED)) -> list[str]:
        """See `BoxColumns.notes`; with what is odd about ids."""
        ids = [entry["id"] for entry in self.entries if isinstance(entry.get("id"), int | str)]
        odd = (
            (len(ids) - len(set(ids)), "annotation ids repeat an earlier one (harmless unless ids are looked up)"),
            (ids.count(0), "annotations have id 0 (harmless here; pycocotools takes a match with it for no match)"),
            (int(self._left_out), "category with id 0 only names the supercategory of all others and has no annotation "
                                  "(left out)"),
        )  # fmt: skip
        noted = [f"{count} {what}" for count, what in odd if count]
        return [*self.boxes.notes(self.reasons, num_dropped), *noted]

    def pack(self, masks: bool) -> dict[str, NDArray]:
        """The arrays of `BoxIndex`."""
        order = kept_order(self.reasons, self.rows)
        notes = self.notes()
        if not len(self.entries):
            notes.append(f"lists no box at all; all {len(self.image_ids)} images count as looked at and empty")
        packed = {
            **self.columns(),
            **self.boxes.pack(order, self.rows, len(self.image_ids)),
            "labels": self.box_labels[order],
            "notes": text_array(notes),
        }
        if masks:
            sizes = self.sizes[self.rows]
            codes = [encode(self.file, "annotations", at, self.entries, sizes[at].tolist()) for at in order.tolist()]
            packed["mask_ends"] = np.cumsum([0, *map(len, codes)])
            packed["mask_rle"] = np.frombuffer(b"".join(codes), np.uint8)
        return packed


def check_unit(place: str, xywh: NDArray, sizes: NDArray | None = None) -> None:
    """Raise ValueError where boxes [N, 4] are surely no x, y, width, height in pixels, but fractions or corners.

    place: the file, with what else tells where they are
    sizes: [N, 2] (H, W) of each one's image, 0 where it is not known; None: not known at all
    """
    if len(xywh) and (xywh >= 0).all() and (xywh <= 1).all() and (xywh % 1 != 0).any():
        raise ValueError(
            f"{place}: all {len(xywh)} boxes lie in 0..1, the first is {xywh[0].tolist()}; COCO's are pixels, x, y, "
            "width, height; multiply by width and height of the image (boxes as fractions are YOLO's, format: yolo)"
        )
    if sizes is None or len(xywh) < _FEW:
        return
    edges = np.where(sizes > 0, sizes, np.inf)[:, ::-1]
    are_corners = (xywh[:, 2:] > xywh[:, :2]).all() and (xywh[:, 2:] <= edges + 1).all()
    beyond = (xywh[:, :2] > edges + 1 - xywh[:, 2:]).any(axis=1)
    if are_corners and beyond.mean() > 0.25:
        first = int(np.argmax(beyond))
        raise ValueError(
            f"{place}: all {len(xywh)} boxes end inside their image as corners x1, y1, x2, y2, and {beyond.sum()} end "
            f"outside as x, y, width, height, the first is {xywh[first].tolist()}; COCO's are x, y, width, height; "
            "write x2 - x1 and y2 - y1 in place of x2 and y2"
        )


class BoxColumns:
    """bbox, area and iscrowd of entries, checked and as columns."""

    def __init__(self, file: Path, what: str, entries: Sequence[Entry], sizes: NDArray) -> None:
        """what: the list that the entries are from; sizes: (H, W) of each one's image, 0 where it is not known."""
        written = [entry.get("bbox") for entry in entries]
        for number, box in enumerate(written):
            if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
                raise bad(file, what, number, entries, "four numbers x, y, width, height as bbox")
        self.xywh = np.array(written, np.float64).reshape(-1, 4)
        check_unit(str(file), self.xywh, sizes)
        areas = np.array([entry["area"] if is_number(entry.get("area")) else math.nan for entry in entries])
        with np.errstate(over="ignore", invalid="ignore"):  # what becomes infinite is dropped
            xyxy = np.concatenate([self.xywh[:, :2], self.xywh[:, :2] + self.xywh[:, 2:]], axis=1)
            self.xyxy = xyxy.astype(np.float32)  # what has no extent there counts as having none
            self.has_area = np.isfinite(areas.astype(np.float32)) & (areas >= 0)
            self.areas = np.where(self.has_area, areas, self.xywh[:, 2] * self.xywh[:, 3])
        crowd = [entry.get("iscrowd", 0) for entry in entries]
        for number, value in enumerate(crowd):
            if value is not None and (not isinstance(value, int | float) or value not in (0, 1)):
                raise bad(file, what, number, entries, "0 or 1 as iscrowd")
        self.crowd = np.array([bool(value) for value in crowd], np.bool_)

        self._edges = np.where(sizes > 0, sizes, np.inf)[:, ::-1]  # a size that is not given limits nothing
        beyond = np.any((self.xyxy[:, :2] < -1) | (self.xyxy[:, 2:] > self._edges + 1), axis=1)
        has_value = np.array([entry.get("area") is not None for entry in entries], np.bool_)
        null_areas = np.array(["area" in entry for entry in entries], np.bool_) & ~has_value
        self._odd: dict[str, NDArray] = {
            "boxes reach more than 1 px beyond their image (kept as they are, as official evaluation does)": beyond,
            "areas are negative or no number (the box's own is taken)": ~self.has_area & has_value,
            "annotations have null as area (the box's own is taken)": null_areas,
            "annotations have null as iscrowd (taken as 0)": np.array([value is None for value in crowd], np.bool_),
        }

    def reasons(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Why each box is dropped, as a position in _DROPPED; -1 where it is kept. rows: their images, -1 = unknown."""
        xyxy = self.xyxy
        each = (
            ~np.isfinite(xyxy).all(axis=1),
            rows < 0,
            ~(xyxy[:, 2:] > xyxy[:, :2]).all(axis=1),
            (xyxy[:, 2:] <= 0).any(axis=1) | (xyxy[:, :2] >= self._edges).any(axis=1),
        )
        return np.select(each, range(len(each)), -1)

    def notes(self, reasons: NDArray[np.int64], num_dropped: int = len(_DROPPED)) -> list[str]:
        """What was dropped, by the first `num_dropped` reasons, what was scored all the same, and what is odd."""
        counts = [int(np.count_nonzero(reasons == number)) for number in range(len(_DROPPED))]
        each = [f"{count} {why}" for count, why in zip(counts, _DROPPED, strict=True)][:num_dropped]
        dropped = [text for text, count in zip(each, counts, strict=False) if count]
        total, notes = np.count_nonzero(reasons < OTHER_KIND), []
        if dropped:
            text = ", ".join(dropped)
            notes.append(f"dropped {sum(counts[:num_dropped])} of {total} boxes: {text}; correct or remove them")
        for count, why in zip(counts[num_dropped:], _DROPPED[num_dropped:], strict=True):
            notes += [f"{count} boxes {why} (scored, as official evaluation does)"] if count else []
        for what, which in self._odd.items():
            if odd := np.count_nonzero(which & (reasons < 0)):
                notes.append(f"{odd} {what}")
        return notes

    def pack(self, order: NDArray[np.int64], rows: NDArray[np.int64], num_images: int) -> dict[str, NDArray]:
        """start, xyxy, crowd and area of the boxes in `order`, which goes by their image's row."""
        return {
            "start": np.searchsorted(rows[order], np.arange(num_images + 1)),
            "xyxy": self.xyxy[order],
            "crowd": self.crowd[order],
            "area": self.areas[order].astype(np.float32),
        }


def kept_order(reasons: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions of the boxes that are kept, by image, in the file's order within one."""
    order = np.argsort(rows, kind="stable")
    return order[reasons[order] < 0]


def existing(file: Path) -> Path:
    """The file itself; raises ValueError where there is none."""
    if not file.is_file():
        raise ValueError(
            f"found no {file}{', but a folder of that name' if file.is_dir() else ''}; one annotation file in COCO's "
            "JSON format is needed; check the path, or leave the label out"
        )
    return file


def read_lists(file: Path, keys: Sequence[str]) -> dict[str, list[Entry]]:
    """The lists under these keys, all of whose entries are objects."""
    content = read_json(file)
    missing = [key for key in keys if not isinstance(content, dict) or not isinstance(content.get(key), list)]
    if missing:
        raise ValueError(
            f"{file} has no list {', '.join(map(repr, missing))}; an annotation file of COCO's format is needed "
            "(results and image_info files are none); name another file, or leave out the label"
        )
    for key in keys:
        check_objects(file, key, content[key])
    return {key: content[key] for key in keys}


def check_objects(file: Path, what: str, entries: Sequence[Any]) -> None:
    """Raises ValueError for the first entry of the list `what` that is no object."""
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise bad(file, what, number, entries, "an object {...}")


def canonical(value: object) -> str | None:
    """An id as text by which ids are compared; None for what is no id.

    139, 139.0, "139" and "000000000139" are one, and so are texts in two Unicode forms.
    """
    if type(value) is int:
        return str(value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if not isinstance(value, str) or not value or "\0" in value or not is_unicode(value):
        return None
    return (value.lstrip("0") or "0") if value.isascii() and value.isdecimal() else composed(value)


def _name_of(image: Entry) -> str:
    """See `Truth.names`."""
    name = image.get("file_name")
    return (canonical(without_ending(name)) if isinstance(name, str) else None) or ""


def id_order(text: str) -> tuple[bool, int, str]:
    """Sorts ids: numbers first, by value, then texts."""
    return (False, int(text), "") if _is_whole(text) else (True, 0, text)


def _is_whole(text: str) -> bool:
    return re.fullmatch(r"-?[0-9]{1,18}", text) is not None


def ids_of(file: Path, what: str, entries: Sequence[Entry], key: str, unique: bool = False) -> list[str]:
    """The id under `key` of every entry, as `canonical` writes it; `what` is the list's name."""
    texts = [canonical(entry.get(key)) for entry in entries]
    if None in texts:
        raise bad(file, what, texts.index(None), entries, f"a whole number or a text as {key}")
    if unique:
        _check_once(file, what, entries, key, texts)
    return [text for text in texts if text is not None]


def text_array(texts: Sequence[str]) -> NDArray[np.bytes_]:
    """UTF-8, as long as the longest."""
    return np.array([text.encode() for text in texts], np.bytes_)


def file_names(file: Path, what: str, entries: Sequence[Entry]) -> list[str]:
    """`file_name` of every entry, none of which leaves its folder."""
    names = [entry.get("file_name") for entry in entries]
    names = [name.removeprefix("./") if isinstance(name, str) else name for name in names]
    for number, name in enumerate(names):
        if not isinstance(name, str) or not stays_inside(name):
            raise bad(file, what, number, entries, "a file_name relative to the folder, with / and without '..'")
    return [str(name) for name in names]


def is_number(value: Any) -> bool:
    """Whether a float64 can hold it; NaN is a number in this, True is none."""
    return type(value) is float or (type(value) is int and abs(value) < 2**1023)


def _check_once(file: Path, what: str, entries: Sequence[Entry], key: str, values: Sequence[Hashable]) -> None:
    """Raises ValueError for the first value that an earlier entry has."""
    if len(set(values)) == len(values):
        return
    seen: set[Hashable] = set()
    for number, value in enumerate(values):
        if value in seen:
            raise bad(file, what, number, entries, f"its own {key}, which no other entry has")
        seen.add(value)


def bad(file: Path, what: str, number: int, entries: Sequence[Any], needed: str) -> ValueError:
    """The error for entry `number` of the list `what`; of a file that is one list, `what` is "entry"."""
    return ValueError(f"{file}: {what}[{number}] is {shown(entries[number])}; it needs {needed}; correct or remove it")


def encode(file: Path, what: str, number: int, entries: Sequence[Entry], size: list[int]) -> bytes:
    """The `segmentation` of an entry, polygons or run lengths, as COCO's compressed run lengths of its image's size.

    Raises ValueError for run lengths that do not cover the image: pycocotools would crash, or read past their end.
    """
    mask = entries[number].get("segmentation")
    needed = "a segmentation (polygons, or an RLE of its image's size), and an image with height and width"
    if 0 in size:
        raise bad(file, what, number, entries, needed)

    if isinstance(mask, dict) and mask.get("size") == size:
        counts, pixels = mask.get("counts"), size[0] * size[1]
        if isinstance(counts, str) and counts.isascii() and _covers(counts.encode(), pixels):
            return counts.encode()
        if isinstance(counts, list) and all(type(run) is int and run >= 0 for run in counts) and sum(counts) == pixels:
            return bytes(rle.frPyObjects({"size": size, "counts": counts}, *size)["counts"])
    elif isinstance(mask, list) and mask and all(map(_is_polygon, mask)):
        polygons = [polygon for polygon in mask if len(polygon) >= 6]  # pycocotools would take four numbers for a box
        if polygons:
            return bytes(rle.merge(rle.frPyObjects(polygons, *size))["counts"])
        return bytes(rle.frPyObjects({"size": size, "counts": [size[0] * size[1]]}, *size)["counts"])
    raise bad(file, what, number, entries, needed)


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


def _is_polygon(part: object) -> bool:
    # False for NaN
    return isinstance(part, list) and all(type(x) in (int, float) and abs(x) < MAX_COORDINATE for x in part)
