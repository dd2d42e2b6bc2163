"""The training loop, top to bottom; it knows no task, data set or balancing method by name."""

import itertools
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visionmtl import checkpoint, distributed
from visionmtl.augment import Augment
from visionmtl.balance.base import Step
from visionmtl.config import Run, dump
from visionmtl.data import TrainLoader, ValLoader, open_readers, resolve_spaces, val_loader
from visionmtl.datasets import Reader
from visionmtl.distributed import Ranks
from visionmtl.evaluate import evaluate, save_json, score
from visionmtl.log import RunLog
from visionmtl.model import LossNet, MultiTaskNet, build_model, to_device
from visionmtl.ops.colour import apply_matrices
from visionmtl.optim import Ema, build_optimizer, lr_factor, set_lr
from visionmtl.types import Batch, Sample

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
    profile: int | None = None  # trace so many steps
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
    torch.use_deterministic_algorithms(run.train.deterministic)
    if options.overfit:
        run = run.model_copy(update={"data": run.data.model_copy(update={"augment": Augment()})})
    readers, val_readers = _readers(run, options.overfit)
    spaces = resolve_spaces(run.tasks, readers)
    loader = TrainLoader(
        run.data, run.tasks, spaces, readers, run.train.batch_size, run.seed, ranks.rank, ranks.world
    )
    val = val_loader(
        run.data, run.tasks, spaces, val_readers, run.train.batch_size, ranks.rank, ranks.world,
        limit=1 if options.dry_run else options.limit_val_batches,
    )  # fmt: skip

    net = build_model(run.model, run.tasks, spaces, run.data.size)
    if options.init_from:
        _start_from(net, Path(options.init_from))
    state = _State(run, net.to(ranks.device), ranks)
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
    log = RunLog.open(
        folder, write=ranks.first and not options.dry_run, show=ranks.first, resume_step=state.step if resumed else None
    )
    with log:
        log.config(dump(run))
        for line in _introduction(run, net, loader, val, spaces, ranks, resumed, state.step):
            log.line(line)
        results = _loop(state, loader, val, log, options, steps_per_epoch, total_steps, folder)
    return results


