"""Training images decoded once and kept on disk: written at the first start, read at later ones, anew when stale.

What is kept: the image, reduced by the divisor (1, 2, 4, 8) that the largest zoom of the run allows, and the labels the
run's tasks learn, at full size. Batches are the same, bit for bit, as without the cache, but for images that a smaller
zoom would have decoded at a larger divisor: those are resized in two steps then instead of one, which moves nothing and
changes photographs by one to four grey levels.

A data set has changed when its settings, the number of its images, the size or date of a file with an image or its
labels, or one of NUM_PROBES samples, compared byte for byte at every start, has. A cache of a data set that changed, or
whose index is damaged, is told, deleted and written anew. Of a damaged sample the data set itself is read, and it is
told as well. Images that cannot be read are not kept: the data set itself is asked for them, as without a cache.
"""

import hashlib
import json
import shutil
import uuid
import warnings
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from rich.progress import track

from visionmtl.config.console import Console
from visionmtl.data.bad_files import BadFiles, UnreadableSample, read_persistently
from visionmtl.data.cache.packed import Parts, SampleStore, pack, to_block, to_parts
from visionmtl.data.stamps import stamps
from visionmtl.data.transforms.crop_resize import CropParams, Size, jpeg_scale
from visionmtl.data.watched_loader import WatchedLoader
from visionmtl.data.workers import now_reading, now_resting
from visionmtl.datasets import Dataset, DatasetReader, NamedDataset, read_part
from visionmtl.io.index import CacheError, locked
from visionmtl.structures import JpegScale, LabelSpace, ReadRequest, Sample

VERSION = 5
"""Of the way in which samples become bytes; another one makes another cache."""
NUM_PROBES = 8

_Item = tuple[Parts, Size, int]
_NO_IMAGE: _Item = ({}, (0, 0), 1)
_TOLERATE_NONE = BadFiles(limit=0)


@dataclass(frozen=True)
class CachedReader:
    """A reader whose samples come from a packed folder."""

    reader: DatasetReader
    packed: SampleStore
    fields: frozenset[str]

    @property
    def provides(self) -> Mapping[str, LabelSpace | None]:
        """Those of the reader, as far as they are kept."""
        return {name: space for name, space in self.reader.provides.items() if name in self.fields}

    @property
    def notes(self) -> list[str]:
        """Those of the reader, and where its samples come from now."""
        gigabytes = (self.packed.folder / "samples.bin").stat().st_size / 1e9
        return [*getattr(self.reader, "notes", ()), f"read from {self.packed.folder}, {gigabytes:.2f} GB"]

    def __len__(self) -> int:
        return len(self.packed)

    def __getattr__(self, name: str) -> Any:
        if name in ("file", "sample_name"):  # which not every reader has
            return getattr(self.reader, name)
        raise AttributeError(name)

    def read(self, index: int) -> Sample:
        """The sample at full size, from the data set itself: what is kept may be smaller."""
        return self.reader.read(index)

    def read_part(self, index: int, request: ReadRequest) -> Sample:
        """See `visionmtl.datasets.DatasetReader`."""
        wanted = request.fields & self.fields
        if not self.packed.sizes[index, 0]:
            return read_part(self.reader, index, replace(request, fields=wanted))
        try:
            return self.packed.read(index, wanted)
        except CacheError as error:
            work = _Packing(
                self.reader, frozenset(_text(self.packed.extra["fields"])), self.packed.sizes[:, 2].tolist()
            )
            block = np.frombuffer(to_block(work.read(index)[0]), np.uint8)
            if zlib.crc32(block.data) != self.packed.checksum(index):  # the data set is another one now
                raise
            where = self.file(index) if hasattr(self.reader, "file") else "its source"
            warnings.warn(f"{error}: until then the sample is read from {where}", stacklevel=2)
            return self.packed.sample(index, block, wanted)


def with_cache(
    sources: Sequence[NamedDataset],
    specs: Sequence[Dataset],
    folder: Path,
    fields: Collection[str],
    size: Size,
    max_zoom: float,
    workers: int,
    bad_files: BadFiles = _TOLERATE_NONE,
) -> list[NamedDataset]:
    """The sources, read from caches in `folder`; those that are not there yet are written first, one process a machine.

    specs: the settings of each source; fields: labels that the run's tasks learn; size, max_zoom: of the network's
    input, and the largest that is drawn; bad_files: how many images of each source need not be readable. Raises
    ValueError when more are not, and when the disk is too small.
    """
    choose_scale = partial(jpeg_scale, size=size, params=CropParams(max_zoom))
    return [
        replace(source, reader=_open(source, spec, folder, frozenset(fields), choose_scale, workers, bad_files))
        for source, spec in zip(sources, specs, strict=True)
    ]


