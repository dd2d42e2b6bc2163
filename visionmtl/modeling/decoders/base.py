"""The dense decoder contract: pyramid maps in, one map at a quarter of the input size out."""

from abc import abstractmethod
from typing import ClassVar

from pydantic import Field
from torch import Tensor, nn

from visionmtl.config.registry import Configurable
from visionmtl.modeling.layers import Norm
from visionmtl.structures import Maps

OUT_LEVEL = 2
"""Every decoder answers at this level, stride 4."""


class DenseMap(nn.Module):
    """A built decoder."""

    out_channels: int

    def forward(self, maps: Maps) -> Tensor:
        """Pyramid maps, of which `levels` are read -> float [B, out_channels, H/4, W/4]."""
        raise NotImplementedError


class Decoder(Configurable, package="visionmtl.modeling.decoders"):
    """Frozen settings of one dense decoder."""

    finest: ClassVar[int] = OUT_LEVEL

    levels: tuple[int, ...] = Field((2, 3, 4, 5), min_length=1)
    """The pyramid levels it reads, finest first; level l has stride 2**l."""
    channels: int = Field(96, ge=1)
    """Channels of its output."""
    norm: Norm = "batch"
    separable: bool = False
    """Depthwise + pointwise instead of full 3x3 convolutions."""

    def model_post_init(self, context: object) -> None:
        """Levels are a run without gaps that starts at stride 4 or coarser."""
        if list(self.levels) != list(range(self.levels[0], self.levels[-1] + 1)) or self.levels[0] < self.finest:
            raise ValueError(
                f"decoder {self.type} reads levels {self.levels}; allowed is a run without gaps from level "
                f"{self.finest} or coarser; try (2, 3, 4, 5)"
            )

    @property
    def stride_level(self) -> int:
        """The finest level read."""
        return self.levels[0]

    @abstractmethod
    def build(self, in_channels: int) -> DenseMap:
        """in_channels: of every pyramid level."""
