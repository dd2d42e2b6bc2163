"""From a trained network to one with more tasks: old weights, what stays of them, and what holds the rest."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from visionmtl.config.loader import dotted
from visionmtl.data.label_spaces import align
from visionmtl.data.loader import train_loader
from visionmtl.datasets import open_datasets
from visionmtl.engine import checkpoint
from visionmtl.io.download import sha256
from visionmtl.io.tensor_files import READING_FAILS, read_archive, write_archive
from visionmtl.modeling.sharing.lora_branch import LoRABranch
from visionmtl.network import LossNet, Model, MultiTaskNet
from visionmtl.ops.ranks import step_totals
from visionmtl.run import Optim, Run, restore
from visionmtl.structures import LabelSpace
from visionmtl.tasks.base import Task
from visionmtl.transfer.base import Extend
from visionmtl.transfer.distillation import Distill
from visionmtl.transfer.ewc import EWC, ElasticPenalty, normalised

NUM_FISHER_IMAGES = 200


def extended(run: Run) -> Run:
    """The run with the old tasks in front of its own, the old network's settings, and what teaches the old tasks.

    The same where that is done already. Raises ValueError where the run's settings contradict the checkpoint's.
    """
    if run.extend is None:
        return run
    path, saved = _load(run.extend)
    before = restore(saved["run"], str(path))
    new = [name for name in run.tasks if name not in before.tasks]
    model = run.extend.model(before.model, list(before.tasks), new)
    if _plain(run.model) not in (_plain(before.model), _plain(model)):
        raise ValueError(
            f"the run's model is not that of {path}: {_difference(_plain(run.model), _plain(before.model))}; a network "
            "is extended as it is; take over its model, or train a new one"
        )
    if run.data.size != before.data.size:
        raise ValueError(
            f"data.size is {run.data.size}, but {path} was trained at {before.data.size}; a network is extended at its "
            "own size; set data.size to it"
        )
    if not new:
        raise ValueError(
            f"extend.checkpoint {path} has all tasks of the run ({', '.join(run.tasks)}); new ones are needed; add one "
            "under `tasks`, or go on with --init-from"
        )
    _check_levels(before, run, path)
    tasks = before.tasks | run.tasks  # settings that the run gives an old task anew must fit its weights
    distill = _with(run.distill, run.extend.distill(list(before.tasks)))
    update = {"model": model, "tasks": tasks, "distill": distill}
    try:  # validated anew: names and settings must fit together
        return Run.model_validate({**run.model_dump(), **{name: _dump(value) for name, value in update.items()}})
    except ValidationError as error:
        said = [f"{dotted(detail['loc'])} {detail['msg']}" for detail in error.errors(include_url=False)]
        raise ValueError(f"with the old network of {path}: {'; '.join(said)}") from None


def train_tasks(run: Run) -> dict[str, Task]:
    """The tasks as training data teach them: the old ones learn from no data set, unless the method says so."""
    if run.extend is None or run.extend.old_labels:
        return run.tasks
    old = _load(run.extend)[1]["run"]["tasks"]
    return {n: task.model_copy(update={"learns_from": ()}) if n in old else task for n, task in run.tasks.items()}


def old_spaces(run: Run) -> dict[str, LabelSpace | None]:
    """The classes of the old tasks; nothing where the run extends no network."""
    if run.extend is None:
        return {}
    return _spaces(_load(run.extend)[1])


@dataclass
class Extension:
    """A network that holds the old weights, with what is frozen."""

    spec: Extend
    path: Path
    sha256: str
    old: list[str]  # tasks
    learning: list[str]  # tasks that have a loss
    weights: set[str]  # names of the old network's tensors
    fresh: list[str]  # tensors of the trunk that the old network does not have
    num_kept: int = 0  # parameters that stay
    penalty: ElasticPenalty | None = None

    def outputs(self, net: MultiTaskNet, image: Tensor) -> Any:
        """All that a training step takes losses of."""
        raw, initial = net.with_initial(image)
        return [(raw[name], initial.get(name, ())) for name in self.learning]

    def settle(self, net: MultiTaskNet) -> None:
        """Once what nothing teaches is frozen: let its statistics stay too, and hold the rest where that is the way."""
        net.freeze_modules()
        self.num_kept = sum(parameter.numel() for parameter in net.parameters() if not parameter.requires_grad)
        if isinstance(self.spec, EWC):
            held = ((f"trunk.{name}", p) for name, p in net.trunk.named_parameters() if p.requires_grad)
            self.penalty = ElasticPenalty((pair for pair in held if pair[0] in self.weights), self.spec.strength)

    def record(self) -> dict[str, str]:
        """For checkpoints."""
        return {"path": str(self.path), "sha256": self.sha256}

    def prepare(self, net: MultiTaskNet, optim: Optim, folder: Path | None) -> None:
        """What has to be measured before the first step; folder: where to leave it as a file, None: nowhere."""
        if self.penalty is None:
            return
        assert isinstance(self.spec, EWC)
        fisher = measure_fisher(self.spec, net)
        largest = max(float(value.max()) for value in fisher.values())
        # gradient descent on a parabola of curvature c diverges where rate * c > 2; AdamW bounds its steps
        if optim.name == "sgd" and (stable := 2 / (optim.lr * largest)) < self.spec.strength:
            raise ValueError(
                f"extend.strength is {self.spec.strength:g}, and the most important weight counts {largest:.3g} times "
                f"the mean one: under sgd with lr {optim.lr:g} the penalty diverges above {stable:.2g}; lower "
                "extend.strength or optim.lr, or set optim.name=adamw"
            )
        self.penalty.set_fisher(fisher)
        if folder is not None:
            write_archive(folder / "fisher.pt", {name: value.cpu() for name, value in fisher.items()})

    def state_dict(self) -> dict[str, Any]:
        """The old network's file, and what was measured of it."""
        return {**self.record(), "fisher": self.penalty.state_dict() if self.penalty else {}}

    def load_state_dict(self, saved: Mapping[str, Any] | None, path: Path) -> None:
        """Undo `state_dict`. Raises ValueError where a run would go on from another old network than it began with."""
        if saved is None or saved["sha256"] != self.sha256:
            raise ValueError(
                f"{path} extends {saved['path'] if saved else 'no network'}, and this run {self.path}, another file; a "
                "resumed run needs the same; set extend.checkpoint to it"
            )
        if self.penalty is not None:
            self.penalty.set_fisher(saved["fisher"])

    def line(self) -> str:
        """For the log."""
        fresh = f"; new in the trunk: {len(self.fresh)} tensors, {self.fresh[0]}" if self.fresh else ""
        return (
            f"{self.path} (SHA-256 {self.sha256[:12]}) by {self.spec.type}: {', '.join(self.old)} are old, "
            f"{self.num_kept / 1e6:.2f} M parameters stay{fresh}"
        )


