"""Hard sharing: one encoder and one pyramid for all tasks."""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from visionmtl.modeling.sharing.base import Parts, Sharing, Trunk
from visionmtl.structures import Maps


class Hard(Sharing, frozen=True):
    """Every task reads the same maps (Caruana 1997)."""

    type: Literal["hard"] = "hard"

    def build(self, parts: Parts) -> Trunk:
        return _Hard(parts)


class _Hard(Trunk):
    splits_by_modules = False

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self.encoder = parts.encoder(parts.all_levels[-1])
        self.pyramid = parts.pyramid(self.encoder.channels, parts.all_levels)
        self.out_channels = self.pyramid.out_channels

    def forward(self, image: Tensor) -> Maps:
        maps: Maps = self.pyramid(self.encoder(image))
        return maps

    def split(self, shared: Maps) -> Mapping[str, Maps]:
        return {task: {level: shared[level] for level in levels} for task, levels in self.levels.items()}
