"""A run as one frozen value, and its way from YAML files and overrides to that value and back."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError
from typing_extensions import Self

from visionmtl.balance.base import Balance
from visionmtl.balance.fixed import Fixed
from visionmtl.config import durations, loader
from visionmtl.config.imports import foreign_settings
from visionmtl.config.loader import ConfigError, KeyPath, Tree, dotted
from visionmtl.config.registry import PYDANTIC_ERRORS, EachOnce, Size, Spec
from visionmtl.config.suggest import did_you_mean, settings_called
from visionmtl.config.text_files import check_plain, shown, texts_in
from visionmtl.data.loader import Data
from visionmtl.network import Model
from visionmtl.ops.precision import Precision
from visionmtl.structures import has_controls
from visionmtl.tasks.base import Task
from visionmtl.transfer.base import Extend
from visionmtl.transfer.distillation import Distill

_CheckedSpec = TypeVar("_CheckedSpec", bound=Spec)


LoggerName = Literal["tensorboard", "wandb", "mlflow"]
Schedule = Literal["cosine", "poly", "step", "constant"]

_ONLY_WITH = {  # setting -> (the field it depends on, the values under which it does something)
    "betas": ("name", ("adamw",)),
    "momentum": ("name", ("sgd",)),
    "nesterov": ("name", ("sgd",)),
    "min_lr_factor": ("schedule", ("cosine", "poly")),
    "power": ("schedule", ("poly",)),
    "milestones": ("schedule", ("step",)),
    "gamma": ("schedule", ("step",)),
}


class Optim(Spec):
    """Optimiser, schedule and moving average. None means the default named beside the field, where it applies."""

    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(2e-4, gt=0)
    weight_decay: float = Field(
        0.05, ge=0, description="not applied to biases, norms, gains, and what timm exempts in its models"
    )
    betas: tuple[float, float] | None = Field(None, description="adamw; (0.9, 0.999)")
    momentum: float | None = Field(None, ge=0, lt=1, description="sgd; 0.9")
    nesterov: bool | None = Field(None, description="sgd; true")
    encoder_lr_factor: float = Field(1.0, gt=0, description="learning rate of the encoder as a multiple of `lr`")
    layer_decay: float | None = Field(
        None, gt=0, lt=1, description="each encoder layer learns this much slower than the next"
    )
    clip_norm: float | None = Field(None, gt=0, description="largest L2 norm of all gradients together")
    schedule: Schedule = "cosine"
    warmup_steps: int | None = Field(None, ge=1, description="linear from lr / warmup_steps")
    warmup_epochs: float | None = Field(None, gt=0)
    min_lr_factor: float | None = Field(None, ge=0, lt=1, description="cosine, poly; 0: where the schedule ends")
    power: float | None = Field(None, gt=0, description="poly; 0.9")
    milestones: tuple[float, ...] | None = Field(
        None, description="step; (2/3, 11/12): fractions of the run where lr drops"
    )
    gamma: float | None = Field(None, gt=0, lt=1, description="step; 0.1: factor of each drop")
    ema_decay: float | None = Field(None, gt=0, lt=1, description="evaluate and keep a moving average of the weights")
    ema_every_steps: int | None = Field(
        None, ge=1, description="ema_decay; 1: the average takes so many steps at once, which saves time"
    )

    @model_validator(mode="after")
    def _every_setting_has_an_effect(self) -> Self:
        for setting, (decider, values) in _ONLY_WITH.items():
            if getattr(self, setting) is not None and (found := getattr(self, decider)) not in values:
                raise ValueError(
                    f"{setting} is set but does nothing under {decider}: {found}; it belongs to {decider}: "
                    f"{' or '.join(values)}; remove {setting} or change {decider}"
                )
        if self.warmup_steps is not None and self.warmup_epochs is not None:
            raise ValueError("warmup_steps and warmup_epochs are both set; one of them decides; remove the other")
        if self.ema_every_steps and not self.ema_decay:
            raise ValueError(
                "ema_every_steps is set, but without ema_decay there is no average; set it, or remove both"
            )
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs momentum > 0, found momentum: 0; raise momentum or remove nesterov")
        if self.betas is not None and not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {self.betas}; each must lie in [0, 1); the usual pair is [0.9, 0.999]")
        if self.milestones is not None:
            inside = all(0 < fraction < 1 for fraction in self.milestones)
            if not inside or sorted(set(self.milestones)) != list(self.milestones):
                raise ValueError(
                    f"milestones are {self.milestones}; allowed are rising fractions of the run between 0 and 1; "
                    "write for instance [0.67, 0.92]"
                )
        return self


class Distributed(Spec):
    """How the processes of a run work together; with one of them none of it matters, and it changes no result."""

    former: ClassVar = {"static_graph": False, "bucket_mb": None}

    timeout_s: float = Field(600.0, gt=0, description="how long a process waits for the others before the run fails")
    shard: bool = Field(
        False, description="each process keeps a share of weights, gradients and moments (FSDP2), for large encoders"
    )


class TaskEpochs(Spec):
    """When one task is taught, in epochs counted from 0; what is unset has no effect."""

    start_epoch: int | None = Field(None, ge=1, description="before it, the task teaches nothing")
    stop_epoch: int | None = Field(None, ge=1, description="from it on, the task teaches nothing")
    freeze_epoch: int | None = Field(
        None, ge=1, description="from it on, its decoder stays as it is, and its loss still teaches what is shared"
    )

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        in_order = ("start_epoch", "freeze_epoch", "stop_epoch")
        known = {name: epoch for name in in_order if (epoch := getattr(self, name)) is not None}
        if not known:
            raise ValueError("no epoch is set; set start_epoch, freeze_epoch or stop_epoch, or remove the task here")
        if list(known.values()) != sorted(set(known.values())):
            raise ValueError(
                f"{', '.join(f'{name} is {epoch}' for name, epoch in known.items())}; a task starts, then freezes, "
                "then stops, each in a later epoch; correct the epochs"
            )
        return self

    def teaches(self, epoch: int) -> bool:
        """Whether the task has a loss in an epoch."""
        return (self.start_epoch or 0) <= epoch and (self.stop_epoch is None or epoch < self.stop_epoch)

    def freezes(self, epoch: int) -> bool:
        """Whether its decoder is frozen in an epoch."""
        return self.freeze_epoch is not None and epoch >= self.freeze_epoch


class EasiestFirst(Spec):
    """All tasks for some epochs, which measure learning progress; then the easiest alone, and one more at a time.

    Progress is the relative fall of a task's loss from the first to the second half of the measured epochs (learning
    progress as in Graves et al. 2017, arXiv:1704.03003, sec. 3.2; one order for the whole run, as in Pentina et al.
    2015, arXiv:1412.1353).
    """

    measure_epochs: int = Field(1, ge=1)
    every_epochs: int = Field(1, ge=1, description="how long until the next task joins")


class SmallerImages(Spec):
    """A stage of progressive resolution."""

    epochs: int = Field(ge=1)
    size: Size
    """(H, W) of the network's input in these epochs, pixels, in the proportions of `data.size`."""


