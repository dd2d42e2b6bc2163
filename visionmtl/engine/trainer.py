"""The training loop, top to bottom; it knows no task, data set or balancing method by name."""

import copy
import itertools
import math
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader

from visionmtl.balance.base import Balance, Step
from visionmtl.balance.conflict import pairs
from visionmtl.data.cache.decoded import with_cache
from visionmtl.data.label_spaces import align, eval_names, supervises
from visionmtl.data.loader import train_loader, val_loader
from visionmtl.data.prefetch import Prefetcher
from visionmtl.data.stamps import image_lists
from visionmtl.data.transforms.augment import Augment
from visionmtl.data.workers import choose_workers, num_cores, num_processes_here
from visionmtl.datasets import NamedDataset, check_channels, first_samples, open_datasets, shortened
from visionmtl.engine import checkpoint, distributed, memory_errors, run_lock, teachers
from visionmtl.engine import extension as extending
from visionmtl.engine.bad_files import BadFileRecord
from visionmtl.engine.capture import check_step, state_before
from visionmtl.engine.checkpoint import check_continues
from visionmtl.engine.compile import Graphs, compile_losses, compile_teachers
from visionmtl.engine.curriculum import TaskSchedule
from visionmtl.engine.distributed import Ranks
from visionmtl.engine.dry_run import measure_worst_case
from visionmtl.engine.evaluator import evaluate, read_results, save_json
from visionmtl.engine.forgetting import BEFORE, write_report
from visionmtl.engine.fsdp import (
    apply_fsdp,
    check_shard,
    full_moments,
    full_weights,
    load_full_moments,
    load_full_weights,
)
from visionmtl.engine.initial_weights import load_initial
from visionmtl.engine.logging import RunLog, logger, results_table
from visionmtl.engine.monitor import Monitor
from visionmtl.engine.nonfinite import FiniteGuard, check_weights, largest_weight
from visionmtl.engine.optim import (
    Ema,
    build_optimizer,
    clip_next_step,
    load_moments,
    lr_factor,
    milestone_steps,
    num_warmup_steps,
    set_lr,
    skip_next_step,
    unguarded,
)
from visionmtl.engine.options import PROFILE_WARMUP, TrainOptions
from visionmtl.engine.position import (
    Continuation,
    Position,
    changed_images,
    changed_settings,
    go_on,
    is_of_evaluation,
    own_config,
    what_changed,
)
from visionmtl.engine.stopping import Border, StepBorders, StopAsked, StopSignals, leave
from visionmtl.engine.throughput import DataTimeAdvice, ThroughputMeter
from visionmtl.metrics.base import Results
from visionmtl.modeling.sync_batchnorm import synchronise
from visionmtl.modeling.unused_parameters import check_evaluates, freeze_unused_parameters
from visionmtl.modeling.weights import check_fits
from visionmtl.network import FEATURES, SOFT, LossNet, MultiTaskNet, build_model
from visionmtl.ops.precision import autocast, chosen_precision
from visionmtl.ops.ranks import Counts, step_totals, sum_over_ranks
from visionmtl.run import Run, dump
from visionmtl.structures import Batch, Sample, as_rgb
from visionmtl.tasks.base import Task
from visionmtl.transfer.distillation import Soft
from visionmtl.visualization.draw import DrawOptions
from visionmtl.visualization.palette import recolour


def train(run: Run, options: TrainOptions | None = None) -> Results:
    """Train, evaluate, keep checkpoints; returns the last evaluation's results by task.

    Raises ValueError for what does not fit together, NotFinite when a loss or a gradient stops being finite, and
    OutOfMemory, which names settings, when the memory of the host or of the device is full. After SIGINT, SIGTERM or
    SIGUSR1 the state is saved, and Interrupted (a KeyboardInterrupt) or Terminated (a SystemExit) raised.
    """
    options = options or TrainOptions()
    run = extending.extended(run)
    remedies = memory_errors.train_remedies(run)
    with (
        StopSignals() as signals,
        distributed.group(options.device, run.train.distributed.timeout_s) as ranks,
        nullcontext() if options.dry_run else run_lock.hold(run.folder, ranks) as lock_note,
        memory_errors.explained(remedies, "training"),
    ):
        return _prepare(run, options, ranks).fit(signals, lock_note)


def _prepare(run: Run, options: TrainOptions, ranks: Ranks) -> "Trainer":
    """Open the data sets and build the network."""
    torch.manual_seed(run.seed)
    if run.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is not reproducible without it
    torch.use_deterministic_algorithms(run.train.deterministic)
    if options.overfit:
        run = run.model_copy(update={"data": run.data.model_copy(update={"augment": Augment()})})

    datasets, val_datasets = open_run_datasets(run, options.overfit)
    check_channels([*datasets, *val_datasets], run.model.encoder.in_chans)
    spaces = teachers.resolve_taught_spaces(run, datasets, val_datasets, extending.old_spaces(run))
    datasets, val_datasets = (align(each, run.tasks, spaces) for each in (datasets, val_datasets))
    names = eval_names(run.tasks, spaces, val_datasets)
    settings = run.train
    monitor = Monitor(settings.best, run.tasks, names)
    num_eval_images = options.limit_val_batches and options.limit_val_batches * settings.batch_size * ranks.world
    monitor.check(spaces, val_datasets, num_eval_images)
    smaller = {stage.size for stage in settings.curriculum.smaller_first} if settings.curriculum else set()
    train_batches, *smaller_batches = [
        train_loader(
            run.data, extending.train_tasks(run), spaces, datasets, settings.batch_size, run.seed, ranks.rank,
            ranks.world, unlabelled=run.is_taught, size=size,
            leave_out_bad_files=True,
        )
        for size in (None, *sorted(smaller))
    ]  # fmt: skip
    val_batches = val_loader(
        run.data, run.tasks, spaces, val_datasets, settings.batch_size, ranks.rank, ranks.world,
        limit=1 if options.dry_run else options.limit_val_batches,
    )  # fmt: skip

    if steps_per_epoch := len(train_batches) // settings.accumulate:
        _check_schedule(run, steps_per_epoch)
    net = build_model(run.model, run.tasks, spaces, run.data.size)
    net.check_size(run.data.input_size, "data.eval_size")
    for size in smaller:
        net.check_size(size, "train.curriculum.smaller_first")
    if options.init_from and run.extend:
        raise ValueError(
            f"--init-from {options.init_from} and extend.checkpoint {run.extend.checkpoint} are both set, and weights "
            "come from one of them; leave one out"
        )
    initial: list[str] = []
    if options.init_from and not checkpoint.find_resumed(run.folder, options.resume, options.dry_run):
        initial = load_initial(net, run, Path(options.init_from))
    loaders = dict(zip(sorted(smaller), smaller_batches, strict=True))
    data = LoopData(datasets, val_datasets, train_batches, val_batches, names, monitor, loaders, initial)
    return Trainer(run, net.to(ranks.device), ranks, data, options)


