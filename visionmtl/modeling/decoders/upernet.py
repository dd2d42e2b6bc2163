"""UPerNet: the coarsest map pooled at several scales, then merged top-down and joined at the finest level."""

from itertools import pairwise
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from visionmtl.config.registry import EachOnce
from visionmtl.modeling.decoders.base import OUT_LEVEL, Decoder, DenseMap
from visionmtl.modeling.layers import ConvBlock
from visionmtl.ops.resize import average_bins, resize_small, upsample
from visionmtl.structures import Maps


class UPerNet(Decoder):
    """Xiao et al. 2018, arXiv:1807.10221, sec. 3.1, with pyramid pooling of PSPNet (arXiv:1612.01105, sec. 3.2).

    BatchNorm behind the bin of 1 x 1 needs two images a step; with one, choose norm: group.
    """

    type: Literal["upernet"] = "upernet"
    bins: Annotated[tuple[Annotated[int, Field(ge=1)], ...], EachOnce] = Field((1, 2, 3, 6), min_length=1)
    """Pooled sizes of the coarsest map."""

    def build(self, in_channels: int) -> DenseMap:
        """See the base."""
        return _Merge(self, in_channels)


class _Merge(DenseMap):
    def __init__(self, spec: UPerNet, in_channels: int) -> None:
        super().__init__()
        self.out_channels = width = spec.channels
        self.levels = spec.levels
        self.bins = spec.bins

        def block(c_in: int, kernel: int) -> ConvBlock:
            return ConvBlock(c_in, width, kernel, norm=spec.norm, separable=spec.separable)

        self.pooled = nn.ModuleList(block(in_channels, 1) for _ in spec.bins)
        self.context = block(in_channels + len(spec.bins) * width, 3)
        self.lateral = nn.ModuleList(block(in_channels, 1) for _ in spec.levels[:-1])
        self.smooth = nn.ModuleList(block(width, 3) for _ in spec.levels[:-1])
        self.join = block(len(spec.levels) * width, 3)

    def forward(self, maps: Maps) -> Tensor:
        """See the base."""
        coarsest = maps[self.levels[-1]]
        size = (coarsest.shape[-2], coarsest.shape[-1])
        bins = [average_bins(coarsest, n) for n in self.bins]
        pooled = [resize_small(block(x), size) for block, x in zip(self.pooled, bins, strict=True)]
        merged = {self.levels[-1]: self.context(torch.cat([coarsest, *pooled], 1))}

        for coarse, fine in pairwise(reversed(self.levels)):
            merged[fine] = self.lateral[self.levels.index(fine)](maps[fine]) + upsample(merged[coarse], 2)
        for level, smooth in zip(self.levels, self.smooth, strict=False):  # the coarsest was smoothed as context
            merged[level] = smooth(merged[level])

        joined = [upsample(merged[level], 2 ** (level - self.levels[0])) for level in self.levels]
        return upsample(self.join(torch.cat(joined, 1)), 2 ** (self.levels[0] - OUT_LEVEL))