class Curriculum(Spec):
    """Which tasks are taught when, and at which size. The number of steps and of images stays."""

    tasks: dict[str, TaskEpochs] = {}
    easiest_first: EasiestFirst | None = None
    smaller_first: tuple[SmallerImages, ...] = ()
    """Stages at smaller sizes, growing; the epochs after them are at `data.size`. Depth is scaled, for what looks
    smaller is taken for farther."""

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if self.tasks and self.easiest_first:
            raise ValueError(
                "`tasks` and `easiest_first` are both set; one of them decides which tasks are taught; remove one"
            )
        if not (self.tasks or self.easiest_first or self.smaller_first):
            raise ValueError(
                "none of `tasks`, `easiest_first` and `smaller_first` is set; a curriculum has one or more; set one, "
                "or remove it"
            )
        return self

    def size(self, epoch: int) -> tuple[int, int] | None:
        """(H, W) of the input in an epoch; None: `data.size`."""
        for stage in self.smaller_first:
            if epoch < stage.epochs:
                return stage.size
            epoch -= stage.epochs
        return None

    def problem(self, tasks: Sequence[str], epochs: int, size: tuple[int, int]) -> str | None:
        """What does not fit a run of these tasks, epochs and `data.size`; None: nothing."""
        sizes = [*(stage.size for stage in self.smaller_first), size]
        for (h, w), (next_h, next_w) in pairwise(sizes):
            if h >= next_h or h * size[1] != w * size[0]:
                return (
                    f"has smaller_first with {h}x{w} before {next_h}x{next_w}; sizes grow in the proportions of "
                    f"data.size {size[0]}x{size[1]}; correct it"
                )
        if (staged := sum(stage.epochs for stage in self.smaller_first)) >= epochs and staged:
            return (
                f"has {staged} epochs of smaller_first, but train.epochs is {epochs}; one or more must be left at "
                "data.size; lower them, or raise train.epochs"
            )
        if unknown := [name for name in self.tasks if name not in tasks]:
            near = did_you_mean(unknown[0], tasks)
            return f"names {unknown[0]!r}{near}; the tasks are {', '.join(tasks)}; correct it"
        for name, when in self.tasks.items():
            for setting, epoch in when:
                if epoch is not None and epoch >= epochs:
                    return (
                        f"has tasks.{name}.{setting} {epoch}, but epochs are 0 to {epochs - 1}, so it would have no "
                        "effect or teach nothing; lower it, or raise train.epochs"
                    )
        for epoch in range(epochs if self.tasks else 0):
            if not any(name not in self.tasks or self.tasks[name].teaches(epoch) for name in tasks):
                return f"teaches no task in epoch {epoch}; one or more are needed in each; correct the epochs"
        if order := self.easiest_first:
            needed = order.measure_epochs + order.every_epochs * (len(tasks) - 1) + 1
            if len(tasks) < 2:
                return "orders tasks by easiest_first, but there is one task; two or more are needed; remove it"
            if needed > epochs:
                return (
                    f"needs {needed} epochs until {len(tasks)} tasks are taught together for one, and train.epochs is "
                    f"{epochs}; lower measure_epochs or every_epochs, or raise train.epochs"
                )
        return None


