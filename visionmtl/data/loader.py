"""The settings of the data, and the loaders that make batches of it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch.utils.data import DataLoader
from typing_extensions import Self

from visionmtl.config.registry import Size, Spec
from visionmtl.data.bad_files import BadFiles
from visionmtl.data.collate import Collate
from visionmtl.data.dataset import EvalDataset, MultiTaskDataset
from visionmtl.data.fetch_ahead import FetchAhead, FollowedBatches
from visionmtl.data.label_spaces import Spaces, supervises
from visionmtl.data.sampler import BatchSampler, MixtureSampler, Sampling
from visionmtl.data.transforms.augment import Augment
from visionmtl.data.watched_loader import TIMEOUT_S, WatchedLoader
from visionmtl.data.workers import choose_workers, num_processes_here
from visionmtl.datasets import Dataset, NamedDataset
from visionmtl.structures import Batch
from visionmtl.tasks.base import Task


class Data(Spec):
    """What to train and evaluate on, and how it is fed."""

    former: ClassVar = {"decode": "workers", "prefetch": 2}

    root: str | None = None
    """Where the data lies, for the data sets below to refer to as ${data.root}."""
    train: list[Dataset] = Field(min_length=1)
    """Mixed within every batch; `sampling` and their `weight` say how often each is drawn from."""
    val: list[Dataset] = Field(min_length=1)
    """Each is evaluated by itself."""
    sampling: Sampling = Sampling()
    size: Size
    """(H, W) of the padded network input in training, pixels."""
    eval_size: Size | None = None
    """The same in evaluation and prediction, e.g. whole images after training on crops; None: `size`."""
    augment: Augment = Augment()
    workers: Annotated[int, Field(ge=0, le=1024)] | Literal["auto"] = "auto"
    """Loader processes per training process; 0 loads in the training process itself."""
    bad_files: BadFiles = BadFiles()
    timeout_s: float = Field(TIMEOUT_S, gt=0)
    """How long the loader processes may stand still over a file before the run ends with its name, seconds."""
    cache: Path | None = None
    """A folder on a fast disk for decoded training images, written at the first start; see `data.cache`. None: decode
    anew each time."""

    @property
    def input_size(self) -> tuple[int, int]:
        """(H, W) of the padded network input in evaluation and prediction, pixels."""
        return self.eval_size or self.size

    def elsewhere(self, part: Literal["train", "val"]) -> str:
        """For messages where the data of a trained network are not there."""
        return f"or give their folder as {'data.root' if self.root else f'data.{part}.0.root'}=DIR"

    @model_validator(mode="after")
    def _timeout_has_an_effect(self) -> Self:
        if self.workers == 0 and self.timeout_s != TIMEOUT_S:
            raise ValueError(
                f"timeout_s is {self.timeout_s:g}, but workers is 0, so it would have no effect: the training process "
                "cannot watch itself; remove it, or raise workers"
            )
        return self

    @model_validator(mode="after")
    def _sampling_has_an_effect(self) -> Self:
        weighted = [f"data.train.{i}.weight" for i, one in enumerate(self.train) if one.weight != 1]
        weighted_val = [f"data.val.{i}.weight" for i, one in enumerate(self.val) if one.weight != 1]
        rules = [f"data.sampling.{name}" for name in self.sampling.without_effect(len(self.train))]
        without = [*weighted_val, *(weighted if len(self.train) == 1 else []), *rules]
        if without:
            raise ValueError(
                f"{', '.join(without)} would have no effect; shares are of several training data sets, and temperature "
                "is for amounts that differ; remove it"
            )
        return self


def train_loader(
    data: Data,
    tasks: Mapping[str, Task],
    spaces: Spaces,
    datasets: Sequence[NamedDataset],
    batch_size: int,
    seed: int,
    rank: int = 0,
    world: int = 1,
    unlabelled: bool = False,
    size: tuple[int, int] | None = None,
    leave_out_bad_files: bool = False,
) -> "DataLoader[Batch]":
    """Augmented batches; `loader.batch_sampler.set_epoch(epoch, start)` chooses which.

    A batch is a function of seed, epoch and its number: the number of workers changes nothing, and a training cut at
    any batch continues with the batches it would have seen.
    batch_size: per process; `world` processes take the parts of one common batch.
    unlabelled: data sets whose labels no task learns may be among them: teachers need none
    size: (H, W) in place of `data.size`, to which depth stays relative
    leave_out_bad_files: whether `Batch.bad_files` is looked at, as the limit of `data.bad_files` needs; else a file
    that cannot be read is an error
    """
    mixture = _mixture(data.sampling, tasks, spaces, datasets, seed, unlabelled)
    if len(mixture) < batch_size * world:
        raise ValueError(
            f"an epoch has {len(mixture)} images, but one step takes {batch_size} x {world} process(es); "
            "every step needs a full batch; lower train.batch_size, add data, or raise data.sampling.epoch_images"
        )
    size = size or data.size
    enlarged = size[0] / data.size[0]
    dataset = MultiTaskDataset(
        tasks, spaces, datasets, size=size, augment=data.augment, seed=seed, enlarged=enlarged,
        bad_files=data.bad_files, leave_out=leave_out_bad_files and data.bad_files.limit > 0,
    )  # fmt: skip
    sampler = BatchSampler(mixture, batch_size, rank, world, FetchAhead(datasets).start)
    num_workers = choose_workers(data.workers, num_processes_here())[0]
    return _loader(dataset, sampler, Collate(tasks, size, training=True), num_workers, data.timeout_s)


def val_loader(
    data: Data,
    tasks: Mapping[str, Task],
    spaces: Spaces,
    datasets: Sequence[NamedDataset],
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    workers: int | None = None,
    limit: int | None = None,
) -> "DataLoader[Batch]":
    """Every image once over all ranks, resized to fit but not augmented, with its original sample.

    `labelled[task]` tells whose labels are of the space the task learns: a meter must see no others. The last batch
    may be smaller; targets stay empty. A file that cannot be read is an error: scores over fewer images are others.
    limit: batches per rank, which take images of all data sets in turn, each from its first image on.
    """
    order = np.arange(sum(len(dataset) for dataset in datasets))
    if limit is not None:
        order = np.argsort(np.concatenate([np.arange(len(dataset)) for dataset in datasets]), kind="stable")
    mine = order.tolist()[rank::world]
    chosen = [mine[first : first + batch_size] for first in range(0, len(mine), batch_size)][:limit]
    batches = FollowedBatches(chosen, FetchAhead(datasets))
    dataset = EvalDataset(tasks, spaces, datasets, size=data.input_size, train_size=data.size, bad_files=data.bad_files)
    num_workers = choose_workers(data.workers, num_processes_here())[0] if workers is None else workers
    return _loader(dataset, batches, Collate(tasks, data.input_size, training=False), num_workers, data.timeout_s)


def _loader(
    dataset: MultiTaskDataset | EvalDataset, batches: Any, collate: Collate, num_workers: int, timeout_s: float
) -> "DataLoader[Batch]":
    loader: WatchedLoader[Any] = WatchedLoader(
        dataset,
        num_workers=num_workers,
        place=dataset.place,
        timeout_s=timeout_s,
        batch_sampler=batches,
        collate_fn=collate,
        prefetch_factor=2 if num_workers else None,  # batches that each worker prepares ahead
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
    )
    return loader


def _mixture(
    sampling: Sampling,
    tasks: Mapping[str, Task],
    spaces: Spaces,
    datasets: Sequence[NamedDataset],
    seed: int,
    unlabelled: bool,
) -> MixtureSampler:
    teaches = [{name for name, task in tasks.items() if supervises(one, task, spaces[name])} for one in datasets]
    idle = [one.name for one, taught in zip(datasets, teaches, strict=True) if tasks and not taught]
    if idle and not unlabelled:
        raise ValueError(
            f"training data set {idle[0]!r} teaches none of the tasks {', '.join(tasks)}; one that does is needed; "
            "remove it, add a task that learns its labels, or correct the tasks' space and learns_from"
        )
    sizes = [len(one) for one in datasets]
    shares = sampling.shares(sizes, [one.weight for one in datasets], teaches)
    mixture = MixtureSampler(sizes, shares, sampling.epoch_images, seed, [one.locality for one in datasets])
    if never := [one.name for one, count in zip(datasets, mixture.counts, strict=True) if not count]:
        raise ValueError(
            f"training data set {never[0]!r} would never be drawn in an epoch of {len(mixture)} images; every data set "
            "comes at least once; raise its weight or data.sampling.epoch_images, or remove it"
        )
    return mixture
