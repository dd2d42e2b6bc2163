"""How loader processes start, how many there are, and how they end with the process they work for."""

import multiprocessing
import multiprocessing.context
import os
import signal
import sys
import threading
from typing import Literal

import cv2
import torch

MAX_AUTO_WORKERS = 16


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
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([name for name in sys.modules if name.partition(".")[0] == "visionmtl"])
    return context


def init_worker(worker: int) -> None:
    """Runs first in every worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the training process
    # parallelism is over workers; threads inside them only fight for the cores
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    # a worker of a fork server outlives a training process that was killed, unless it looks for itself
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