def _loop(
    state: "_State", loader: TrainLoader, val: ValLoader, log: RunLog, options: Options, steps_per_epoch: int,
    total_steps: int, folder: Path,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    run, ranks = state.run, state.ranks
    settings = run.train
    results: dict[str, dict[str, Any]] = {}
    started = time.monotonic()
    last_step = min(total_steps, options.max_steps or total_steps)
    meter = _Pace(settings.batch_size * settings.accumulate * ranks.world)

    while state.step < last_step:
        epoch, done = divmod(state.step, steps_per_epoch)
        stream = itertools.islice(
            loader.epoch(epoch, start=done * settings.accumulate), (steps_per_epoch - done) * settings.accumulate
        )
        for micro_batches in _groups(meter.timed(stream), settings.accumulate):
            set_lr(state.optimizer, lr_factor(run.optim, state.step, total_steps, steps_per_epoch))
            losses, weights, norm = state.advance(micro_batches)
            meter.step()
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
            state.save(folder, epochs_done)
        if stopping and not finished:
            log.line(f"stopped after step {state.step} of {total_steps}; continue with --resume")
            break
    distributed.barrier()
    return results


class _State:
    """Everything that moves during a run."""

    def __init__(self, run: Run, net: MultiTaskNet, ranks: Ranks) -> None:
        self.run, self.net, self.ranks = run, net, ranks
        if run.train.channels_last:
            net.to(memory_format=torch.channels_last)
        weights = {name: task.weight for name, task in run.tasks.items()}
        self.balancer = run.balance.build(weights).to(ranks.device)
        self.optimizer = build_optimizer(run.optim, net, self.balancer)
        self.ema = Ema(net, run.optim.ema_decay) if run.optim.ema_decay else None
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=run.train.precision == "fp16")
        self.step = 0
        self.best = -math.inf

        loss_net: Any = LossNet(net, self.balancer.needs_cut)
        self.loss_net = distributed.replicate(loss_net, ranks)
        if run.train.compile:
            self.loss_net = torch.compile(self.loss_net)  # type: ignore[assignment]
        torch.manual_seed(run.seed * 1000 + ranks.rank)  # dropout and drop path differ between ranks

    def advance(self, micro_batches: list[Batch]) -> tuple[dict[str, dict[str, Tensor]], Mapping[str, Tensor], Tensor]:
        """One optimiser step. Returns the last micro-batch's loss parts, task weights and the gradient norm."""
        settings, device = self.run.train, self.ranks.device
        self.net.train()
        scale = self.scaler.scale(torch.ones((), device=device)) / settings.accumulate
        for i, batch in enumerate(micro_batches):
            batch = to_device(batch, device)
            image = batch.image if batch.colour is None else apply_matrices(batch.image, batch.colour)
            if settings.channels_last:
                image = image.contiguous(memory_format=torch.channels_last)
            with self._synchronised(last=i == len(micro_batches) - 1):
                with torch.autocast(device.type, DTYPES[settings.precision], enabled=settings.precision != "fp32"):
                    parts, shared, leaves = self.loss_net(image, batch.targets, batch.labelled)
                losses = {task: torch.stack(list(of_task.values())).sum() for task, of_task in parts.items()}
                weights = self.balancer.backward(Step(losses, shared, leaves, scale))

        distributed.average_gradients(self.balancer.parameters())
        self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.run.optim.clip_norm or math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update()
        self.step += 1
        return parts, weights, norm

    def _synchronised(self, last: bool) -> Any:
        """Ranks exchange gradients in the last of accumulated backwards only."""
        no_sync = getattr(self.loss_net, "no_sync", None)
        return torch.enable_grad() if last or no_sync is None else no_sync()

    def save(self, folder: Path, epochs_done: int) -> None:
        """last.pt, and step-N.pt for the newest `keep`."""
        path = folder / "checkpoints" / "last.pt"
        checkpoint.save(path, self.plain(epochs_done))
        if self.run.train.keep:
            named = path.with_name(f"step-{self.step:07d}.pt")
            named.unlink(missing_ok=True)
            named.hardlink_to(path)
            for old in sorted(path.parent.glob("step-*.pt"))[: -self.run.train.keep]:
                old.unlink()

    def plain(self, epochs_done: int) -> dict[str, Any]:
        """The state as tensors and plain data."""
        return {
            "run": self.run.model_dump(mode="json"),
            "spaces": {name: space and space.plain() for name, space in self.net.spaces.items()},
            "net": self.net.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "balancer": self.balancer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "epoch": epochs_done,
            "best": self.best,
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.ranks.device) if self.ranks.device.type == "cuda" else None,
        }

    def restore(self, state: Mapping[str, Any], path: Path) -> None:
        """Undo `plain`."""
        checkpoint.load_weights(self.net, state["net"], path)
        if self.ema:
            if not state["ema"]:
                raise ValueError(f"{path} holds no weight average, but optim.ema_decay is set; resume needs the same")
            self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.balancer.load_state_dict(state["balancer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.best = state["step"], state["best"]
        torch.set_rng_state(state["random"])
        if state["random_cuda"] is not None and self.ranks.device.type == "cuda":
            torch.cuda.set_rng_state(state["random_cuda"], self.ranks.device)


def _evaluate(
    state: _State, val: ValLoader, log: RunLog, folder: Path, epochs_done: int, dry_run: bool
) -> dict[str, dict[str, Any]]:
    """Results of the averaged weights where there are any; keeps best.pt and a few pictures."""
    run, ranks = state.run, state.ranks
    net = state.ema.module if state.ema else state.net
    drawn: list[tuple[Sample, dict[str, Any]]] = []

    def collect(sample: Sample, predictions: dict[str, Any]) -> None:
        if ranks.first and len(drawn) < run.train.sample_pictures:
            drawn.append((sample, predictions))

    results = evaluate(net, val, ranks.device, precision=run.train.precision, on_image=collect)
    if dry_run:
        return results
    log.val(step=state.step, epoch=epochs_done, results=results)
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


@dataclass(frozen=True)
class _Repeated:
    """The first `count` samples of a reader, over and over to its full length (`--overfit`), or once."""

    reader: Reader
    count: int
    length: int

    @property
    def provides(self) -> Any:
        return self.reader.provides

    def __len__(self) -> int:
        return self.length

    def read(self, index: int) -> Sample:
        return self.reader.read(index % self.count)


def _readers(run: Run, overfit: int | None) -> tuple[list[Reader], list[Reader]]:
    readers = open_readers(run.data.train)
    if overfit is None:
        return readers, open_readers(run.data.val)
    count = min(overfit, len(readers[0]))
    return [_Repeated(readers[0], count, len(readers[0]))], [_Repeated(readers[0], count, count)]


def _start_from(net: MultiTaskNet, path: Path) -> None:
    state = checkpoint.load(path)
    checkpoint.load_weights(net, state["ema"]["module"] if state["ema"] else state["net"], path)


def _resume(state: _State, folder: Path, options: Options) -> bool:
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
    """Loss parts as numbers: the one place of the loop that waits for the device."""
    values = {task: {part: float(value.detach()) for part, value in parts.items()} for task, parts in losses.items()}
    for task, parts in values.items():
        for part, value in parts.items():
            if not math.isfinite(value):
                raise RuntimeError(
                    f"loss {task}/{part} is {value} at step {step}; a finite loss is needed; lower optim.lr, set "
                    "optim.clip_norm, or look at the labels with tools/visualize.py --mode data"
                )
    return values


class _Pace:
    """Images a second, share of time waiting for data, time to go; since the last reading."""

    def __init__(self, images_per_step: int) -> None:
        self.images_per_step = images_per_step
        self.restart()

    def restart(self) -> None:
        """Forget the time since the last reading (evaluation)."""
        self.since, self.waited_s, self.steps = time.perf_counter(), 0.0, 0

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; time spent in getting them is counted as waiting."""
        while True:
            before = time.perf_counter()
            batch = next(batches, None)
            self.waited_s += time.perf_counter() - before
            if batch is None:
                return
            yield batch

    def step(self) -> None:
        """One optimiser step is done."""
        self.steps += 1

    def read(self, steps_left: int) -> dict[str, float]:
        """Figures since the last reading."""
        elapsed = max(time.perf_counter() - self.since, 1e-9)
        figures = {
            "images_per_s": self.steps * self.images_per_step / elapsed,
            "data_wait_share": self.waited_s / elapsed,
            "eta_s": steps_left * elapsed / max(self.steps, 1),
        }
        self.restart()
        return figures


def _introduction(
    run: Run, net: MultiTaskNet, loader: TrainLoader, val: ValLoader, spaces: Mapping[str, Any], ranks: Ranks,
    resumed: bool, step: int,
) -> Iterator[str]:  # fmt: skip
    """What a person wants to know before the first step."""
    millions = sum(p.numel() for p in net.parameters()) / 1e6
    yield f"network   {millions:.2f} M parameters; encoder {run.model.encoder.name}, weights: {net.encoder_origin}"
    for name, task in run.tasks.items():
        space = spaces[name]
        yield f"task      {name}: {task.type}" + (f", {len(space.classes)} classes of {space.name}" if space else "")
    yield f"data      {len(loader)} batches of {run.train.batch_size} a rank, {len(val)} for validation, {run.data.size}"
    yield f"loading   {loader.workers} workers ({loader.workers_reason})"
    yield f"device    {ranks.device}, {ranks.world} process(es), {run.train.precision}, balance {run.balance.type}"
    if resumed:
        yield f"resumed   at step {step}"
