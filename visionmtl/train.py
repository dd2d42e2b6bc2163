"""The training loop, top to bottom; it knows no task, data set or balancing method by name."""

import itertools
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visionmtl import checkpoint, distributed
from visionmtl.augment import Augment
from visionmtl.config import Run, dump
from visionmtl.data import TrainLoader, ValLoader, val_loader
from visionmtl.datasets import Repeated, Source, open_sources
from visionmtl.distributed import Ranks
from visionmtl.evaluate import evaluate, save_json, score
from visionmtl.log import RunLog
from visionmtl.model import MultiTaskNet, build_model
from visionmtl.optim import lr_factor, set_lr
from visionmtl.pace import Pace
from visionmtl.spaces import resolve_spaces, supervises
from visionmtl.state import RunState
from visionmtl.types import Batch, Sample
from visionmtl.weights import load_strictly

PROFILE_WARMUP = 2  # steps before a trace, so that it shows a warmed loop


@dataclass(frozen=True)
class Options:
    """How this start differs from a plain one; none of it changes what a whole run computes."""

    resume: str | None = None  # "auto" = this run's last checkpoint if there is one; or a path
    init_from: str | None = None  # weights to start from, nothing else
    overfit: int | None = None  # learn these first N images only, and evaluate on them
    limit_train_batches: int | None = None  # per epoch
    limit_val_batches: int | None = None
    max_time_s: float | None = None  # stop with a checkpoint
    max_steps: int | None = None  # stop with a checkpoint
    profile: int | None = None  # write a trace of so many steps, and stop
    dry_run: bool = False  # one step, one validation batch, nothing written
    device: str = "auto"


def train(run: Run, options: Options = Options()) -> dict[str, dict[str, Any]]:
    """Train, evaluate, keep checkpoints; returns the last evaluation's results by task.

    Raises ValueError for what does not fit together, RuntimeError when the loss stops being finite.
    """
    ranks = distributed.start(options.device)
    try:
        return _train(run, options, ranks)
    finally:
        distributed.stop()


def _train(run: Run, options: Options, ranks: Ranks) -> dict[str, dict[str, Any]]:
    torch.manual_seed(run.seed)
    if run.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is not reproducible without it
    torch.use_deterministic_algorithms(run.train.deterministic)
    if options.overfit:
        run = run.model_copy(update={"data": run.data.model_copy(update={"augment": Augment()})})
    sources, val_sources = _sources(run, options.overfit)
    spaces = resolve_spaces(run.tasks, sources)
    loader = TrainLoader(run.data, run.tasks, spaces, sources, run.train.batch_size, run.seed, ranks.rank, ranks.world)
    val = val_loader(
        run.data, run.tasks, spaces, val_sources, run.train.batch_size, ranks.rank, ranks.world,
        limit=1 if options.dry_run else options.limit_val_batches,
    )  # fmt: skip

    net = build_model(run.model, run.tasks, spaces, run.data.size)
    if options.init_from:
        _start_from(net, Path(options.init_from))
    state = RunState(run, net.to(ranks.device), ranks)
    batches = min(len(loader), options.limit_train_batches or len(loader))
    steps_per_epoch = batches // run.train.accumulate
    if steps_per_epoch == 0:
        raise ValueError(
            f"an epoch has {batches} batches, but train.accumulate is {run.train.accumulate}; one step takes that many "
            "batches; lower train.accumulate or train.batch_size"
        )
    total_steps = 1 if options.dry_run else run.train.epochs * steps_per_epoch

    folder = Path(run.output or "runs/unnamed")
    resumed = _resume(state, folder, options)
    distributed.barrier()  # all ranks have looked into the folder before the first one writes there
    writes = ranks.first and not options.dry_run
    with RunLog.open(folder, writes, resume_step=state.step if resumed else None, show=ranks.first) as log:
        log.config(dump(run))
        for line in _introduction(run, net, loader, val, sources, val_sources, ranks, resumed, state.step):
            log.line(line)
        return _loop(state, loader, val, log, options, steps_per_epoch, total_steps, folder)


