"""The data set contract, and the finder that makes the top-level `datasets/` importable as `visionmtl.datasets`."""

import itertools
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from visionmtl.config.paths import shipped_folder
from visionmtl.config.registry import Configurable
from visionmtl.structures import EVERYTHING, IGNORE, Boxes, LabelSpace, ReadRequest, Sample

__path__ = [str(shipped_folder("datasets"))]


class DatasetReader(Protocol):
    """An opened data set: cheap to hold, safe to send to worker processes.

    Optional members: `channels` (of its images, where not 3), `notes` (sentences about its labels), `file(index)` and
    `label_files(index)` (the paths that a sample comes from), `sample_name(index)` (where one file holds several),
    `ids_are_names` (whether image ids are file names without ending, or numbers of an annotation file), and
    `read_part(index, request)`, through which training reads: as `read`, but labels that are not requested may be None,
    and the image may be reduced (with `full_size`); see `PartReader`. Samples that lie together, as in shards:
    `locality`, and `fetch(index)`, which brings those of one shard near before they are read.
    """

    @property
    def provides(self) -> Mapping[str, LabelSpace | None]:
        """The label fields of `Sample` that some image may carry, with their label space (None for depth, normals)."""
        ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> Sample:
        """The sample at full size. The same index gives the same values in every process."""
        ...


class PartReader(ABC):
    """Base of readers that save work where a sample is not needed whole."""

    def read(self, index: int) -> Sample:
        """The sample at full size; a broken file raises ValueError with its name."""
        return self.read_part(index, EVERYTHING)

    @abstractmethod
    def read_part(self, index: int, request: ReadRequest) -> Sample:
        """What is requested of the sample."""


def read_part(reader: DatasetReader, index: int, request: ReadRequest) -> Sample:
    """What is requested of a sample; all of it where the reader has no `read_part`."""
    read: Callable[[int, ReadRequest], Sample] | None = getattr(reader, "read_part", None)
    return reader.read(index) if read is None else read(index, request)


class Dataset(Configurable, package="visionmtl.datasets"):
    """Settings of one data set and split: where its files lie, which labels to read."""

    name: str | None = Field(None, pattern=r"^[^@/]+$")
    """What the run calls it, in results and in `learns_from` of tasks; None: its type, numbered where it repeats."""
    weight: float = Field(1.0, gt=0)
    """Factor on how often a training data set is drawn from, see `data.sampling`."""

    @abstractmethod
    def build(self) -> DatasetReader:
        """Check that the files are there and index them. Raises ValueError naming what is missing and how to get it."""


