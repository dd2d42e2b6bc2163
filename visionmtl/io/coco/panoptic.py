"""Annotation files in COCO's panoptic format as flat arrays, and their PNGs as class maps."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from visionmtl.io.coco.annotations import (
    AnnotationIndex,
    Annotations,
    Entry,
    bad,
    existing,
    file_names,
    text_array,
)
from visionmtl.io.images import read_png
from visionmtl.io.index import cached
from visionmtl.structures import IGNORE


class SegmentIndex(AnnotationIndex):
    """Which PNG belongs to an image, and which classes the segment ids in it stand for."""

    def png(self, row: int) -> str | None:
        """The file name of the PNG of image `row`; None where nobody labelled the image."""
        return bytes(self.arrays["pngs"][row]).decode() or None

    def read(self, file: Path, row: int, size: tuple[int, ...]) -> NDArray[np.uint8]:
        """The PNG `file` of image `row` as positions in `categories`, [H, W]; void is IGNORE. `size` is the image's."""
        colours = read_png(file)
        if colours.shape != (*size, 3) or colours.dtype != np.uint8:
            raise ValueError(
                f"{file} is {colours.dtype} {colours.shape}, its image {size}; a panoptic PNG has three channels of "
                "8 bits and the size of its image; fetch it again"
            )
        blue, green, red = (colours[..., channel].astype(np.int32) for channel in range(3))  # OpenCV's order
        codes = red + 256 * green + 65536 * blue

        part, classes = self.part(row), np.full(codes.shape, IGNORE, np.uint8)
        known = codes == 0  # void
        for segment, label in zip(self.arrays["segment_ids"][part], self.arrays["labels"][part], strict=True):
            pixels = codes == segment
            classes[pixels] = label
            known |= pixels
        if not known.all():
            raise ValueError(
                f"{file} holds segment {codes[~known][0]}, which {self.file} does not list for this image; the two "
                "must be of one release; fetch both again"
            )
        return classes


def read_segments(file: Path) -> SegmentIndex:
    """A panoptic file. Raises ValueError naming the entry, as `read_boxes` does."""
    return SegmentIndex(file, cached(existing(file), "segments-3", lambda: _pack(file)))


def _pack(file: Path) -> dict[str, NDArray]:
    annotations = Annotations(file)
    entries, rows = annotations.entries, annotations.image_rows()
    check_segments(file, entries)
    _check_once(file, entries, rows)

    of_row = dict(zip(rows.tolist(), zip(file_names(file, "annotations", entries), entries, strict=True), strict=True))
    empty: tuple[str, Entry] = ("", {"segments_info": []})
    ordered = [of_row.get(row, empty) for row in range(len(annotations.image_ids))]
    counts = [len(entry["segments_info"]) for _, entry in ordered]
    segments = [segment for _, entry in ordered for segment in entry["segments_info"]]
    return {
        **annotations.columns(),
        "pngs": text_array([name for name, _ in ordered]),
        "start": np.cumsum([0, *counts]),
        "segment_ids": _segment_ids(file, segments, np.repeat(np.arange(len(ordered)), counts)),
        "labels": annotations.labels("segments_info", segments).astype(np.uint8),
    }


def _segment_ids(file: Path, segments: Sequence[Entry], rows: NDArray[np.int64]) -> NDArray[np.int32]:
    """Ids that three channels of 8 bits can hold, without void, and once an image."""
    for number, segment in enumerate(segments):
        if type(segment.get("id")) is not int or not 0 < segment["id"] < 2**24:
            raise bad(file, "segments_info", number, segments, "an id of 1 to 16777215; 0 is void")
    ids = np.array([segment["id"] for segment in segments], np.int32)
    first = np.unique(np.stack([rows, ids]), axis=1, return_index=True)[1]
    if len(first) < len(ids):
        repeated = np.setdiff1d(np.arange(len(ids)), first)[0]
        raise bad(file, "segments_info", int(repeated), segments, "its own id, which no other segment of its image has")
    return ids


def _check_once(file: Path, entries: Sequence[Entry], rows: NDArray[np.int64]) -> None:
    """One annotation an image, of an image that is listed."""
    first = set(np.unique(rows, return_index=True)[1].tolist())
    for number, row in enumerate(rows.tolist()):
        if row < 0 or number not in first:
            raise bad(file, "annotations", number, entries, "an image_id that `images` lists, once")


def check_segments(file: Path, entries: Sequence[Entry]) -> None:
    """Raises ValueError for the first annotation without a list of segments."""
    for number, entry in enumerate(entries):
        segments = entry.get("segments_info")
        if not isinstance(segments, list) or not all(isinstance(segment, dict) for segment in segments):
            raise bad(file, "annotations", number, entries, "a list of objects {...} as segments_info")
