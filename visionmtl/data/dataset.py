"""The data sets of a run as one: an index in, one sample as the network sees it out. Runs in loader workers."""

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from visionmtl.data.label_spaces import Spaces, supervises
from visionmtl.data.sampler import SampleKey
from visionmtl.data.transforms.augment import Augment, fit
from visionmtl.data.transforms.crop_resize import jpeg_scale
from visionmtl.datasets import NamedDataset
from visionmtl.structures import ImageMeta, JpegScale, ReadRequest, Sample, at_full_size
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


class _JointDataset:
    """Several data sets, counted through."""

    def __init__(self, tasks: Mapping[str, Task], spaces: Spaces, datasets: Sequence[NamedDataset]) -> None:
        self._tasks, self._datasets = dict(tasks), list(datasets)
        self._ends = list(accumulate(len(dataset) for dataset in datasets))
        self._supervised = [
            frozenset(name for name, task in tasks.items() if supervises(dataset, task, spaces[name]))
            for dataset in datasets
        ]

    def __len__(self) -> int:
        return self._ends[-1]

    def _read(self, index: int, scale: JpegScale = at_full_size) -> tuple[Sample, frozenset[str], str]:
        """The sample, the tasks whose labels it has, and the name of its data set. Other labels may be None."""
        number = bisect.bisect_right(self._ends, index)
        dataset, supervised = self._datasets[number], self._supervised[number]
        request = ReadRequest(frozenset(self._tasks[name].field for name in supervised), scale)
        sample = dataset.read_part(index - (self._ends[number] - len(dataset)), request)
        labelled = (name for name in supervised if getattr(sample, self._tasks[name].field) is not None)
        return sample, frozenset(labelled), dataset.name


class MultiTaskDataset(_JointDataset, Dataset[Example]):
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
    ) -> None:
        """size: (H, W) of the network's input; enlarged: see `Augment.view`.

        Raises ValueError when the augmentation cannot be built.
        """
        super().__init__(tasks, spaces, datasets)
        self._size, self._augment, self._seed, self._enlarged = size, augment, seed, enlarged
        augment.check()

    def __getitem__(self, key: SampleKey) -> Example:
        rng = key.rng(self._seed)
        params = self._augment.draw(rng)
        original, labelled, dataset = self._read(key.index, partial(jpeg_scale, size=self._size, params=params))
        sample = self._augment.view(original, self._size, params, rng, self._enlarged)
        color = self._augment.color(sample.image, rng) if self._augment.colors else None
        return Example(sample.image, sample, labelled, dataset, color=color)


class EvalDataset(_JointDataset, Dataset[Example]):
    """Whole images resized to fit, not augmented, each with its original sample."""

    def __init__(
        self,
        tasks: Mapping[str, Task],
        spaces: Spaces,
        datasets: Sequence[NamedDataset],
        *,
        size: tuple[int, int],
        train_size: tuple[int, int],
    ) -> None:
        """size, train_size: (H, W) of the network's input, here and in training."""
        super().__init__(tasks, spaces, datasets)
        self._size, self._train_size = size, train_size

    def __getitem__(self, index: int) -> Example:
        sample, labelled, dataset = self._read(index)
        image, meta = fit(sample.image, self._size, self._train_size)
        return Example(image, sample, labelled, dataset, meta=replace(meta, annotated=sample.annotated))
