"""From samples to padded batches: which data set teaches which task, in an order fixed by (seed, epoch) alone.

Nothing here depends on the number of worker processes, and a training run cut at any batch continues with exactly the
batches it would have seen: every random number is a function of (seed, epoch, index of the sample).
"""

import bisect
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch.utils.data import DataLoader
from typing_extensions import Self

from visionmtl import device_decode
from visionmtl.config.registry import Spec
from visionmtl.data.label_spaces import Spaces, judged, supervises
from visionmtl.data.sampler import Draws, Sampling, random_numbers
from visionmtl.data.transforms.augment import Augment, fit
from visionmtl.data.transforms.crop_resize import CropResize, divisor
from visionmtl.data.workers import choose_workers, load, num_processes_here
from visionmtl.datasets import Dataset, NamedDataset
from visionmtl.structures import Batch, ImageMeta, JpegScale, ReadRequest, Sample, at_full_size
from visionmtl.tasks.base import Task

_Job = tuple[int, list[tuple[int, int]]]  # epoch, then index and round (see `Draws`) of each sample of one batch


class Data(Spec):
    """What to train and evaluate on, and how it is fed."""

    root: str | None = None
    """Where the data lies, for the data sets below to refer to as ${data.root}."""
    train: list[Dataset] = Field(min_length=1)
    """Mixed within every batch; `sampling` and their `weight` say how often each is drawn from."""
    val: list[Dataset] = Field(min_length=1)
    """Each is judged by itself."""
    sampling: Sampling = Sampling()
    size: tuple[int, int]
    """(H, W) of the padded network input in training, pixels."""
    eval_size: tuple[int, int] | None = None
    """The same in evaluation and prediction, e.g. whole images after training on crops; None: `size`."""
    augment: Augment = Augment()
    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Loader processes per training process; 0 loads in the training process itself."""
    prefetch: int = Field(default=2, ge=1)
    """Batches each worker prepares ahead."""
    cache: Path | None = None
    """A folder on a fast disk for decoded training images, written at the first start; see `data_cache`. None: decode
    anew each time."""
    decode: Literal["workers", "device"] = "workers"
    """Where training images are decoded. device: JPEGs only, as they are on disk (nvJPEG on CUDA); frees the workers of
    most of their work, see `device_decode`. Validation images are decoded by workers in any case."""

    @property
    def input_size(self) -> tuple[int, int]:
        """(H, W) of the padded network input in evaluation and prediction, pixels."""
        return self.eval_size or self.size

    @model_validator(mode="after")
    def _sampling_has_an_effect(self) -> Self:
        weighted = [f"data.train.{i}.weight" for i, one in enumerate(self.train) if one.weight != 1]
        judged = [f"data.val.{i}.weight" for i, one in enumerate(self.val) if one.weight != 1]
        rules = [f"data.sampling.{name}" for name in self.sampling.without_effect(len(self.train))]
        without = [*judged, *(weighted if len(self.train) == 1 else []), *rules]
        if without:
            raise ValueError(
                f"{', '.join(without)} would have no effect; shares are of several training data sets, and temperature "
                "is for amounts that differ; remove it"
            )
        return self

    @model_validator(mode="after")
    def _pixels_are_where_they_are_needed(self) -> Self:
        needs = [name for name, value in (("cache", self.cache), ("augment.pipeline", self.augment.pipeline)) if value]
        if needs and self.decode == "device":
            raise ValueError(
                f"data.decode: device leaves loader workers without pixels, which data.{needs[0]} needs; one of the "
                f"two is allowed; set data.decode: workers, or data.{needs[0]} to null"
            )
        return self


class TrainLoader:
    """Endless supply of augmented batches, one epoch at a time."""

    def __init__(
        self,
        data: Data,
        tasks: Mapping[str, Task],
        spaces: Spaces,
        sources: Sequence[NamedDataset],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """batch_size: per process; `world` processes take the parts of one common batch."""
        self._draws = _draws(data.sampling, tasks, spaces, sources, seed)
        if self._draws.total < batch_size * world:
            raise ValueError(
                f"an epoch has {self._draws.total} images, but one step takes {batch_size} x {world} process(es); "
                "every step needs a full batch; lower train.batch_size, add data, or raise data.sampling.epoch_images"
            )
        self._batch_size, self._seed, self._rank, self._world = batch_size, seed, rank, world
        self._jobs: list[_Job] = []  # what the DataLoader hands to its workers; set anew each epoch
        self.workers, self.workers_reason = choose_workers(data.workers, num_processes_here())
        work = _TrainWork(data, tasks, spaces, sources, seed)
        if data.decode == "device":
            device_decode.check_sources(sources)
        self._loader = load(work, self._jobs, self.workers, data.prefetch, persistent=True)

    def __len__(self) -> int:
        """Batches per epoch; the remainder is dropped (other images each epoch)."""
        return self._draws.total // (self._batch_size * self._world)

    @property
    def counts(self) -> list[int]:
        """Images drawn an epoch, by data set."""
        return self._draws.counts

    def draws(self, epoch: int) -> list[tuple[int, int]]:
        """The images of an epoch in order, numbered through all data sets, each with its round; see `Draws`."""
        images, rounds = self._draws.epoch(epoch)
        return list(zip(images.tolist(), rounds.tolist(), strict=True))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from number `start` on; the same for any number of workers."""
        draws = self.draws(epoch)
        step = self._batch_size * self._world
        mine = [number * step + self._rank * self._batch_size for number in range(start, len(self))]
        self._jobs[:] = [(epoch, draws[first : first + self._batch_size]) for first in mine]
        for content in self._loader:
            yield Batch(**content)


