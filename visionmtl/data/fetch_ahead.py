"""Fetches the shards that the coming batches will read while the present ones are trained on."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import numpy as np

from visionmtl.data.sampler import SampleKey, followed
from visionmtl.datasets import Locality, NamedDataset
from visionmtl.io.remote import StoreError


class FetchAhead:
    """For the data sets of a loader whose samples lie elsewhere; does nothing for the others."""

    def __init__(self, datasets: Sequence[NamedDataset]) -> None:
        ends = list(accumulate(len(dataset) for dataset in datasets))
        self._remote: list[tuple[int, int, Locality, Callable[[int], None]]] = []
        for dataset, end in zip(datasets, ends, strict=True):
            fetch, locality = getattr(dataset.reader, "fetch", None), dataset.locality
            if fetch is not None and locality is not None:
                self._remote.append((end - len(dataset), end, locality, fetch))

    def start(self, keys: Sequence[SampleKey]) -> list["Fetching"]:
        """A thread for each data set that follows these samples, the coming ones of an epoch in their order."""
        if not self._remote or not keys:
            return []
        numbers = np.array([(key.index, key.repeat) for key in keys], np.int64)
        threads = []
        for begin, end, locality, fetch in self._remote:
            positions = np.flatnonzero((begin <= numbers[:, 0]) & (numbers[:, 0] < end))
            indices = numbers[positions, 0] - begin
            # a shard is needed once in each permutation of the data set
            stretches = np.stack([numbers[positions, 1], locality.run_of(indices)], axis=1)
            first = np.sort(np.unique(stretches, axis=0, return_index=True)[1])
            threads.append(Fetching(positions[first].tolist(), indices[first].tolist(), locality.window, fetch))
        return threads


class FollowedBatches:
    """Batches of indices, as DataLoader takes them, that tell a `FetchAhead` how far they are."""

    def __init__(self, batches: Sequence[list[int]], ahead: FetchAhead) -> None:
        self._batches, self._ahead = batches, ahead

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        keys = [SampleKey(0, index, 0) for batch in self._batches for index in batch]
        positions = accumulate((len(batch) for batch in self._batches), initial=0)
        yield from followed(zip(positions, self._batches, strict=False), self._ahead.start(keys))


class Fetching:
    """Fetches one data set's shards in the order in which they are needed, so many ahead of those begun."""

    def __init__(
        self, positions: Sequence[int], indices: Sequence[int], ahead: int, fetch: Callable[[int], None]
    ) -> None:
        """positions: in the order of samples, where each shard begins to be needed; indices: a sample of each."""
        self._positions, self._indices, self._ahead, self._fetch = positions, indices, ahead, fetch
        self._reached, self._closed = 0, False
        self._changed = threading.Condition()
        threading.Thread(target=self._work, daemon=True).start()

    def reach(self, position: int) -> None:
        """Tell how far the samples have been given to the workers."""
        with self._changed:
            self._reached = position
            self._changed.notify()

    def close(self) -> None:
        """No more is needed."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _work(self) -> None:
        for number, index in enumerate(self._indices):
            with self._changed:
                self._changed.wait_for(lambda at=number: self._closed or self._is_due(at))  # type: ignore[misc]
                if self._closed:
                    return
                if self._is_over(number):  # readers were faster; it may have made room for others already
                    continue
            # the worker that reads the sample tries again, and says what is wrong; RuntimeError: this process is ending
            # and has closed its connections
            with contextlib.suppress(StoreError, OSError, RuntimeError):
                self._fetch(index)

    def _is_due(self, number: int) -> bool:
        return number < self._ahead or self._positions[number - self._ahead] <= self._reached

    def _is_over(self, number: int) -> bool:
        """Whether a shard of a later window is begun, so that this one is read no more."""
        later = number + self._ahead
        return later < len(self._positions) and self._positions[later] <= self._reached
