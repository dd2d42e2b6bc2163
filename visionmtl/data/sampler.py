"""How often each data set is drawn from, and in which order its images come."""

from collections import Counter
from collections.abc import Collection, Sequence
from itertools import accumulate
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from visionmtl.config.registry import Spec


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
            of_task: Counter[str] = Counter()
            for size, tasks in zip(sizes, teaches, strict=True):
                of_task.update(dict.fromkeys(tasks, size))
            pairs = zip(sizes, teaches, strict=True)
            amounts = np.array([sum(size / of_task[task] for task in tasks) for size, tasks in pairs])
        shares = np.array(weights) * amounts ** (1 / self.temperature)
        return np.asarray(shares / shares.sum())


class Draws:
    """The images of every epoch, as a function of (seed, epoch) alone.

    A data set gives its images in rounds: each once, in an order of the round's own, then the next round. An epoch
    takes up where the last one stopped, so no image is seen more than once oftener than another, whatever the share.
    The data sets are spread evenly over the epoch: every batch holds each one's share, to a rounding.
    """

    def __init__(
        self, sizes: Sequence[int], shares: Sequence[float] | NDArray[np.float64], epoch_images: int | None, seed: int
    ) -> None:
        """shares: of each data set in the draws, adding up to 1; epoch_images: None = as many as there are."""
        self.sizes, self._seed = list(sizes), seed
        self._firsts = [0, *accumulate(sizes)]
        self.total = epoch_images or self._firsts[-1]
        wanted = np.array(shares) * self.total
        counts = np.floor(wanted + 1e-9).astype(int)
        for place in np.argsort(counts - wanted, kind="stable")[: self.total - counts.sum()]:
            counts[place] += 1  # what rounding left goes to the largest remainders
        self.counts: list[int] = counts.tolist()

    def epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Images in order, numbered through all data sets, and their rounds within this epoch, from 0.

        An image comes once a round, so the pair is met once an epoch.
        """
        streams = [self._stream(which, epoch) for which in range(len(self.sizes))]
        images, rounds = (np.concatenate(parts) for parts in zip(*streams, strict=True))
        if len(streams) > 1:
            rng = np.random.default_rng([self._seed, epoch, 0, 0, 1])
            places = [(np.arange(count) + rng.random(count)) / max(count, 1) for count in self.counts]
            order = np.argsort(np.concatenate(places), kind="stable")
            images, rounds = images[order], rounds[order]
        return images, rounds

    def _stream(self, which: int, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        size, count = self.sizes[which], self.counts[which]
        first, skipped = divmod(epoch * count, size)
        numbers = range(-(-(skipped + count) // size))
        # trailing zeros do not change a seed: the first data set's rounds are those of [seed, round]
        orders = [np.random.default_rng([self._seed, first + i, 0, which]).permutation(size) for i in numbers]
        images = np.concatenate([np.zeros(0, np.int64), *orders])[skipped : skipped + count]
        return images + self._firsts[which], np.repeat(np.array(numbers, np.int64), size)[skipped : skipped + count]


def random_numbers(seed: int, epoch: int, index: int, again: int) -> np.random.Generator:
    """Those of one image in one of its rounds (`again`) of an epoch."""
    return np.random.default_rng([seed, epoch, index + 1, again])  # 0 for 1 would repeat that of the order