class NotFinitePolicy(Spec):
    """What becomes of a step whose loss or gradient is infinite or not a number. It never changes weights or state."""

    policy: Literal["raise", "skip", "capture"] = Field(
        "raise",
        description="raise: the run ends at the next logged step; skip: it goes on, up to the limits below; capture: "
        "it ends at once and keeps the step for `visionmtl replay`, for which each step waits for the device and a "
        "copy of weights and moments is kept on it",
    )
    max_in_a_row: int | None = Field(None, ge=1, description="skip; 10: with more such steps in a row the run ends")
    max_share: float | None = Field(
        None, gt=0, lt=1, description="skip; 0.01: with more than this share of all steps the run ends"
    )

    @property
    def longest_row(self) -> int:
        """Steps in a row that may be skipped."""
        return self.max_in_a_row or 10

    @property
    def largest_share(self) -> float:
        """Of all steps, which may be skipped; as many as may follow each other always may."""
        return self.max_share or 0.01

    @model_validator(mode="after")
    def _every_setting_has_an_effect(self) -> Self:
        for name in ("max_in_a_row", "max_share"):
            if self.policy != "skip" and getattr(self, name) is not None:
                raise ValueError(
                    f"{name} is set but does nothing under policy: {self.policy}; it belongs to policy: skip; remove "
                    f"{name} or change policy"
                )
        return self


_EARLIER_ACTIVATION_MEMORY = (0.95,)
"""Defaults that runs saved by earlier versions have written out."""


