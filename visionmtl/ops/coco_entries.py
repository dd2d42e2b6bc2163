"""What COCO's JSON formats share: lists of entries with ids, checked and turned into flat columns.

No Python object per image or annotation stays behind: those would be copied into every worker that looks at them.
"""

import json
import math
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visionmtl.ops.file_names import is_unicode, stays_inside
from visionmtl.ops.index_cache import Arrays
from visionmtl.structures import MAX_CLASSES

Entry = dict[str, Any]


class Packed:
    """The images and categories of a file, images in its order."""

    def __init__(self, file: Path, arrays: Arrays) -> None:
        self.file, self.arrays = file, arrays

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def image_ids(self) -> NDArray[np.int64]:
        """[I]"""
        return self.arrays["image_ids"]

    @property
    def names(self) -> NDArray[np.bytes_]:
        """[I] file names in UTF-8: relative, with / and without `..`."""
        return self.arrays["names"]

    def name(self, row: int) -> str:
        """The file name of image `row`."""
        return bytes(self.names[row]).decode()

    def size(self, row: int) -> tuple[int, int]:
        """(H, W) as the file says; 0 where it does not."""
        height, width = self.arrays["sizes"][row]
        return int(height), int(width)

    @property
    def categories(self) -> tuple[tuple[int, str], ...]:
        """(official id, name), by id; a label is a position in here."""
        ids, names = self.arrays["category_ids"].tolist(), self.arrays["category_names"].tolist()
        return tuple((number, name.decode()) for number, name in zip(ids, names, strict=True))

    def part(self, row: int) -> slice:
        """Where what belongs to image `row` lies in the flat arrays."""
        start = self.arrays["start"]
        return slice(int(start[row]), int(start[row + 1]))


def load(file: Path) -> tuple[dict[str, NDArray], list[Entry]]:
    """The columns of `images` and `categories`, and the entries of `annotations`."""
    content = read_lists(file, ("images", "annotations", "categories"))
    columns = {**_pack_images(file, content["images"]), **pack_categories(file, content["categories"])}
    return columns, content["annotations"]


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
        for number, entry in enumerate(content[key]):
            if not isinstance(entry, dict):
                raise bad(file, key, number, content[key], "an object {...}")
    return {key: content[key] for key in keys}


def read_json(file: Path) -> Any:
    """What a JSON file holds, in UTF-8, -16 or -32, with or without a byte order mark."""
    try:
        return json.loads(file.read_bytes())
    # ValueError: no UTF-8, no JSON, or a number of thousands of digits; RecursionError: brackets in brackets
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{file} is no complete JSON: {error}; it may have been cut short; download or write it again"
        ) from error


def found(file: Path) -> Path:
    """The file itself; raises ValueError where there is none."""
    if not file.is_file():
        raise ValueError(
            f"found no {file}; an annotation file in COCO's JSON format is needed; check the path, or leave the label "
            "out"
        )
    return file


def _pack_images(file: Path, entries: Sequence[Entry]) -> dict[str, NDArray]:
    """image_ids [I], names [I] and sizes [I, 2] (H, W) of `images`."""
    ids, names = integers(file, "images", entries, "id"), file_names(file, "images", entries)
    check_once(file, "images", entries, "id", ids.tolist())
    check_once(file, "images", entries, "file_name", names)
    sizes = [[entry.get("height"), entry.get("width")] for entry in entries]
    for number, (height, width) in enumerate(sizes):
        if not (height is None and width is None) and not (_is_natural(height) and _is_natural(width)):
            raise bad(file, "images", number, entries, "height and width in whole pixels, or neither")
    return {
        "image_ids": ids,
        "names": packed_text(names),
        "sizes": np.array([[height or 0, width or 0] for height, width in sizes], np.int32).reshape(-1, 2),
    }


def pack_categories(file: Path, entries: Sequence[Entry]) -> dict[str, NDArray]:
    """category_ids [K] and category_names [K] of `categories`, by id."""
    if not 0 < len(entries) <= MAX_CLASSES:
        raise ValueError(
            f"{file}: categories has {len(entries)} entries; allowed are 1 to {MAX_CLASSES}; list the classes "
            "there, or leave the label out"
        )
    ids = integers(file, "categories", entries, "id")
    check_once(file, "categories", entries, "id", ids.tolist())
    for number, entry in enumerate(entries):
        if not isinstance(entry.get("name"), str) or not is_unicode(entry["name"]):
            raise bad(file, "categories", number, entries, "a text as name")
    check_once(file, "categories", entries, "name", [entry["name"] for entry in entries])
    order = np.argsort(ids)
    return {"category_ids": ids[order], "category_names": packed_text([entries[i]["name"] for i in order])}


