"""Semantic FPN: every level convolved and doubled until all have one size, then summed."""

from itertools import pairwise
from typing import Literal

from torch import Tensor, nn

from visionmtl.decoders.base import OUT_LEVEL, Decoder, DenseMap
from visionmtl.layers import ConvBlock
from visionmtl.ops.resize import upsample
from visionmtl.types import Maps


class SemanticFPN(Decoder):
    """Kirillov et al. 2019, arXiv:1901.02446, sec. 3 and fig. 3; without level 2 it sums at its finest level."""

    type: Literal["semantic_fpn"] = "semantic_fpn"

    def build(self, in_channels: int) -> DenseMap:
        """See the base."""
        return _Sum(self, in_channels)


class _Sum(DenseMap):
    def __init__(self, spec: SemanticFPN, in_channels: int) -> None:
        super().__init__()
        self.out_channels = spec.channels
        self.levels = spec.levels
        self.branches = nn.ModuleList()
        for level in spec.levels:
            num_convolutions = max(1, level - spec.levels[0])
            widths = [in_channels] + [spec.channels] * num_convolutions
            self.branches.append(
                nn.ModuleList(
                    ConvBlock(c_in, c_out, norm=spec.norm, separable=spec.separable) for c_in, c_out in pairwise(widths)
                )
            )

    def forward(self, maps: Maps) -> Tensor:
        """See the base."""
        outputs = []
        for level, branch in zip(self.levels, self.branches, strict=True):
            x = maps[level]
            for convolution in branch:  # type: ignore[attr-defined]  # a ModuleList of blocks
                x = convolution(x)
                if level > self.levels[0]:
                    x = upsample(x, 2)
            outputs.append(x)
        return upsample(sum(outputs[1:], outputs[0]), 2 ** (self.levels[0] - OUT_LEVEL))
