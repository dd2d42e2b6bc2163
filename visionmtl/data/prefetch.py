"""The way of batches to the device: the next ones are copied while the step on the present ones runs."""

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from visionmtl.network import to_device
from visionmtl.structures import Batch

MOST_PAUSES = 4096
"""Pauses kept for `Prefetcher.waited_s`, which somebody who does not ask never takes out."""


@dataclass(frozen=True, slots=True)
class _Copied:
    """Batches on the device, or on their way there."""

    batches: list[Batch]
    asked: torch.cuda.Event  # behind the work that the device had when they were asked for
    done: torch.cuda.Event  # behind their copies


class Prefetcher:
    """Hands batches on in groups, and knows how long the device stood still for want of them.

    On CUDA they are copied from pinned memory on a stream of their own, by `move`; elsewhere they pass as they are.
    """

    def __init__(self, device: torch.device, move: Callable[[Batch, torch.device], Batch] = to_device) -> None:
        self._device, self._move = device, move
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._source: Iterator[Batch] = iter(())
        self._size = 1
        self._next: _Copied | None = None
        # events alone: what was copied must not outlive its step
        self._pauses: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque(maxlen=MOST_PAUSES)
        self._waited_s = 0.0

    def groups(self, batches: Iterable[Batch], size: int = 1) -> Iterator[list[Batch]]:
        """The batches in order, `size` at a time, the last group perhaps smaller. One pass at a time."""
        self._source, self._size, self._next = iter(batches), size, None
        while group := self._take():
            yield group

    def ahead(self) -> None:
        """Take the next group from the loader and begin to copy it: to be called when a step is under way.

        Only then does the copy run beside the step even if the host waits for that one (to log it). Does nothing where
        nothing is copied.
        """
        if self._side is not None and self._next is None:
            self._next = self._copy(self._side)

    def waited_s(self) -> float:
        """Seconds, since the last call, that there was no data to work on; waits for nothing itself.

        Elsewhere than on CUDA that is the time spent in taking batches. A CUDA device may be busy meanwhile: there it
        is the time from the end of its work to the end of the copy; what lies ahead of it counts in a later call.
        """
        while self._pauses and all(event.query() for event in self._pauses[0]):
            asked, done = self._pauses.popleft()
            self._waited_s += max(asked.elapsed_time(done), 0.0) / 1000
        waited, self._waited_s = self._waited_s, 0.0
        return waited

    def _take(self) -> list[Batch]:
        if self._side is None:
            before = time.perf_counter()
            group = list(itertools.islice(self._source, self._size))
            self._waited_s += time.perf_counter() - before
            return group

        copied, self._next = self._next or self._copy(self._side), None
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(copied.done)
        for tensor in itertools.chain.from_iterable(map(_tensors, copied.batches)):
            tensor.record_stream(stream)  # its memory was taken on the side: not to be used there again before the step
        if copied.batches:
            self._pauses.append((copied.asked, copied.done))
        return copied.batches

    def _copy(self, side: torch.cuda.Stream) -> _Copied:
        asked, done = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        asked.record(torch.cuda.current_stream(self._device))
        batches = list(itertools.islice(self._source, self._size))
        with torch.cuda.stream(side):
            moved = [self._move(batch, self._device) for batch in batches]
            done.record(side)
        return _Copied(moved, asked, done)


def _tensors(batch: Batch) -> Iterator[Tensor]:
    """Those on a CUDA device."""
    tensors = [batch.image, *batch.labelled.values(), *(t for task in batch.targets.values() for t in task.values())]
    return (tensor for tensor in (*tensors, batch.colour) if tensor is not None and tensor.is_cuda)
