"""The training loop, top to bottom; it knows no task, data set or balancing method by name."""

import itertools
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visionmtl.data.cache.decoded import with_cache
from visionmtl.data.label_spaces import resolve_spaces, supervises
from visionmtl.data.loader import TrainLoader, ValLoader, val_loader
from visionmtl.data.prefetch import Prefetcher
from visionmtl.data.transforms.augment import Augment
from visionmtl.data.workers import choose_workers, num_cores, num_processes_here
from visionmtl.datasets import NamedDataset, Subset, open_datasets
from visionmtl.engine import checkpoint, distributed, resume
from visionmtl.engine.distributed import Ranks
from visionmtl.engine.evaluator import Results, evaluate, save_json, score
from visionmtl.engine.logging import RunLog, results_table
from visionmtl.engine.optim import lr_factor, set_lr
from visionmtl.engine.options import PROFILE_WARMUP, Options, Plan, plan_steps
from visionmtl.engine.state import RunState
from visionmtl.engine.throughput import Advice, Pace
from visionmtl.modeling.weights import load_strictly
from visionmtl.network import MultiTaskNet, build_model
from visionmtl.run import Run, dump
from visionmtl.structures import Sample

Losses = dict[str, dict[str, Tensor]]


class NotFinite(RuntimeError):
    """A loss became infinite or not a number: what a setting can cure, unlike other RuntimeErrors."""


def train(run: Run, options: Options | None = None) -> Results:
    """Train, evaluate, keep checkpoints; returns the last evaluation's results by task.

    Raises ValueError for what does not fit together, NotFinite when a loss stops being finite.
    """
    options = options or Options()
    with distributed.group(options.device, run.train.distributed.timeout_s) as ranks:
        return _train(run, options, ranks)


def _train(run: Run, options: Options, ranks: Ranks) -> Results:
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

    resume.check_best(run, spaces, val.judged, val_sources)
    net = build_model(run.model, run.tasks, spaces, run.data.size)
    net.check_size(run.data.input_size, "data.eval_size")
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

    folder = Path(run.output or "runs/unnamed")
    path = resume.find(folder, options.resume, options.dry_run)
    found = resume.go_on(state, path, set(val.judged)) if path else None
    # all ranks have looked into the folder before the first one writes there
    remedy = "let all machines see one run folder, or copy it to each"
    distributed.check_same((state.step, found is not None), "the resumed step, and whether it was evaluated,", remedy)
    plan = plan_steps(run.train, options, state.step, steps_per_epoch)
    writes, resume_step = ranks.first and not options.dry_run, state.step if path else None
    with RunLog.open(folder, writes, resume_step, show=ranks.first, evaluated=found is not None) as log:
        log.config(dump(run))
        for line in _introduction(run, net, loader, val, sources, val_sources, ranks, path is not None, state.step):
            log.line(line)
        return _loop(state, loader, val, log, options, plan, folder, found)


