"""One run of a comparison, in a process of its own: train or go on, choose a checkpoint, evaluate it on test data."""

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from visionmtl import api
from visionmtl.config.allocator import keep_freed_memory
from visionmtl.config.loader import ConfigError
from visionmtl.config.text_files import check_object, read_object
from visionmtl.datasets import Dataset, open_datasets
from visionmtl.engine import checkpoint
from visionmtl.engine.evaluator import read_results
from visionmtl.engine.nonfinite import NotFinite
from visionmtl.io.atomic import write_json
from visionmtl.metrics.base import Results
from visionmtl.report.report import read_rows
from visionmtl.run import Run
from visionmtl.study.comparison import renewed, settings_of

RESULT = "result.json"
BEGUN = "settings.json"
"""Written before the first step, so that no other run goes on from its checkpoint."""
INTERRUPTED, FAILED = 130, 2
"""Exit statuses of the process."""


@dataclass(frozen=True)
class Result:
    """What a finished run leaves in its folder."""

    settings: Mapping[str, Any]  # see `settings_of`
    diverged: str | None  # why it could not be trained to its end; the rest is empty then
    step: int  # of the chosen checkpoint
    held_out: Results  # of that checkpoint
    test: Results | None  # of that checkpoint; None: not evaluated
    test_sets: Sequence[Mapping[str, Any]]
    num_parameters: int
    peak_memory_mb: float  # of the process on a CPU, of its device else
    train_s: float
    gradients: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Means over training by figure and pair of tasks, see `balance.conflict`; empty where the method sees none."""

    def save(self, folder: Path) -> None:
        """Write the file that marks the run as finished."""
        write_json(folder / RESULT, vars(self))


_RESULT_FIELDS: dict[str, type | tuple[type, ...]] = {
    "settings": dict, "diverged": (str, type(None)), "step": int, "held_out": dict, "test": (dict, type(None)),
    "test_sets": list, "num_parameters": int, "peak_memory_mb": (int, float), "train_s": (int, float),
}  # fmt: skip


def load_result(folder: Path) -> Result | None:
    """The result of a finished run; None where there is none. Raises ValueError for a file of another kind."""
    file = folder / RESULT
    if not file.is_file():
        return None
    try:
        content = read_object(file, _RESULT_FIELDS)
        for name, of_task in (content["held_out"] | (content["test"] or {})).items():
            check_object(of_task, f"{file}: results of {name}")
        return Result(**content)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{file} holds no result of a run ({error}); this version wrote it or it is not read; delete the folder "
            "to train the run again"
        ) from error


def begun_settings(folder: Path) -> Mapping[str, Any] | None:
    """The settings (see `settings_of`) of the run that began in a folder; None: none did."""
    file = folder / BEGUN
    return read_object(file) if file.is_file() else None


def differences(stored: Mapping[str, Any], run: Run) -> list[str]:
    """Where the settings that a folder was trained with are not those of a run; what later versions added is filled in.

    stored: see `settings_of`
    """
    try:
        before = renewed(stored)
    except ConfigError as error:
        return [str(error)]
    return list(_differences(before, settings_of(run), ""))


def _differences(before: Any, now: Any, path: str) -> list[str]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = list(dict.fromkeys([*before, *now]))
        return [
            text for key in keys for text in _differences(before.get(key), now.get(key), f"{path}.{key}".strip("."))
        ]
    return [] if before == now else [f"{path} {before} (now {now})"]


def work(run: Run, test: Sequence[Dataset] | None, threads: int, device: str) -> None:
    """The whole life of the process; `run.output` is its folder, and its exit status says how it went.

    test: what the chosen checkpoint is evaluated on at the end; None: nothing.
    """
    folder = Path(str(run.output))
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "compare.log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(threads)
    keep_freed_memory()  # as every command does; this process is forked from a server that ran none
    parent = multiprocessing.parent_process()

    def stop() -> bool:
        return parent is not None and not parent.is_alive()

    try:
        _train_and_evaluate(run, folder, test, device, stop)
    except (ValueError, OSError) as error:
        print(f"error: {error}", flush=True)
        sys.exit(FAILED)
    except KeyboardInterrupt:  # a training has written its checkpoint; SIGTERM ends the process with its own status
        sys.exit(INTERRUPTED)
    if stop() and load_result(folder) is None:
        sys.exit(INTERRUPTED)


def _train_and_evaluate(run: Run, folder: Path, test: Sequence[Dataset] | None, device: str, stop: Any) -> None:
    begin, before = time.monotonic(), load_result(folder)
    num_parameters = sum(parameter.numel() for parameter in api.build_model(run).parameters())
    test_sets = [dataset.model_dump(mode="json") for dataset in test or ()]
    empty = Result(settings_of(run), None, 0, {}, None, test_sets, num_parameters, 0.0, 0.0)
    open_datasets(test or ())  # they are read after the training; what is not there is told before it
    if before is None:
        write_json(folder / BEGUN, settings_of(run))
        try:
            api.train(run, resume="auto", device=device, stop=stop)
        except NotFinite as error:  # the settings decide it: another try would end the same
            Result(**{**vars(empty), "diverged": str(error)}).save(folder)
            return
        if stop():
            return
    best = checkpoint.find(folder)
    step = checkpoint.load(best)["step"]
    held_out = read_results(checkpoint.results_file(folder, step))
    tested = None
    if test is not None:
        tested = api.evaluate(best, f"data.val={json.dumps(test_sets)}", device=device)
    rows = read_rows(folder / "metrics.jsonl")
    memory = [row["memory_mb"] for row in rows if row.get("memory_mb")]
    train_s = before.train_s if before else time.monotonic() - begin
    finished = {"step": step, "held_out": held_out, "test": tested, "train_s": train_s, "gradients": _gradients(rows)}
    Result(**{**vars(empty), **finished, "peak_memory_mb": max(memory, default=0.0)}).save(folder)


def _gradients(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Means over the logged steps of how the tasks' gradients lie to each other, on all maps together."""
    logged = [row["gradients"] for row in rows if row.get("gradients")]
    means: dict[str, dict[str, float]] = {}
    for name in ("cosine", "conflict", "magnitude_similarity"):
        for pair in logged[0][name] if logged else ():
            values = [of_row[name][pair] for of_row in logged if of_row[name][pair] is not None]
            if values:
                means.setdefault(name, {})[pair] = fmean(values)
    return means