def _loop(
    state: RunState, loader: TrainLoader, val: ValLoader, log: RunLog, options: Options, steps_per_epoch: int,
    total_steps: int, folder: Path,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    run, ranks = state.run, state.ranks
    settings = run.train
    results: dict[str, dict[str, Any]] = {}
    started = time.monotonic()
    last_step = min(total_steps, options.max_steps or total_steps)
    profiler = _profiler(options.profile, folder) if options.profile and ranks.first else None
    if options.profile:
        last_step = min(last_step, state.step + PROFILE_WARMUP + options.profile)
    meter = Pace(settings.batch_size * settings.accumulate * ranks.world)

    while state.step < last_step:
        epoch, done = divmod(state.step, steps_per_epoch)
        stream = itertools.islice(
            loader.epoch(epoch, start=done * settings.accumulate), (steps_per_epoch - done) * settings.accumulate
        )
        for micro_batches in _groups(meter.timed(stream), settings.accumulate):
            set_lr(state.optimizer, lr_factor(run.optim, state.step, total_steps, steps_per_epoch))
            losses, weights, norm = state.advance(micro_batches)
            while state.news:
                log.line(state.news.pop(0))
            meter.step()
            if profiler:
                profiler.step()
            if state.step % settings.log_every_steps == 0 or state.step == last_step:
                values = _read(losses, state.step)
                log.train(
                    step=state.step, epoch=epoch, losses=values, weights={k: float(w) for k, w in weights.items()},
                    grad_norm=float(norm), lr=state.optimizer.param_groups[-1]["lr"], total_steps=total_steps,
                    **meter.read(total_steps - state.step),
                )  # fmt: skip
            late = options.max_time_s is not None and time.monotonic() - started > options.max_time_s
            stopping = distributed.agree(late, ranks.device) if options.max_time_s is not None else False
            if stopping or state.step >= last_step:
                break

        _read(losses, state.step)  # between logged steps too, nothing spoilt is evaluated or saved
        ended = state.step % steps_per_epoch == 0
        finished = state.step >= total_steps
        epochs_done = state.step // steps_per_epoch
        if finished or (ended and epochs_done % settings.eval_every_epochs == 0):
            results = _evaluate(state, val, log, folder, epochs_done, options.dry_run)
            meter.restart()
        if options.dry_run:
            return results
        stopping = stopping or state.step >= last_step
        if ranks.first and (stopping or finished or (ended and epochs_done % settings.checkpoint_every_epochs == 0)):
            checkpoint.save_step(folder, state.plain(epochs_done), settings.keep)
        if stopping and not finished:
            log.line(f"stopped after step {state.step} of {total_steps}; continue with --resume")
            break
    if profiler:
        profiler.stop()
        log.line(f"trace of {options.profile} steps: {folder / 'profile.json'}, for chrome://tracing or perfetto.dev")
    distributed.barrier()
    return results


def _profiler(num_steps: int, folder: Path) -> torch.profiler.profile:
    """A running profiler that traces `num_steps` steps after PROFILE_WARMUP."""
    profiler = torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=0, warmup=PROFILE_WARMUP, active=num_steps, repeat=1),
        on_trace_ready=lambda trace: trace.export_chrome_trace(str(folder / "profile.json")),
    )
    profiler.start()
    return profiler


def _evaluate(
    state: RunState, val: ValLoader, log: RunLog, folder: Path, epochs_done: int, dry_run: bool
) -> dict[str, dict[str, Any]]:
    """Results of the averaged weights where there are any; keeps best.pt and a few pictures."""
    run, ranks = state.run, state.ranks
    net = state.ema.module if state.ema else state.net
    distributed.share_statistics(net)
    drawn: list[tuple[Sample, dict[str, Any]]] = []

    def collect(sample: Sample, predictions: dict[str, Any]) -> None:
        if ranks.first and len(drawn) < run.train.sample_pictures:
            drawn.append((sample, predictions))

    meters = {name: run.tasks[task].meter(net.spaces[task]) for name, task in val.judged.items()}
    results = evaluate(net, val, ranks.device, precision=run.train.precision, meters=meters, on_image=collect)
    log.val(step=state.step, epoch=epochs_done, results=results)
    if dry_run:
        return results
    for i, (sample, predictions) in enumerate(drawn):
        for name, prediction in predictions.items():
            picture = run.tasks[name].draw(sample.image, prediction, net.spaces[name], 0.4)
            log.picture(f"{name}/{i}", picture, state.step)

    value = score(results, run.tasks, run.train.best)
    if ranks.first:
        save_json(results, folder / "eval" / f"step-{state.step:07d}.json", {"step": state.step, "epoch": epochs_done})
        if value > state.best:
            state.best = value
            checkpoint.save(folder / "checkpoints" / "best.pt", state.plain(epochs_done))
            log.line(f"best so far by rule {run.train.best!r}: {value:.4f}")
    return results


