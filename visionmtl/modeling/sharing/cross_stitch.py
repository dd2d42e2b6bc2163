"""Cross-stitch networks: an encoder for each task, and after each stage learnt mixtures of their maps."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from visionmtl.modeling.sharing.base import Parts, Sharing, Trunk
from visionmtl.modeling.sharing.single import SeparateTrunk
from visionmtl.structures import Maps


class CrossStitch(Sharing, frozen=True):
    """Misra et al. 2016, arXiv:1604.03539, eq. 1, after each stage from stride 4 on.

    Deviations: any number of tasks; the units learn at the rate of the rest, the paper's 100 to 1000 times faster.
    They have no weight decay.
    """

    type: Literal["cross_stitch"] = "cross_stitch"
    own: float = Field(0.9, ge=0, le=1)
    """Share of a task's own map at the start; the others share the rest."""
    per_channel: bool = True
    """Whether each channel has its own mixture; false: one number for each pair of tasks and stage."""

    def build(self, parts: Parts) -> Trunk:
        def unit(num_tasks: int, channels: int) -> nn.Module:
            return _Unit(num_tasks, channels if self.per_channel else 1, self.own)

        return StageTrunk(parts, "sharing cross_stitch", unit)


class StageTrunk(SeparateTrunk):
    """An encoder for each task, whose maps meet in a unit after each stage: T maps in, T maps out."""

    of_each_task = ("pyramid",)

    def __init__(self, parts: Parts, who: str, unit: Callable[[int, int], nn.Module]) -> None:
        """unit: number of tasks T, channels -> module: list of T maps [B, channels, h, w] -> such a list."""
        super().__init__(parts, {task: parts.encoder(parts.all_levels[-1]) for task in parts.levels})
        encoders: list[Any] = self.encoders()
        for encoder in encoders:
            self.stages: tuple[int, ...] = encoder.split_stages(who)
        self.units = nn.ModuleDict(
            {str(level): unit(len(encoders), encoders[0].channels[level]) for level in self.stages}
        )

    def encode(self, image: Tensor) -> Mapping[str, Maps]:
        encoders: list[Any] = self.encoders()
        size = image.shape[-2:]
        encoders[0].check_size(*size)
        current = [image] * len(encoders)
        of_level: list[list[Tensor]] = []
        for level in self.stages:
            current = [encoder.run_stage(level, x) for encoder, x in zip(encoders, current, strict=True)]
            current = self.units[str(level)](current)
            of_level.append(current)
        maps = {
            task: dict(zip(self.stages, of_task, strict=True))
            for task, of_task in zip(self.encoder, zip(*of_level, strict=True), strict=True)
        }
        for encoder, of_task in zip(encoders, maps.values(), strict=True):
            encoder.check_strides(of_task, *size)
        return maps


def own_and_others(num_tasks: int, own: float) -> Tensor:
    """[T, T]: `own` on the diagonal, and the rest of each row shared out over the other tasks; 1 for one task."""
    if num_tasks == 1:
        return torch.ones(1, 1)
    eye = torch.eye(num_tasks)
    return own * eye + (1 - own) / (num_tasks - 1) * (1 - eye)


class _Unit(nn.Module):
    no_decay_names = frozenset({"mixture"})

    def __init__(self, num_tasks: int, channels: int, own: float) -> None:
        super().__init__()
        self.mixture = nn.Parameter(own_and_others(num_tasks, own)[:, :, None].repeat(1, 1, channels))
        """[T, T, C]: how much of the second task's map the first one's takes."""

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        mixture = self.mixture.to(maps[0].dtype)[..., None, None]
        return [sum((a * x for a, x in zip(row[1:], maps[1:], strict=True)), row[0] * maps[0]) for row in mixture]