def open_run_datasets(run: Run, overfit: int | None = None) -> tuple[list[NamedDataset], list[NamedDataset]]:
    """The training and validation data sets of a run.

    overfit: the first so many images of each training data set are what is trained and evaluated on.
    """
    datasets = open_datasets(run.data.train)
    if overfit is None:
        data, fields = run.data, {task.field for task in run.tasks.values()}
        if data.cache is not None:
            num_workers, _ = choose_workers(data.workers)
            largest_zoom = data.augment.largest_zoom
            datasets = with_cache(
                datasets, data.train, data.cache, fields, data.size, largest_zoom, num_workers, data.bad_files
            )
        return datasets, open_datasets(run.data.val)

    training = [first_samples(dataset, overfit, len(dataset)) for dataset in datasets]
    return training, [first_samples(dataset, overfit) for dataset in datasets]


def _early_tasks(run: Run) -> dict[str, tuple[int, Task]]:
    """By task whose loss begins under other settings (see `Task.early`): for how many epochs, and these settings."""
    found = {}
    for name, task in run.tasks.items():
        if (early := task.early()) is None:
            continue
        share, settings = early
        num_epochs = round(share * run.train.epochs)
        if not 0 < num_epochs < run.train.epochs:
            raise ValueError(
                f"tasks.{name} begins with other losses up to {share:g} of train.epochs {run.train.epochs}, which "
                "is none or all of them; a whole number between is needed; change late_losses_from, or train.epochs"
            )
        found[name] = num_epochs, settings
    return found


def _check_schedule(run: Run, steps_per_epoch: int) -> None:
    """Raise ValueError where a schedule does not fit the steps of the whole run, whatever a start's options cut off."""
    warmup, total = num_warmup_steps(run.optim, steps_per_epoch), run.train.epochs * steps_per_epoch
    if warmup > total:
        setting = "warmup_epochs" if run.optim.warmup_steps is None else "warmup_steps"
        raise ValueError(
            f"the warm-up takes {warmup} steps, but the run has {total} (train.epochs {run.train.epochs} of "
            f"{steps_per_epoch} steps), so the rate would never reach optim.lr; allowed are up to {total} steps; lower "
            f"optim.{setting}, or raise train.epochs"
        )
    milestones = milestone_steps(run.optim, total) if run.optim.schedule == "step" else []
    if len({0, *milestones, total}) < len(milestones) + 2 and run.optim.milestones:
        raise ValueError(
            f"optim.milestones {list(run.optim.milestones)} are the steps {milestones} of {total}, so that one has no "
            "effect; each needs a step of its own behind the first; move them apart, or raise train.epochs"
        )
    order = run.train.curriculum.easiest_first if run.train.curriculum else None
    if order is not None and order.measure_epochs * steps_per_epoch < 2:
        raise ValueError(
            f"the curriculum measures for {order.measure_epochs} epoch(s) of {steps_per_epoch} step(s), and compares "
            "the first half of the steps with the second; two steps or more are needed; raise measure_epochs"
        )


@dataclass(frozen=True)
class LoopData:
    """The data that a loop runs on."""

    train_datasets: Sequence[NamedDataset]
    val_datasets: Sequence[NamedDataset]
    train_loader: "DataLoader[Batch]"  # with a `BatchSampler`
    val_loader: "DataLoader[Batch]"
    eval_names: Mapping[str, str]  # see `data.label_spaces.eval_names`
    monitor: Monitor
    smaller: Mapping[tuple[int, int], "DataLoader[Batch]"] = field(default_factory=dict)
    """The training data of epochs with smaller images, by size (H, W)."""
    initial: Sequence[str] = ()
    """What was taken of the weights to start from, see `engine.initial_weights`."""


