"""What `--dry-run` measures: the largest batches that training and evaluation may meet, and what a whole run takes."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from visionmtl.config.durations import clock
from visionmtl.datasets import most_boxes
from visionmtl.engine.evaluator import evaluate
from visionmtl.engine.logging import peak_memory_mb
from visionmtl.io.tensor_files import num_tensor_bytes
from visionmtl.structures import Batch

Trainer = Any
"""A `trainer.Trainer`; that module imports this one."""

STEPS = 2
"""Of each kind: the first makes graphs, moments and buffers, the last is timed."""


@dataclass(frozen=True)
class Measured:
    """One kind of work."""

    what: str
    batch: str
    seconds: float  # of the last step
    memory: str


def measure_worst_case(trainer: Trainer) -> list[str]:
    """Run the largest batches, and return a table for people. Weights and statistics move; nothing is written."""
    assert trainer.data is not None
    train_batch, train_load_s = _train_batch(trainer)
    eval_batch, eval_load_s = _eval_batch(trainer)
    device, accumulate = trainer.ranks.device, trainer.run.train.accumulate
    rows = []

    def train_step() -> None:
        trainer.train_step([train_batch.to(device) for _ in range(accumulate)])

    shapes = {task: tuple(of["boxes"].shape[:2]) for task, of in train_batch.targets.items() if "boxes" in of}
    boxes = "".join(f", {padded} padded boxes an image ({task})" for task, (_, padded) in shapes.items())
    rows.append(_measured("training step", _shape(train_batch, accumulate) + boxes, train_step, trainer))
    state_bytes = num_tensor_bytes(trainer.state_dict())  # all processes must call this one

    net = trainer.eval_model()
    tasks = dict(net.tasks)
    names = trainer.data.eval_names
    net.tasks = {name: task.with_most_predictions() for name, task in tasks.items()}

    def eval_batch_once() -> None:
        meters = {name: tasks[task].meter(net.spaces[task]) for name, task in names.items()}
        evaluate(net, [eval_batch], device, precision=trainer.run.train.precision, meters=meters)

    try:
        shape = _shape(eval_batch) + ", as many predictions as there may be"
        rows.append(_measured("evaluation batch", shape, eval_batch_once, trainer))
    finally:
        net.tasks = tasks
    return [*_table(rows), *_projection(trainer, rows, train_load_s, eval_load_s, state_bytes)]


def _train_batch(trainer: Trainer) -> tuple[Batch, float]:
    """The largest batch: full size, all tasks labelled, as many boxes in each image as in the fullest; and the seconds
    that loading one of its images took."""
    assert trainer.data is not None
    loader: Any = trainer.data.train_loader
    loader.batch_sampler.set_epoch(0)
    keys = next(iter(loader.batch_sampler))
    begin = time.perf_counter()
    batch: Batch = loader.collate_fn([loader.dataset[key] for key in keys])
    load_s = (time.perf_counter() - begin) / len(keys)
    counts = [most_boxes(dataset.reader) for dataset in trainer.data.train_datasets if "boxes" in dataset.provides]
    known = [count for count in counts if count is not None]
    most = max(known) if known and len(known) == len(counts) else None
    size = batch.image.shape[2], batch.image.shape[3]
    tasks = trainer.net.tasks
    targets = {name: tasks[name].worst_case(of, size, most) for name, of in batch.targets.items()}
    labelled = {name: torch.ones_like(flags) for name, flags in batch.labelled.items()}
    counted = {name: tasks[name].count(of, size) for name, of in targets.items()}
    return replace(batch, targets=targets, labelled=labelled, counts=counted), load_s


def _eval_batch(trainer: Trainer) -> tuple[Batch, float]:
    """A full batch at the size of evaluation, all tasks labelled where the data set is; images repeat where few."""
    assert trainer.data is not None
    loader: Any = trainer.data.val_loader
    first, batch_size = next(iter(loader.batch_sampler)), trainer.run.train.batch_size
    begin = time.perf_counter()
    examples = [loader.dataset[index] for index in first]
    load_s = (time.perf_counter() - begin) / len(first)
    batch: Batch = loader.collate_fn([examples[number % len(examples)] for number in range(batch_size)])
    batch.samples = [replace(one, image_id=f"{one.image_id} {number}") for number, one in enumerate(batch.samples)]
    return batch, load_s


def _measured(what: str, batch: str, work: Callable[[], None], trainer: Trainer) -> Measured:
    device = trainer.ranks.device
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(STEPS):
        begin = time.perf_counter()
        work()
        if on_cuda:
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - begin
    if on_cuda:
        total = torch.cuda.get_device_properties(device).total_memory
        allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        held = f"{allocated / 2**20:,.0f} MiB allocated, {reserved / 2**20:,.0f} reserved"
        memory = f"{held}, {reserved / total:.0%} of the GPU"
    else:
        peak = peak_memory_mb()
        limit = _host_memory_mb()
        memory = f"{peak:,.0f} MiB of this process" + (f", {peak / limit:.0%} of {limit:,.0f}" if limit else "")
    return Measured(what, batch, seconds, memory)


def _host_memory_mb() -> float | None:
    """MiB that this process may have: of the machine, or of its container (cgroup v2); None where nothing says."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    total = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(total, float(text) if text.isdigit() else total) / 2**20


def _shape(batch: Batch, times: int = 1) -> str:
    images, _, height, width = batch.image.shape
    return (f"{times} x " if times > 1 else "") + f"{images} images of {height}x{width}"


def _table(rows: list[Measured]) -> list[str]:
    header = ("worst case", "batch", "time", "peak memory")
    cells = [header, *((row.what, row.batch, f"{row.seconds:.3g} s", row.memory) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header) - 1)]
    return [
        "  ".join([*(f"{cell:<{width}}" for cell, width in zip(row[:-1], widths, strict=True)), row[-1]])
        for row in cells
    ]


def _projection(
    trainer: Trainer, rows: list[Measured], train_load_s: float, eval_load_s: float, state_bytes: int
) -> list[str]:
    """The whole run: at most so long, if all batches were like the largest."""
    assert trainer.data is not None
    settings, world = trainer.run.train, trainer.ranks.world
    workers = max(trainer.data.train_loader.num_workers, 1)
    steps_per_epoch = max(len(trainer.data.train_loader) // settings.accumulate, 1)
    step_load_s = train_load_s * settings.batch_size * settings.accumulate / workers
    step_s = max(rows[0].seconds, step_load_s)
    num_val = -(-sum(len(dataset) for dataset in trainer.data.val_datasets) // world)
    val_batches = -(-num_val // settings.batch_size)
    batch_s = max(rows[1].seconds, eval_load_s * settings.batch_size / workers)
    evaluations = -(-settings.epochs // settings.eval_every_epochs)
    training_s, evaluating_s = settings.epochs * steps_per_epoch * step_s, evaluations * val_batches * batch_s
    files = max(2, settings.keep) + 2  # last.pt, steps and best.pt, with the file before of each
    gib = state_bytes / 2**30
    bound = "loading" if step_load_s > rows[0].seconds else "the step"
    return [
        f"whole run  {settings.epochs} epochs of {steps_per_epoch:,} steps: {clock(training_s)} ({bound} decides: "
        f"loading an image takes {train_load_s * 1e3:.3g} ms, {workers} at a time); {evaluations} evaluations of "
        f"{val_batches:,} batches: {clock(evaluating_s)}; together at most {clock(training_s + evaluating_s)}",
        f"disk       {gib:.3g} GiB a checkpoint, up to {files} of them: {files * gib:.3g} GiB",
        "note       memory of loader workers and of results that grow with the validation set is not in the table",
    ]