def _loop(
    state: RunState, loader: TrainLoader, val: ValLoader, log: RunLog, options: Options, plan: Plan, folder: Path,
    found: Results | None,
) -> Results:  # fmt: skip
    """found: results at the step resumed from, where it was evaluated."""
    run, ranks = state.run, state.ranks
    settings, steps_per_epoch = run.train, plan.steps_per_epoch
    total_steps, last_step = plan.total_steps, plan.last_step
    results = found or {}
    started = time.monotonic()

    if found is None and plan.evaluates(state.step) and not options.dry_run:
        log.line(f"step {state.step} was saved, but not evaluated to the end; that comes first")
        results = _evaluate(state, val, log, folder, state.step // steps_per_epoch, options.dry_run)
    if state.step >= last_step:
        log.line(f"nothing is left to train: step {state.step} of {last_step} is done")
        if found:
            log.line(f"its evaluation gave\n{results_table(found)}")

    profiler = _profiler(options.profile, folder, log) if options.profile and ranks.first else None
    feed = Prefetcher(ranks.device)
    meter = Pace(settings.batch_size * settings.accumulate * ranks.world, feed.waited_s)
    advice = Advice(run.data, loader.workers, num_cores(), num_processes_here())
    while state.step < last_step:
        epoch, done = divmod(state.step, steps_per_epoch)
        stream = itertools.islice(
            loader.epoch(epoch, start=done * settings.accumulate), (steps_per_epoch - done) * settings.accumulate
        )
        for micro_batches in feed.groups(stream, settings.accumulate):
            set_lr(state.optimizer, lr_factor(run.optim, state.step, total_steps, steps_per_epoch))
            losses, weights, norm = state.advance(micro_batches)
            if state.step < last_step:
                feed.ahead()
            while state.news:
                log.line(state.news.pop(0))
            meter.step()
            if profiler:
                profiler.step()
            if state.step % settings.log_every_steps == 0 or state.step == last_step:
                values = _read(losses, micro_batches[-1].labelled, state.step)
                pace = meter.read(total_steps - state.step)
                log.train(
                    step=state.step, epoch=epoch, losses=values, weights={k: float(w) for k, w in weights.items()},
                    grad_norm=float(norm), lr=state.optimizer.param_groups[-1]["lr"], total_steps=total_steps,
                    **pace,
                )  # fmt: skip
                if line := advice.line(pace["data_wait_share"], settings.log_every_steps):
                    log.line(line)
            late = options.max_time_s is not None and time.monotonic() - started > options.max_time_s
            stopping = distributed.agree(late, ranks.device) if options.max_time_s is not None else False
            if stopping or state.step >= last_step:
                break

        # between logged steps too, nothing spoilt is evaluated or saved
        _read(losses, micro_batches[-1].labelled, state.step)
        ended = state.step % steps_per_epoch == 0
        finished = state.step >= total_steps
        epochs_done = state.step // steps_per_epoch
        stopping = stopping or state.step >= last_step
        saves = stopping or finished or (ended and epochs_done % settings.checkpoint_every_epochs == 0)
        if saves and not options.dry_run:  # whatever evaluation comes to
            state.hand_to_first(epochs_done, lambda plain: checkpoint.save_step(folder, plain, settings.keep))
        if plan.evaluates(state.step):
            results = _evaluate(state, val, log, folder, epochs_done, options.dry_run)
            meter.restart()
        if options.dry_run:
            return results
        if stopping and not finished:
            log.line(f"stopped after step {state.step} of {total_steps}; continue with --resume")
            break
    if profiler:
        profiler.stop()
    distributed.barrier()
    return results


def _profiler(num_steps: int, folder: Path, log: RunLog) -> torch.profiler.profile:
    """A running profiler that traces `num_steps` steps after PROFILE_WARMUP, fewer where time is up before."""
    file = folder / "profile.json"

    def keep(trace: torch.profiler.profile) -> None:
        trace.export_chrome_trace(str(file))
        log.line(f"trace of {num_steps} steps: {file}, for chrome://tracing or perfetto.dev")

    profiler = torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=0, warmup=PROFILE_WARMUP, active=num_steps, repeat=1),
        on_trace_ready=keep,
    )
    profiler.start()
    return profiler