class Train(Spec):
    """The loop: how long, how much at once, in which precision, and what is kept."""

    epochs: int = Field(12, ge=1)
    batch_size: int = Field(8, ge=1, description="images of one process in one forward pass")
    accumulate: int = Field(1, ge=1)
    """Forward and backward passes before one optimiser step. A loss is divided by the labelled items of all of them, so
    that gradients add up to those of one large batch."""
    precision: Precision = "auto"
    """auto: bf16 on GPUs that have it and on CPUs with AMX, else fp32; the log says which."""
    channels_last: bool = True
    compile: bool | Literal["cuda_graph"] = Field(
        False, description="one graph of fused kernels; cuda_graph: recorded and replayed, for small batches"
    )
    activation_memory: float = Field(
        0.985, gt=0, le=1, description="share of activations that compiled steps keep; the cheapest are computed again"
    )
    """torch's memory budget. Just below 1 it gives up what costs one pass, such as ReLU. A step with ResNet-50, 16
    images of 512x512 and three tasks on one H200: 0.95 takes 3.8 GiB, 1 takes 5.4 and 1.1 ms less."""
    sync_batchnorm: bool = Field(
        False, description="every BatchNorm takes its statistics over the images of all processes"
    )
    distributed: Distributed = Distributed()
    deterministic: bool = Field(False, description="the same numbers twice, at some cost of speed")
    eval_every_epochs: int = Field(1, ge=1, description="the last epoch is evaluated in any case")
    log_every_steps: int = Field(20, ge=1)
    checkpoint_every: Annotated[int, Field(strict=True, ge=1)] | str | None = Field(
        "10m", description="within an epoch, too: every so many optimiser steps, or every 90s, 10m, 2h (last.pt alone)"
    )
    checkpoint_every_epochs: int = Field(1, ge=1)
    keep: int = Field(1, ge=0, description="checkpoints by step beside last and best")
    best: str = Field("mean", description="which checkpoint is best: 'mean' over tasks, or by 'task[@data set]/metric'")
    sample_pictures: int = Field(4, ge=0, description="validation images drawn for the loggers at each evaluation")
    loggers: Annotated[tuple[LoggerName, ...], EachOnce] = Field(
        ("tensorboard",), description="where numbers and pictures can be watched; wandb and mlflow are extras"
    )
    curriculum: Curriculum | None = Field(None, description="which tasks are taught when; unset: all, always")
    not_finite: NotFinitePolicy = NotFinitePolicy()

    @field_validator("checkpoint_every", mode="before")
    @classmethod
    def _steps_or_a_time(cls, value: Any) -> Any:
        if isinstance(value, str):
            try:
                too_short = durations.seconds(value) == 0
            except ValueError:
                too_short = True
            if too_short:
                raise ValueError(
                    f"checkpoint_every is {value!r}; allowed are a number of optimiser steps, a time with its unit as "
                    "90s, 10m or 2h, and null for ends of epochs alone; correct it"
                )
        return value

    @model_validator(mode="after")
    def _memory_is_the_compilers(self) -> Self:
        defaults = (type(self).model_fields["activation_memory"].default, *_EARLIER_ACTIVATION_MEMORY)
        if not self.compile and self.activation_memory not in defaults:
            raise ValueError(
                f"activation_memory is {self.activation_memory}, but compile is false, so it would have no effect: "
                "eager steps keep everything; remove it, or set compile: true"
            )
        return self