def pack_labels(file: Path, what: str, entries: Sequence[Entry], category_ids: NDArray) -> NDArray[np.int64]:
    """Positions of the entries' `category_id` in `category_ids`."""
    labels = look_up(category_ids, integers(file, what, entries, "category_id"))
    if (labels < 0).any():
        raise bad(file, what, int(np.argmin(labels)), entries, "a category_id that `categories` lists")
    return labels


def packed_text(texts: Sequence[str]) -> NDArray[np.bytes_]:
    """UTF-8, as long as the longest."""
    return np.array([text.encode() for text in texts], np.bytes_)


def integers(file: Path, what: str, entries: Sequence[Entry], key: str) -> NDArray[np.int64]:
    """The whole number under `key` of every entry; `what` is the list's name."""
    values = [entry.get(key) for entry in entries]
    for number, value in enumerate(values):
        if type(value) is not int or not -(2**63) <= value < 2**63:  # True is an int, and no number here
            raise bad(file, what, number, entries, f"a whole number as {key}")
    return np.array(values, np.int64)


def file_names(file: Path, what: str, entries: Sequence[Entry]) -> list[str]:
    """`file_name` of every entry, none of which leaves its folder."""
    names = [entry.get("file_name") for entry in entries]
    for number, name in enumerate(names):
        if not isinstance(name, str) or not stays_inside(name):
            raise bad(file, what, number, entries, "a file_name relative to the folder, with / and without '..'")
    return [str(name) for name in names]


def corners(file: Path, what: str, entries: Sequence[Entry]) -> NDArray[np.float32]:
    """xyxy [A, 4] of every `bbox`; in float32, so that what has no extent there counts as having none."""
    given = [entry.get("bbox") for entry in entries]
    for number, box in enumerate(given):
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
            raise bad(file, what, number, entries, "four numbers x, y, width, height as bbox")
    xywh = np.array(given, np.float64).reshape(-1, 4)
    with np.errstate(over="ignore", invalid="ignore"):  # what becomes infinite is dropped
        return np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1).astype(np.float32)


def areas(entries: Sequence[Entry], xyxy: NDArray[np.float32]) -> tuple[NDArray[np.float32], int]:
    """The areas given, or the box's where there is none; and how many were given but cannot be meant."""
    given = [entry.get("area") for entry in entries]
    with np.errstate(over="ignore"):
        area = np.array([value if _is_number(value) else math.nan for value in given], np.float64).astype(np.float32)
    sound = np.isfinite(area) & (area >= 0)
    absent = sum(value is None for value in given)
    own = np.prod(xyxy[:, 2:] - xyxy[:, :2], axis=1)
    return np.where(sound, area, own).astype(np.float32), int(np.count_nonzero(~sound)) - absent


def crowds(file: Path, what: str, entries: Sequence[Entry]) -> NDArray[np.bool_]:
    """[A] `iscrowd` of every entry; absent or null means no."""
    given = [0 if entry.get("iscrowd") is None else entry["iscrowd"] for entry in entries]
    for number, value in enumerate(given):
        if not isinstance(value, int) or value not in (0, 1):
            raise bad(file, what, number, entries, "0 or 1 as iscrowd")
    return np.array(given, np.bool_)


def _is_number(value: Any) -> bool:
    """Whether a float64 can hold it; NaN is a number in this."""
    return type(value) is float or (type(value) is int and abs(value) < 2**1023)


def _is_natural(value: Any) -> bool:
    """Whether a size can be that many pixels."""
    return type(value) is int and 0 < value < 2**31


def check_once(file: Path, what: str, entries: Sequence[Entry], key: str, values: Sequence[Hashable]) -> None:
    """Raises ValueError for the first value that an earlier entry has."""
    if len(set(values)) == len(values):
        return
    seen: set[Hashable] = set()
    for number, value in enumerate(values):
        if value in seen:
            raise bad(file, what, number, entries, f"its own {key}, which no other entry has")
        seen.add(value)


def look_up(ids: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    """Position of each wanted id in `ids` (unique, in any order); -1 where it is none of them."""
    if not len(ids):
        return np.full(len(wanted), -1)
    order = np.argsort(ids)
    places = order[np.minimum(np.searchsorted(ids, wanted, sorter=order), len(ids) - 1)]
    return np.where(ids[places] == wanted, places, -1)


def bad(file: Path, what: str, number: int, entries: Sequence[Any], needed: str) -> ValueError:
    """The error for entry `number` of the list `what`."""
    text = json.dumps(entries[number])
    shown = text if len(text) <= 200 else f"{text[:200]} ..."
    return ValueError(f"{file}: {what}[{number}] is {shown}; it needs {needed}; correct or remove it")
