"""Writes any data set as shards: samples as they are read, images in the bytes that they have on disk.

What was written before a stop is kept, where it was made from the same settings and is whole, and is not written again.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from visionmtl.config.text_files import read_object
from visionmtl.data.stamps import stamps
from visionmtl.data.watched_loader import WatchedLoader
from visionmtl.data.workers import now_reading, now_resting
from visionmtl.datasets import Dataset, DatasetReader, NamedDataset, most_boxes, num_channels, read_part
from visionmtl.io.atomic import remove_unfinished
from visionmtl.io.images import SUFFIXES, decode_photo
from visionmtl.io.shards import (
    INDEX,
    FileEntry,
    Members,
    ShardEntry,
    ShardIndex,
    StoredImage,
    digest,
    lossless,
    read_index,
    read_members,
    read_whole,
    shard_name,
    to_members,
    write_index,
    write_shard,
)
from visionmtl.structures import ReadRequest, Sample


def write_shards(
    dataset: NamedDataset,
    spec: Dataset,
    folder: Path,
    shard_bytes: int,
    workers: int,
    on_sample: Callable[[], None] = lambda: None,
) -> ShardIndex:
    """Write the data set into a folder, which may hold shards of an earlier call, also damaged ones or with gaps.

    spec: its settings; shard_bytes: a shard takes no more, unless one sample does; on_sample: called after each
    Raises ValueError where the folder holds something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder)
    for tar in sorted(folder.glob("[0-9]" * len(shard_name(0)) + ".tar")):
        if not tar.with_suffix(".json").exists():
            raise ValueError(
                f"{tar} has no {tar.stem}.json beside it, which is written before a shard; nothing of yours is written "
                "over; choose another folder"
            )
    settings = spec.model_dump(mode="json", exclude={"name", "weight"})
    made_of = digest([settings, stamps(dataset).tolist(), shard_bytes])
    for file in sorted(folder.glob("[0-9]" * len(shard_name(0)) + ".json")):
        # raises for one that is not ours
        if read_object(file, {"first": int, "made_of": str})["made_of"] != made_of:
            raise _other(folder)
    finished = read_index(folder / INDEX) if (folder / INDEX).exists() else None
    if finished is not None and finished.made_of != made_of:
        raise _other(folder)
    work = _Members(dataset)
    entries, boxes = _written(folder, work, None if finished is None else finished.shards)
    if finished is not None:
        if tuple(entries) == finished.shards:
            return finished
        (folder / INDEX).unlink()  # until all that it lists is there again
    first = sum(entry.num_samples for entry in entries)
    for _ in range(first):
        on_sample()
    waiting: list[Members] = []
    size, most = 0, 0

    def close() -> None:
        nonlocal size, most, first
        entries.append(write_shard(folder, len(entries), first, waiting, most, made_of))
        boxes.append(most)
        first += len(waiting)
        waiting.clear()
        size = most = 0

    for members, num_boxes in work.items(first, workers):
        sample_bytes = sum(map(len, members.values()))
        if waiting and size + sample_bytes > shard_bytes:
            close()
        waiting.append(members)
        size, most = size + sample_bytes, max(most, num_boxes)
        on_sample()
    if waiting:
        close()
    index = ShardIndex(
        provides=dict(dataset.provides),
        channels=num_channels(dataset.reader),
        most_boxes=most_boxes(dataset.reader) if "boxes" not in dataset.provides else max(boxes),
        notes=tuple(" ".join(str(note).split()) for note in dataset.notes),
        shards=tuple(entries),
        made_of=made_of,
    )
    write_index(folder, index)
    return index


