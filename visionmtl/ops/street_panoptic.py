"""Boxes of Cityscapes' panoptic json, as flat arrays: Python objects per box would be copied into every worker."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from visionmtl.ops.coco_entries import (
    Entry,
    areas,
    bad,
    check_once,
    corners,
    crowds,
    integers,
    look_up,
    pack_categories,
    read_lists,
)
from visionmtl.ops.street_labels import THINGS8
from visionmtl.structures import Boxes

_DROPPED = ("with NaN or infinite coordinates", "without width or height", "outside their image")


class PanopticBoxes:
    """The things of some images, from the file that csCreatePanopticImgs of cityscapesscripts makes."""

    def __init__(self, file: Path, image_ids: Sequence[str]) -> None:
        """image_ids: "aachen_000000_000019" and the like.

        Raises ValueError naming the entry that lacks what it needs, and for a file of train ids.
        """
        self.file = file
        lists = read_lists(file, ("images", "annotations", "categories"))
        columns = pack_categories(file, lists["categories"])
        _check_names(file, columns["category_ids"].tolist(), columns["category_names"].tolist())
        images, entries = lists["images"], lists["annotations"]
        sizes = dict(zip(_texts(file, "images", images, "id"), (_size(one) for one in images), strict=True))
        listed = _texts(file, "annotations", entries, "image_id")
        for number, entry in enumerate(entries):
            found = entry.get("segments_info")
            if not isinstance(found, list) or not all(isinstance(segment, dict) for segment in found):
                raise bad(file, "annotations", number, entries, "a list of objects {...} as segments_info")

        index_of = {image_id: index for index, image_id in enumerate(image_ids)}
        known = [(index_of[one], one, entry) for one, entry in zip(listed, entries, strict=True) if one in index_of]
        segments = [segment for _, _, entry in known for segment in entry["segments_info"]]
        counts = [len(entry["segments_info"]) for _, _, entry in known]
        rows = np.repeat(np.array([row for row, _, _ in known], np.int64), counts)
        limits = np.array([sizes.get(one, (np.inf, np.inf)) for _, one, _ in known], np.float64).reshape(-1, 2)

        categories = integers(file, "segments_info", segments, "category_id")
        strange = look_up(columns["category_ids"], categories) < 0
        if strange.any():
            raise bad(file, "segments_info", int(np.argmax(strange)), segments, "a category_id that `categories` lists")
        labels = look_up(np.array(THINGS8.ids), categories)
        things = np.flatnonzero(labels >= 0)
        xyxy = corners(file, "segments_info", segments)
        reasons = (
            ~np.isfinite(xyxy).all(axis=1),
            ~(xyxy[:, 2:] > xyxy[:, :2]).all(axis=1),
            (xyxy[:, 2:] <= 0).any(axis=1) | (xyxy[:, :2] >= np.repeat(limits, counts, axis=0)[:, ::-1]).any(axis=1),
        )
        reason = np.select(reasons, range(len(reasons)), -1)
        kept = things[reason[things] < 0]
        kept = kept[np.argsort(rows[kept], kind="stable")]

        self.notes: list[str] = []
        """What was dropped or cannot be meant, a sentence each."""
        for number, why in enumerate(_DROPPED):
            if count := np.count_nonzero(reason[things] == number):
                self.notes.append(f"{file}: dropped {count} of {len(things)} boxes {why}; correct or remove them")
        edges = np.repeat(limits, counts, axis=0)[kept, ::-1]
        if count := np.count_nonzero(((xyxy[kept, :2] < 0) | (xyxy[kept, 2:] > edges)).any(axis=1)):
            self.notes.append(f"{file}: {count} boxes reach beyond their image (kept as they are)")
        self._area, wrong = areas([segments[i] for i in kept], xyxy[kept])
        if wrong:
            self.notes.append(f"{file}: {wrong} areas are negative or no number (the box's own is taken)")
        self.listed = np.zeros(len(image_ids), np.bool_)
        """bool [N]: which images have an entry, be it without things."""
        self.listed[[row for row, _, _ in known]] = True
        self._start = np.searchsorted(rows[kept], np.arange(len(image_ids) + 1))
        self._file, self._sizes = file, np.full((len(image_ids), 2), np.inf)
        self._sizes[[row for row, _, _ in known]] = limits
        self._xyxy, self._labels = xyxy[kept], labels[kept].astype(np.int64)
        self._crowd = crowds(file, "segments_info", segments)[kept]

    def of(self, index: int, image: Path, size: tuple[int, ...]) -> Boxes:
        """Boxes of an image, in the file's order. image, size: its file, and (H, W) as read; these must fit."""
        declared = tuple(self._sizes[index].tolist())
        if declared not in (size, (np.inf, np.inf)):
            raise ValueError(
                f"{image} is {size}, {self._file} says {declared} (height, width); boxes would not fit; make the json "
                "anew with csCreatePanopticImgs"
            )
        part = slice(self._start[index], self._start[index + 1])
        columns: tuple[NDArray, ...] = (self._xyxy, self._labels, self._crowd, self._area)
        return Boxes(*(column[part].copy() for column in columns))


def _check_names(file: Path, ids: Sequence[int], names: Sequence[bytes]) -> None:
    theirs = {number: name.decode() for number, name in zip(ids, names, strict=True)}
    ours = dict(zip(THINGS8.ids, THINGS8.classes, strict=True))
    if any(theirs.get(number) != name for number, name in ours.items()):
        raise ValueError(
            f"{file} calls categories {sorted(ours)} {[theirs.get(number) for number in sorted(ours)]}; needed are "
            "the official ids, not train ids; make it with csCreatePanopticImgs without --use-train-id"
        )


def _texts(file: Path, what: str, entries: Sequence[Entry], key: str) -> list[str]:
    """The text under `key` of every entry, which no other has."""
    values = [entry.get(key) for entry in entries]
    for number, value in enumerate(values):
        if not isinstance(value, str):
            raise bad(file, what, number, entries, f"a text such as 'aachen_000000_000019' as {key}")
    texts = [str(value) for value in values]
    check_once(file, what, entries, key, texts)
    return texts


def _size(image: Entry) -> tuple[float, float]:
    """(H, W) as declared; infinite where it is not, which limits nothing."""
    height, width = image.get("height"), image.get("width")
    if type(height) is int and type(width) is int and height > 0 and width > 0:
        return float(height), float(width)
    return np.inf, np.inf
