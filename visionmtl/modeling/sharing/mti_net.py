"""MTI-Net: initial predictions and exchange between the tasks at several levels, coarse features helping finer ones."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from visionmtl.modeling.layers import ConvBlock, Norm
from visionmtl.modeling.sharing.base import Parts, PyramidTrunk, Sharing, Trunk
from visionmtl.modeling.sharing.pad_net import Exchange, task_features
from visionmtl.ops.resize import upsample
from visionmtl.structures import Maps


class MTINet(Sharing, frozen=True):
    """Vandenhende et al. 2020, arXiv:2001.06902, sec. 3, on the levels of the pyramid that two tasks or more read.

    From the coarsest level to the finest: features of each task, from the shared map and from what the feature
    propagation module (sec. 3.2) made of the coarser level; initial predictions from these; the exchange of PAD-Net
    (sec. 3.1). A task's own module reads what it has after the exchange, and the shared maps at levels that no other
    task reads. Initial predictions are as in `pad_net`: of a dense task one at each level, of a detector one over all.
    Deviations: the maps are those of the pyramid, the paper's those of HRNet; a task has one gate for all others, not
    one for each.
    """

    type: Literal["mti_net"] = "mti_net"
    channels: int = Field(64, ge=4)
    """Width of the features."""
    initial_weight: float = Field(1.0, gt=0)
    """Factor on the losses of initial predictions, at every level."""
    norm: Norm = "batch"

    def build(self, parts: Parts) -> Trunk:
        return _MTINet(parts, self)


class _MTINet(PyramidTrunk):
    of_each_task = ("initial", "restore")

    def __init__(self, parts: Parts, spec: MTINet) -> None:
        super().__init__(parts)
        readers = {k: [task for task, levels in parts.levels.items() if k in levels] for k in parts.all_levels}
        enough = min(2, len(parts.levels))
        self.readers = {level: tasks for level, tasks in readers.items() if len(tasks) >= enough}
        if not self.readers:
            raise ValueError(
                f"sharing mti_net exchanges features at levels that two tasks read, but {', '.join(parts.levels)} "
                "have none in common; at least one must be; change the levels of their decoders or heads, or choose "
                "hard"
            )
        self.initial_weight = spec.initial_weight
        self.joins_tasks = len(parts.levels) > 1
        self.scales = nn.ModuleDict(
            {
                str(level): _Scale(spec, self.out_channels, tasks, self.readers.get(level + 1, ()))
                for level, tasks in self.readers.items()
            }
        )
        self.propagate = nn.ModuleDict(
            {
                str(level): _Propagation(spec, len(tasks), receivers)
                for level, tasks in self.readers.items()
                if (receivers := [task for task in tasks if task in self.readers.get(level - 1, ())])
            }
        )
        own_levels = {
            task: tuple(level for level, tasks in self.readers.items() if task in tasks) for task in parts.levels
        }
        self.initial: Any = nn.ModuleDict(
            {task: parts.last_layers(task, levels, spec.channels) for task, levels in own_levels.items() if levels}
        )
        self.restore = nn.ModuleDict(
            {
                task: nn.ModuleDict(
                    {str(k): ConvBlock(spec.channels, self.out_channels, 1, norm=spec.norm) for k in levels}
                )
                for task, levels in own_levels.items()
            }
        )

    def split(self, shared: Maps) -> dict[str, Maps]:
        return self._distilled(shared, self._features(shared))

    def split_with_initial(self, shared: Maps) -> tuple[Mapping[str, Maps], Mapping[str, Sequence[Any]]]:
        features = self._features(shared)
        of_task = {
            task: {level: of_level[task] for level, of_level in features.items() if task in of_level}
            for task in self.initial
        }
        initial = {task: [layer(of_task[task]) for layer in layers] for task, layers in self.initial.items()}
        return self._distilled(shared, features), initial

    def read_levels(self) -> set[int]:
        """The levels of the exchange, too."""
        return super().read_levels() | set(self.readers)

    def _features(self, shared: Maps) -> dict[int, dict[str, Tensor]]:
        """By level and task, before the exchange."""
        features: dict[int, dict[str, Tensor]] = {}
        propagated: dict[str, Tensor] = {}
        for level in sorted(self.readers, reverse=True):
            features[level] = self.scales[str(level)](shared[level], propagated)
            propagated = {}
            if str(level) in self.propagate:
                propagated = self.propagate[str(level)](features[level])
        return dict(sorted(features.items()))

    def _distilled(self, shared: Maps, features: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Maps]:
        maps = super().split(shared)
        for task in maps:
            restore: nn.ModuleDict = self.restore[task]  # type: ignore[assignment]
            for level, convolution in restore.items():
                exchange: Any = self.scales[level].exchange
                maps[task][int(level)] = convolution(exchange(task, features[int(level)]))
        return maps


class _Scale(nn.Module):
    """The tasks' features at one level, and their exchange."""

    def __init__(self, spec: MTINet, c_shared: int, tasks: Sequence[str], at_coarser: Sequence[str]) -> None:
        super().__init__()
        self.features = nn.ModuleDict(
            {
                task: task_features(c_shared + spec.channels * (task in at_coarser), spec.channels, spec.norm)
                for task in tasks
            }
        )
        self.exchange = Exchange(tasks, spec.channels)

    def forward(self, shared: Tensor, propagated: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The shared map [B, C, h, w], and by task what the coarser level passed on -> features by task."""
        height, width = shared.shape[-2:]
        features = {}
        for task, module in self.features.items():
            x = shared
            if task in propagated:  # where halving rounded up, the last row or column is left out
                x = torch.cat([shared, upsample(propagated[task], 2)[..., :height, :width]], dim=1)
            features[task] = module(x)
        return features


class _Propagation(nn.Module):
    """Feature propagation (sec. 3.2): a representation common to the tasks, added to each after channel attention."""

    def __init__(self, spec: MTINet, num_tasks: int, receivers: Sequence[str]) -> None:
        """receivers: the tasks that read the next finer level, too."""
        super().__init__()
        width = spec.channels
        self.scores: nn.Module | None = None  # one task needs no shares
        if num_tasks > 1:
            self.scores = nn.Sequential(
                ConvBlock(num_tasks * width, width, norm=spec.norm), nn.Conv2d(width, num_tasks * width, 1)
            )
        self.reduce = ConvBlock(num_tasks * width, width, 1, norm=spec.norm)
        self.excite = nn.ModuleDict(
            {
                task: nn.Sequential(
                    nn.AdaptiveAvgPool2d(1),
                    nn.Conv2d(width, width // 4, 1),
                    nn.ReLU(inplace=True),
                    nn.Conv2d(width // 4, width, 1),
                    nn.Sigmoid(),
                )
                for task in receivers
            }
        )

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """[B, channels, h, w] by task -> the same, refined, of those that receive."""
        joined = torch.cat(list(features.values()), dim=1)
        if self.scores is not None:
            joined = joined * self.scores(joined).unflatten(1, (len(features), -1)).softmax(dim=1).flatten(1, 2)
        common = self.reduce(joined)
        return {task: features[task] + common * excite(common) for task, excite in self.excite.items()}
