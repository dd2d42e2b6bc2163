"""Training many runs side by side: each in a process of its own, finished ones skipped, interrupted ones resumed."""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from visionmtl.config.loader import ConfigError
from visionmtl.datasets import Dataset
from visionmtl.run import Run
from visionmtl.study import worker
from visionmtl.study.comparison import key_of
from visionmtl.study.worker import Result, begun_settings, differences, load_result

PATIENCE_S = 120.0
"""How long a process that was asked to stop may take to write its checkpoint."""


@dataclass(frozen=True)
class Job:
    """A run to train, and what to evaluate it on at the end (None: nothing)."""

    name: str
    run: Run
    test: tuple[Dataset, ...] | None

    @property
    def title(self) -> str:
        """For messages."""
        return f"{self.name}, seed {self.run.seed}"


class Runner:
    """The runs of a comparison in a folder. Runs with equal settings are trained once."""

    def __init__(
        self, folder: Path, num_jobs: int, threads: int, device: str, cache: bool, tell: Callable[[str], None]
    ) -> None:
        """threads: of each process, the same for all runs, as their results may depend on it in the last digits.

        cache: whether decoded training images are kept in DIR/cache
        """
        self._cache = folder / "cache" if cache else None
        self.folder, self.num_jobs, self.threads, self.device, self.tell = folder, num_jobs, threads, device, tell
        self._folders: dict[str, Path] = {}

    def place(self, name: str, run: Run) -> Path:
        """The folder of a run: DIR/runs/NAME/SEED, or that of a run with equal settings that was placed before."""
        return self._folders.setdefault(key_of(run), self.folder / "runs" / name / str(run.seed))

    def result(self, name: str, run: Run, test: Sequence[Dataset] | None) -> Result | None:
        """The result of a finished run; None: not finished. Raises ConfigError where the folder is another run's.

        test: what it must have been evaluated on
        """
        folder = self.place(name, run)
        result = load_result(folder)
        settings = result.settings if result else begun_settings(folder)
        if settings is not None and (changed := differences(settings, run)):
            more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
            raise ConfigError(
                f"{folder} holds {'a finished' if result else 'an unfinished'} run with other settings: "
                f"{'; '.join(changed[:5])}{more}; a folder belongs to one run; delete it to train anew, or choose "
                "another --output"
            )
        if result is None:
            return None
        missing = test is not None and (result.test is None or not _same_data(result.test_sets, test))
        return None if missing and not result.diverged else result

    def finish(self, jobs: Sequence[Job], on_result: Callable[[], None] = lambda: None) -> list[str]:
        """Train and evaluate what is not finished; returns what failed, a line each.

        on_result: called after each run. At an interrupt the processes write their checkpoints first.
        """
        waiting: dict[Path, Job] = {}
        for job in jobs:
            folder = self.place(job.name, job.run)
            if self.result(job.name, job.run, job.test) is None:
                known = waiting.get(folder)
                waiting[folder] = job if known is None or known.test is None else known
        if waiting:
            self.tell(f"{len(waiting)} runs to train, {self.num_jobs} at a time, {self.threads} thread(s) each")
        failed, done, total, begin = [], 0, len(waiting), time.monotonic()
        running: dict[BaseProcess, tuple[Path, Job, float]] = {}
        try:
            while waiting or running:
                while waiting and len(running) < self.num_jobs:
                    folder, job = next(iter(waiting.items()))
                    del waiting[folder]
                    running[self._start(folder, job)] = folder, job, time.monotonic()
                time.sleep(0.1)
                for process in [process for process in running if not process.is_alive()]:
                    folder, job, started = running.pop(process)
                    done += 1
                    result = load_result(folder)
                    taken, left = time.monotonic() - started, (time.monotonic() - begin) / done * (total - done)
                    if process.exitcode or result is None:
                        failed.append(f"{job.title}: {_last_line(folder / 'compare.log')}")
                        self.tell(f"[{done}/{total}] {job.title} FAILED: {failed[-1]}")
                    else:
                        what = "diverged" if result.diverged else f"{taken:.0f} s"
                        self.tell(f"[{done}/{total}] {job.title}: {what}; about {left / 60:.0f} min left")
                        on_result()
        finally:
            self._stop(list(running))
        return failed

    def _start(self, folder: Path, job: Job) -> BaseProcess:
        data = job.run.data.model_copy(update={"cache": self._cache or job.run.data.cache})
        run = job.run.model_copy(update={"output": str(folder), "data": data})
        process = _context(self.threads).Process(
            target=worker.work, args=(run, job.test, self.threads, self.device), name=job.title
        )
        process.start()
        return process

    def _stop(self, processes: Sequence[BaseProcess]) -> None:
        """Let processes write their checkpoints, and end."""
        if not processes:
            return
        self.tell(f"stopping {len(processes)} run(s) with a checkpoint; the same command goes on from there")
        for process in processes:
            process.terminate()
        end = time.monotonic() + PATIENCE_S
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
            if process.is_alive():
                process.kill()


def _context(threads: int) -> Any:
    """Processes fork from a clean server that has imported the package: imports take longer than a short run."""
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    names = ["timm", "torch.utils.tensorboard", "pycocotools.cocoeval", "albumentations"]
    context.set_forkserver_preload([*names, *(name for name in sys.modules if name.partition(".")[0] == "visionmtl")])
    return context


def _same_data(stored: Sequence[Mapping[str, Any]], wanted: Sequence[Dataset]) -> bool:
    """Settings that the stored ones lack, since a later version added them, have their defaults."""
    try:
        return TypeAdapter(tuple[Dataset, ...]).validate_python(stored) == tuple(wanted)
    except ValidationError:
        return False


def _last_line(file: Path) -> str:
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    errors = [line for line in lines if "rror" in line]
    return (errors or lines or ["no message"])[-1].removeprefix("error: ")