def _sources(run: Run, overfit: int | None) -> tuple[list[Source], list[Source]]:
    sources = open_sources(run.data.train)
    if overfit is None:
        return sources, open_sources(run.data.val)
    few = [(source, min(overfit, len(source))) for source in sources]
    return (
        [replace(source, reader=Repeated(source.reader, count, len(source))) for source, count in few],
        [replace(source, reader=Repeated(source.reader, count, count)) for source, count in few],
    )


def _start_from(net: MultiTaskNet, path: Path) -> None:
    load_strictly(net, checkpoint.best_weights(checkpoint.load(path)), path)


def _resume(state: RunState, folder: Path, options: Options) -> bool:
    """Continue where a checkpoint left off. An existing run is never overwritten silently."""
    last = folder / "checkpoints" / "last.pt"
    if options.resume is None:
        if not options.dry_run and (folder / "metrics.jsonl").exists():
            raise ValueError(
                f"{folder} already holds a run; one folder holds one run; continue it with --resume, "
                "choose another with --output DIR, or delete it"
            )
        return False
    path = last if options.resume == "auto" else Path(options.resume)
    if options.resume == "auto" and not last.exists():
        return False
    state.restore(checkpoint.load(path), path)
    return True


def _groups(batches: Iterator[Batch], count: int) -> Iterator[list[Batch]]:
    while group := list(itertools.islice(batches, count)):
        yield group


def _read(losses: dict[str, dict[str, Tensor]], step: int) -> dict[str, dict[str, float]]:
    """Loss parts of all ranks as numbers: the one place of the loop that waits for the device."""
    names = [(task, part) for task, parts in losses.items() for part in parts]
    # a rank's loss is its share of the whole times the number of ranks, so that their mean is the whole
    mean = distributed.mean(torch.stack([losses[task][part] for task, part in names]))
    values: dict[str, dict[str, float]] = {task: {} for task in losses}
    for (task, part), value in zip(names, mean.tolist(), strict=True):
        values[task][part] = value
    if bad := [f"{task}/{part} {values[task][part]}" for task, part in names if not math.isfinite(values[task][part])]:
        raise RuntimeError(
            f"losses are not finite at step {step}: {', '.join(bad)}; finite ones are needed; lower optim.lr, set "
            "optim.clip_norm, or look at the labels with tools/visualize.py --mode data; where one task spoilt the "
            "others, train.log_every_steps=1 shows the first"
        )
    return values


def _introduction(
    run: Run, net: MultiTaskNet, loader: TrainLoader, val: ValLoader, sources: Sequence[Source],
    val_sources: Sequence[Source], ranks: Ranks, resumed: bool, step: int,
) -> Iterator[str]:  # fmt: skip
    """What a person wants to know before the first step."""
    millions = sum(p.numel() for p in net.parameters()) / 1e6
    yield f"network   {millions:.2f} M parameters; encoder {run.model.encoder.name}, weights: {net.encoder_origin}"
    for name, task in run.tasks.items():
        space = net.spaces[name]
        yield f"task      {name}: {task.type}" + (f", {len(space.classes)} classes of {space.name}" if space else "")
    yield f"data      {len(loader)} batches of {run.train.batch_size} a rank, {len(val)} to validate, {run.data.size}"
    for source, count in zip(sources, loader.counts, strict=True):
        taught = ", ".join(name for name, task in run.tasks.items() if supervises(source, task, net.spaces[name]))
        yield f"train on  {source.name}: {len(source)} images, {count} drawn an epoch; teaches {taught}"
    for source in val_sources:
        yield f"judge on  {source.name}: {len(source)} images"
    for source in (*sources, *val_sources):
        yield from (f"note      {source.name}: {note}" for note in source.notes)
    yield f"loading   {loader.workers} workers ({loader.workers_reason})"
    yield f"device    {ranks.device}, {ranks.world} process(es), {run.train.precision}, balance {run.balance.type}"
    if resumed:
        yield f"resumed   at step {step}"
