"""Teachers: trained networks whose outputs on the student's own augmented images are further targets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from visionmtl.config.registry import EachOnce, Spec
from visionmtl.network import FEATURES, MultiTaskNet
from visionmtl.ops.ranks import Counts
from visionmtl.ops.soft_losses import content_shares, num_pairs, resize_like
from visionmtl.tasks.base import SoftLoss, Task


class Teacher(Spec):
    """A trained network that teaches."""

    checkpoint: str
    """A run folder (its best checkpoint, else its last), a .pt or .safetensors file, or nyuv2-small."""
    tasks: dict[str, str] | None = Field(None, min_length=1)
    """By the student's task the teacher's; None: those of the same names."""


class Distill(Spec):
    """Learning from teachers beside the labels, on every image of every training data set."""

    teachers: Annotated[tuple[Teacher, ...], EachOnce] = Field(min_length=1)
    """Several that teach one task give their mean."""
    tasks: dict[str, SoftLoss] | None = Field(None, min_length=1)
    """The student's tasks that learn from teachers, and how; a list of names is short for their defaults. None: all
    that some teacher has."""
    flip: bool = False
    """Teachers also see each image turned left to right, and give the mean of both."""

    @field_validator("teachers", mode="before")
    @classmethod
    def _paths_are_teachers(cls, value: Any) -> Any:
        several = value if isinstance(value, list | tuple) else [value]
        return [{"checkpoint": one} if isinstance(one, str) else one for one in several]

    @field_validator("tasks", mode="before")
    @classmethod
    def _names_are_defaults(cls, value: Any) -> Any:
        return dict.fromkeys(value, SoftLoss()) if isinstance(value, list | tuple) else value

    def check(self, tasks: Mapping[str, Task]) -> None:
        """Raise ValueError for tasks that the run does not have, and for settings that they do not read."""
        named = [name for teacher in self.teachers for name in teacher.tasks or ()]
        for name in (*(self.tasks or ()), *named):
            if name not in tasks:
                raise ValueError(f"distill names task {name!r}; this run has {', '.join(tasks)}; correct it")
        for name, settings in (self.tasks or {}).items():
            task = tasks[name]
            read = {"weight", *task.soft_settings}
            idle = [field for field, value in settings if field not in read and value is not None]
            if idle:
                raise ValueError(
                    f"distill.tasks.{name}.{idle[0]} is set, but a task of type {task.type!r} does not read it, so it "
                    f"would have no effect; it reads {', '.join(('weight', *task.soft_settings))}; remove it"
                )


Soft = dict[str, dict[str, Tensor]]
"""By the student's task: what teachers say of a batch, see `Task.soft_targets`, and "content"."""


@dataclass(frozen=True)
class Lesson:
    """What one teacher teaches one task of the student."""

    task: str  # the student's
    source: str  # the teacher's
    order: Tensor | None  # int64 [K]: the teacher's class for each class of the student; None: the same


class Teachers(nn.Module):
    """Frozen networks in evaluation mode; what they say of a batch, in float32, without gradients."""

    def __init__(
        self,
        nets: Sequence[MultiTaskNet],
        lessons: Sequence[Sequence[Lesson]],
        tasks: Mapping[str, Task],
        soft_losses: Mapping[str, SoftLoss],
        size: tuple[int, int],
        flip: bool,
        features_for: str | None = None,
    ) -> None:
        """nets: on the device; lessons: of each net; tasks: the student's; size: (H, W) of its training inputs.

        features_for: the task whose counts tell of the last net's shared maps; None: they are not handed out
        """
        super().__init__()
        self.nets = nn.ModuleList(nets)
        self.lessons, self.tasks, self.soft_losses, self.flip = lessons, tasks, dict(soft_losses), flip
        self.features_for = features_for
        self.zooms = [size[0] / net.size[0] for net in nets]
        for net, of_net in zip(nets, lessons, strict=True):
            if of_net:
                net.keep([lesson.source for lesson in of_net])
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Teachers":
        """Stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, image: Tensor, color: Tensor | None) -> tuple[Soft, Counts]:
        """image, color: as in a `Batch`. Returns targets, and what the student's tasks count of them."""
        content = content_shares(image)
        several: dict[str, list[dict[str, Tensor]]] = {name: [] for name in self.soft_losses}
        features: dict[str, Tensor] = {}
        for net, of_net, zoom in zip(self.nets, self.lessons, self.zooms, strict=True):
            for mirrored in (False, True) if self.flip else (False,):
                shared = net.shared(image.flip(-1) if mirrored else image, color)  # type: ignore[operator]
                if not mirrored:
                    features = {str(level): maps for level, maps in shared.items()}
                raw = net.decode(shared) if of_net else {}  # type: ignore[operator]
                with torch.autocast(image.device.type, enabled=False):
                    for lesson in of_net:
                        task: Task = net.tasks[lesson.source]  # type: ignore[index,assignment]
                        settings = self.soft_losses[lesson.task]
                        several[lesson.task].append(
                            task.soft_targets(raw[lesson.source], settings, lesson.order, mirrored, zoom)
                        )
        soft = {name: {**_mean(targets), "content": content} for name, targets in several.items()}
        counts = {name: self.tasks[name].count_soft(targets) for name, targets in soft.items()}
        if self.features_for is not None:
            soft[FEATURES] = features
            pairs = {"soft_pairs": num_pairs(len(image), content)}
            counts[self.features_for] = counts.get(self.features_for, {}) | pairs
        return soft, counts


def _mean(targets: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean by name; maps take the size of the first."""
    first = targets[0]
    if len(targets) == 1:
        return first
    return {
        name: torch.stack([resize_like(of[name], value) if value.ndim == 4 else of[name] for of in targets]).mean(0)
        for name, value in first.items()
    }
