"""The pyramid contract: an encoder's maps in, maps of equal channels on the wanted levels out."""

from abc import abstractmethod
from collections.abc import Collection, Mapping

from pydantic import Field
from torch import nn

from visionmtl.config.registry import Configurable
from visionmtl.modeling.layers import Norm
from visionmtl.structures import Maps


class PyramidMaps(nn.Module):
    """A built pyramid."""

    out_channels: int
    """Channels of every level."""

    def forward(self, maps: Maps) -> Maps:
        """The encoder's maps, of which those it needs are read -> the levels it was built for, finest first."""
        raise NotImplementedError

    def keep(self, levels: Collection[int]) -> None:
        """Leave out what serves only other levels than these, where the pyramid can; for predictions."""


class Pyramid(Configurable, package="visionmtl.modeling.pyramids"):
    """Frozen settings of one pyramid.

    Inputs are multiples of 32, or of the coarsest stride up to 32; maps coarser than that are rounded up.
    """

    channels: int | None = Field(None, ge=1)
    """Channels of every level; None: as `fitting_width` says, 256 for all but small encoders."""
    norm: Norm = "batch"
    separable: bool = False
    """Depthwise + pointwise instead of full 3x3 convolutions: about 8 times less arithmetic."""

    @abstractmethod
    def build(self, channels: Mapping[int, int], levels: tuple[int, ...]) -> PyramidMaps:
        """channels: the encoder's, by level; levels: wanted ones, a run without gaps, finest first."""


def fitting_width(channels: Mapping[int, int]) -> int:
    """256, the width of the papers, but no wider than the encoder's own map of stride 16, rounded up to 32 channels.

    A wider pyramid adds nothing to what that map knows, and costs more than all of a small encoder: MobileNetV3-Large
    has 112 channels there and gets 128. Without such a map the next finer one counts, or else the finest.
    channels: the encoder's, by level
    """
    level = max((level for level in channels if level <= 4), default=min(channels))
    return min(256, -(-channels[level] // 32) * 32)


def used_levels(channels: Mapping[int, int], levels: tuple[int, ...], who: str) -> tuple[int, ...]:
    """The encoder levels that a top-down pyramid reads; coarser wanted ones are added by strided convolutions.

    Raises ValueError where wanted levels have gaps, or are finer than the encoder's, or where there is one map only.
    """
    if not levels or list(levels) != list(range(levels[0], levels[-1] + 1)):
        raise ValueError(f"{who} was asked for levels {levels}; allowed is a run without gaps; complete it")
    if len(channels) == 1:
        raise ValueError(
            f"{who} needs maps of several strides, but the encoder gives level {next(iter(channels))} only, as plain "
            "ViTs do; allowed is a pyramid that makes the others; set pyramid: {type: simple}"
        )
    used = tuple(level for level in levels if level in channels)
    if not used or used[0] != levels[0] or used[-1] < min(levels[-1], max(channels)):
        raise ValueError(
            f"{who} was asked for levels {levels}, but the encoder gives {tuple(channels)}; only coarser levels can be "
            "added; let the decoders read coarser levels, or choose an encoder with finer maps"
        )
    return used
