"""Semantic FPN: every level convolved and doubled until all have one size, then summed."""

from typing import Literal

from torch import Tensor, nn

from visionmtl.modeling.decoders.base import OUT_LEVEL, Decoder, DenseMap
from visionmtl.modeling.layers import ConvBlock
from visionmtl.ops.resize import average_bins, resize_small, upsample
from visionmtl.structures import Maps

_PARTS = (1, 2, 3, 6)  # a side


class SemanticFPN(Decoder):
    """Kirillov et al. 2019, arXiv:1901.02446, sec. 3 and fig. 3; without level 2 it sums at its finest level."""

    type: Literal["semantic_fpn"] = "semantic_fpn"
    reduce: bool = True
    """Where the pyramid is wider than `channels`, bring every level to these by a 1x1 convolution first. The paper's
    first 3x3 convolution does that itself, and so do separable ones. At stride 4 and twice 256 to 96 channels it
    saves a tenth of the arithmetic of a step with ResNet-50."""

    context: Literal["none", "pooled"] = "none"
    """pooled: the coarsest map is joined by its means over 1, 2x2, 3x3 and 6x6 parts of the image, as in PSPNet
    (arXiv:1612.01105), each through a 1x1 convolution without norm and added. Costs next to nothing."""

    def build(self, in_channels: int) -> DenseMap:
        """See the base."""
        return _Sum(self, in_channels)


class _Sum(DenseMap):
    def __init__(self, spec: SemanticFPN, in_channels: int) -> None:
        super().__init__()
        self.out_channels = spec.channels
        self.levels = spec.levels
        self.context = _PooledContext(in_channels) if spec.context == "pooled" else nn.Identity()
        self.branches = nn.ModuleList(_branch(spec, in_channels, level - spec.levels[0]) for level in spec.levels)

    def forward(self, maps: Maps) -> Tensor:
        """See the base."""
        maps = {**maps, self.levels[-1]: self.context(maps[self.levels[-1]])}
        finest, *coarser = [branch(maps[level]) for level, branch in zip(self.levels, self.branches, strict=True)]
        if coarser:  # doubled once, as a sum: the sum of what is doubled one by one
            finest = finest + upsample(sum(coarser[1:], coarser[0]), 2)
        return upsample(finest, 2 ** (self.levels[0] - OUT_LEVEL))


class _PooledContext(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(channels, channels, 1) for _ in _PARTS)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        joined = x
        for parts, layer in zip(_PARTS, self.layers, strict=True):
            means = layer(average_bins(x, parts)).relu()
            joined = joined + (means if parts == 1 else resize_small(means, (height, width)))
        return joined


def _branch(spec: SemanticFPN, in_channels: int, num_doublings: int) -> nn.Sequential:
    """All of a branch but its last doubling, which all branches share."""
    layers: list[nn.Module] = []
    if spec.reduce and in_channels > spec.channels and not spec.separable:
        layers.append(nn.Conv2d(in_channels, spec.channels, 1, bias=False))
        in_channels = spec.channels
    for i in range(max(1, num_doublings)):
        if i:
            layers.append(_Double())
        c_in = spec.channels if i else in_channels
        layers.append(ConvBlock(c_in, spec.channels, norm=spec.norm, separable=spec.separable))
    return nn.Sequential(*layers)


class _Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return upsample(x, 2)