def _open(
    source: NamedDataset,
    spec: Dataset,
    folder: Path,
    learnt: frozenset[str],
    choose_scale: JpegScale,
    workers: int,
    bad_files: BadFiles,
) -> CachedReader:
    fields = learnt & set(source.provides)
    settings = json.dumps([VERSION, spec.model_dump(mode="json", exclude={"name", "weight"})], sort_keys=True)
    stem = f"{spec.type.rpartition('.')[2]}-{hashlib.blake2b(settings.encode(), digest_size=6).hexdigest()}"
    wait = partial(Console().print, f"another process writes the cache of {source.name}; waiting for it", markup=False)
    with locked(folder / f"{stem}.lock", wait):
        packed = _find(folder, stem, fields, choose_scale)
        if packed is not None and (why := _difference(packed, source)):
            _discard(packed.folder, f"data set {source.name} is no longer what it was made from: {why}")
            packed = None
        if packed is None:
            work = _Packing(source.reader, fields, choose_scale, bad_files)
            packed = _write(folder, stem, source, work, workers)
    return CachedReader(source.reader, packed, fields)


def _find(folder: Path, stem: str, fields: frozenset[str], choose_scale: JpegScale) -> SampleStore | None:
    """A cache of this data set that holds the labels and enough of every image: the smallest, as a new one would be."""
    fitting: list[SampleStore] = []
    for index in sorted(folder.glob(f"{stem}-*/index")):
        try:
            packed = SampleStore(index.parent)
        except CacheError as error:
            _discard(index.parent, str(error))
            continue
        sizes = np.unique(packed.sizes[packed.sizes[:, 0] > 0], axis=0)
        enough = all(choose_scale((height, width)) % jpeg_scale == 0 for height, width, jpeg_scale in sizes.tolist())
        if enough and fields <= set(_text(packed.extra["fields"])):
            fitting.append(packed)
    return max(fitting, key=lambda packed: int(packed.sizes[:, 2].sum()), default=None)


def _discard(folder: Path, why: str) -> None:
    """Delete a cache, and say so: what it was made for finds none then, and writes one."""
    Console(stderr=True).print(f"the cache {folder} does not fit: {why}: it is deleted and written anew", markup=False)
    shutil.rmtree(folder)


def _difference(packed: SampleStore, source: NamedDataset) -> str:
    """What has changed in a data set since it was packed; "" where nothing has."""
    before, now = packed.extra["stamps"], stamps(source)
    if len(before) != len(now):
        return f"{len(now)} images instead of {len(before)}"
    if len(changed := np.flatnonzero(before != now)):
        first = source.file(int(changed[0]))
        return f"files of {len(changed)} of {len(before)} images, or of their labels, changed, first of {first}"
    work = _Packing(source.reader, frozenset(_text(packed.extra["fields"])), packed.sizes[:, 2].tolist())
    for index in _probes(len(source)):
        if packed.sizes[index, 0] and zlib.crc32(to_block(work.read(index)[0])) != packed.checksum(index):
            return f"sample {index} ({source.file(index) or 'drawn'}) reads otherwise now"
    return ""


def _write(folder: Path, stem: str, source: NamedDataset, work: "_Packing", workers: int) -> SampleStore:
    probes = [work[index] for index in _probes(len(source))]
    need = int(np.mean([0 if isinstance(item, str) else len(to_block(item[0])) for item in probes]) * len(source))
    free = shutil.disk_usage(folder).free
    if need * 1.05 > free:
        raise ValueError(
            f"the cache of {source.name} takes about {need / 1e9:.1f} GB, but {folder} has {free / 1e9:.1f} GB free; "
            "a twentieth more than the size is needed; free some, choose another data.cache, or set it to null"
        )
    console = Console()
    console.print(f"writing the cache of {source.name}: about {need / 1e9:.2f} GB into {folder}", markup=False)
    for left in folder.glob(f".{stem}-*"):  # of a process that was stopped; the lock says that none is at it
        shutil.rmtree(left, ignore_errors=True)
    unfinished = folder / f".{stem}-{uuid.uuid4().hex}"
    unfinished.mkdir()
    try:
        extra = {"stamps": stamps(source), "fields": np.array([name.encode() for name in sorted(work.fields)], "S16")}
        pack(unfinished, work.tolerated(_shown(work.items(workers), len(source), console), source), extra)
        target = folder / f"{stem}-{uuid.uuid4().hex[:6]}"
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # gone already where the renaming succeeded
    return SampleStore(target)