@dataclass(frozen=True)
class Locality:
    """Runs of samples that lie together, such as shards: each is fetched once if its samples are read in a row."""

    sizes: NDArray[np.int64]
    """Samples of each run, in the order of the indices."""
    window: int
    """Runs among whose samples an order is shuffled at a time."""

    def order(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """All indices: the runs in random order, and the samples of each `window` runs shuffled among each other."""
        ends = np.cumsum(self.sizes)
        runs = rng.permutation(len(ends))
        windows = [runs[first : first + self.window] for first in range(0, len(runs), self.window)]
        of_window = (
            np.concatenate([np.arange(ends[run] - self.sizes[run], ends[run]) for run in window]) for window in windows
        )
        return np.concatenate([rng.permutation(indices) for indices in of_window])

    def run_of(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Of each index the run that it lies in."""
        return np.searchsorted(np.cumsum(self.sizes), indices, side="right")

    def of(self, indices: NDArray[np.int64]) -> "Locality":
        """That of a part of the samples, which these are, in ascending order."""
        sizes = np.bincount(self.run_of(indices), minlength=len(self.sizes))
        return Locality(sizes[sizes > 0], self.window)


@dataclass(frozen=True)
class NamedDataset:
    """An opened data set under the name by which a run calls it."""

    name: str
    reader: DatasetReader
    weight: float = 1.0

    @property
    def provides(self) -> Mapping[str, LabelSpace | None]:
        """See `DatasetReader.provides`."""
        return self.reader.provides

    @property
    def locality(self) -> Locality | None:
        """Which samples lie together; None where they may be read in any order."""
        return getattr(self.reader, "locality", None)

    @property
    def notes(self) -> Sequence[str]:
        """What the reader found worth telling, such as labels it left out."""
        return getattr(self.reader, "notes", ())

    def file(self, index: int) -> str | None:
        """The file of an image, for messages; None where the reader has no method `file` or draws its images."""
        file = getattr(self.reader, "file", None)
        return None if file is None else str(file(index))

    def place(self, index: int) -> str:
        """A sample with its file, for messages."""
        file = self.file(index)
        return f"image {index} of {self.name}" + (f" ({file})" if file else "")

    def label_files(self, index: int) -> Sequence[Path]:
        """The files that its labels come from; none where the reader has no method `label_files`."""
        files: Callable[[int], Sequence[Path]] | None = getattr(self.reader, "label_files", None)
        return () if files is None else files(index)

    def __len__(self) -> int:
        return len(self.reader)

    def read(self, index: int) -> Sample:
        """See `DatasetReader.read`."""
        return self.reader.read(index)

    def read_part(self, index: int, request: ReadRequest) -> Sample:
        """See `read_part`."""
        return read_part(self.reader, index, request)


def sample_names(reader: DatasetReader) -> list[str]:
    """What tells each sample from the others wherever the data set lies: its name where it has one, else its file's.

    Of files, their paths below the folder that holds them all where folders hold files of one name. Samples that are
    drawn have their numbers.
    """
    name: Callable[[int], str] | None = getattr(reader, "sample_name", None)
    file: Callable[[int], Path] | None = getattr(reader, "file", None)
    if name is not None or file is None:
        return [(name or str)(index) for index in range(len(reader))]
    files = [Path(file(index)) for index in range(len(reader))]
    names = [one.name for one in files]
    if len(set(names)) == len(names):
        return names
    above = os.path.commonpath(files)
    return [one.relative_to(above).as_posix() for one in files]


def num_channels(reader: DatasetReader) -> int:
    """Channels of the images of a reader, or of the one that it holds; 3 where none says so."""
    inner: Any = reader
    while inner is not None:
        if (channels := getattr(inner, "channels", None)) is not None:
            return int(channels)
        inner = getattr(inner, "reader", None)
    return 3


def most_boxes(reader: DatasetReader) -> int | None:
    """Boxes in the fullest image of a reader, or of the one that it holds; None where none has a `most_boxes`.

    For a part of a data set, that of the whole: it may be too large, never too small.
    """
    inner: Any = reader
    while inner is not None:
        if (most := getattr(inner, "most_boxes", None)) is not None:
            return int(most)
        inner = getattr(inner, "reader", None)
    return None


def check_channels(datasets: "Sequence[NamedDataset]", in_chans: int) -> None:
    """Raises ValueError for a data set whose images have other channels than the encoder takes."""
    for dataset in datasets:
        if (channels := num_channels(dataset.reader)) != in_chans:
            raise ValueError(
                f"images of {dataset.name} have {channels} channels, but model.encoder.in_chans is {in_chans}; "
                "both are one number, for no channel is left out or mixed in silence; set in_chans (with mean and "
                "std), or `channels` of the data set"
            )


def open_datasets(datasets: Sequence[Dataset], otherwise: str = "") -> list[NamedDataset]:
    """Every data set, checked, indexed and named. Raises ValueError for a name given twice.

    otherwise: what else helps where one cannot be opened, for the message
    """
    names = name_all(datasets)
    try:
        return [NamedDataset(name, spec.build(), spec.weight) for name, spec in zip(names, datasets, strict=True)]
    except (ValueError, OSError) as error:
        if not otherwise:
            raise
        raise ValueError(f"{error}; {otherwise}") from error


def name_all(datasets: Sequence[Dataset]) -> list[str]:
    """What a run calls its data sets. Raises ValueError for a name given twice."""
    chosen = [dataset.name for dataset in datasets if dataset.name]
    if repeated := {name for name in chosen if chosen.count(name) > 1}:
        raise ValueError(
            f"{len(chosen)} data sets are named {', '.join(chosen)}; a name stands for one data set, but "
            f"{', '.join(sorted(repeated))} comes twice; give each a name of its own"
        )
    names: list[str] = []
    for dataset in datasets:
        type_name = dataset.type.rpartition(".")[2] or type(dataset).__name__
        numbered = (f"{type_name}-{number}" for number in itertools.count(2))
        free = (name for name in itertools.chain([type_name], numbered) if name not in {*names, *chosen})
        names.append(dataset.name or next(free))
    return names


@dataclass(frozen=True)
class Relabelled:
    """A reader whose classes are given in other label spaces, matched by name."""

    reader: DatasetReader
    learned: Mapping[str, LabelSpace]
    """By field; each has all the classes of the reader's own space, but of fields in `names`."""
    names: Mapping[str, Mapping[str, str]] = dataclass_field(default_factory=dict)
    """Of fields whose space unites several data sets: what the space calls a class of the reader. Others are left out,
    and a sample says which classes of the space the reader's labels tell of (`Sample.annotated`)."""

    @property
    def provides(self) -> Mapping[str, LabelSpace | None]:
        """Those of the reader, with the other spaces."""
        return {**self.reader.provides, **self.learned}

    @property
    def notes(self) -> list[str]:
        """Those of the reader, and which classes it does not have."""
        notes = list(getattr(self.reader, "notes", ()))
        for field, space in self.learned.items():
            own = self.reader.provides[field]
            assert own is not None
            if field in self.names:
                notes.append(f"{field}: {self._united(own, space, self.names[field])}")
                continue
            missing = [name for name in space.classes if name not in own.classes]
            notes.append(f"{field}: lists no class {', '.join(missing)}" if missing else f"{field}: classes reordered")
        return notes

    def _united(self, own: LabelSpace, space: LabelSpace, names: Mapping[str, str]) -> str:
        """Which classes it teaches, for people."""
        taught = [name if new == name else f"{name} as {new}" for name, new in names.items()]
        text = f"tells of {len(set(names.values()))} of {len(space.classes)} classes: {shortened(taught)}"
        dropped = [name for name in own.classes if name not in names]
        return f"{text}; leaves out {shortened(dropped)}" if dropped else text

    def __len__(self) -> int:
        return len(self.reader)

    def __getattr__(self, name: str) -> Any:
        if name in ("file", "label_files", "sample_name", "locality", "fetch"):  # which not every reader has
            return getattr(self.reader, name)
        raise AttributeError(name)

    def read(self, index: int) -> Sample:
        """See `DatasetReader.read`."""
        return self._relabel(self.reader.read(index))

    def read_part(self, index: int, request: ReadRequest) -> Sample:
        """See `read_part`."""
        return self._relabel(read_part(self.reader, index, request))

    def _relabel(self, sample: Sample) -> Sample:
        for field, space in self.learned.items():
            own = self.reader.provides[field]
            assert own is not None
            names = self.names.get(field) or {name: name for name in own.classes}
            table = np.full(256, IGNORE, np.uint8)
            for label, name in enumerate(own.classes):
                if name in names:
                    table[label] = space.classes.index(names[name])
            if field == "boxes" and sample.boxes is not None:
                sample = replace(sample, boxes=_relabelled_boxes(sample.boxes, table))
            if field == "segmentation" and sample.segmentation is not None:
                sample = replace(sample, segmentation=table[sample.segmentation])
            if field == "image_labels" and sample.image_labels is not None:
                labels = np.unique(table[sample.image_labels]).astype(np.int64)  # several may have become one
                sample = replace(sample, image_labels=labels[labels != IGNORE])
            if field in self.names:
                annotated = np.isin(space.classes, list(names.values()))
                sample = replace(sample, annotated={**sample.annotated, field: annotated})
        return sample


def _relabelled_boxes(boxes: Boxes, table: NDArray[np.uint8]) -> Boxes:
    """Boxes with the labels that `table` gives; those with IGNORE are left out."""
    labels = table[boxes.labels].astype(np.int64)
    kept = labels != IGNORE
    if kept.all():
        return replace(boxes, labels=labels)
    return Boxes(boxes.xyxy[kept], labels[kept], boxes.crowd[kept], boxes.area[kept])


def shortened(names: Sequence[str], most: int = 12) -> str:
    """The first of many names, for messages."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


@dataclass(frozen=True)
class Subset:
    """The first `count` samples of a reader, over and over up to `length`."""

    reader: DatasetReader
    count: int
    length: int

    @property
    def provides(self) -> Mapping[str, LabelSpace | None]:
        """Those of the reader."""
        return self.reader.provides

    def __len__(self) -> int:
        return self.length

    def read(self, index: int) -> Sample:
        """Sample `index` modulo `count`."""
        return self.reader.read(index % self.count)

    def read_part(self, index: int, request: ReadRequest) -> Sample:
        """See `read_part`."""
        return read_part(self.reader, index % self.count, request)


def first_samples(dataset: NamedDataset, count: int, length: int = 0) -> NamedDataset:
    """The first `count` samples of a data set, or all where it has fewer, over and over up to `length`."""
    count = min(count, len(dataset))
    return replace(dataset, reader=Subset(dataset.reader, count, max(length, count)))