class ValLoader:
    """Every image once over all ranks, resized to fit but not augmented, with the original sample beside it.

    `labelled[task]` tells whose labels are of the space the task learns: a meter must see no others.
    judged: names of results and their tasks, see `spaces.judged`.
    """

    def __init__(self, loader: "DataLoader[Any]", judged: Mapping[str, str]) -> None:
        self._loader = loader
        self.judged = dict(judged)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        for content in self._loader:
            yield Batch(**content)


def val_loader(
    data: Data,
    tasks: Mapping[str, Task],
    spaces: Spaces,
    sources: Sequence[NamedDataset],
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    workers: int | None = None,
    limit: int | None = None,
) -> ValLoader:
    """limit: batches per rank, which take images of all data sets in turn, each from its first image on.

    The last batch may be smaller. Targets stay empty.
    """
    names = judged(tasks, spaces, sources)
    order = np.arange(sum(len(source) for source in sources))
    if limit is not None:
        order = np.argsort(np.concatenate([np.arange(len(source)) for source in sources]), kind="stable")
    mine = [(index, 0) for index in order.tolist()[rank::world]]
    jobs = [(0, mine[first : first + batch_size]) for first in range(0, len(mine), batch_size)][:limit]
    count = choose_workers(data.workers, num_processes_here())[0] if workers is None else workers
    work = _ValWork(data, tasks, spaces, sources)
    return ValLoader(load(work, jobs, count, data.prefetch, persistent=True), names)


def _draws(
    sampling: Sampling, tasks: Mapping[str, Task], spaces: Spaces, sources: Sequence[NamedDataset], seed: int
) -> Draws:
    teaches = [{name for name, task in tasks.items() if supervises(one, task, spaces[name])} for one in sources]
    if idle := [one.name for one, of_one in zip(sources, teaches, strict=True) if tasks and not of_one]:
        raise ValueError(
            f"training data set {idle[0]!r} teaches none of the tasks {', '.join(tasks)}; one that does is needed; "
            "remove it, add a task that learns its labels, or correct the tasks' space and learns_from"
        )
    sizes = [len(one) for one in sources]
    draws = Draws(sizes, sampling.shares(sizes, [one.weight for one in sources], teaches), sampling.epoch_images, seed)
    if never := [one.name for one, count in zip(sources, draws.counts, strict=True) if not count]:
        raise ValueError(
            f"training data set {never[0]!r} would never be drawn in an epoch of {draws.total} images; every data set "
            "comes at least once; raise its weight or data.sampling.epoch_images, or remove it"
        )
    return draws


def pad(images: Sequence[NDArray[np.uint8]], size: tuple[int, int]) -> torch.Tensor:
    """[h, w, 3] arrays at the top left of uint8 [B, 3, H, W], 0 elsewhere; in memory the channels come last."""
    canvas = np.zeros((len(images), *size, 3), np.uint8)
    for place, image in zip(canvas, images, strict=True):
        place[: image.shape[0], : image.shape[1]] = image
    return torch.from_numpy(canvas).permute(0, 3, 1, 2)


