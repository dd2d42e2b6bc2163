"""Which samples come in which batch, as a function of (seed, epoch) alone."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from torch.utils.data import Sampler

from visionmtl.config.registry import Spec
from visionmtl.datasets import Locality

Batch = TypeVar("Batch")


class Sampling(Spec):
    """How often each of several data sets is drawn from: its share is weight * amount ** (1 / temperature)."""

    by: Literal["size", "task", "equal"] = "size"
    """What a data set's amount is. size: its images, so that every image is seen once an epoch. task: of each task's
    images the part it holds, added up, so that every task sees equally many. equal: 1, whatever its size."""
    temperature: float = Field(default=1.0, gt=0)
    """1 leaves the amounts; above, they move towards equal shares (mT5, arXiv:2010.11934, section 3.2, alpha = 1/T)."""
    epoch_images: int | None = Field(default=None, ge=1)
    """Images drawn an epoch; None: as many as the data sets have together."""

    def without_effect(self, num_sets: int) -> list[str]:
        """Which of these settings are set, but would do nothing with so many training data sets."""
        shares = ("by", "temperature") if num_sets == 1 else ("temperature",) if self.by == "equal" else ()
        return [name for name in shares if getattr(self, name) != type(self).model_fields[name].default]

    def shares(
        self, sizes: Sequence[int], weights: Sequence[float], teaches: Sequence[Collection[str]]
    ) -> NDArray[np.float64]:
        """The share of each data set in the draws; their sum is 1.

        sizes, weights: images and factor of each; teaches: the tasks it has labels for, read by rule "task" only.
        """
        amounts = np.ones(len(sizes)) if self.by == "equal" else np.array(sizes, np.float64)
        if self.by == "task":
            images_of_task: Counter[str] = Counter()
            for size, tasks in zip(sizes, teaches, strict=True):
                images_of_task.update(dict.fromkeys(tasks, size))
            pairs = zip(sizes, teaches, strict=True)
            amounts = np.array([sum(size / images_of_task[task] for task in tasks) for size, tasks in pairs])
        shares = np.array(weights) * amounts ** (1 / self.temperature)
        return np.asarray(shares / shares.sum())


@dataclass(frozen=True, slots=True)
class SampleKey:
    """One draw of one sample. All its random numbers follow from this and the run's seed."""

    epoch: int
    index: int  # counted through all data sets
    repeat: int  # how many times the whole data set was already drawn in this epoch

    def rng(self, seed: int) -> np.random.Generator:
        """The random numbers of this draw."""
        return np.random.default_rng([seed, self.epoch, self.index + 1, self.repeat])  # index 0 is the order's own


class MixtureSampler:
    """The order of samples in each epoch.

    A data set is drawn in permutations: each image once, then the next permutation. An epoch continues where the last
    one stopped, so the images of a data set are seen equally often, whatever its share. The data sets are spread
    evenly over the epoch: every batch holds each one's share, to a rounding. Where samples of a data set lie together,
    as in shards, its permutations read them together: see `Locality.order`.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        shares: Sequence[float] | NDArray[np.float64],
        epoch_images: int | None,
        seed: int,
        localities: Sequence[Locality | None] | None = None,
    ) -> None:
        """shares: of each data set in the draws, adding up to 1; epoch_images: None = as many as there are.

        localities: of each data set; None: of none
        """
        self._sizes, self._seed = list(sizes), seed
        self._localities = list(localities or [None] * len(self._sizes))
        self._offsets = [0, *accumulate(sizes)]
        self.total = epoch_images or self._offsets[-1]
        exact = np.array(shares) * self.total
        counts = np.floor(exact + 1e-9).astype(int)
        for largest_remainder in np.argsort(counts - exact, kind="stable")[: self.total - counts.sum()]:
            counts[largest_remainder] += 1
        self.counts: list[int] = counts.tolist()
        """Draws an epoch, by data set."""

    def __len__(self) -> int:
        return self.total

    def keys(self, epoch: int) -> list[SampleKey]:
        """The draws of an epoch in order."""
        streams = [self._stream(dataset, epoch) for dataset in range(len(self._sizes))]
        indices, repeats = (np.concatenate(parts) for parts in zip(*streams, strict=True))
        if len(streams) > 1:
            rng = np.random.default_rng([self._seed, epoch, 0, 0, 1])
            positions = [(np.arange(count) + rng.random(count)) / max(count, 1) for count in self.counts]
            order = np.argsort(np.concatenate(positions), kind="stable")
            indices, repeats = indices[order], repeats[order]
        return [SampleKey(epoch, *draw) for draw in zip(indices.tolist(), repeats.tolist(), strict=True)]

    def _stream(self, dataset: int, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        size, count = self._sizes[dataset], self.counts[dataset]
        first_permutation, skipped = divmod(epoch * count, size)
        repeats = range(-(-(skipped + count) // size))
        # trailing zeros do not change a seed: the permutations of the first data set are those of [seed, number]
        rngs = (np.random.default_rng([self._seed, first_permutation + repeat, 0, dataset]) for repeat in repeats)
        locality = self._localities[dataset]
        orders = [rng.permutation(size) if locality is None else locality.order(rng) for rng in rngs]
        drawn = slice(skipped, skipped + count)
        indices = np.concatenate([np.zeros(0, np.int64), *orders])[drawn] + self._offsets[dataset]
        return indices, np.repeat(np.array(repeats, np.int64), size)[drawn]


class BatchSampler(Sampler[list[SampleKey]]):
    """This process's batches of an epoch; `world` processes take the parts of one common batch.

    `set_epoch` chooses the epoch and the batch to start from; what is left over at the end of an epoch is dropped
    (other samples each epoch).
    """

    def __init__(
        self,
        mixture: MixtureSampler,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        follow: "Callable[[Sequence[SampleKey]], Sequence[Follower]]" = lambda keys: (),
    ) -> None:
        """follow: called with the samples of each pass, gives who is to know how far it is."""
        self.mixture, self._batch_size, self._rank, self._world = mixture, batch_size, rank, world
        self._follow = follow
        self._epoch = self._start = self._shift = 0

    def set_epoch(self, epoch: int, start: int = 0, shift: int = 0) -> None:
        """The next iteration gives the batches of `epoch` from number `start` on.

        shift: images by which all batches lie later in the epoch's order, where an epoch that was begun in batches of
        another size is finished
        """
        self._epoch, self._start, self._shift = epoch, start, shift

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        return len(self.mixture) // (self._batch_size * self._world)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        keys = self.mixture.keys(self._epoch)
        common = self._batch_size * self._world
        begin = self._shift + self._start * common
        numbers = range(self._start, (len(keys) - self._shift) // common)
        firsts = (self._shift + number * common + self._rank * self._batch_size for number in numbers)
        batches = ((first - begin, keys[first : first + self._batch_size]) for first in firsts)
        yield from followed(batches, self._follow(keys[begin:]))


class Follower(Protocol):
    """Who works ahead of the batches of a pass."""

    def reach(self, position: int) -> None:
        """So many samples of the pass were given."""

    def close(self) -> None:
        """The pass has ended."""


def followed(batches: Iterable[tuple[int, Batch]], followers: Sequence[Follower]) -> Iterator[Batch]:
    """The batches of a pass, given with the number of samples before each, which the followers are told."""
    try:
        for position, batch in batches:
            for follower in followers:
                follower.reach(position)
            yield batch
    finally:
        for follower in followers:
            follower.close()
