"""Feature pyramid network: coarse meaning added to fine maps, top-down."""

from collections.abc import Collection, Mapping
from typing import Literal

from pydantic import Field
from torch import nn
from torch.nn import functional as F

from visionmtl.modeling.layers import ConvBlock
from visionmtl.modeling.pyramids.base import Pyramid, PyramidMaps, fitting_width, used_levels
from visionmtl.ops.resize import double_nearest
from visionmtl.structures import Maps


class FPN(Pyramid):
    """Lin et al. 2017, arXiv:1612.03144, sec. 3; with normalisation, and coarse levels as in FCOS (P6 from P5)."""

    type: Literal["fpn"] = "fpn"
    smooth_from: int = Field(4, ge=0, description="finest level with a 3x3 convolution after the sum")
    """The paper has one at every level. At strides 4 and 8 they are a fifth of the arithmetic of a step with ResNet-50,
    and nothing nonlinear lies between them and the 3x3 convolutions with which decoders and heads begin."""

    def build(self, channels: Mapping[int, int], levels: tuple[int, ...]) -> PyramidMaps:
        """See the base."""
        return _TopDown(self, channels, levels)


class _TopDown(PyramidMaps):
    def __init__(self, spec: FPN, channels: Mapping[int, int], levels: tuple[int, ...]) -> None:
        super().__init__()
        self.out_channels = width = spec.channels or fitting_width(channels)
        self.used = used_levels(channels, levels, "fpn")
        self.added = levels[len(self.used) :]
        self.lateral = nn.ModuleList(
            ConvBlock(channels[level], width, 1, norm=spec.norm, activate=False) for level in self.used
        )
        self.smooth = nn.ModuleList(
            ConvBlock(width, width, norm=spec.norm, separable=spec.separable, activate=False)
            if level >= spec.smooth_from
            else nn.Identity()
            for level in self.used
        )
        self.coarser = nn.ModuleList(
            ConvBlock(width, width, stride=2, norm=spec.norm, separable=spec.separable, activate=False)
            for _ in self.added
        )

    def forward(self, maps: Maps) -> Maps:
        """See the base."""
        inner = [lateral(maps[level]) for lateral, level in zip(self.lateral, self.used, strict=True)]
        for fine in range(len(inner) - 2, -1, -1):
            inner[fine] = inner[fine] + double_nearest(inner[fine + 1])
        outputs = [smooth(x) for smooth, x in zip(self.smooth, inner, strict=True)]
        for convolution in self.coarser:
            outputs.append(convolution(F.relu(outputs[-1]) if len(outputs) > len(self.used) else outputs[-1]))
        return dict(zip(self.used + self.added, outputs, strict=True))

    def keep(self, levels: Collection[int]) -> None:
        """Finer levels give nothing to coarser ones, and levels added at the coarse end nothing to finer ones."""
        num_finer = sum(level < min(levels) for level in self.used[:-1])
        self.used = self.used[num_finer:]
        self.lateral, self.smooth = self.lateral[num_finer:], self.smooth[num_finer:]
        self.added = tuple(level for level in self.added if level <= max(levels))
        self.coarser = self.coarser[: len(self.added)]