class Run(Spec):
    """Everything that decides a run's numbers."""

    seed: int = Field(0, ge=0, lt=2**63)
    output: str | None = Field(None, description="run directory; None: runs/<name of the config>")
    model: Model
    tasks: dict[str, Task]
    balance: Balance = Fixed()
    distill: Distill | None = Field(None, description="teachers whose outputs are targets beside the labels")
    extend: Extend | None = Field(None, description="a trained network that the run adds tasks to, and how")
    data: Data
    optim: Optim = Optim()
    train: Train = Train()

    @property
    def folder(self) -> Path:
        """The run directory."""
        return Path(self.output or "runs/unnamed")

    @property
    def is_taught(self) -> bool:
        """Whether networks teach beside the labels, so that data sets without any may be among the training data."""
        return self.distill is not None or self.extend is not None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if not self.tasks:
            raise _problem_at(("tasks",), "no tasks; a run learns one or more; add one under `tasks`")
        for name in self.tasks:
            if not re.fullmatch(r"[A-Za-z_]\w*", name):
                text = "task names are letters, digits and _, not starting with a digit; rename it"
                raise _problem_at(("tasks", name), text)
        try:  # here, where all else is right: it imports timm, for which a misspelt setting should not wait
            self.model.encoder.check_name()
        except ValueError as error:
            raise _problem_at(("model", "encoder", "name"), str(error)) from None
        for name, settings in self.tasks.items():
            if problem := settings.size_problem(self.data.size):
                raise _problem_at(("tasks", name), problem)
        channels, augment = self.model.encoder.in_chans, self.data.augment
        if channels != 3 and (augment.colors or augment.pipeline):
            text = (
                "changes colours of RGB (brightness, contrast, saturation, hue_turns, grey or pipeline), and images "
                f"have {channels} channels, whose colours nobody knows; set those to 0 and leave `pipeline` out"
            )
            raise _problem_at(("data", "augment"), text)
        idle = augment.without_effect({task.field for task in self.tasks.values()})
        if idle and self.extend is None:  # an extended run has more tasks than its config
            name, needed = next(iter(idle.items()))
            text = f"is set, but no task learns {needed}, so it would have no effect; remove it, or add such a task"
            raise _problem_at(("data", "augment", name), text)
        curriculum = self.train.curriculum
        if curriculum and (problem := curriculum.problem(list(self.tasks), self.train.epochs, self.data.size)):
            raise _problem_at(("train", "curriculum"), problem)
        if curriculum and self.is_taught:
            text = "says which labels teach when, and extend or distill add others; they do not go together; choose one"
            raise _problem_at(("train", "curriculum"), text)
        if curriculum and self.train.distributed.shard:
            text = "holds decoders still, which train.distributed.shard cannot; choose one of the two"
            raise _problem_at(("train", "curriculum"), text)
        if self.distill is not None and augment.place == "random":
            text = (
                "is random, but distill learns from what lies at the top left of the network's input; corner is "
                "allowed; remove one of the two"
            )
            raise _problem_at(("data", "augment", "place"), text)
        if self.train.not_finite.policy == "capture" and (self.extend or self.distill or self.train.distributed.shard):
            text = (
                "is capture, and a captured step holds neither teachers (distill), nor an older network (extend), nor "
                "shares of weights (train.distributed.shard), so it could not be replayed; choose raise or skip"
            )
            raise _problem_at(("train", "not_finite", "policy"), text)
        if self.distill is not None:
            try:
                self.distill.check(self.tasks)
            except ValueError as error:
                raise _problem_at(("distill",), str(error)) from None
        best, task = self.train.best, re.split("[/@]", self.train.best)[0]
        if best != "mean" and ("/" not in best or task not in self.tasks):
            text = (
                f"found {best!r}{did_you_mean(task, self.tasks)}; allowed are mean and TASK[@DATASET]/METRIC "
                f"with a task of this run ({', '.join(self.tasks)}); correct it"
            )
            raise _problem_at(("train", "best"), text)
        return self


def _problem_at(keys: KeyPath, text: str) -> ValidationError:
    kind = PydanticCustomError("run", "{text}", {"text": text})
    return ValidationError.from_exception_data("Run", [InitErrorDetails(type=kind, loc=keys, input=None)])


@dataclass(frozen=True)
class Loaded:
    """A run and the tree it was read from, which knows every value's origin."""

    run: Run
    tree: Tree


def load(path: str | Path, overrides: Sequence[str] = (), split: str | None = None) -> Run:
    """The run of a config file (see `loader.read`) with overrides. Raises ConfigError listing every problem.

    split: of all validation data sets, in place of their own
    """
    return read(path, overrides, split).run


def load_recorded(folder: Path) -> Run:
    """The run that a run directory keeps in config.yaml: whoever wrote it, modules are imported as `restore` does."""
    return read_recorded(folder).run


def read_recorded(folder: Path, overrides: Sequence[str] = ()) -> Loaded:
    """As `load_recorded`, with overrides and the origins."""
    file = folder / "config.yaml"
    with foreign_settings(str(file)):
        return read(file, overrides)


def read(path: str | Path, overrides: Sequence[str] = (), split: str | None = None) -> Loaded:
    """As `load`, with the origins."""
    tree = loader.read(path, overrides)
    _choose_split(tree, split)
    return Loaded(checked(Run, tree.resolved(), tree, path), tree)


def _choose_split(tree: Tree, split: str | None) -> None:
    if split is not None:
        val = tree.resolved("data").get("val")
        for number in range(len(val) if isinstance(val, list) else 0):  # what is no list, validation will tell
            tree.override(f"data.val.{number}.split={split}")


