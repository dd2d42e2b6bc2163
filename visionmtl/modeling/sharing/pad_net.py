"""PAD-Net: initial predictions of every task, whose features the tasks then exchange under attention."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from visionmtl.modeling.layers import ConvBlock, Norm
from visionmtl.modeling.sharing.base import Parts, PyramidTrunk, Sharing, Trunk
from visionmtl.structures import Maps


class PADNet(Sharing, frozen=True):
    """Xu et al. 2018, arXiv:1805.04409, sec. 3.3, module C (attention-guided distillation), on one pyramid level.

    F_k + sum over t != k of sigmoid(G_k F_k) * (W_kt F_t), where F_t are the features behind the initial prediction of
    task t, and G_k and W_kt 3x3 convolutions. The task's own module reads the result at that level, and the shared maps
    at the others. Each initial prediction is the task's last layer on F_t, with the task's own loss: a detector gives
    and takes like the others, and its initial boxes are those of this level. A task with neither dense decoder nor
    detection head takes part without an initial prediction; one that does not read the level takes no part.
    Deviation: the paper turns predictions into features again before the exchange; here the features before the last
    layer are exchanged, so that no prediction has to be computed when the network is used.
    """

    type: Literal["pad_net"] = "pad_net"
    level: int = Field(3, ge=2)
    """Of the exchange; 2 costs four times as much."""
    channels: int = Field(64, ge=1)
    """Width of the features."""
    initial_weight: float = Field(1.0, gt=0)
    """Factor on the losses of initial predictions."""
    norm: Norm = "batch"

    def build(self, parts: Parts) -> Trunk:
        return _PADNet(parts, self)


class _PADNet(PyramidTrunk):
    of_each_task = ("initial", "restore")

    def __init__(self, parts: Parts, spec: PADNet) -> None:
        super().__init__(parts)
        tasks = [task for task, levels in parts.levels.items() if spec.level in levels]
        if len(tasks) < min(2, len(parts.levels)):
            raise ValueError(
                f"sharing pad_net exchanges features at level {spec.level}, but "
                f"{f'only {tasks[0]} reads' if tasks else 'no task reads'} it; two tasks must; set "
                f"model.sharing.level to one that several of {', '.join(parts.levels)} read: "
                f"{ {task: list(levels) for task, levels in parts.levels.items()} }"
            )
        self.level = spec.level
        self.initial_weight = spec.initial_weight
        self.joins_tasks = len(parts.levels) > 1
        width = self.out_channels
        self.features = nn.ModuleDict({task: task_features(width, spec.channels, spec.norm) for task in tasks})
        self.initial: Any = nn.ModuleDict(
            {task: parts.last_layers(task, (spec.level,), spec.channels) for task in tasks}
        )
        self.exchange = Exchange(tasks, spec.channels)
        self.restore = nn.ModuleDict({task: ConvBlock(spec.channels, width, 1, norm=spec.norm) for task in tasks})

    def split(self, shared: Maps) -> dict[str, Maps]:
        return self._distilled(shared, self._features(shared))

    def split_with_initial(self, shared: Maps) -> tuple[Mapping[str, Maps], Mapping[str, Sequence[Any]]]:
        features = self._features(shared)
        initial = {
            task: [layer({self.level: features[task]}) for layer in layers] for task, layers in self.initial.items()
        }
        return self._distilled(shared, features), initial

    def read_levels(self) -> set[int]:
        """The level of the exchange, too."""
        return super().read_levels() | {self.level}

    def _features(self, shared: Maps) -> dict[str, Tensor]:
        return {task: module(shared[self.level]) for task, module in self.features.items()}

    def _distilled(self, shared: Maps, features: Mapping[str, Tensor]) -> dict[str, Maps]:
        maps = super().split(shared)
        for task, restore in self.restore.items():
            maps[task][self.level] = restore(self.exchange(task, features))
        return maps


def task_features(c_in: int, c_out: int, norm: Norm) -> nn.Sequential:
    """The features of one task, from which its initial prediction is made."""
    return nn.Sequential(ConvBlock(c_in, c_out, norm=norm), ConvBlock(c_out, c_out, norm=norm))


class Exchange(nn.Module):
    """What each task takes from the others' features, under its own attention; PAD-Net's module C at one level."""

    def __init__(self, tasks: Sequence[str], channels: int) -> None:
        super().__init__()

        def convolution(bias: bool) -> nn.Conv2d:
            return nn.Conv2d(channels, channels, 3, padding=1, bias=bias)

        self.gates = nn.ModuleDict({task: convolution(True) for task in tasks} if len(tasks) > 1 else {})
        self.messages = nn.ModuleDict(
            {task: nn.ModuleDict({other: convolution(False) for other in tasks if other != task}) for task in tasks}
        )

    def forward(self, task: str, features: Mapping[str, Tensor]) -> Tensor:
        """features: [B, channels, h, w] by task -> what `task` makes of them."""
        own = features[task]
        messages: nn.ModuleDict = self.messages[task]  # type: ignore[assignment]
        if not len(messages):
            return own
        received = [convolution(features[other]) for other, convolution in messages.items()]
        return own + self.gates[task](own).sigmoid() * torch.stack(received).sum(0)
