"""NDDR: an encoder for each task, and after each stage 1x1 convolutions that reduce the maps of all tasks to one's."""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from visionmtl.modeling.layers import Norm, norm_layer
from visionmtl.modeling.sharing.base import Parts, Sharing, Trunk
from visionmtl.modeling.sharing.cross_stitch import StageTrunk, own_and_others


class NDDR(Sharing, frozen=True):
    """Neural discriminative dimensionality reduction, Gao et al. 2019, arXiv:1801.08297, sec. 3.

    Concatenation, 1x1 convolution, normalisation; the convolution starts as a cross-stitch unit. Its shortcuts to the
    last layer are left out: the pyramid reads every stage.
    """

    type: Literal["nddr"] = "nddr"
    own: float = Field(0.9, ge=0, le=1)
    """Weight of a task's own map at the start; the others share the rest."""
    norm: Norm = "batch"

    def build(self, parts: Parts) -> Trunk:
        return StageTrunk(parts, "sharing nddr", lambda num_tasks, channels: _Unit(num_tasks, channels, self))


class _Unit(nn.Module):
    def __init__(self, num_tasks: int, channels: int, spec: NDDR) -> None:
        super().__init__()
        self.reduce = nn.ModuleList(
            nn.Sequential(nn.Conv2d(num_tasks * channels, channels, 1, bias=False), norm_layer(spec.norm, channels))
            for _ in range(num_tasks)
        )
        eye = torch.eye(channels)
        for layers, shares in zip(self.reduce, own_and_others(num_tasks, spec.own), strict=True):
            weight = torch.cat([share * eye for share in shares], dim=1)
            layers[0].weight.data.copy_(weight[:, :, None, None])  # type: ignore[index]

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        joined = torch.cat(list(maps), dim=1)
        return [layers(joined) for layers in self.reduce]
