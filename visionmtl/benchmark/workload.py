"""What is measured: the joint network as a run would train it, and random labelled images for it."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from visionmtl.balance.base import Balance
from visionmtl.balance.fixed import Fixed
from visionmtl.benchmark.measure import Work
from visionmtl.config.loader import ConfigError
from visionmtl.config.text_files import parse_yaml
from visionmtl.data.collate import pad
from visionmtl.data.prefetch import Prefetcher
from visionmtl.datasets.coco import COCO80
from visionmtl.engine.distributed import Ranks, choose_device
from visionmtl.engine.trainer import Trainer
from visionmtl.io.cityscapes import CITYSCAPES19
from visionmtl.modeling.sharing.hard import Hard
from visionmtl.network import MultiTaskNet, build_model
from visionmtl.ops.precision import DTYPES
from visionmtl.run import Run, load, restore
from visionmtl.structures import IGNORE, Batch, Boxes, LabelSpace, Maps, Sample

FIXED = Fixed()
TASKS = ("detection", "segmentation", "depth")
FIVE_TASKS = (*TASKS, "normals", "classification")
SPACES: dict[str, LabelSpace | None] = {  # by type of task
    "detection": COCO80, "segmentation": CITYSCAPES19, "depth": None, "normals": None, "classification": CITYSCAPES19,
}  # fmt: skip
Mode = Literal["eager", "compiled", "cuda_graph"]
COMPILE = {"eager": False, "compiled": True, "cuda_graph": "cuda_graph"}  # the values of train.compile
OPTIONS = {"model.encoder.name": "--encoder", "data.size": "--size", "train.batch_size": "--batch"}
"""Of the command line, by the setting that each stands for where there is no config."""


@dataclass(frozen=True)
class Workload:
    """80 detection classes, 19 segmentation classes and depth, with the settings that a config has by default.

    Balancing is also measured with five tasks: normals and 19 classes of whole images beside them.
    """

    encoder: str = "resnet50"
    batch: int = 16
    size: tuple[int, int] = (512, 512)  # (H, W) of the input
    boxes: int = 30  # mean number of boxes an image: 1 to 2 * boxes - 1, all equally likely
    precision: str | None = None  # fp32 or bf16; None: bf16 on CUDA devices, else fp32
    device: str = "auto"
    overrides: Sequence[str] = ()  # further settings of the run, as on train.py's command line
    of: Run | None = None  # the run of a config, which is measured instead, see `of_config`

    @classmethod
    def of_config(
        cls, file: Path, boxes: int, precision: str | None, device: str, overrides: Sequence[str]
    ) -> "Workload":
        """Network, losses, size and batch of a config; images, labels and label spaces stay those of the benchmark."""
        run = load(file, [*overrides, "train.compile=true"])  # `run` sets it; what only compiled steps use may be set
        if unknown := [name for name, task in run.tasks.items() if task.type not in SPACES]:
            raise ValueError(
                f"tasks.{unknown[0]} in {file} is of type {run.tasks[unknown[0]].type!r}, for which there are no "
                f"random labels; allowed are {', '.join(SPACES)}; leave it out by ~tasks.{unknown[0]}"
            )
        return cls(run.model.encoder.name, run.train.batch_size, run.data.size, boxes, precision, device, of=run)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of those that are measured together."""
        return tuple(self.of.tasks) if self.of else TASKS

    @property
    def on(self) -> torch.device:
        """The device that is measured."""
        return choose_device(self.device)

    @property
    def dtype(self) -> torch.dtype:
        """What autocast computes in."""
        return DTYPES[self._precision]

    @property
    def text(self) -> str:
        """Device, encoder, size and precision."""
        return f"{self.on}: {self.encoder}, {self.size[0]}x{self.size[1]}, {str(self.dtype).removeprefix('torch.')}"

    def autocast(self) -> Callable[[], torch.autocast]:
        """What makes the context of a forward pass; looked up once, for asking for the device takes its time."""
        return partial(torch.autocast, self.on.type, self.dtype, enabled=self.dtype != torch.float32)

    @property
    def _precision(self) -> str:
        return self.precision or ("bf16" if self.on.type == "cuda" else "fp32")

    def run(self, tasks: Sequence[str] | None = None, balance: Balance = FIXED, mode: Mode = "eager") -> Run:
        """The run of which a step is measured. Raises ValueError for overrides that no config could hold."""
        run = self.of or self._default_run()
        train = run.train.model_copy(update={"precision": self._precision, "compile": COMPILE[mode]})
        return self._of_tasks(run.model_copy(update={"train": train}), self.tasks if tasks is None else tasks, balance)

    def _default_run(self) -> Run:
        defaults = Run.model_validate({
            "model": {"encoder": {"name": "resnet50"}},
            "tasks": {name: {"type": name} for name in FIVE_TASKS},
            "data": {"train": [{"type": "scenes"}], "val": [{"type": "scenes"}], "size": list(self.size)},  # not read
            "optim": {"clip_norm": 10.0, "ema_decay": 0.998, "ema_every_steps": 5},
            "train": {"batch_size": self.batch, "compile": True},  # what only compiled steps use may be set
        }).model_dump(mode="json")  # fmt: skip
        run = restore(defaults, "the benchmark", [f"model.encoder.name={self.encoder}", *self.overrides])
        if {name: task.type for name, task in run.tasks.items()} != {name: name for name in FIVE_TASKS}:
            raise ValueError(
                f"--set makes the tasks {', '.join(f'{name} ({task.type})' for name, task in run.tasks.items())}; "
                f"without --config they are {', '.join(FIVE_TASKS)}, each of the type of its name; change their "
                "settings alone, or name a config"
            )
        return run

    @staticmethod
    def _of_tasks(run: Run, tasks: Sequence[str], balance: Balance) -> Run:
        """A network of one task has nothing to share, and some ways of sharing refuse it."""
        model = run.model.model_copy(update={"sharing": Hard()}) if len(tasks) == 1 else run.model
        learnt = {name: run.tasks[name] for name in tasks}
        return run.model_copy(update={"model": model, "tasks": learnt, "balance": balance})

    def net(self, tasks: Sequence[str] | None = None) -> MultiTaskNet:
        """The network of `run`, with the same random weights at each call, on the device."""
        run = self.run(tasks)
        torch.manual_seed(0)
        spaces = {name: SPACES[task.type] for name, task in run.tasks.items()}
        with self.told_by_options():
            net = build_model(run.model, run.tasks, spaces, self.size).to(self.on)
        return net.to(memory_format=torch.channels_last) if run.train.channels_last else net

    def trainer(self, tasks: Sequence[str] | None = None, balance: Balance = FIXED, mode: Mode = "eager") -> Trainer:
        """A training before its first step."""
        run, net = self.run(tasks, balance, mode), self.net(tasks)
        with self.told_by_options():
            return Trainer(run, net, Ranks(0, 1, self.on))

    @contextmanager
    def told_by_options(self) -> Iterator[None]:
        """Errors name the options that there are in place of settings."""
        try:
            yield
        except ValueError as error:
            if self.of or isinstance(error, ConfigError):
                raise
            text = str(error)
            for setting, option in OPTIONS.items():
                text = text.replace(setting, option)
            raise ValueError(text) from error

    def samples(self, boxes: int | None = None, seed: int = 0) -> list[Sample]:
        """As many random images as a batch has, each of the input's size. boxes: exactly so many in each."""
        rng = np.random.default_rng(seed)
        counts = rng.integers(1, 2 * self.boxes, self.batch) if boxes is None else [boxes] * self.batch
        return [_sample(rng, self.size, int(count)) for count in counts]

    def batch_of(self, samples: Sequence[Sample], tasks: Sequence[str] | None = None) -> Batch:
        """What the loader hands over: uint8 images, targets and colour matrices, pinned where there is a GPU."""
        run = self.run(tasks)
        image = pad([sample.image for sample in samples], self.size)
        targets = {name: task.collate(samples, self.size) for name, task in run.tasks.items()}
        labelled = {name: torch.ones(len(samples), dtype=torch.bool) for name in run.tasks}
        counts = {name: task.count(targets[name], self.size) for name, task in run.tasks.items()}
        batch = Batch(image, targets, labelled, counts, torch.eye(3, 4).repeat(len(samples), 1, 1))
        return batch.pin_memory() if self.on.type == "cuda" else batch


