"""How loader processes start, how many there are, what they tell of their work, and how they end."""

import errno
import multiprocessing
import multiprocessing.context
import multiprocessing.queues
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import Any, Literal

import cv2
import torch

MAX_AUTO_WORKERS = 16
NO_SHARED_MEMORY, TOO_MANY_FILES, UNDELIVERABLE = 80, 81, 82
"""Exit statuses of a worker that could not hand over what it read."""


def choose_workers(workers: int | Literal["auto"], processes: int = 1) -> tuple[int, str]:
    """Loader processes per training process, and why that many.

    processes: training processes that share this machine's cores, see `num_processes_here`.
    """
    if workers != "auto":
        return workers, f"data.workers={workers}"
    cores = num_cores()
    chosen = max(0, min(MAX_AUTO_WORKERS, cores // processes - 1))
    shared = f" for {processes} processes" if processes > 1 else ""
    return chosen, f"auto: {cores} cores{shared}, one left to each training process, at most {MAX_AUTO_WORKERS}"


def num_cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_processes_here() -> int:
    """Training processes on this machine: torchrun's LOCAL_WORLD_SIZE; all of the run where it does not say."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)


def start_method() -> multiprocessing.context.BaseContext:
    """How workers begin: never as a fork of the training process, which loses OpenCV's and OpenMP's threads (it hangs).

    They are forked from a clean server that has imported what this process has of the package, or else spawned.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    from visionmtl.data.worker_context import WorkerContext, start_server  # not every system can import it

    context = WorkerContext()
    context.set_forkserver_preload([name for name in sys.modules if name.partition(".")[0] == "visionmtl"])
    start_server()
    return context


class Activity:
    """What each worker is doing, in memory that it shares with the process it works for.

    Three int64 a worker: its process id (0: it has not begun), the number of the sample that it reads (-2 - number:
    that it read last; -1: none yet), and how often that changed.
    """

    def __init__(self, num_workers: int) -> None:
        # without locks: each slot has one writer, and int64 are written whole
        context: Any = start_method()
        self._slots = context.RawArray("q", 3 * num_workers)

    def begin(self, worker: int) -> None:
        """Called by the worker at its start."""
        self._slots[3 * worker : 3 * worker + 3] = [os.getpid(), -1, 1]

    def read(self, worker: int, number: int) -> None:
        """Called by the worker before it reads a sample."""
        self._slots[3 * worker + 1] = number
        self._slots[3 * worker + 2] += 1

    def rest(self, worker: int) -> None:
        """Called by the worker when a batch is done."""
        self.read(worker, -2 - self._slots[3 * worker + 1])

    def clear(self) -> None:
        """Before other workers begin."""
        self._slots[:] = [0] * len(self._slots)

    def snapshot(self) -> list[Sequence[int]]:
        """The three numbers of each worker."""
        numbers = self._slots[:]
        return [numbers[first : first + 3] for first in range(0, len(numbers), 3)]


_own: tuple[Activity, int] | None = None
"""In a worker: where it writes what it does, and its own number."""


def now_reading(number: int) -> None:
    """Tell which sample this worker begins to read; does nothing in another process."""
    if _own:
        _own[0].read(_own[1], number)


def now_resting() -> None:
    """Tell that this worker has read a batch."""
    if _own:
        _own[0].rest(_own[1])


def init_worker(worker: int, activity: Activity | None = None) -> None:
    """Runs first in every worker."""
    global _own
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the training process
    # parallelism is over workers; threads inside them only fight for the cores
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    # else Python drops the batch, and the training process waits for it without end
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_undelivered)  # type: ignore[attr-defined]
    # a worker of a fork server outlives a training process that was killed, unless it looks for itself
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if "forkserver" in multiprocessing.get_all_start_methods():
        from visionmtl.data.worker_context import end_with_server

        end_with_server()
    if activity:
        activity.begin(worker)
        _own = activity, worker


def _end_undelivered(error: Exception, _: object) -> None:
    if isinstance(error, OSError) and error.errno == errno.EMFILE:
        os._exit(TOO_MANY_FILES)
    if "shared memory" in str(error):  # a RuntimeError of torch's
        os._exit(NO_SHARED_MEMORY)
    traceback.print_exception(error)
    os._exit(UNDELIVERABLE)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