class _Work:
    """Runs in the workers: indices in, the fields of one `Batch` out (a dict, which DataLoader knows how to pin)."""

    _encoded = False  # whether images stay as their files hold them

    def __init__(
        self, size: tuple[int, int], tasks: Mapping[str, Task], spaces: Spaces, sources: Sequence[NamedDataset]
    ) -> None:
        self._size, self._tasks, self._sources = size, dict(tasks), list(sources)
        self._ends = list(accumulate(len(source) for source in sources))
        self._supervises = [
            {name: supervises(source, task, spaces[name]) for name, task in tasks.items()} for source in sources
        ]
        self._fields = [frozenset(tasks[name].field for name, does in one.items() if does) for one in self._supervises]

    def _read(self, index: int, choose_scale: JpegScale = at_full_size) -> tuple[Sample, frozenset[str], str]:
        """The sample, the tasks it supervises, and the name of its data set; labels of no such task may be None."""
        which = bisect.bisect_right(self._ends, index)
        source = self._sources[which]
        wanted = ReadRequest(self._fields[which], choose_scale, self._encoded)
        sample = source.read_part(index - (self._ends[which] - len(source)), wanted)
        taught = self._supervises[which]
        tasks = {name for name, task in self._tasks.items() if taught[name] and getattr(sample, task.field) is not None}
        return sample, frozenset(tasks), source.name

    def _labelled(self, taught: Sequence[frozenset[str]]) -> dict[str, torch.Tensor]:
        return {name: torch.tensor([name in one for one in taught], dtype=torch.bool) for name in self._tasks}


class _TrainWork(_Work):
    def __init__(
        self, data: Data, tasks: Mapping[str, Task], spaces: Spaces, sources: Sequence[NamedDataset], seed: int
    ) -> None:
        super().__init__(data.size, tasks, spaces, sources)
        self._augment, self._seed, self._encoded = data.augment, seed, data.decode == "device"
        self._augment.check()

    def __getitem__(self, job: _Job) -> dict[str, Any]:
        epoch, draws = job
        samples, taught, colours, windows, jpegs = [], [], [], [], []
        for index, again in draws:
            rng = random_numbers(self._seed, epoch, index, again)
            params = self._augment.draw(rng)
            original, tasks, name = self._read(index, partial(divisor, size=self._size, params=params))
            sample = self._augment.view(original, self._size, params, rng)
            if self._encoded:
                jpegs.append(device_decode.jpeg_of(original, name))
                windows.append(CropResize.cut(original.size, self._size, params))
            samples.append(sample)
            taught.append(tasks)
            if self._augment.colours:
                colours.append(self._augment.colour(None if self._encoded else sample.image, rng))

        targets = {}
        for name, task in self._tasks.items():
            known = [sample if name in tasks else None for sample, tasks in zip(samples, taught, strict=True)]
            targets[name] = task.collate(known, self._size)
        return {
            "image": pad([sample.image for sample in samples], (0, 0) if self._encoded else self._size),
            "targets": targets,
            "labelled": self._labelled(taught),
            "colour": torch.from_numpy(np.stack(colours)) if colours else None,
            "encoded": device_decode.encoded(jpegs, windows, self._size) if self._encoded else None,
        }


class _ValWork(_Work):
    def __init__(self, data: Data, tasks: Mapping[str, Task], spaces: Spaces, sources: Sequence[NamedDataset]) -> None:
        super().__init__(data.input_size, tasks, spaces, sources)
        self._train_size = data.size

    def __getitem__(self, job: _Job) -> dict[str, Any]:
        samples, taught, names = zip(*(self._read(index) for index, _ in job[1]), strict=True)
        fitted: list[tuple[NDArray[np.uint8], ImageMeta]] = [
            fit(sample.image, self._size, self._train_size) for sample in samples
        ]
        return {
            "image": pad([image for image, _ in fitted], self._size),
            "targets": {},
            "labelled": self._labelled(taught),
            "metas": [meta for _, meta in fitted],
            "samples": list(samples),
            "sources": list(names),
        }