def _evaluate(state: RunState, val: ValLoader, log: RunLog, folder: Path, epochs_done: int, dry_run: bool) -> Results:
    """Results of the averaged weights where there are any; keeps best.pt and a few pictures.

    The file of results is written last: where it lies, a resumed run takes the evaluation as done.
    """
    run, ranks = state.run, state.ranks
    net = state.judged()
    drawn: list[tuple[Sample, dict[str, Any]]] = []

    def collect(sample: Sample, predictions: dict[str, Any]) -> None:
        if ranks.first and len(drawn) < run.train.sample_pictures:
            drawn.append((sample, predictions))

    meters = {name: run.tasks[task].meter(net.spaces[task]) for name, task in val.judged.items()}
    results = evaluate(net, val, ranks.device, precision=run.train.precision, meters=meters, on_image=collect)
    log.val(step=state.step, epoch=epochs_done, results=results)
    if dry_run:
        if results.get(run.train.best.partition("/")[0], {}).get("images"):
            score(results, run.tasks, run.train.best)  # a metric that does not exist is found now
        return results
    for i, (sample, predictions) in enumerate(drawn):
        for name, prediction in predictions.items():
            picture = run.tasks[name].draw(sample.image, prediction, net.spaces[name], 0.4)
            log.picture(f"{name}/{i}", picture, state.step)

    value = score(results, run.tasks, run.train.best)
    if value > state.best:
        state.best = value
        state.hand_to_first(epochs_done, lambda plain: checkpoint.save(folder / "checkpoints" / "best.pt", plain))
        log.line(f"best so far by rule {run.train.best!r}: {value:.4f}")
    if ranks.first:
        save_json(results, resume.results_file(folder, state.step), {"step": state.step, "epoch": epochs_done})
    return results


def _sources(run: Run, overfit: int | None) -> tuple[list[NamedDataset], list[NamedDataset]]:
    sources = open_datasets(run.data.train)
    if overfit is None:
        if run.data.cache is not None:
            fields, (number, _) = {task.field for task in run.tasks.values()}, choose_workers(run.data.workers)
            sources = with_cache(
                sources, run.data.train, run.data.cache, fields, run.data.size, run.data.augment.zoom[1], number
            )
        return sources, open_datasets(run.data.val)
    few = [(source, min(overfit, len(source))) for source in sources]
    return (
        [replace(source, reader=Subset(source.reader, count, len(source))) for source, count in few],
        [replace(source, reader=Subset(source.reader, count, count)) for source, count in few],
    )


def _start_from(net: MultiTaskNet, path: Path) -> None:
    load_strictly(net, checkpoint.best_weights(checkpoint.load(path)), path)


def _read(losses: Losses, labelled: Mapping[str, Tensor], step: int) -> dict[str, dict[str, float]]:
    """Loss parts of all ranks as numbers, of tasks with a label in the batch: a 0 that means "nobody looked" is none.

    The one place of the loop that waits for the device.
    """
    names = [(task, part) for task, parts in losses.items() for part in parts]
    flags = [labelled[task].any().to(losses[task][part].dtype) for task, part in names]
    # a rank's loss is its share of the whole times the number of ranks, so that their mean is the whole
    mean = distributed.mean(torch.stack([*(losses[task][part] for task, part in names), *flags])).tolist()
    values: dict[str, dict[str, float]] = {}
    for (task, part), value, flag in zip(names, mean[: len(names)], mean[len(names) :], strict=True):
        if flag or not math.isfinite(value):
            values.setdefault(task, {})[part] = value
    names = [(task, part) for task, parts in values.items() for part in parts]
    if bad := [f"{task}/{part} {values[task][part]}" for task, part in names if not math.isfinite(values[task][part])]:
        raise NotFinite(
            f"losses are not finite at step {step}: {', '.join(bad)}; finite ones are needed; lower optim.lr, set "
            "optim.clip_norm, or look at the labels with tools/visualize.py --mode data; where one task spoilt the "
            "others, train.log_every_steps=1 shows the first"
        )
    return values


def _introduction(
    run: Run, net: MultiTaskNet, loader: TrainLoader, val: ValLoader, sources: Sequence[NamedDataset],
    val_sources: Sequence[NamedDataset], ranks: Ranks, resumed: bool, step: int,
) -> Iterator[str]:  # fmt: skip
    """What a person wants to know before the first step."""
    millions = sum(p.numel() for p in net.parameters()) / 1e6
    yield f"network   {millions:.2f} M parameters; encoder {run.model.encoder.name}, weights: {net.encoder_origin}"
    yield f"pyramid   {run.model.pyramid.type}, {net.trunk.out_channels} channels"
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