def open_extension(run: Run, net: MultiTaskNet) -> Extension:
    """Load the old weights into a network of the extended run, and freeze what stays.

    Raises ValueError where they do not fit.
    """
    assert run.extend is not None
    path, saved = _load(run.extend)
    old = list(saved["run"]["tasks"])
    missing = [name for name in old if name not in net.tasks]
    assert not missing, "`extended` comes first"
    checkpoint.check_classes(saved["spaces"], {name: s and s.plain() for name, s in net.spaces.items()}, path)
    weights = run.extend.weights(checkpoint.best_weights(saved), net)
    fresh = _load_old(net, weights, [name for name in net.tasks if name not in old], path)

    for module in run.extend.kept(net, old):
        module.requires_grad_(False)
    for name, parameter in net.named_parameters():
        if name not in weights:
            parameter.requires_grad_(True)
    if isinstance(run.extend, EWC) and run.train.distributed.shard:
        raise ValueError("extend.type is ewc, which does not go with train.distributed.shard; set it to false")
    net.freeze_modules()
    learning = [name for name in net.tasks if name not in old or run.extend.old_labels or run.extend.distill(old)]
    return Extension(run.extend, path, sha256(path), old, learning, set(weights), fresh)


def measure_fisher(spec: EWC, net: MultiTaskNet) -> dict[str, Tensor]:
    """The Fisher information of the trunk's weights on images with labels of the old tasks, see `EWC`.

    In float32 and evaluation mode, image by image; every process measures the same.
    """
    if spec.fisher is not None:
        return _read_fisher(Path(spec.fisher))
    path, saved = _load(spec)
    before = restore(saved["run"], str(path))
    spaces = _spaces(saved)
    datasets = align(open_datasets(spec.data or before.data.train), before.tasks, spaces)
    data = before.data.model_copy(update={"workers": 0})
    loader = train_loader(data, before.tasks, spaces, datasets, 1, before.seed)
    available = len(loader)
    if spec.images and spec.images > available:
        raise ValueError(
            f"extend.images is {spec.images}, but an epoch of the old data has {available}; at most so many count; "
            "lower it, or name more in extend.data"
        )
    wanted = spec.images or min(NUM_FISHER_IMAGES, available)
    old = checkpoint.best_weights(saved)
    held = {f"trunk.{name}": p for name, p in net.trunk.named_parameters() if p.requires_grad}
    held = {name: p for name, p in held.items() if name in old}
    fisher = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in held.items()}
    losses, device = LossNet(net, cut=False, learning=list(before.tasks)), net.mean.device
    was_training = net.training
    net.eval()
    loader.batch_sampler.set_epoch(0)  # type: ignore[union-attr]
    for batch in islice(loader, wanted):
        on_device = batch.to(device)
        image, totals = on_device.image, step_totals([on_device.counts])
        parts, _, _ = losses(image, on_device.targets, on_device.labelled, totals, on_device.color)
        weighted = [before.tasks[task].weight * part for task, of in parts.items() for part in of.values()]
        gradients = torch.autograd.grad(torch.stack(weighted).sum(), list(held.values()), allow_unused=True)
        for value, gradient in zip(fisher.values(), gradients, strict=True):
            if gradient is not None:
                value += gradient.float().square()
    net.train(was_training)
    return normalised(fisher)


