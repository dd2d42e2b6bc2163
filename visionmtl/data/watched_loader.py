"""A DataLoader that says which of its workers died or hangs, and over which file."""

import queue
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from visionmtl.data.workers import (
    NO_SHARED_MEMORY,
    TOO_MANY_FILES,
    UNDELIVERABLE,
    Activity,
    init_worker,
    start_method,
)

TIMEOUT_S = 300.0
"""How long all workers may stand still while a batch is waited for."""
START_S = 120.0
"""As much longer while one has not begun: it imports packages and opens the data sets first."""
_POLL_S = 1.0
_GRACE_S = 3.0  # from the error that a dead worker causes to its exit status
_END = object()
_AGAIN = "start again, a training with --resume"
_SERVER_GONE = 255  # the exit status of a process whose fork server has ended
_CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)

Item = TypeVar("Item")


class LostWorker(ChildProcessError):
    """A loader worker ended before its work did."""


class HungWorker(TimeoutError):
    """The loader workers stand still."""


class WatchedLoader(DataLoader[Item]):
    """As DataLoader; where a worker dies or all stand still, iterating raises LostWorker or HungWorker."""

    def __init__(
        self,
        dataset: "TorchDataset[Any]",
        *,
        num_workers: int,
        place: Callable[[int], str],
        timeout_s: float = TIMEOUT_S,
        **settings: Any,
    ) -> None:
        """place: names the sample of a number that the data set gave to `workers.now_reading`, with its file.

        settings: DataLoader's own.
        """
        self._place, self._timeout_s = place, timeout_s
        self._activity: Activity | None = None  # from the first pass on: it starts the server of the workers
        super().__init__(
            dataset,
            num_workers=num_workers,
            multiprocessing_context=start_method() if num_workers else None,
            generator=torch.Generator(),  # else every pass draws from the global generator, and resuming is not exact
            **settings,
        )

    def __iter__(self) -> Any:
        if not self.num_workers:
            return super().__iter__()
        if self._activity is None:
            self._activity = Activity(self.num_workers)
            self.worker_init_fn = partial(init_worker, activity=self._activity)
        if self._iterator is None:
            self._activity.clear()
        self._oom_kills = _oom_kills()
        return self._watched(super().__iter__())

    def _watched(self, iterator: Any) -> Iterator[Item]:
        """The items of `iterator`, which another thread waits for: half a message of a dead worker would hold it."""
        requests: queue.SimpleQueue[bool] = queue.SimpleQueue()
        answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        threading.Thread(target=_answer, args=(iterator, requests, answers), daemon=True).start()
        try:
            while True:
                requests.put(True)
                try:
                    item = self._receive(iterator, answers)
                except BaseException:
                    self._iterator = None  # the other thread may still wait with this one
                    raise
                if item is _END:
                    return
                yield item
        finally:
            requests.put(False)

    def _receive(self, iterator: Any, answers: "queue.SimpleQueue[tuple[Any, BaseException | None]]") -> Any:
        assert self._activity is not None
        stands_still_s, before = 0.0, self._activity.snapshot()
        while True:
            try:
                item, error = answers.get(timeout=_POLL_S)
            except queue.Empty:
                self._check_alive(iterator)
                # counted in turns of this loop: it may have been stopped together with the workers
                stands_still_s += _POLL_S
                if (now := self._activity.snapshot()) != before:
                    stands_still_s, before = 0.0, now
                starting = any(not pid for pid, _, _ in now)
                if stands_still_s >= self._timeout_s + (START_S if starting else 0):
                    self._raise_hung(iterator, stands_still_s)
                continue
            if error is None:
                return item
            if isinstance(error, StopIteration):
                return _END
            deadline = time.monotonic() + _GRACE_S  # what torch says of a dead worker depends on when it died
            while isinstance(error, RuntimeError | OSError | EOFError) and time.monotonic() < deadline:
                self._check_alive(iterator, error)
                if "DataLoader worker" not in str(error) and not isinstance(error, ConnectionError | EOFError):
                    break
                time.sleep(0.05)
            raise error

    def _check_alive(self, iterator: Any, cause: BaseException | None = None) -> None:
        """Raise LostWorker where a worker has ended."""
        assert self._activity is not None
        if iterator._shutdown:  # at the end of a pass
            return
        processes = iterator._workers
        dead = [number for number, process in enumerate(processes) if not process.is_alive()]
        if not dead:
            return
        # one that died by itself explains more than those that ended with the server
        number = min(dead, key=lambda one: processes[one].exitcode == _SERVER_GONE)
        pid, index, _ = self._activity.snapshot()[number]
        ended, advice = self._explain(processes[number].exitcode, processes)
        self._abandon(iterator)
        raise LostWorker(
            f"loader worker {number + 1} of {len(processes)} (process {processes[number].pid}) {ended} "
            f"{_doing(pid, index, self._place)}; workers must run to the end; {advice}"
        ) from cause

    def _explain(self, code: int, processes: list[Any]) -> tuple[str, str]:
        """How a worker with this exit status ended, and what to do."""
        if code == _SERVER_GONE:
            ended = "or the server process that starts workers ended (exit status 255)"
            return ended, f"look for what ended them (the system's log of killed processes), then {_AGAIN}"
        if code == NO_SHARED_MEMORY:
            return "found no room in shared memory for its batch", _enlarge_shared_memory()
        if code == TOO_MANY_FILES:
            return "may have no more files open", "allow more of them (ulimit -n 65536), or take fewer data.workers"
        if code == UNDELIVERABLE:
            return "could not hand over its batch", "what it printed above says why"
        if code >= 0:
            return (
                f"ended with exit status {code}",
                "look at what it printed above, or see it without workers (data.workers=0)",
            )
        name = signal.Signals(-code).name if -code in set(signal.Signals) else "unknown"
        ended = f"was killed by signal {-code} ({name})"
        if -code == signal.SIGKILL:
            kills = _oom_kills() - self._oom_kills
            counted = f"the kernel counts {kills} kill(s) for want of memory meanwhile; " if kills > 0 else ""
            return f"{ended}{_memory([process.pid for process in processes])}", (
                f"{counted}mostly the kernel kills so when memory runs out: lower data.workers, which is "
                f"{len(processes)} here, or train.batch_size, then {_AGAIN}"
            )
        if -code == getattr(signal, "SIGBUS", None):
            return ended, f"mostly shared memory is too small: {_enlarge_shared_memory()}"
        if -code in _CRASHES:
            return ended, "a decoder crashed, mostly over a damaged file: mend or remove this one"
        return ended, f"find out who sent the signal, then {_AGAIN}"

    def _raise_hung(self, iterator: Any, stands_still_s: float) -> None:
        assert self._activity is not None
        slots, processes = self._activity.snapshot(), iterator._workers
        states = [_state(process.pid) for process in processes]
        # suspicious are one that has not begun, one that reads, and one that is stopped
        number = max(
            range(len(slots)), key=lambda one: (slots[one][1] >= 0, not slots[one][0], states[one].startswith("T"))
        )
        pid, index, _ = slots[number]
        state = f", {_STATES[states[number]]}" if states[number] in _STATES else ""
        self._abandon(iterator)
        raise HungWorker(
            f"loader worker {number + 1} of {len(processes)} (process {processes[number].pid}{state}) has stood still "
            f"for {stands_still_s:.0f} s {_doing(pid, index, self._place)}, and no other goes on; data.timeout_s "
            f"allows {self._timeout_s:g} s; look whether the disk of this file answers and nothing stops the process, "
            f"then {_AGAIN}; raise data.timeout_s for a slower disk"
        )

    def _abandon(self, iterator: Any) -> None:
        """End all workers, and leave nothing that waits for them."""
        for process in iterator._workers:
            process.kill()
        iterator._shutdown = True  # else torch waits at the end for a thread that half a message holds


