"""Top-down: the coarsest map is convolved, doubled and added to the next finer one, level by level."""

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from visionmtl.modeling.decoders.base import OUT_LEVEL, Decoder, DenseMap
from visionmtl.modeling.layers import ConvBlock
from visionmtl.ops.resize import upsample
from visionmtl.structures import Maps


class TopDown(Decoder):
    """The expanding half of U-Net (Ronneberger et al. 2015, arXiv:1505.04597) with one residual convolution a level,
    and maps added as in LinkNet (arXiv:1707.03718) instead of joined.

    A 1x1 convolution brings each level to `channels` where the pyramid has others. Semantic FPN convolves every level
    on its own; here coarse maps share the convolutions of finer ones, of which there are fewer. Without the residual
    connection short trainings with few channels miss rare classes.
    """

    type: Literal["top_down"] = "top_down"
    channels: int = Field(80, ge=1)

    def build(self, in_channels: int) -> DenseMap:
        """See the base."""
        return _Steps(self, in_channels)


class _Steps(DenseMap):
    def __init__(self, spec: TopDown, in_channels: int) -> None:
        super().__init__()
        self.out_channels = width = spec.channels
        self.levels = spec.levels
        self.lateral = nn.ModuleList(
            nn.Identity() if in_channels == width else nn.Conv2d(in_channels, width, 1, bias=False) for _ in spec.levels
        )
        self.blocks = nn.ModuleList(
            ConvBlock(width, width, norm=spec.norm, separable=spec.separable) for _ in spec.levels
        )

    def forward(self, maps: Maps) -> Tensor:
        """See the base."""
        *finer, x = [lateral(maps[level]) for lateral, level in zip(self.lateral, self.levels, strict=True)]
        *blocks, coarsest = self.blocks
        x = x + coarsest(x)
        for fine, block in zip(reversed(finer), reversed(blocks), strict=True):
            x = fine + upsample(x, 2)
            x = x + block(x)
        return upsample(x, 2 ** (self.levels[0] - OUT_LEVEL))
