"""The data sets of a run as one: an index in, one sample as the network sees it out. Runs in loader workers."""

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from visionmtl.data.bad_files import BadFiles, UnreadableSample, read_persistently
from visionmtl.data.label_spaces import Spaces, supervises
from visionmtl.data.sampler import SampleKey
from visionmtl.data.transforms.augment import Augment, fit
from visionmtl.data.transforms.crop_resize import jpeg_scale
from visionmtl.data.workers import now_reading
from visionmtl.datasets import NamedDataset
from visionmtl.structures import BadFile, ImageMeta, JpegScale, ReadRequest, Sample, at_full_size
from visionmtl.tasks.base import Task


@dataclass(frozen=True, slots=True)
class Example:
    """One sample, transformed for the network."""

    image: NDArray[np.uint8]  # [h, w, 3] RGB, at most the size of the network's input
    sample: Sample  # training: with the labels transformed alike; evaluation: the original
    tasks: frozenset[str]  # whose labels it has
    dataset: str  # the name of its data set
    color: NDArray[np.float32] | None = None  # [3, 4], see `ops.color.apply_matrices`
    meta: ImageMeta | None = None  # evaluation only
    bad_file: BadFile | None = None  # which could not be read, so that this unlabelled copy of another stands here


_DEFAULTS = BadFiles()
_MAX_REPLACEMENTS = 8
"""Images that are tried in place of a batch that cannot be read at all."""


class JointDataset:
    """Several data sets, counted through."""

    def __init__(
        self, tasks: Mapping[str, Task], spaces: Spaces, datasets: Sequence[NamedDataset], bad_files: BadFiles
    ) -> None:
        self._tasks, self._datasets, self._bad_files = dict(tasks), list(datasets), bad_files
        self._ends = list(accumulate(len(dataset) for dataset in datasets))
        self._supervised = [
            frozenset(name for name, task in tasks.items() if supervises(dataset, task, spaces[name]))
            for dataset in datasets
        ]

    def __len__(self) -> int:
        return self._ends[-1]

    def _locate(self, index: int) -> tuple[int, int]:
        """The position of its data set, and the index in that."""
        number = bisect.bisect_right(self._ends, index)
        return number, index - (self._ends[number] - len(self._datasets[number]))

    def place(self, index: int) -> str:
        """The sample of this index and its file, for messages."""
        number, inner = self._locate(index)
        return self._datasets[number].place(inner)

    def _read(self, index: int, scale: JpegScale = at_full_size) -> tuple[Sample, frozenset[str], str]:
        """The sample, the tasks whose labels it has, and the name of its data set. Other labels may be None.

        Raises UnreadableSample when its files cannot be read.
        """
        number, inner = self._locate(index)
        dataset, supervised = self._datasets[number], self._supervised[number]
        request = ReadRequest(frozenset(self._tasks[name].field for name in supervised), scale)

        def read() -> Sample:
            now_reading(index)
            return dataset.read_part(inner, request)

        sample = read_persistently(read, self._bad_files.retries, partial(self.place, index))
        labelled = (name for name in supervised if getattr(sample, self._tasks[name].field) is not None)
        return sample, frozenset(labelled), dataset.name


class MultiTaskDataset(JointDataset, Dataset[Example]):
    """Augmented samples for training. An example is a function of (seed, key) alone."""

    def __init__(
        self,
        tasks: Mapping[str, Task],
        spaces: Spaces,
        datasets: Sequence[NamedDataset],
        *,
        size: tuple[int, int],
        augment: Augment,
        seed: int,
        enlarged: float = 1.0,
        bad_files: BadFiles = _DEFAULTS,
        leave_out: bool = False,
    ) -> None:
        """size: (H, W) of the network's input; enlarged: see `Augment.view`.

        leave_out: whether batches may have unlabelled copies in place of what cannot be read
        Raises ValueError when the augmentation cannot be built.
        """
        super().__init__(tasks, spaces, datasets, bad_files)
        self._leave_out = leave_out
        self._size, self._augment, self._seed, self._enlarged = size, augment, seed, enlarged
        augment.check()

    def __getitem__(self, key: SampleKey) -> Example:
        rng = key.rng(self._seed)
        params = self._augment.draw(rng)
        original, labelled, dataset = self._read(key.index, partial(jpeg_scale, size=self._size, params=params))
        sample = self._augment.view(original, self._size, params, rng, self._enlarged)
        color = self._augment.color(sample.image, rng) if self._augment.colors else None
        return Example(sample.image, sample, labelled, dataset, color=color)

    def __getitems__(self, keys: Sequence[SampleKey]) -> list[Example]:
        """A batch, as DataLoader asks for it.

        What cannot be read is replaced by an unlabelled copy of the next image of the batch that can, so that no shape
        changes; where none can, of the next of all images. The same files give the same batch.
        """
        if not self._leave_out:
            return [self[key] for key in keys]
        examples = [self._example_or_bad_file(key) for key in keys]
        readable = [position for position, one in enumerate(examples) if isinstance(one, Example)]
        spare = None if readable else self._next_readable(keys[0])
        batch = []
        for position, one in enumerate(examples):
            if isinstance(one, BadFile):
                after = next((other for other in readable if other > position), readable[0] if readable else -1)
                copied = examples[after] if readable else spare
                assert isinstance(copied, Example)
                one = replace(copied, tasks=frozenset(), bad_file=one)
            batch.append(one)
        return batch

    def _example_or_bad_file(self, key: SampleKey) -> Example | BadFile:
        try:
            return self[key]
        except UnreadableSample as error:
            number, inner = self._locate(key.index)
            dataset = self._datasets[number]
            return BadFile(dataset.name, inner, dataset.file(inner), str(error))

    def _next_readable(self, key: SampleKey) -> Example:
        for offset in range(1, _MAX_REPLACEMENTS + 1):
            example = self._example_or_bad_file(replace(key, index=(key.index + offset) % len(self)))
            if isinstance(example, Example):
                return example
        raise UnreadableSample(
            f"none of {_MAX_REPLACEMENTS + 1} images from {self.place(key.index)} on can be read; images are needed to "
            "train on; look whether their disk is there, then go on with --resume"
        )


class EvalDataset(JointDataset, Dataset[Example]):
    """Whole images resized to fit, not augmented, each with its original sample."""

    def __init__(
        self,
        tasks: Mapping[str, Task],
        spaces: Spaces,
        datasets: Sequence[NamedDataset],
        *,
        size: tuple[int, int],
        train_size: tuple[int, int],
        bad_files: BadFiles = _DEFAULTS,
    ) -> None:
        """size, train_size: (H, W) of the network's input, here and in training."""
        super().__init__(tasks, spaces, datasets, bad_files)
        self._size, self._train_size = size, train_size

    def __getitem__(self, index: int) -> Example:
        sample, labelled, dataset = self._read(index)
        image, meta = fit(sample.image, self._size, self._train_size)
        return Example(image, sample, labelled, dataset, meta=replace(meta, annotated=sample.annotated))
