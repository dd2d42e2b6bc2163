"""The prefetcher: batches arrive in order, copies run beside the step and are awaited, waiting is measured right."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from toy_run import small_batch, small_run, small_state, small_tasks

from visionmtl.data import prefetch as module
from visionmtl.data.prefetch import Prefetcher
from visionmtl.structures import Batch

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def batch(number: int) -> Batch:
    return Batch(torch.full((1, 3, 2, 2), number, dtype=torch.uint8), {"a": {"b": torch.tensor([number])}}, {})


def test_on_a_cpu_the_batches_pass_as_they_are_in_order_and_no_sooner_than_asked_for():
    batches, taken = [batch(i) for i in range(5)], []

    def loader() -> Iterator[Batch]:
        for one in batches:
            taken.append(one)
            yield one

    prefetcher, groups = Prefetcher(CPU), []
    for group in prefetcher.groups(loader(), 2):
        prefetcher.prefetch()
        groups.append(group)
        assert len(taken) == sum(map(len, groups))

    assert [len(group) for group in groups] == [2, 2, 1]
    passed = [one for group in groups for one in group]
    assert [int(one.image[0, 0, 0, 0]) for one in passed] == list(range(5))


def test_on_a_cpu_waiting_is_the_time_in_the_loader(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])

    def loader() -> Iterator[Batch]:
        for _ in range(2):
            now[0] += 0.25
            yield batch(0)

    prefetcher, waited = Prefetcher(CPU), []
    for _ in prefetcher.groups(loader()):
        now[0] += 1.0  # the step
        waited.append(prefetcher.data_time())
    assert waited == [0.25, 0.25]
    assert prefetcher.data_time() == 0.0


class Imagined:
    """Streams and events of a GPU that is not there: they note what they are told, at times that the test decides."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.notes: list[str] = []
        self.times: dict[str, float] = {}  # when what is recorded on a stream has come to pass, ms
        self.pending = False
        imagined = self

        class Stream:
            name = "side"

            def __init__(self, *_: object) -> None: ...

            def wait_event(self, event: "Event") -> None:
                imagined.notes.append(f"{self.name} waits for {event.name}")

        class Main(Stream):
            name = "main"

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing
                self.name, self.at = "", 0.0

            def record(self, stream: Stream) -> None:
                self.name, self.at = f"{stream.name}'s work", imagined.times.get(stream.name, 0.0)

            def query(self) -> bool:
                return not imagined.pending

            def elapsed_time(self, end: "Event") -> float:
                return end.at - self.at

        @contextmanager
        def within(stream: Stream) -> Iterator[None]:
            imagined.notes.append(f"on {stream.name}")
            yield
            imagined.notes.append(f"off {stream.name}")

        for name, stub in {"Stream": Stream, "Event": Event, "stream": within}.items():
            monkeypatch.setattr(torch.cuda, name, stub)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: Main())

    def there(self, one: Any, device: torch.device) -> Any:
        """A batch moved: of one tensor that notes who uses it."""
        number, notes = int(one.image.max()), self.notes
        notes.append(f"copy {number}")

        class There:
            is_cuda = True

            def record_stream(self, stream: Any) -> None:
                notes.append(f"{number} used on {stream.name}")

        return Batch(There(), {}, {})  # type: ignore[arg-type]


def test_a_gpu_waits_from_the_end_of_its_work_to_the_end_of_the_copy(monkeypatch: pytest.MonkeyPatch):
    gpu = Imagined(monkeypatch)
    prefetcher = Prefetcher(CUDA, gpu.there)
    gpu.times = {"main": 0.0, "side": 30.0}  # the first batch came 30 ms after the device was free
    groups = prefetcher.groups(map(batch, range(3)))
    next(groups)
    gpu.pending = True
    assert prefetcher.data_time() == 0.0, "nobody waits to find out"
    gpu.pending = False
    assert prefetcher.data_time() == pytest.approx(0.030)

    gpu.times = {"main": 100.0, "side": 60.0}  # copied before the step was over
    prefetcher.prefetch()
    next(groups)
    assert prefetcher.data_time() == 0.0


def test_a_pass_broken_off_leaves_nothing_to_the_next(monkeypatch: pytest.MonkeyPatch):
    gpu = Imagined(monkeypatch)
    prefetcher = Prefetcher(CUDA, gpu.there)
    next(prefetcher.groups(map(batch, range(5))))
    prefetcher.prefetch()

    gpu.notes.clear()
    next(prefetcher.groups(map(batch, range(7, 9))))
    assert "copy 7" in gpu.notes and "1 used on main" not in gpu.notes


def test_batches_do_not_outlive_their_step_though_nobody_asks_how_long_they_took(monkeypatch: pytest.MonkeyPatch):
    class Watched(Batch):
        __slots__ = ("__weakref__",)

    Imagined(monkeypatch)
    watched: list[weakref.ref[Watched]] = []

    def moved(one: Batch, device: torch.device) -> Batch:
        there = Watched(one.image, {}, {})
        watched.append(weakref.ref(there))
        return there

    prefetcher = Prefetcher(CUDA, moved)
    for group in prefetcher.groups(map(batch, range(5))):
        prefetcher.prefetch()
        assert len(group) == 1 and sum(one() is not None for one in watched) <= 2, "this one and the next"


def pinned(one: Batch) -> Batch:
    """As the loader's own thread pins it."""
    return one.pin_memory()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_on_a_gpu_each_step_sees_its_own_batch_however_late_it_runs():
    """Memory of a batch must not be written again before the step that reads it; here steps are far behind copies."""
    count, size = 40, (16, 3, 512, 512)
    batches = (pinned(Batch(torch.full(size, i, dtype=torch.uint8), {}, {})) for i in range(count))
    prefetcher, sums, busy = Prefetcher(CUDA), [], torch.rand(4096, 4096, device=CUDA)
    for (one,) in prefetcher.groups(batches):
        for _ in range(3):
            busy = busy @ busy / 4096
        sums.append(one.image.float().mean())
        del one
        prefetcher.prefetch()
    assert torch.stack(sums).tolist() == list(range(count))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_on_a_gpu_fed_steps_wait_for_nothing():
    tasks = small_tasks()
    state, prefetcher = small_state(small_run(tasks), "cuda"), Prefetcher(CUDA)
    for step, group in enumerate(prefetcher.groups([pinned(small_batch(tasks)) for _ in range(6)])):
        torch.cuda.set_sync_debug_mode("error" if step > 2 else "default")
        try:
            state.train_step(group)
            prefetcher.prefetch()
            prefetcher.data_time()
        finally:
            torch.cuda.set_sync_debug_mode("default")