def _written(
    folder: Path, work: "_Members", listed: tuple[ShardEntry, ...] | None
) -> tuple[list[ShardEntry], list[int]]:
    """The shards before the first that is missing or damaged, and the most boxes of a sample in each.

    listed: what they should be, where that is known
    Raises ValueError where the data set reads otherwise now.
    """
    entries: list[ShardEntry] = []
    boxes: list[int] = []
    first = 0
    while listed is None or len(entries) < len(listed):
        tar, file = (folder / f"{shard_name(len(entries))}.{ending}" for ending in ("tar", "json"))
        if not tar.exists():
            break
        places = read_whole(tar)
        if places is not None:
            entry = ShardEntry(len(places.samples), FileEntry.of(tar), FileEntry.of(file))
        if places is None or places.first != first or (listed is not None and entry != listed[len(entries)]):
            warnings.warn(
                f"{tar} or {file.name} is not as it was written: both are written anew, and the shards behind them",
                stacklevel=3,
            )
            break
        last = len(places.samples) - 1
        if read_members(tar, places.samples[last]) != work[first + last][0]:
            raise ValueError(
                f"{tar} does not hold what sample {first + last} of the data set reads as now; the shards of a folder "
                "are made from one state of the data; choose another folder"
            )
        first += len(places.samples)
        entries.append(entry)
        boxes.append(places.most_boxes)
    return entries, boxes


def _other(folder: Path) -> ValueError:
    return ValueError(
        f"{folder} holds shards of another data set, or of the same with other settings or before its files changed; "
        "nothing is written over; choose another folder"
    )


class _Members:
    """Runs in workers: an index in, the files of that sample and the number of its boxes out."""

    def __init__(self, dataset: NamedDataset, first: int = 0) -> None:
        self._dataset, self._first = dataset, first

    def __len__(self) -> int:
        return len(self._dataset) - self._first

    def __getitem__(self, position: int) -> tuple[Members, int]:
        index = self._first + position
        now_reading(index)
        sample = self._dataset.read(index)
        if sample.annotated:
            raise ValueError(
                f"{self._dataset.place(index)} says of each class whether it was looked for, which shards do not hold; "
                "write the data sets that it unites, and unite their shards"
            )
        members = to_members(sample, _stored_image(self._dataset.reader, index, self._dataset.file(index), sample))
        return members, 0 if sample.boxes is None else len(sample.boxes.labels)

    def items(self, first: int, workers: int) -> Iterator[tuple[Members, int]]:
        """All from number `first` on, in order."""
        loader: WatchedLoader[Any] = WatchedLoader(
            _Members(self._dataset, first),  # type: ignore[arg-type]
            num_workers=workers,
            place=self._dataset.place,
            batch_size=None,
            collate_fn=_as_it_is,  # one sample, where batch_size is None
        )
        return iter(loader)


def _as_it_is(item: tuple[Members, int]) -> tuple[Members, int]:
    now_resting()
    return item


def _stored_image(reader: DatasetReader, index: int, file: str | None, sample: Sample) -> StoredImage:
    """The bytes of the image's file where they decode to the pixels of the sample; else those, without loss."""
    ending = Path(file or "").suffix.lower()
    if file is None or ending not in SUFFIXES or sample.image.shape[2] != 3:
        return lossless(sample.image)
    content = Path(file).read_bytes()
    for upright in (False, True):
        try:
            pixels = decode_photo(file, content, upright=upright)[0]
        except ValueError:  # the reader takes it otherwise
            continue
        if np.array_equal(pixels, sample.image):
            image = StoredImage(ending[1:], content, upright)
            return replace(image, reduces=_reduces(reader, index, file, image))
    return lossless(sample.image)


def _reduces(reader: DatasetReader, index: int, file: str, image: StoredImage) -> bool:
    """Whether the reader decodes a JPEG at a fraction of its size, as `decode_photo` does."""
    asked = read_part(reader, index, ReadRequest(frozenset(), _at_an_eighth))
    pixels, _, jpeg_scale = decode_photo(file, image.content, _at_an_eighth, image.upright)
    return jpeg_scale == asked.jpeg_scale and np.array_equal(pixels, asked.image)


def _at_an_eighth(size: tuple[int, int]) -> int:
    return 8