def restore(plain: dict[str, Any], origin: str, overrides: Sequence[str] = (), split: str | None = None) -> Run:
    """The run that a checkpoint holds as plain data, with overrides. Raises ConfigError listing every problem.

    origin: the checkpoint, for messages. A new data.root moves every path that lies in the old one.
    What the checkpoint holds is taken as it is: no reference in it is followed, no variable of the environment is read,
    and a module is imported only where the user allowed it by name (see `config.imports`).
    """
    _check_saved(plain, origin)
    if not plain["train"].get("compile"):  # where it does nothing, and what was saved may be a former default
        plain = {**plain, "train": {k: v for k, v in plain["train"].items() if k != "activation_memory"}}
    # whatever the value of a former setting, it changed no result
    data, distributed = _without_former(Data, plain["data"]), plain["train"].get("distributed", {})
    distributed = _without_former(Distributed, distributed) if isinstance(distributed, dict) else distributed
    train = {**plain["train"], "distributed": distributed}
    tree = Tree({**plain, "data": data, "train": train}, {(): origin})
    before = plain["data"].get("root")
    for override in overrides:
        tree.override(override)
    _choose_split(tree, split)
    settings = tree.resolved()
    after = settings["data"].get("root") if isinstance(settings.get("data"), dict) else None
    if isinstance(before, str) and isinstance(after, str) and before and after and before != after:
        settings["data"] = moved(settings["data"], before, after)
    with foreign_settings(origin):
        return checked(Run, settings, tree, origin)


def _check_saved(plain: Mapping[str, Any], origin: str) -> None:
    """Raises ConfigError for saved settings that no run of ours has: these are plain data without references."""
    try:
        check_plain(plain, origin)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    for section in ("model", "tasks", "data", "train"):
        if not isinstance(plain.get(section), dict):
            raise ConfigError(
                f"{origin} has no settings {section!r}; a run has a mapping there; use a file that visionmtl wrote"
            )
    if controls := [text for text in texts_in(plain) if has_controls(text)]:
        raise ConfigError(
            f"{origin} holds the setting {shown(controls[0])}; settings have no control characters, which "
            "terminals obey; use a file that visionmtl wrote"
        )
    if "${" in (text := next((text for text in texts_in(plain) if "${" in text), "")):
        raise ConfigError(
            f"{origin} holds the setting {shown(text)}; saved settings have no references ${{...}}, and none is "
            "followed there; use a file that visionmtl wrote, or give the value as an override"
        )


def _without_former(spec: type[Spec], plain: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in plain.items() if name not in spec.former}


def moved(value: Any, before: str, after: str) -> Any:
    """The same nested value, paths in folder `before` now lying in `after`."""
    if isinstance(value, dict):
        return {key: moved(inner, before, after) for key, inner in value.items()}
    if isinstance(value, list):
        return [moved(inner, before, after) for inner in value]
    inside = isinstance(value, str) and (value == before or value.startswith(before.rstrip("/") + "/"))
    return after + value[len(before) :] if inside else value


class _DataAlone(Spec, extra="ignore"):
    data: Data


def load_data(path: str | Path, overrides: Sequence[str] = ()) -> Data:
    """`data` of a config file alone; the rest of it may be missing or not fit. Raises ConfigError like `load`."""
    tree = loader.read(path, overrides)
    values = {name: value for name, value in tree.values.items() if name == "data"}
    if isinstance(values.get("data"), dict):
        values["data"] = tree.resolved("data")
    return checked(_DataAlone, values, tree, path).data


class _TasksAlone(Spec, extra="ignore"):
    tasks: dict[str, Task] = {}


def load_union_tasks(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Task]:
    """The tasks of a config file that set `classes`; the rest of it may be missing or not fit. Raises ConfigError."""
    tree = loader.read(path, overrides)
    tasks = tree.values.get("tasks")
    given = tasks.items() if isinstance(tasks, dict) else ()
    names = [str(name) for name, task in given if isinstance(task, dict) and task.get("classes")]
    values = {"tasks": {name: tree.resolved("tasks")[name] for name in names}}
    return checked(_TasksAlone, values, tree, path).tasks


