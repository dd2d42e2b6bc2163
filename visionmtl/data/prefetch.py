"""Batches copied to the device ahead of the step that needs them."""

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from visionmtl.structures import Batch

MAX_WAITS = 4096
"""Waits kept for `Prefetcher.data_time`, in case nobody asks."""


@dataclass(frozen=True, slots=True)
class _Copy:
    """Batches on the device, or on their way there."""

    batches: list[Batch]
    requested: torch.cuda.Event  # behind the work that the device had when the batches were requested
    done: torch.cuda.Event  # behind the copies


class Prefetcher:
    """Hands batches on in groups, on the device, and measures how long the device had no data.

    On CUDA, batches are copied from pinned memory on a side stream; elsewhere they are moved when they are needed.
    """

    def __init__(self, device: torch.device, move: Callable[[Batch, torch.device], Batch] = Batch.to) -> None:
        self._device, self._move = device, move
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._batches: Iterator[Batch] = iter(())
        self._group_size = 1
        self._next: _Copy | None = None
        # events alone: a batch must not outlive its step
        self._waits: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque(maxlen=MAX_WAITS)
        self._data_time_s = 0.0

    def groups(self, batches: Iterable[Batch], size: int = 1) -> Iterator[list[Batch]]:
        """The batches in order, `size` at a time, the last group perhaps smaller. One pass at a time."""
        self._batches, self._group_size, self._next = iter(batches), size, None
        while group := self._take():
            yield group

    def prefetch(self) -> None:
        """Take the next group from the loader and start to copy it. Call this while the device works on a step.

        The copy then runs beside the step even if the host waits for the step (to log it). Does nothing where nothing
        is copied.
        """
        if self._side is not None and self._next is None:
            self._next = self._copy(self._side)

    def data_time(self) -> float:
        """Seconds without data since the last call. Does not wait itself.

        On CUDA: from the end of the device's work to the end of the copy; copies not done yet count in a later call.
        Elsewhere: the time spent in taking batches from the loader.
        """
        while self._waits and all(event.query() for event in self._waits[0]):
            requested, done = self._waits.popleft()
            self._data_time_s += max(requested.elapsed_time(done), 0.0) / 1000
        data_time_s, self._data_time_s = self._data_time_s, 0.0
        return data_time_s

    def _take(self) -> list[Batch]:
        if self._side is None:
            before = time.perf_counter()
            group = list(itertools.islice(self._batches, self._group_size))
            self._data_time_s += time.perf_counter() - before
            return [self._move(batch, self._device) for batch in group]

        copy, self._next = self._next or self._copy(self._side), None
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(copy.done)
        for tensor in itertools.chain.from_iterable(batch.tensors() for batch in copy.batches):
            if tensor.is_cuda:  # the side stream must not reuse its memory before the step is done
                tensor.record_stream(stream)
        if copy.batches:
            self._waits.append((copy.requested, copy.done))
        return copy.batches

    def _copy(self, side: torch.cuda.Stream) -> _Copy:
        requested, done = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        requested.record(torch.cuda.current_stream(self._device))
        batches = list(itertools.islice(self._batches, self._group_size))
        with torch.cuda.stream(side):
            moved = [self._move(batch, self._device) for batch in batches]
            done.record(side)
        return _Copy(moved, requested, done)
