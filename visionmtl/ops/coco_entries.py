"""What COCO's JSON formats share: lists of entries with ids, checked and turned into flat columns.

No Python object per image or annotation stays behind: those would be copied into every worker that looks at them.
"""

import json
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visionmtl.ops.file_names import stays_inside
from visionmtl.ops.index_cache import Arrays

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
    content = _parse(file)
    missing = [
        key
        for key in ("images", "annotations", "categories")
        if not isinstance(content, dict) or not isinstance(content.get(key), list)
    ]
    if missing:
        raise ValueError(
            f"{file} has no list {', '.join(map(repr, missing))}; an annotation file of COCO's format is needed "
            "(results and image_info files are none); name another file, or leave out the label"
        )
    for key in ("images", "annotations", "categories"):
        for number, entry in enumerate(content[key]):
            if not isinstance(entry, dict):
                raise bad(file, key, number, content[key], "an object {...}")
    columns = {**_pack_images(file, content["images"]), **_pack_categories(file, content["categories"])}
    return columns, content["annotations"]


def _parse(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
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
    _check_once(file, "images", entries, "id", ids.tolist())
    _check_once(file, "images", entries, "file_name", names)
    sizes = [[entry.get("height"), entry.get("width")] for entry in entries]
    for number, (height, width) in enumerate(sizes):
        if not (height is None and width is None) and not (_is_natural(height) and _is_natural(width)):
            raise bad(file, "images", number, entries, "height and width in whole pixels, or neither")
    return {
        "image_ids": ids,
        "names": packed_text(names),
        "sizes": np.array([[height or 0, width or 0] for height, width in sizes], np.int32).reshape(-1, 2),
    }


def _pack_categories(file: Path, entries: Sequence[Entry]) -> dict[str, NDArray]:
    """category_ids [K] and category_names [K] of `categories`, by id."""
    ids = integers(file, "categories", entries, "id")
    _check_once(file, "categories", entries, "id", ids.tolist())
    for number, entry in enumerate(entries):
        if not isinstance(entry.get("name"), str):
            raise bad(file, "categories", number, entries, "a text as name")
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
        if not isinstance(value, int) or not -(2**63) <= value < 2**63:
            raise bad(file, what, number, entries, f"a whole number as {key}")
    return np.array(values, np.int64)


def file_names(file: Path, what: str, entries: Sequence[Entry]) -> list[str]:
    """`file_name` of every entry, none of which leaves its folder."""
    names = [entry.get("file_name") for entry in entries]
    for number, name in enumerate(names):
        if not isinstance(name, str) or not stays_inside(name):
            raise bad(file, what, number, entries, "a file_name relative to the folder, with / and without '..'")
    return [str(name) for name in names]


def _is_natural(value: Any) -> bool:
    """Whether a size can be that many pixels."""
    return isinstance(value, int) and 0 < value < 2**31


def _check_once(file: Path, what: str, entries: Sequence[Entry], key: str, values: Sequence[Hashable]) -> None:
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