def check_counts(overrides: Sequence[str], instead: Mapping[str, str]) -> None:
    """Raises ValueError for an override that sets, or removes, what the benchmark replaces.

    instead: what to do, by each setting that is replaced
    """
    for override in overrides:
        for setting, advice in instead.items():
            if _sets(override, setting):
                raise ValueError(
                    f"--set {override} would have no effect, for the benchmark itself chooses {setting}; {advice}"
                )


def _sets(override: str, setting: str) -> bool:
    """Whether an override is of a setting, of something in it, or of a mapping that holds it."""
    path, _, value = override.removeprefix("~").partition("=")
    if not f"{setting}.".startswith(f"{path}."):
        return path.startswith(f"{setting}.")
    inside: Any = None if path == setting else parse_yaml(value, f"override {override}")[0]
    for key in setting[len(path) + 1 :].split(".") if path != setting and not override.startswith("~") else ():
        if not isinstance(inside, Mapping) or key not in inside:
            return False
        inside = inside[key]
    return True


def joint_step(trainer: Trainer, batch: Batch) -> Work:
    """The step of a training run; the next (pinned) batch is copied to the device beside it, as the loop does it."""
    prefetcher = Prefetcher(trainer.ranks.device)
    batches = prefetcher.groups(itertools.repeat(batch))

    def work() -> None:
        trainer.train_step(next(batches))
        prefetcher.prefetch()

    return work


