"""MTAN: one encoder, and for each task attention masks that choose from the maps of its stages."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from visionmtl.modeling.encoder import FINEST_READ
from visionmtl.modeling.layers import ConvBlock, Norm
from visionmtl.modeling.sharing.base import Parts, Sharing, Trunk
from visionmtl.structures import Maps


class MTAN(Sharing, frozen=True):
    """Multi-task attention network, Liu et al. 2019, arXiv:1803.10704, eq. 1 and 2, on the encoder's stages.

    a_j = h(g([p_j; f(a_{j-1} * p_{j-1})])), where p_j is the map of stage j, g and h are 1x1 convolutions of the task,
    h ends in a sigmoid, and f is a 3x3 convolution common to the tasks, then max-pooling. Each task has a pyramid.
    Deviations: the mask is computed from the stage's last map, not from one before it, so that any encoder serves;
    g and f are `reduction` times narrower than the stage; the chain begins at the finest level that the task reads.
    """

    type: Literal["mtan"] = "mtan"
    reduction: int = Field(4, ge=1)
    norm: Norm = "batch"

    def build(self, parts: Parts) -> Trunk:
        return _MTAN(parts, self)


class _MTAN(Trunk):
    of_each_task = ("attention", "pyramid")

    def __init__(self, parts: Parts, spec: MTAN) -> None:
        super().__init__(parts)
        self.encoder = encoder = parts.encoder(parts.all_levels[-1])
        channels: dict[int, int] = {k: c for k, c in encoder.channels.items() if k >= FINEST_READ}
        self.read = tuple(channels)
        starts = {
            task: min((k for k in channels if k >= levels[0]), default=max(channels))
            for task, levels in parts.levels.items()
        }
        self.chains = {
            task: [k for k in channels if start <= k <= parts.levels[task][-1]] or [start]
            for task, start in starts.items()
        }
        self.pass_on = nn.ModuleDict(
            {
                str(coarse): ConvBlock(channels[fine], max(1, channels[coarse] // spec.reduction), norm=spec.norm)
                for fine, coarse in pairwise(self.read)
                if any(fine in chain and coarse in chain for chain in self.chains.values())
            }
        )
        self.joins_tasks = sum(len(chain) > 1 for chain in self.chains.values()) > 1
        self.attention = nn.ModuleDict(
            {
                task: nn.ModuleDict({str(k): _mask(spec, channels[k], after_others=k != chain[0]) for k in chain})
                for task, chain in self.chains.items()
            }
        )
        self.pyramid = nn.ModuleDict({task: parts.pyramid(channels, levels) for task, levels in parts.levels.items()})
        self.out_channels = next(iter(self.pyramid.values())).out_channels  # type: ignore[assignment]

    def forward(self, image: Tensor) -> Maps:
        maps = self.encoder(image)
        return {level: maps[level] for level in self.read}

    def split(self, shared: Maps) -> Mapping[str, Maps]:
        return {task: pyramid(self._attend(task, shared)) for task, pyramid in self.pyramid.items()}

    def _attend(self, task: str, shared: Maps) -> Maps:
        masks: nn.ModuleDict = self.attention[task]  # type: ignore[assignment]
        attended: Maps = {}
        for level in self.chains[task]:
            seen = [shared[level]]
            if attended:
                finer = max(attended)
                passed_on = self.pass_on[str(level)](attended[finer])
                seen.append(F.max_pool2d(passed_on, 2 ** (level - finer)))
            attended[level] = shared[level] * masks[str(level)](torch.cat(seen, dim=1))
        return attended


def _mask(spec: MTAN, channels: int, after_others: bool) -> nn.Sequential:
    width = max(1, channels // spec.reduction)
    return nn.Sequential(
        ConvBlock(channels + width * after_others, width, 1, norm=spec.norm),
        ConvBlock(width, channels, 1, norm=spec.norm, activate=False),
        nn.Sigmoid(),
    )
