"""Simple feature pyramid: every level from the one map of a plain ViT."""

from collections.abc import Collection, Mapping
from typing import Literal

from torch import nn

from visionmtl.modeling.layers import ConvBlock, norm_layer
from visionmtl.modeling.pyramids.base import Pyramid, PyramidMaps, fitting_width
from visionmtl.structures import Maps


class Simple(Pyramid):
    """Li et al. 2022 (ViTDet), arXiv:2203.16527, sec. 3: transposed convolutions upwards, max-pooling downwards.

    Deviation: the paper takes level 6 from the finished level 5, here every level is made from the encoder's map.
    """

    type: Literal["simple"] = "simple"

    def build(self, channels: Mapping[int, int], levels: tuple[int, ...]) -> PyramidMaps:
        """See the base."""
        if len(channels) != 1:
            raise ValueError(
                f"the simple pyramid reads one map, but the encoder gives levels {tuple(channels)}; "
                "allowed is a plain ViT; set pyramid: {type: fpn}"
            )
        width = self.channels or fitting_width(channels)
        return _Branches(self, *next(iter(channels.items())), width, levels)


class _Branches(PyramidMaps):
    def __init__(self, spec: Simple, source: int, c_source: int, width: int, levels: tuple[int, ...]) -> None:
        super().__init__()
        self.out_channels = width
        self.source = source
        self.levels = levels
        self.branches = nn.ModuleList(_branch(spec, c_source, width, source - level) for level in levels)

    def forward(self, maps: Maps) -> Maps:
        """See the base."""
        source = maps[self.source]
        return {level: branch(source) for level, branch in zip(self.levels, self.branches, strict=True)}

    def keep(self, levels: Collection[int]) -> None:
        """Every level is made by itself."""
        kept = [at for at, level in enumerate(self.levels) if level in levels]
        self.levels = tuple(self.levels[at] for at in kept)
        self.branches = nn.ModuleList(self.branches[at] for at in kept)


def _branch(spec: Simple, c_source: int, width: int, num_doublings: int) -> nn.Sequential:
    """Negative doublings halve."""
    layers: list[nn.Module] = []
    c_map = c_source
    for i in range(num_doublings):
        if i:
            layers += [norm_layer(spec.norm, c_map), nn.GELU()]
        layers.append(nn.ConvTranspose2d(c_map, c_map := max(c_map // 2, 1), 2, 2))
    layers += [nn.MaxPool2d(2, ceil_mode=True) for _ in range(-num_doublings)]
    smooth = ConvBlock(width, width, norm=spec.norm, separable=spec.separable, activate=False)
    return nn.Sequential(*layers, ConvBlock(c_map, width, 1, norm=spec.norm, activate=False), smooth)