def _read_fisher(file: Path) -> dict[str, Tensor]:
    try:
        fisher, _ = read_archive(file)
    except READING_FAILS as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"extend.fisher {file} cannot be read ({reason}); a whole fisher.pt of a run is needed; correct the path, "
            "or leave it out to measure it again"
        ) from error
    if not isinstance(fisher, dict) or not all(isinstance(value, Tensor) for value in fisher.values()):
        raise ValueError(
            f"extend.fisher {file} holds other things than tensors by name; a fisher.pt of a run is needed; correct "
            "the path, or leave it out to measure it again"
        )
    return fisher


def _spaces(saved: Mapping[str, Any]) -> dict[str, LabelSpace | None]:
    return {name: plain and LabelSpace.from_plain(plain) for name, plain in saved["spaces"].items()}


def _load(spec: Extend) -> tuple[Path, dict[str, Any]]:
    if spec.checkpoint is None:
        raise ValueError("extend.checkpoint is not set; the trained network is needed; give it, or --extend CHECKPOINT")
    path = checkpoint.find(spec.checkpoint)
    return path, checkpoint.load(path)


def _load_old(net: MultiTaskNet, weights: Mapping[str, Tensor], new: list[str], path: Path) -> list[str]:
    """Load the weights; returns the names in the trunk that they lack."""
    own = net.state_dict()
    wrong = [name for name, value in weights.items() if name not in own or own[name].shape != value.shape]
    if wrong:
        raise ValueError(
            f"{path} has {len(wrong)} tensors that the extended network lacks or has in another shape, the first is "
            f"{wrong[0]}; all of the old network must fit; leave the settings of its model and its tasks as they were"
        )
    net.load_state_dict(dict(weights), strict=False)
    lacking = [name for name in own if name not in weights]
    decoders = tuple(f"decoders.{name}." for name in new)
    return [name for name in lacking if not name.startswith(decoders)]


def _check_levels(before: Run, run: Run, path: Path) -> None:
    """Layers of a common pyramid have no names by level, so that their weights fit the same levels only."""
    sharing, tasks = before.model.sharing, list(before.tasks)
    reading = sharing.common_of(tasks) if isinstance(sharing, LoRABranch) else tasks
    known = {level for name in reading for level in before.tasks[name].levels}
    for name, task in run.tasks.items():
        own_pyramid = run.extend is not None and run.extend.own_pyramids
        if name not in before.tasks and not own_pyramid and (others := sorted(set(task.levels) - known)):
            raise ValueError(
                f"tasks.{name} reads levels {others}, which the pyramid of {path} does not have; it has "
                f"{sorted(known)}; set the levels of the new task's decoder or head to some of these"
            )


def _with(own: Distill | None, old: Distill | None) -> Distill | None:
    """Both ways of teaching; the same where the old network teaches already."""
    if old is None or own is None:
        return own or old
    if all(teacher in own.teachers for teacher in old.teachers):
        return own
    if own.tasks is None:
        raise ValueError(
            "distill.tasks is unset, but the old network teaches the old tasks besides; then the tasks that learn from "
            "the other teachers must be named; list them under distill.tasks"
        )
    return own.model_copy(
        update={"teachers": (*old.teachers, *own.teachers), "tasks": {**(old.tasks or {}), **own.tasks}}
    )


def _plain(model: Model) -> dict[str, Any]:
    """The settings that decide the shape; where weights come from does not matter."""
    plain = model.model_dump(mode="json")
    for name in ("pretrained", "checkpoint"):
        plain["encoder"].pop(name, None)
    return plain


def _difference(one: Mapping[str, Any], other: Mapping[str, Any], path: str = "model") -> str:
    for name in {**one, **other}:
        a, b = one.get(name), other.get(name)
        if a != b:
            if isinstance(a, Mapping) and isinstance(b, Mapping):
                return _difference(a, b, f"{path}.{name}")
            return f"{path}.{name} is {a!r} and was {b!r}"
    return ""


def _dump(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _dump(inner) for name, inner in value.items()}
    return value.model_dump() if hasattr(value, "model_dump") else value
