"""Path aggregation network: a feature pyramid followed by a bottom-up path."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Literal

from torch import nn

from visionmtl.modeling.layers import ConvBlock
from visionmtl.modeling.pyramids.base import Pyramid, PyramidMaps
from visionmtl.modeling.pyramids.fpn import FPN
from visionmtl.structures import Maps


class PAFPN(Pyramid):
    """Liu et al. 2018, arXiv:1803.01534, sec. 3.1; the bottom-up path runs over all wanted levels."""

    type: Literal["pafpn"] = "pafpn"

    def build(self, channels: Mapping[int, int], levels: tuple[int, ...]) -> PyramidMaps:
        """See the base."""
        return _BottomUp(self, channels, levels)


class _BottomUp(PyramidMaps):
    def __init__(self, spec: PAFPN, channels: Mapping[int, int], levels: tuple[int, ...]) -> None:
        super().__init__()
        top_down = FPN(channels=spec.channels, norm=spec.norm, separable=spec.separable, smooth_from=0)
        self.top_down = top_down.build(channels, levels)
        self.out_channels = width = self.top_down.out_channels
        self.down = nn.ModuleList(
            ConvBlock(width, width, stride=2, norm=spec.norm, separable=spec.separable) for _ in levels[1:]
        )
        self.smooth = nn.ModuleList(
            ConvBlock(width, width, norm=spec.norm, separable=spec.separable) for _ in levels[1:]
        )

    def forward(self, maps: Maps) -> Maps:
        """See the base."""
        outputs = dict(self.top_down(maps))
        for (fine, coarse), down, smooth in zip(pairwise(outputs), self.down, self.smooth, strict=True):
            outputs[coarse] = smooth(down(outputs[fine]) + outputs[coarse])
        return outputs