def _answer(
    iterator: Iterator[Any],
    requests: "queue.SimpleQueue[bool]",
    answers: "queue.SimpleQueue[tuple[Any, BaseException | None]]",
) -> None:
    """Fetch one item for each request."""
    while requests.get():
        try:
            answers.put((next(iterator), None))
        except BaseException as error:  # noqa: BLE001 (who waits for the answer raises it again)
            answers.put((None, error))


def _enlarge_shared_memory() -> str:
    free = f" has {_gib(shutil.disk_usage('/dev/shm').free)} free" if Path("/dev/shm").is_dir() else ""
    return f"/dev/shm{free}; enlarge it (docker run --shm-size=8g), or lower data.workers or train.batch_size"


def _doing(pid: int, index: int, place: Callable[[int], str]) -> str:
    """What a worker was doing, as its slot of `Activity` tells."""
    if not pid:
        return "before it began (it imports packages and opens the data sets)"
    if index == -1:
        return "before it read its first image"
    return f"while it read {place(index)}" if index >= 0 else f"after it had read {place(-2 - index)}"


# ---- what Linux tells of processes; elsewhere the messages are shorter ----

_STATES = {"T": "stopped by a signal", "t": "stopped by a debugger", "D": "waiting for a disk"}


def _state(pid: int) -> str:
    return _proc(f"{pid}/status", "State")[:1]


def _memory(pids: list[int]) -> str:
    """Resident memory of this process and of those of `pids` that live, and what is free, for messages."""
    own, free, total = (_proc(*one) for one in (("self/status", "VmRSS"), *_MEMORY))
    if not (own and free and total):
        return ""
    others = [text for pid in pids if (text := _proc(f"{pid}/status", "VmRSS"))]
    told = f", the other workers {' + '.join(_gib_of_kb(text) for text in others)}" if others else ""
    return f" [memory: this process {_gib_of_kb(own)}{told}; {_gib_of_kb(free)} of {_gib_of_kb(total)} free]"


_MEMORY = (("meminfo", "MemAvailable"), ("meminfo", "MemTotal"))


def _oom_kills() -> int:
    """Processes that the kernel has killed for want of memory since it started."""
    return int(_proc("vmstat", "oom_kill") or 0)


def _proc(file: str, name: str) -> str:
    """The value of a line "NAME: value" or "NAME value" of a file in /proc; "" where there is none."""
    try:
        lines = Path("/proc", file).read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    rows = (line.replace(":", " ", 1).partition(" ") for line in lines)
    return next((value.strip() for found, _, value in rows if found == name), "")


def _gib_of_kb(text: str) -> str:
    return _gib(int(text.split()[0]) * 1024)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