def checked(kind: type[_CheckedSpec], values: dict[str, Any], tree: Tree, path: str | Path) -> _CheckedSpec:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        details: dict[KeyPath, Any] = {}  # a setting that may be of several types has a detail for each
        for detail in error.errors():
            place = _place(detail["loc"], values)
            if place in details and detail["type"] in PYDANTIC_ERRORS:
                detail["msg"] = f"{details[place]['msg']}, or {detail['msg'][0].lower()}{detail['msg'][1:]}"
            details[place] = {**detail, "loc": place}
        problems = [_problem(detail, tree) for detail in details.values()]
        several = f"{len(problems)} problems in {path}:\n  " if len(problems) > 1 else ""
        raise ConfigError(several + "\n  ".join(problems)) from None


def _place(keys: tuple[str | int, ...], values: Any) -> KeyPath:
    """The setting that keys lead to; pydantic adds the name of the type that it tried."""
    place: KeyPath = ()
    for key in keys:
        if isinstance(values, dict) and isinstance(key, str):
            values = values.get(key)
        elif isinstance(values, list | tuple) and isinstance(key, int):
            values = values[key] if key < len(values) else None
        else:
            break
        place = (*place, key)
    return place


def _problem(detail: Any, tree: Tree) -> str:
    keys: tuple[str | int, ...] = detail["loc"]
    text = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "missing":
        text = f"missing; it must be given; add {dotted(keys)}: VALUE"
    elif detail["type"] in PYDANTIC_ERRORS - {"value_error"}:
        found = detail["input"]
        kept = isinstance(found, str | int | float | bool | None)
        value = (repr(found) if isinstance(found, str) else shown(found)) if kept else f"a {type(found).__name__}"
        text = f"found {value[:200]}; {text[0].lower()}{text[1:]}; correct the value"
    elif ";" not in text:  # pydantic's own, of types that it does not list
        text = f"found {shown(detail['input'], 100)}; {text[0].lower()}{text[1:]}; correct the value"
    elif detail["type"] == "unknown_field" and "did you mean" not in text:
        elsewhere = settings_called(str(keys[-1]))
        text += f"; did you mean {' or '.join(elsewhere)}?" if elsewhere else ""
    return f"{dotted(keys) or 'config'}: {text} (from {tree.origin(keys)})"


def dump(run: Run) -> str:
    """The run as YAML with every default written out; `load` of it gives the same run."""
    return yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def print_config(loaded: Loaded) -> str:
    """`dump` with a comment behind every value that says where it came from."""
    lines = _commented(loaded.run.model_dump(mode="json"), (), loaded.tree)
    width = min(60, max(len(text) for text, _ in lines))
    return "\n".join(f"{text:<{width}}  # {origin}" if origin else text for text, origin in lines) + "\n"


def _commented(value: Any, keys: KeyPath, tree: Tree) -> list[tuple[str, str]]:
    lines: list[tuple[str, str]] = []
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        at = (*keys, key)
        indent = "  " * len(keys)
        head = f"{indent}{key}:" if isinstance(value, dict) else f"{indent}-"
        specs = isinstance(inner, list) and any(isinstance(one, dict) for one in inner)
        if specs or (isinstance(inner, dict) and inner):
            lines += [(head, ""), *_commented(inner, at, tree)]
        else:
            text = yaml.safe_dump(inner, default_flow_style=True, width=math.inf, allow_unicode=True)
            lines.append((f"{head} {text.removesuffix('...' + chr(10)).strip()}", tree.written(at) or "default"))
    return lines


def schema() -> dict[str, Any]:
    """JSON schema of config files, for editors. A file may hold any part of a run, so nothing is required."""
    plain = _without_required(Run.model_json_schema())
    texts = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
    base = {**texts, "description": "files to build on, relative to this one; later ones win"}
    remove = {**texts, "description": "dotted paths of what is not wanted of the bases"}
    plain["properties"] = {"base": base, "remove": remove, **plain["properties"]}
    comment = "generated: python -m visionmtl.run > configs/schema.json; do not edit"
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$comment": comment, **plain}


def _without_required(node: Any) -> Any:
    if isinstance(node, dict):
        return {
            key: _without_required(value)
            for key, value in node.items()
            if not (key == "required" and isinstance(value, list))
        }
    return [_without_required(value) for value in node] if isinstance(node, list) else node


if __name__ == "__main__":  # python -m visionmtl.run > configs/schema.json
    print(json.dumps(schema(), indent=1))