@dataclass
class TrainState:
    """Where a training is."""

    step: int = 0  # optimiser steps done, whatever their size
    best: float = -math.inf  # the monitored value of best.pt
    results: Results = field(default_factory=dict)  # of the last evaluation
    evaluated: bool = False  # whether `results` are those of this step


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one optimiser step gives, on the device."""

    losses: dict[str, dict[str, Tensor]]  # by task and part: this rank's, summed over micro-batches
    labelled: dict[str, Tensor]  # by task: bool scalar, whether the step has a label of it on any rank
    weights: Mapping[str, Tensor]  # by task: as the balancing method gave it, the mean of those of micro-batches
    grad_norm: Tensor
    totals: Mapping[str, Mapping[str, Tensor]]  # by task: what its losses are means over


def _recipe(run: Run) -> str:
    """The settings that decide how well a run learns, chosen or by default, on one line."""
    (height, width), augment, optim, train = run.data.size, run.data.augment, run.optim, run.train
    defaults = type(augment)()
    drawn = [f"{name} {value}" for name, value in augment if value != getattr(defaults, name)]
    warmup = f"{optim.warmup_epochs} epochs" if optim.warmup_epochs else f"{optim.warmup_steps or 0} steps"
    return (
        f"{height}x{width} px, {', '.join(drawn) or 'no augmentation'}; {optim.name} {optim.lr:g}, {optim.schedule}, "
        f"warm-up {warmup}; {train.epochs} epochs of batches of {train.batch_size}"
    )


def _joined(one: Counts, other: Counts) -> Counts:
    """The counts of both, by task."""
    return {task: {**of_task, **other.get(task, {})} for task, of_task in one.items()}


class Trainer:
    """A network in training: weights, optimiser, weight average, balancing method, and the loop around them.

    `train_step` alone needs no data; `fit` needs `data`.
    """

    def __init__(
        self,
        run: Run,
        net: MultiTaskNet,
        ranks: Ranks,
        data: LoopData | None = None,
        options: TrainOptions | None = None,
    ) -> None:
        """net: on the device of `ranks`."""
        self.run, self.net, self.ranks, self.data, self.options = run, net, ranks, data, options or TrainOptions()
        self.state = TrainState()
        self.steps_per_epoch = self.total_steps = self.last_step = 0  # known when the loop starts
        self.resumed_at: Position | None = None
        self.continuation = Continuation()
        self.images_per_step = run.train.batch_size * run.train.accumulate * ranks.world
        self.resume_lines: list[str] = []
        self.saved_step: int | None = None  # the one that a checkpoint of this folder holds
        self.border = Border()
        self.sharded = run.train.distributed.shard and ranks.world > 1
        self.extension = extending.open_extension(run, net) if run.extend else None
        self.learning = self.extension.learning if self.extension else list(net.tasks)
        """The tasks that have a loss."""
        if run.train.channels_last and not self.sharded:  # FSDP flattens parameters, so channels_last would be lost
            net.to(memory_format=torch.channels_last)
        synchronise(net.train(), run.train.sync_batchnorm, ranks.device.type == "cuda" and not run.train.compile)
        outputs = partial(self.extension.outputs, net) if self.extension else net.with_initial
        self.unused = freeze_unused_parameters(net, run.data.size, ranks.device, run.train.batch_size, outputs)
        if self.extension:
            self.extension.settle(net)
        if run.data.input_size != run.data.size:
            check_evaluates(net, run.data.input_size, ranks.device)
        balance = run.balance if net.trunk.shared_maps else run.balance.without_shared_maps()
        self.schedule = TaskSchedule(run.train.curriculum, list(run.tasks)) if run.train.curriculum else None
        if self.schedule:
            self.schedule.to(ranks.device)
        self.balancer = balance.build({name: run.tasks[name].weight for name in self.learning}).to(ranks.device)
        self._check_compared(balance)
        self.shared_parameters = net.trunk.shared_parameters() if self.balancer.needs_parameters else []
        # a task's backward each, through the same graph and to the same parameters
        several_backwards = self.balancer.needs_parameters or (self.balancer.needs_cut and net.trunk.joins_tasks)
        if run.train.distributed.shard:
            check_shard(run.train, self.balancer, several_backwards)
        self.averages_itself = several_backwards or (self.balancer.rescales_decoder_gradients and not self.sharded)
        """Whether gradients are averaged over ranks after all backwards of a step, instead of during its only one."""
        self.teachers = None
        feature_weight = run.extend and run.extend.feature_weight
        if run.distill or feature_weight:
            features = (self.extension.path, self.learning[0]) if self.extension and feature_weight else None
            self.teachers = teachers.open_teachers(run.distill, net, ranks.device, features)
        self.teacher_record = teachers.record(run.distill) if run.distill else []
        soft_losses = self.teachers.soft_losses if self.teachers else {}
        self.cut_net = loss_net = LossNet(
            net, self.balancer.needs_cut, soft_losses, self.learning, feature_weight or 1.0
        )
        sharded_copy = None
        if self.sharded:
            self._unsharded = copy.deepcopy(net).cpu()
            if run.optim.ema_decay:
                sharded_copy = copy.deepcopy(net)
                apply_fsdp(LossNet(sharded_copy, cut=False), ranks.device, ranks.world)
            apply_fsdp(loss_net, ranks.device, ranks.world)
        optim = run.optim
        if self.extension and not any(p.requires_grad for encoder in net.encoders() for p in encoder.parameters()):
            # the recipe of a whole network serves to add a task to it as well
            optim = optim.model_copy(update={"encoder_lr_factor": 1.0, "layer_decay": None})
        self.optimizer = build_optimizer(optim, net, self.balancer)
        self.ema = Ema(net, optim.ema_decay, optim.ema_every_steps or 1, sharded_copy) if optim.ema_decay else None
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=run.train.precision == "fp16")
        self._absent_told = False
        self._amounts: dict[str, Tensor] | None = {}  # steps with labels and what these hold, by task, at first
        self.finite = FiniteGuard(run.train.not_finite, ranks.device, self.scaler.is_enabled())
        self.early_tasks = _early_tasks(run)
        self.counts_predictions = any(net.tasks[name].counts_predictions for name in self.learning)
        self.graphs = Graphs() if run.train.compile else None
        if run.train.compile:
            compile_losses(loss_net, run.train, ranks.device, keeps_graph=several_backwards)
            if self.teachers:
                compile_teachers(self.teachers, run.train)
        self.weighed_parameters = list(loss_net.parameters()) if self.balancer.rescales_decoder_gradients else []
        self.loss_net: nn.Module = loss_net
        if not self.sharded:
            self.loss_net = distributed.replicate(loss_net, ranks, averaged_later=self.averages_itself)

    def _check_compared(self, balance: Balance) -> None:
        """Raise ValueError where the balancing method would compare gradients that lead nowhere, or are not there."""
        trunk = self.net.trunk
        if self.balancer.needs_cut:
            learning = trunk.learning_maps()
            balance.check_levels(list(learning))
            learns, where = any(learning.values()), "shared maps; all that makes these"
        elif self.balancer.needs_parameters:
            learns, where = any(p.requires_grad for p in trunk.parameters()), "trunk; that"
        else:
            return
        if not learns:
            raise ValueError(
                f"balance.type is {balance.type!r}, which compares gradients on the {where} is frozen, so it would "
                "have no effect; set balance=fixed, or choose another extend.type or model.freeze"
            )

    # ---- one step ----

    def train_step(self, micro_batches: Sequence[Batch]) -> StepOutput:
        """One optimiser step on batches that are on the device. Nothing waits for the device.

        A loss or gradient that is not finite leaves everything as it was, see `FiniteGuard`; under fp16 the loss scale
        is lowered.
        """
        before = state_before(self) if self.captures else None
        self.finite.begin(self.net, self._stateful_modules, unguarded(self.optimizer))
        self.net.train()
        self.choose_losses()
        if self.run.train.compile == "cuda_graph":
            torch.compiler.cudagraph_mark_step_begin()
        if self.schedule:
            for module in self.held():
                module.eval()
            micro_batches = [self.schedule.mask(batch, self.epoch) for batch in micro_batches]
        counts = [batch.counts for batch in micro_batches]
        if len(micro_batches) > 1 and self.counts_predictions:
            counts = self._with_predicted_counts(micro_batches)
        soft, soft_counts = self._ask_teachers(micro_batches)
        totals = step_totals([_joined(*of_batch) for of_batch in zip(counts, soft_counts, strict=True)])
        num_labelled = self._num_labelled(micro_batches)
        of_step = num_labelled.sum(dim=0)
        labelled = dict(zip(self.learning, (of_step > 0).unbind(), strict=True))
        label_shares = num_labelled / of_step.clamp(min=1)
        losses: dict[str, dict[str, Tensor]] = {}
        of_batches: list[Mapping[str, Tensor]] = []
        for number, batch in enumerate(micro_batches):
            last = number == len(micro_batches) - 1
            torch.manual_seed(self.step_seed(number))
            with self._gradient_sync(last):
                parts, weights = self._forward_backward(
                    batch, soft[number], totals, labelled, label_shares[number], 1 / len(micro_batches), last
                )
            of_batches.append(weights)
            for task, of_task in parts.items():
                known = losses.setdefault(task, {})
                for name, value in of_task.items():
                    known[name] = known[name] + value.detach() if name in known else value.detach()
        if self.schedule:
            of_tasks = {task: torch.stack(list(parts.values())).sum() for task, parts in losses.items()}
            self.schedule.measure(of_tasks, labelled, self.steps_of_this_size / max(1, self.steps_per_epoch))
        weights = of_batches[0] if len(of_batches) == 1 else self._mean_weights(of_batches, micro_batches)
        output = StepOutput(losses, labelled, weights, self._optimizer_step(losses), totals)
        if before is not None:
            check_step(self, before, micro_batches, totals, output)
        return output

    def choose_losses(self) -> None:
        """Those of this epoch, where a task begins with others. Compiled once more where this changes."""
        for name, (num_epochs, early) in self.early_tasks.items():
            self.net.tasks[name] = early if self.epoch < num_epochs else self.run.tasks[name]

    @property
    def captures(self) -> bool:
        """Whether the first step that is not finite is written to a file."""
        return self.run.train.not_finite.policy == "capture" and not self.options.dry_run

    @property
    def _stateful_modules(self) -> list[nn.Module]:
        """What has state beside the network that a step changes."""
        return [self.balancer, *([self.schedule] if self.schedule else [])]

    def held(self) -> list[nn.Module]:
        """The modules of one task each that the curriculum keeps as they are in this epoch."""
        return [self.net.get_submodule(name) for name in self._names_of_held()]

    def held_parameters(self) -> list[nn.Parameter]:
        """Those of `held` that no other module has, as the encoders of tasks under `lora` share theirs."""
        names = tuple(f"{name}." for name in self._names_of_held())
        every = list(self.net.named_parameters(remove_duplicate=False)) if names else []
        used = {id(parameter) for name, parameter in every if not name.startswith(names)}
        return [parameter for name, parameter in every if name.startswith(names) and id(parameter) not in used]

    def _names_of_held(self) -> list[str]:
        if not self.schedule or not (tasks := self.schedule.held(self.epoch)):  # as in nearly every step
            return []
        of_each_task = ["decoders", "auxiliary", *(f"trunk.{name}" for name in self.net.trunk.of_each_task)]
        by_task = [(name, self.net.get_submodule(name)) for name in of_each_task]
        return [f"{name}.{task}" for name, modules in by_task for task in tasks if task in modules]  # type: ignore[operator]

    @property
    def epoch(self) -> int:
        """Of the next step; 0 where no loop has told how long an epoch is."""
        return self.steps_of_this_size // self.steps_per_epoch if self.steps_per_epoch else 0

    @property
    def steps_of_this_size(self) -> int:
        """Steps done, as if all had had the present size."""
        return self.state.step - self.continuation.offset

    @property
    def position(self) -> Position:
        """In the data, before the next step."""
        if not self.steps_per_epoch:
            return Position(0, 0)
        epoch, steps = divmod(self.steps_of_this_size, self.steps_per_epoch)
        return Position(epoch, steps * self.images_per_step + self.shift(epoch))

    def _epoch_is_over(self) -> bool:
        return self.steps_per_epoch > 0 and self.position.images == 0

    def shift(self, epoch: int) -> int:
        """Images by which the batches of an epoch lie later in its order, see `BatchSampler.set_epoch`."""
        return self.continuation.shift if epoch == self.continuation.epoch else 0

    @torch.no_grad()
    def _with_predicted_counts(self, micro_batches: Sequence[Batch]) -> list[Counts]:
        """The counts of each micro-batch with those that need predictions: a forward pass more, without gradients.

        The trunk draws the same random numbers as in the step; running statistics stay as they are.
        """
        buffers = [(buffer, buffer.clone()) for buffer in self.net.buffers()]
        counts = []
        for number, batch in enumerate(micro_batches):
            torch.manual_seed(self.step_seed(number))
            with autocast(self.ranks.device, self.run.train.precision):
                predicted = self.loss_net(self._image(batch), batch.targets, batch.labelled, None, batch.color)
            counts.append(_joined(batch.counts, predicted))
        for buffer, before in buffers:
            buffer.copy_(before)
        return counts

    def _ask_teachers(self, micro_batches: Sequence[Batch]) -> tuple[list[Soft], list[Counts]]:
        """What teachers say of each micro-batch, and the counts of it that the loss is divided by over all of them."""
        if self.teachers is None:
            return [{} for _ in micro_batches], [{} for _ in micro_batches]
        with autocast(self.ranks.device, self.run.train.precision):
            answers = [self.teachers(self._image(batch), batch.color) for batch in micro_batches]
        return [soft for soft, _ in answers], [counts for _, counts in answers]

    def _image(self, batch: Batch) -> Tensor:
        memory_format = torch.channels_last if self.run.train.channels_last else torch.contiguous_format
        return batch.image.contiguous(memory_format=memory_format)

    def _num_labelled(self, micro_batches: Sequence[Batch]) -> Tensor:
        """float [micro-batches, T], how many images, on all ranks, have a label of each task that is learnt."""
        flags = [torch.stack([batch.labelled[task] for task in self.learning]) for batch in micro_batches]
        return sum_over_ranks(torch.stack([of_batch.sum(dim=1) for of_batch in flags]).float())

    def _mean_weights(
        self, of_batches: Sequence[Mapping[str, Tensor]], micro_batches: Sequence[Batch]
    ) -> dict[str, Tensor]:
        """Each task's weight, the mean over the micro-batches that teach it."""
        means = {}
        for task in of_batches[0]:
            labelled = torch.stack([batch.labelled[task].any() for batch in micro_batches])
            weights = torch.stack([weights[task] for weights in of_batches]).to(labelled.device, non_blocking=True)
            num_taught = (labelled | (weights != 0)).sum().clamp(min=1)  # a teacher, or another rank, teaches too
            means[task] = weights.sum() / num_taught
        return means

    def _forward_backward(
        self,
        batch: Batch,
        soft: Soft,
        totals: Counts,
        labelled: Mapping[str, Tensor],
        label_shares: Tensor,
        share: float,
        last: bool,
    ) -> tuple[dict[str, dict[str, Tensor]], Mapping[str, Tensor]]:
        with autocast(self.ranks.device, self.run.train.precision):
            parts, shared, leaves = self.loss_net(
                self._image(batch), batch.targets, batch.labelled, totals, batch.color, soft
            )
        losses = {task: torch.stack(list(of_task.values())).sum() for task, of_task in parts.items()}
        scale = self.scaler.scale(torch.ones((), device=self.ranks.device))
        without_labels = {*soft, *(self.learning[:1] if FEATURES in soft else ())}
        taught = {task: flag | (task in without_labels) for task, flag in labelled.items()}
        of_labels = dict(zip(self.learning, label_shares.unbind(), strict=True))
        step = Step(
            losses, shared, leaves, scale, taught, share, last, self.shared_parameters, self.net.trunk.joins_tasks,
            self.cut_net.levels, self.weighed_parameters,
            # a teacher teaches all images alike
            {task: torch.full_like(of, share) if task in without_labels else of for task, of in of_labels.items()},
        )  # fmt: skip
        weights = self.balancer.backward(step)
        if self.graphs and (line := self.graphs.report(batch.targets)):
            logger.info(line)
        return parts, weights

    def _optimizer_step(self, losses: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
        """Move the weights, unless something is not finite. Returns the gradients' norm before they are clipped."""
        distributed.average_gradients(self.balancer.parameters())
        if self.averages_itself:
            distributed.average_gradients(self.net.parameters())
        for parameter in self.held_parameters():
            parameter.grad = None  # the optimiser then leaves it as it is
        self.scaler.unscale_(self.optimizer)
        if self.extension and self.extension.penalty:
            self.extension.penalty.add_gradients()
        norm = clip_next_step(self.optimizer, self.run.optim.clip_norm or math.inf)
        undo = self.finite.must_undo(self.state.step + 1, norm, losses)
        skip_next_step(self.optimizer, undo)
        self.optimizer.step()  # not by the scaler, which looks at the gradients alone
        self.finite.restore_where(undo)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.state.step += 1
        self.state.evaluated = False
        if self.ema:
            self.ema.update(now=self.state.step == self.total_steps or self._epoch_is_over())
        return norm

    def step_seed(self, number: int) -> int:
        """Of a micro-batch: dropout and drop path depend on run, rank, step and its number alone, so that there is no
        random state to keep, and a pass over the trunk alone draws what the step draws."""
        entropy = (self.run.seed, self.ranks.rank, self.state.step, *([number] if number else []))
        return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])

    def _gradient_sync(self, last: bool) -> Any:
        """Ranks exchange gradients in the last of several backwards only, or in each where each has its own weights."""
        if isinstance(self.loss_net, FSDPModule):
            self.loss_net.set_requires_gradient_sync(last or self.balancer.rescales_decoder_gradients)
        no_sync = getattr(self.loss_net, "no_sync", None)
        return torch.enable_grad() if last or no_sync is None else no_sync()

    # ---- the loop ----

    def fit(self, signals: StopSignals | None = None, lock_note: str | None = None) -> Results:
        """Train to the end, or as far as the options say; returns the last evaluation's results by task.

        signals: what may ask to stop; then the state is saved, and `stopping.leave` says what is raised
        lock_note: what is to be said of the lock on the run folder
        """
        assert self.data is not None
        run, options, ranks = self.run, self.options, self.ranks
        folder = self.folder = run.folder
        resumed = self._resume()
        self._plan()
        self.signals = signals or StopSignals()
        self.borders = StepBorders(run.train, self.signals, ranks, options.max_time_s, options.stop)
        with RunLog.open(
            folder, ranks.is_main_process and not options.dry_run, self.state.step if resumed else None,
            show=ranks.is_main_process, evaluated=self.state.evaluated, loggers=run.train.loggers,
        ) as self.log:  # fmt: skip
            if not resumed or self.state.step < self.last_step:  # else nothing is learnt under these settings
                self.log.config(dump(run), None if resumed else options.init_from)
            self.bad_files = BadFileRecord(
                run.data.bad_files, {one.name: len(one) for one in self.data.train_datasets}, ranks.device,
                folder if ranks.is_main_process and not options.dry_run else None, resumed,
            )  # fmt: skip
            for line in self._introduction(resumed):
                logger.info(line)
            if lock_note:
                logger.info(f"note      {lock_note}")
            if num_warmup_steps(run.optim, self.steps_per_epoch) > run.train.epochs * self.steps_per_epoch:
                logger.info(
                    "note      --limit-train-batches ends the run before its warm-up; the rate stays below optim.lr"
                )
            try:
                self._begin(resumed)
                self._run_epochs()
                number = self.border.signal
            except StopAsked as asked:
                number = asked.number
                if self.saved_step != self.state.step and not options.dry_run:
                    self.save()
            by = f" by {signal.Signals(number).name}" if number else ""
            text = f"stopped{by} after step {self.state.step} of {self.total_steps}; continue with --resume"
            if number or self.state.step < self.total_steps:
                logger.info(text)
            distributed.barrier()
        if number:
            raise leave(number, text)
        return self.state.results

    def _begin(self, resumed: bool) -> None:
        """What comes before the first step of this start."""
        if self.extension and not resumed:
            self._evaluate_old_network()
        if self._evaluation_is_due() and not self.state.evaluated and not self.options.dry_run:
            logger.info(f"step {self.state.step} was saved, but not evaluated to the end; that comes first")
            self.validate()
        if self.state.step >= self.last_step:
            logger.info(f"nothing is left to train: step {self.state.step} of {self.last_step} is done")
            if self.state.evaluated:
                logger.info(f"its evaluation gave\n{results_table(self.state.results)}")

    def _run_epochs(self) -> None:
        """Train, save and evaluate until the end, or until something asks to stop."""
        assert self.data is not None
        run, options, ranks = self.run, self.options, self.ranks
        self.prefetcher = Prefetcher(ranks.device)
        self.throughput = ThroughputMeter(self.images_per_step, self.prefetcher.data_time)
        self.advice = DataTimeAdvice(run.data, self.data.train_loader.num_workers, num_cores(), num_processes_here())
        self.profiler = self._start_profiler() if options.profile and ranks.is_main_process else None
        while self.state.step < self.last_step and not self.border.stop:
            output = self._train_epoch()
            self._losses(output)  # nothing that is not finite is saved or evaluated
            if self._save_is_due() and not options.dry_run:  # before the evaluation, which may fail
                self.save()
            if self._evaluation_is_due() and not self.border.signal:
                self.validate()
                self.throughput.restart()
        if self.profiler:
            self.profiler.stop()
        if summary := self.bad_files.summary():
            logger.warning(summary)
        if options.dry_run:
            for line in measure_worst_case(self):
                logger.info(line)
        if self.extension and self.state.evaluated and self.state.step >= self.total_steps and not options.dry_run:
            self._report_forgetting()

    def _resume(self) -> bool:
        """Go on from a checkpoint, if the options ask for it and there is one."""
        assert self.data is not None
        folder, options = self.folder, self.options
        path = checkpoint.find_resumed(folder, options.resume, options.dry_run)
        resumed = checkpoint.load_resumed(path, fall_back=options.resume == "auto") if path else None
        results = self.load_checkpoint(resumed.path, self.data.monitor, resumed.state) if resumed else None
        self.state.evaluated, self.state.results = results is not None, results or {}
        if resumed and resumed.path.parent.resolve() != (folder / "checkpoints").resolve():
            is_best = results is not None and self.data.monitor.value(results) == self.state.best
            write = self.ranks.is_main_process and not options.dry_run
            best = folder / "checkpoints" / "best.pt"
            if not checkpoint.carry_best(resumed.path, best, self.state.step, is_best, write):
                self.state.best = -math.inf
        # all ranks have looked into the folder before the first one writes there
        position = (self.state.step, self.state.evaluated)
        remedy = "let all machines see one run folder, or copy it to each"
        distributed.check_same(position, "the resumed step, and whether it was evaluated,", remedy)
        if resumed:
            self.resume_lines += [f"WARNING   {resumed.warning}"] if resumed.warning else []
            if self.ranks.is_main_process and not options.dry_run:
                self.resume_lines += [f"note      {line}" for line in checkpoint.clean_run(folder, resumed)]
        return path is not None

    def _plan(self) -> None:
        """How far this start goes, in optimiser steps of the whole run."""
        assert self.data is not None
        settings, options, done = self.run.train, self.options, self.state.step
        batches = min(len(self.data.train_loader), options.limit_train_batches or len(self.data.train_loader))
        self.steps_per_epoch = batches // settings.accumulate
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"an epoch has {batches} batches, but train.accumulate is {settings.accumulate}; one step takes that "
                "many batches; lower train.accumulate or train.batch_size"
            )
        if self.resumed_at:
            drawn = len(self.data.train_loader.batch_sampler.mixture)  # type: ignore[union-attr]
            if options.limit_train_batches:
                drawn = min(drawn, options.limit_train_batches * settings.batch_size * self.ranks.world)
            self.continuation = go_on(self.resumed_at, done, self.steps_per_epoch, self.images_per_step, drawn)
        whole = self.continuation.offset + settings.epochs * self.steps_per_epoch
        self.total_steps = done + 1 if options.dry_run else whole
        self.last_step = min(self.total_steps, options.max_steps or self.total_steps)
        if options.profile:
            needed = PROFILE_WARMUP + options.profile
            if self.last_step - done < needed:
                raise ValueError(
                    f"--profile {options.profile} needs {needed} steps, {PROFILE_WARMUP} of them to warm up, and this "
                    f"start has {max(self.last_step - done, 0)}; lower --profile, or raise train.epochs or --max-steps"
                )
            self.last_step = done + needed

    def _train_epoch(self) -> StepOutput:
        """The steps that are left of the present epoch."""
        assert self.data is not None
        settings = self.run.train
        epoch, done = divmod(self.steps_of_this_size, self.steps_per_epoch)
        if self.schedule:
            logger.info(f"epoch {epoch} teaches {', '.join(sorted(self.schedule.taught(epoch)))}")
        size = settings.curriculum.size(epoch) if settings.curriculum else None
        if size:
            logger.info(f"epoch {epoch} at {size[0]}x{size[1]}")
        loader = self.data.smaller[size] if size else self.data.train_loader
        loader.batch_sampler.set_epoch(epoch, done * settings.accumulate, self.shift(epoch))  # type: ignore[union-attr]
        batches = itertools.islice(loader, (self.steps_per_epoch - done) * settings.accumulate)
        for micro_batches in self.prefetcher.groups(batches, settings.accumulate):
            set_lr(self.optimizer, self._lr_factor())
            output = self.train_step(micro_batches)
            if self._amounts is not None:
                self._add_amounts(output, micro_batches)
            self.signals.nothing_to_save = False
            self.bad_files.add(micro_batches, epoch, self.state.step)
            if self.ranks.world == 1:
                self.bad_files.share()
            if self.state.step < self.last_step:
                self.prefetcher.prefetch()
            self.throughput.step()
            if self.profiler:
                self.profiler.step()
            if self.state.step % settings.log_every_steps == 0 or self.state.step == self.last_step:
                self.log_step(output, epoch)
            self.border = self.borders.after(self.state.step)
            if self.border.stop or self.state.step >= self.last_step:
                break
            if self.border.save and self.position.images and not self.options.dry_run:  # else the epoch is over
                self._losses(output)  # raises where they are not finite
                self.save(named=isinstance(settings.checkpoint_every, int))
        self._tell_empty_labels()
        return output

    def _add_amounts(self, output: StepOutput, micro_batches: Sequence[Batch]) -> None:
        for task, counts in output.totals.items():
            if task not in output.labelled:
                continue
            num_objects = self.net.tasks[task].num_objects
            found: Iterable[Tensor | None] = counts.values() or (
                num_objects(one.targets[task]) for one in micro_batches
            )
            if known := [one.float() for one in found if one is not None]:
                some = torch.stack(known).amax() > 1e-5  # totals are 1e-6 at least
                amount = torch.stack([output.labelled[task], some]).float()
                assert self._amounts is not None
                self._amounts[task] = self._amounts[task] + amount if task in self._amounts else amount

    def _tell_empty_labels(self) -> None:
        """Once, after the first epoch of this process: a task whose labels are all void learns nothing from them."""
        for task, amount in (self._amounts or {}).items():
            labelled, with_items = distributed.mean(amount).tolist()
            if labelled and not with_items:
                logger.warning(
                    f"{task} is labelled in {labelled:.0f} step(s), and none of these labels holds a pixel, box or "
                    "class to learn from; look at them with `visionmtl check_data`, or leave the task out"
                )
        self._amounts = None

    def _lr_factor(self) -> float:
        """At the present fraction of the run, whatever the size of its steps; a warm-up in steps counts those done."""
        optim, step = self.run.optim, self.steps_of_this_size
        if optim.warmup_steps:
            step = self.state.step if self.state.step < optim.warmup_steps else max(step, optim.warmup_steps)
        return lr_factor(optim, step, self.total_steps - self.continuation.offset, self.steps_per_epoch)

    def log_step(self, output: StepOutput, epoch: int) -> None:
        """Figures since the last logged step. The one place of a step that waits for the device."""
        losses = self._losses(output)
        self.bad_files.share()
        throughput = self.throughput.read(self.total_steps - self.state.step)
        self.log.train(
            step=self.state.step, epoch=epoch, total_steps=self.total_steps, losses=losses,
            weights={task: float(weight) for task, weight in output.weights.items()},
            grad_norm=float(output.grad_norm), lr=self.optimizer.param_groups[-1]["lr"],
            gradients=pairs(self.balancer.diagnostics(), self.learning),
            skipped_steps=self.finite.skipped(), **throughput,
        )  # fmt: skip
        if line := self.advice.line(throughput["data_time"], self.run.train.log_every_steps):
            logger.info(line)

    def _losses(self, output: StepOutput) -> dict[str, dict[str, float]]:
        """Loss parts of all ranks as numbers, of tasks with a label in the step. Raises NotFinite."""
        names = [(task, part) for task, parts in output.losses.items() for part in parts]
        flags = torch.stack(list(output.labelled.values())).float()  # the same on all ranks
        # a rank's loss is its share of the whole times the number of ranks, so that their mean is the whole
        parts = torch.stack([output.losses[task][part] for task, part in names])
        values = distributed.mean(torch.cat([parts, flags])).tolist()
        labelled = dict(zip(output.labelled, values[len(names) :], strict=True))
        losses: dict[str, dict[str, float]] = {}
        for (task, part), value in zip(names, values, strict=False):
            # else the 0 means that nothing was labelled
            if labelled[task] or part.startswith(SOFT) or not math.isfinite(value):
                losses.setdefault(task, {})[part] = value
        if line := self.finite.check(self.state.step, losses):
            logger.info(line)
        self._check_weights()
        # those of a step that was skipped say nothing of the training
        return {t: finite for t, of in losses.items() if (finite := {p: v for p, v in of.items() if math.isfinite(v)})}

    def _check_weights(self) -> None:
        """Raise NotFinite where an update has made weights that are not finite. All processes must call it."""
        named = dict(self.net.named_parameters())
        if self.ema:
            named |= {f"average of {name}": weight for name, weight in self.ema.module.named_parameters()}
        spoilt = not math.isfinite(float(largest_weight(named.values())))
        if distributed.any_rank(spoilt, self.ranks.device):
            check_weights(self.state.step, named, any_rank=True)

    def _save_is_due(self) -> bool:
        position = self.position
        if self.border.stop or self.border.save or self.state.step >= self.last_step:
            return self.saved_step != self.state.step
        return position.images == 0 and position.epoch % self.run.train.checkpoint_every_epochs == 0

    def _evaluation_is_due(self) -> bool:
        step, position = self.state.step, self.position
        at_end_of_epoch = position.images == 0 and position.epoch % self.run.train.eval_every_epochs == 0
        return step > 0 and (step >= self.total_steps or at_end_of_epoch)

    # ---- evaluation and checkpoints ----

    def validate(self) -> None:
        """Evaluate; keep best.pt and a few pictures.

        The file of results is written last: where it lies, a resumed run takes the evaluation as done.
        """
        assert self.data is not None
        run, step = self.run, self.state.step
        net, epoch = self.eval_model(), self.epoch
        examples: list[tuple[Sample, dict[str, Any]]] = []

        def keep_examples(sample: Sample, predictions: dict[str, Any], evaluated: Sequence[str]) -> None:
            if self.ranks.is_main_process and len(examples) < run.train.sample_pictures:
                examples.append((sample, predictions))

        meters = {name: run.tasks[task].meter(net.spaces[task]) for name, task in self.data.eval_names.items()}
        remedies = memory_errors.eval_remedies(run, run.train.batch_size, "train.batch_size")
        with memory_errors.explained(remedies, f"the evaluation after step {step}"):
            results = evaluate(
                net, self._until_asked_to_stop(self.data.val_loader), self.ranks.device,
                precision=run.train.precision, meters=meters, on_image=keep_examples,
            )  # fmt: skip
        self.state.results, self.state.evaluated = results, True
        self.log.val(step=step, epoch=epoch, results=results)
        self._tell_absent_classes(results)
        if self.options.dry_run:
            return
        spaces, as_before = recolour(net.spaces), DrawOptions(depth_range_m=None)  # pictures of all steps compare
        for number, (sample, predictions) in enumerate(examples):
            for name, prediction in predictions.items():
                picture = run.tasks[name].draw(as_rgb(sample.image), prediction, spaces[name], as_before)
                self.log.picture(f"{name}/{number}", picture, step)

        value = self.data.monitor.value(results)
        self.log.sync()
        if value > self.state.best:
            self.state.best = value
            self.save_on_rank_zero(lambda state: checkpoint.save(self.folder / "checkpoints" / "best.pt", state))
            logger.info(f"best so far by rule {run.train.best!r}: {value:.4f}")
        if self.ranks.is_main_process:
            save_json(results, checkpoint.results_file(self.folder, step), {"step": step, "epoch": epoch})

    def _tell_absent_classes(self, results: Results) -> None:
        """Once, after the first whole evaluation of this process: a mean over the other classes says nothing of them.

        A mask of 0 and 255 comes so, whose 255 is taken as not labelled.
        """
        if self._absent_told or self.options.limit_val_batches:
            return
        self._absent_told = True
        for name, result in results.items():
            if absent := result.get("absent"):
                logger.info(f"note      {name}: no validation label shows {shortened(absent)}; no figure counts them")

    def _until_asked_to_stop(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches of an evaluation; raises StopAsked on all ranks where a signal came to any of them."""
        for batch in batches:
            if self.signals.received:
                break
            yield batch
        self.borders.check()

    def _evaluate_old_network(self) -> None:
        """Before the first step: which of the old weights matter, and what the old tasks score, in eval/before.json."""
        assert self.extension is not None and self.data is not None
        writes = self.ranks.is_main_process and not self.options.dry_run
        self.extension.prepare(self.net, self.run.optim, self.folder if writes else None)
        if self.options.dry_run:
            return
        names = {name: task for name, task in self.data.eval_names.items() if task in self.extension.old}
        meters = {name: self.net.tasks[task].meter(self.net.spaces[task]) for name, task in names.items()}
        results = evaluate(
            self.eval_model(),
            self.data.val_loader,
            self.ranks.device,
            precision=self.run.train.precision,
            meters=meters,
        )
        logger.info(f"the old tasks before the first step\n{results_table(results)}")
        if writes:
            save_json(results, self.folder / BEFORE, {"step": 0, **self.extension.record()})

    def _report_forgetting(self) -> None:
        """Compare the last evaluation with the one before the first step."""
        assert self.extension is not None and self.data is not None
        if not self.ranks.is_main_process:
            return
        if not (self.folder / BEFORE).is_file():
            logger.info(f"note      {self.folder / BEFORE} is not there, so that nothing can be compared with it")
            return
        before = read_results(self.folder / BEFORE)
        split = [{"data": dataset.name, "images": len(dataset)} for dataset in self.data.val_datasets]
        header = {**self.extension.record(), "method": self.extension.spec.type, "step": self.state.step, "val": split}
        text = write_report(self.folder, header, before, self.state.results, self.net.tasks, self.extension.old)
        logger.info(f"written: {self.folder / 'forgetting.json'} and .md\n{text}")

    def eval_model(self) -> MultiTaskNet:
        """The network to evaluate: averaged weights where there are any, unsharded, with the first rank's buffers."""
        net = self.ema.module if self.ema else self.net
        distributed.share_statistics(net)
        if not self.sharded:
            return net
        unsharded = copy.deepcopy(self._unsharded)  # with all weights, no rank waits for another while it predicts
        unsharded.load_state_dict(full_weights(net, on_every_rank=True))
        return unsharded.to(self.ranks.device)

    def save(self, named: bool = True) -> None:
        """Write checkpoints/last.pt, and step-N.pt for the newest few where it is `named`."""
        self.bad_files.share()  # a resumed run does not read those before this step again
        self.log.sync()  # a checkpoint counts on the rows before it
        keep = self.run.train.keep if named else 0
        self.save_on_rank_zero(lambda state: checkpoint.save_step(self.folder, state, keep))
        self.saved_step = self.state.step
        self.borders.saved()

    def save_on_rank_zero(self, write: Callable[[dict[str, Any]], None]) -> None:
        """Let the first rank write the state; where it is sharded, the others help to gather it.

        Raises NotFinite for weights that are not finite; `_losses`, which comes first, raises it on all ranks.
        """
        if self.ranks.is_main_process or self.sharded:
            state = self.state_dict()
            if self.ranks.is_main_process:
                write(state)

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors and plain data, the same whether it is sharded or not.

        Where it is, all ranks must call it, and only the first gets the tensors.
        """
        state = self._local_state()
        if self.sharded:
            state["net"] = full_weights(self.net)
            state["optimizer"] = full_moments(self.net, self.optimizer)
            if self.ema:
                state["ema"]["module"] = full_weights(self.ema.module)
        return state

    def _local_state(self) -> dict[str, Any]:
        return {
            "run": self.run.model_dump(mode="json"),
            "spaces": {name: space and space.plain() for name, space in self.net.spaces.items()},
            "net": self.net.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "balancer": self.balancer.state_dict(),
            "curriculum": self.schedule.state_dict() if self.schedule else {},
            "scaler": self.scaler.state_dict(),
            "not_finite": self.finite.state_dict(),
            "world": self.ranks.world,
            "step": self.state.step,
            "epoch": self.epoch,
            "epoch_images": self.position.images,
            "best": self.state.best,
            "images": self.images,
            **({"teachers": self.teacher_record} if self.teacher_record else {}),
            **({"extension": self.extension.state_dict()} if self.extension else {}),
        }

    @cached_property
    def images(self) -> dict[str, dict[str, list[int | str]]]:
        """What a checkpoint tells of the images, see `image_lists`: `train`, and `val`; {} without data."""
        if self.data is None:
            return {}
        return {"train": image_lists(self.data.train_datasets), "val": image_lists(self.data.val_datasets)}

    def load_checkpoint(self, path: Path, monitor: Monitor, saved: Mapping[str, Any] | None = None) -> Results | None:
        """Restore the run; returns the results at its step, None where that was not evaluated to the end.

        saved: what the file holds, where it has been read

        A checkpoint is written before the evaluation at its step, so the best value of that one is added here.
        Results under other names than the monitor's are of other data and do not count.
        """
        saved = saved or checkpoint.load(path)
        self.load_state_dict(saved, path)
        fresh = self._local_state()
        changed = {path: how for path, how in changed_settings(saved["run"], fresh["run"]) if path != "output"}
        self.resume_lines += [f"changed   {path} {how}" for path, how in changed.items()]
        if note := what_changed(saved, fresh):
            self.resume_lines.append(f"note      {note}")
        if "epoch_images" in saved:
            self.resumed_at = Position(saved["epoch"], saved["epoch_images"])
        if trained := changed_images(saved, fresh, "train"):
            self.resume_lines.append(
                f"note      since the checkpoint, training data changed: {trained}; from here on it is not bit for bit "
                "the run it was"
            )
        if evaluated := changed_images(saved, fresh, "val"):
            self.resume_lines.append(
                f"note      since the checkpoint, validation data changed: {evaluated}; the best so far counts no more"
            )
        if changed_eval_settings := [path for path in changed if is_of_evaluation(path)]:
            of_data = any(path.startswith("data.") for path in changed_eval_settings)
            what = "other validation images, or another size" if of_data else "other settings of a task"
            self.resume_lines.append(f"note      {what}: the best so far counts no more")
        if changed_eval_settings or evaluated:
            self.state.best = -math.inf
            return None
        if not monitor.comparable(saved["run"]["train"]["best"], self.state.best):
            self.state.best = -math.inf
        file = checkpoint.results_file(path.parent.parent, self.state.step)
        if not file.exists():
            return None
        results = read_results(file)
        if set(results) != set(monitor.eval_names):
            return None
        self.state.best = max(self.state.best, monitor.value(results))
        return results

    def load_state_dict(self, state: Mapping[str, Any], path: Path) -> None:
        """Undo `state_dict`. path: of the file it comes from, for messages."""
        fresh = self._local_state()
        check_fits(self.net, state["net"], path, own_config(state["run"], fresh["run"]))
        check_continues(state, fresh, self.run.tasks, path)
        teachers.check_record(state, fresh, path)
        if self.extension:
            self.extension.load_state_dict(state.get("extension"), path)
        if self.sharded:
            load_full_weights(self.net, state["net"])
            load_full_moments(self.net, self.optimizer, state["optimizer"])
            if self.ema:
                load_full_weights(self.ema.module, state["ema"]["module"])
                self.ema.load_counts(state["ema"])
        else:
            self.net.load_state_dict(state["net"])
            load_moments(self.optimizer, state["optimizer"])
            if self.ema:
                self.ema.load_state_dict(state["ema"])
        self.balancer.load_state_dict(state["balancer"])
        if self.schedule:
            self.schedule.load_state_dict(state.get("curriculum", {}))
        self.scaler.load_state_dict(state["scaler"])
        if counted := state.get("not_finite"):  # older files have none
            self.finite.resume(counted)
        self.state.step, self.state.best = state["step"], state["best"]

    # ---- for people ----

    def _start_profiler(self) -> torch.profiler.profile:
        """A running profiler that traces `options.profile` steps after PROFILE_WARMUP, or fewer where time is up."""
        num_steps, file = self.options.profile, self.folder / "profile.json"
        assert num_steps is not None

        def keep(trace: torch.profiler.profile) -> None:
            trace.export_chrome_trace(str(file))
            logger.info(f"trace of {num_steps} steps: {file}, for chrome://tracing or perfetto.dev")

        schedule = torch.profiler.schedule(wait=0, warmup=PROFILE_WARMUP, active=num_steps, repeat=1)
        profiler = torch.profiler.profile(schedule=schedule, on_trace_ready=keep)
        profiler.start()
        return profiler

    def _introduction(self, resumed: bool) -> Iterator[str]:
        """What a person wants to know before the first step."""
        assert self.data is not None
        run, net, data = self.run, self.net, self.data
        millions = sum(p.numel() for p in net.parameters()) / 1e6
        origin = net.encoder_origin + (", then as below (init)" if data.initial else "")
        yield f"network   {millions:.2f} M parameters; encoder {run.model.encoder.name}, weights: {origin}"
        if note := net.encoder.normalisation_note:
            yield f"note      {note}"
        yield f"pyramid   {run.model.pyramid.type}, {net.trunk.out_channels} channels"
        if self.unused:
            yield f"frozen    {len(self.unused)} parameters that no output depends on, from {self.unused[0]} on"
        yield from (f"init      {line}" for line in data.initial)
        for name, task in run.tasks.items():
            space = net.spaces[name]
            yield f"task      {name}: {task.type}" + (
                f", {len(space.classes)} classes of {space.name}" if space else ""
            )
        if self.extension:
            yield f"extends   {self.extension.line()}"
        for teacher, lessons in zip(self.teacher_record, self.teachers.lessons if self.teachers else (), strict=False):
            taught = ", ".join(f"{one.task} ({one.source})" for one in lessons)
            yield f"teacher   {teacher['path']} (SHA-256 {teacher['sha256'][:12]}): {taught}"
        yield (
            f"data      {len(data.train_loader)} batches of {run.train.batch_size} a rank, {len(data.val_loader)} to "
            f"validate, {run.data.size}"
        )
        yield f"recipe    {_recipe(run)}"
        counts = data.train_loader.batch_sampler.mixture.counts  # type: ignore[union-attr]
        for dataset, count in zip(data.train_datasets, counts, strict=True):
            learning = extending.train_tasks(run)
            taught = ", ".join(n for n, task in learning.items() if supervises(dataset, task, net.spaces[n])) or "none"
            yield f"train on  {dataset.name}: {len(dataset)} images, {count} drawn an epoch; teaches {taught}"
        unevaluated = list(run.tasks)
        for dataset in data.val_datasets:
            evaluated = [name for name, task in run.tasks.items() if supervises(dataset, task, net.spaces[name])]
            unevaluated = [name for name in unevaluated if name not in evaluated]
            yield f"eval on   {dataset.name}: {len(dataset)} images; judges {', '.join(evaluated) or 'none'}"
        if unevaluated:
            yield f"note      no validation data set has labels of {', '.join(unevaluated)}: trained, and not evaluated"
        for dataset in (*data.train_datasets, *data.val_datasets):
            yield from (f"note      {dataset.name}: {note}" for note in dataset.notes)
        reason = choose_workers(run.data.workers, num_processes_here())[1]
        yield f"loading   {data.train_loader.num_workers} workers ({reason})"
        yield (
            f"device    {self.ranks.device}, {self.ranks.world} process(es), "
            f"{chosen_precision(self.ranks.device, run.train.precision)}{' (auto)' * (run.train.precision == 'auto')}, "
            f"balance {run.balance.type}"
        )
        if len(self.learning) == 1 and (self.balancer.needs_parameters or self.balancer.needs_cut):
            yield f"note      one task is learned: balance {run.balance.type} has no gradients to compare"
        elif self.balancer.needs_parameters and not net.trunk.shared_maps:
            yield "note      no map is shared by all tasks: balance compares gradients on the shared parameters"
        if self.balancer.needs_parameters and not self.shared_parameters:
            yield f"note      no parameter is shared: balance {run.balance.type} leaves each task its own gradient"
        if run.train.accumulate > 1 and self.counts_predictions:
            yield "note      a loss is a mean over predictions of the whole step: one more forward pass a micro-batch"
        if resumed:
            yield f"resumed   at step {self.state.step}"
        yield from self.resume_lines