def _shown(items: Iterator[_Item | str], total: int, console: Console) -> Iterator[_Item | str]:
    """The same items, with a bar on a terminal and ten lines elsewhere."""
    if console.is_terminal:
        yield from track(items, "packing", total, console=console)
        return
    for number, item in enumerate(items, start=1):
        yield item
        if number * 10 // total > (number - 1) * 10 // total:
            console.print(f"packed {number} of {total} images", markup=False)


class _Packing:
    """Runs in workers: an index in, the arrays of that sample out, or the error of one that cannot be read."""

    def __init__(
        self,
        reader: DatasetReader,
        fields: frozenset[str],
        choose_scale: JpegScale | list[int],
        bad_files: BadFiles = _TOLERATE_NONE,
    ) -> None:
        """choose_scale: gives the divisor of an image; or the divisor of each."""
        self.fields = fields
        self._reader, self._choose_scale, self._bad_files = reader, choose_scale, bad_files

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, index: int) -> _Item | str:
        place = partial(NamedDataset("the data set to pack", self._reader).place, index)
        try:
            return read_persistently(partial(self.read, index), self._bad_files.retries, place)
        except UnreadableSample as error:
            if not self._bad_files.allowed(len(self)):
                raise
            return str(error)

    def read(self, index: int) -> _Item:
        """The sample, its full size and the divisor of its image."""
        choose_scale = self._choose_scale
        if not callable(choose_scale):
            divisor = choose_scale[index]
            choose_scale = lambda size: divisor  # noqa: E731
        now_reading(index)
        sample = read_part(self._reader, index, ReadRequest(self.fields, choose_scale))
        scale, size = choose_scale(sample.size), sample.size
        if sample.jpeg_scale < scale:  # a PNG, or a reader that does not know how to reduce
            sample = replace(sample, image=_reduced(sample.image, scale // sample.jpeg_scale), jpeg_scale=scale)
        return to_parts(sample, self.fields), size, sample.jpeg_scale

    def items(self, workers: int) -> Iterator[_Item | str]:
        """All of them, in order."""
        loader: WatchedLoader[Any] = WatchedLoader(
            self,  # type: ignore[arg-type]
            num_workers=workers,
            place=lambda index: NamedDataset("the data set to pack", self._reader).place(index),
            batch_size=None,
            collate_fn=_as_it_is,  # one sample, where batch_size is None
        )
        return iter(loader)

    def tolerated(self, items: Iterator[_Item | str], source: NamedDataset) -> Iterator[_Item]:
        """The same, with an empty place for each that cannot be read. Raises ValueError for one more than may be."""
        errors: list[str] = []
        for item in items:
            if not isinstance(item, str):
                yield item
                continue
            errors.append(item)
            if len(errors) > (allowed := self._bad_files.allowed(len(self))):
                raise ValueError(
                    f"{len(errors)} of {len(self)} images of {source.name} cannot be read, the last: {item}; "
                    f"data.bad_files.limit {self._bad_files.limit:g} allows {allowed}; mend these files, or raise the "
                    "limit"
                )
            yield _NO_IMAGE
        if errors:
            Console(stderr=True).print(
                f"{len(errors)} images of {source.name} cannot be read and are not in the cache: {errors[0]}",
                markup=False,
            )


def _as_it_is(item: _Item | str) -> _Item | str:
    now_resting()
    return item


def _reduced(image: NDArray[np.uint8], divisor: int) -> NDArray[np.uint8]:
    """Means of squares; incomplete ones at the right and lower edge are left out, as no window reaches them."""
    height, width = (side // divisor for side in image.shape[:2])
    squares = image[: height * divisor, : width * divisor]
    small = cv2.resize(squares, (width, height), interpolation=cv2.INTER_AREA)
    return np.asarray(small.reshape(height, width, image.shape[2]), np.uint8)  # OpenCV drops an axis of one channel


def _probes(total: int) -> list[int]:
    return sorted(set(np.linspace(0, total - 1, NUM_PROBES).astype(int).tolist()))


def _text(names: NDArray[np.bytes_]) -> list[str]:
    return [bytes(name).decode() for name in names]