def backward_and_step(net: nn.Module, device: torch.device) -> Callable[[Tensor], None]:
    """What trains a net by its loss: backward and AdamW. Moves the net to the device, in channels_last."""
    net.to(device).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)

    def step(loss: Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def mean_of_maps(maps: Maps) -> Tensor:
    """The loss of an encoder alone: the means of its maps from stride 4 on, added up."""
    return torch.stack([x.float().mean() for level, x in maps.items() if level >= 2]).sum()


def encoder_step(workload: Workload, mode: Mode = "eager") -> Work:
    """The encoder alone on a float image on the device; the loss is the mean of each map from stride 4 on."""
    torch.manual_seed(0)
    with workload.told_by_options():
        encoder = workload.run().model.encoder.build(workload.size, coarsest=5)
    step, autocast = backward_and_step(encoder, workload.on), workload.autocast()
    image = torch.randn(workload.batch, 3, *workload.size, device=workload.on)
    image = image.contiguous(memory_format=torch.channels_last)

    def loss() -> Tensor:
        with autocast():
            maps = encoder(image)
        return mean_of_maps(maps)

    if COMPILE[mode]:
        how = "reduce-overhead" if mode == "cuda_graph" else "default"
        loss = torch.compile(loss, fullgraph=True, dynamic=False, mode=how)

    def work() -> None:
        if mode == "cuda_graph":
            torch.compiler.cudagraph_mark_step_begin()
        step(loss())

    return work


def _sample(rng: np.random.Generator, size: tuple[int, int], num_boxes: int) -> Sample:
    """Boxes from 8 px to half the image, patches of classes and depths of 16 px, some of both missing."""
    sides = rng.uniform(8, max(9, min(size) / 2), (num_boxes, 2))
    low = rng.uniform(0, 1, (num_boxes, 2)) * (np.array(size[::-1]) - sides)
    boxes = Boxes(
        np.concatenate([low, low + sides], axis=1).astype(np.float32),
        rng.integers(0, len(COCO80.classes), num_boxes),
        np.zeros(num_boxes, np.bool_),
        sides.prod(axis=1).astype(np.float32),
    )

    def patches(values: Any, missing: float) -> Any:
        values[rng.uniform(size=values.shape) < 0.05] = missing
        return values.repeat(16, axis=0).repeat(16, axis=1)[: size[0], : size[1]]

    shape = -(-size[0] // 16), -(-size[1] // 16)
    normals = rng.normal(size=(*size, 3))
    return Sample(
        image=rng.integers(0, 256, (*size, 3), dtype=np.uint8),
        image_id="random",
        boxes=boxes,
        segmentation=patches(rng.integers(0, len(CITYSCAPES19.classes), shape), IGNORE).astype(np.uint8),
        depth_m=patches(rng.uniform(0.5, 9.5, shape), 0).astype(np.float32),
        normals=(normals / np.linalg.norm(normals, axis=2, keepdims=True)).astype(np.float32),
        image_labels=rng.integers(0, len(CITYSCAPES19.classes), 1),
    )
