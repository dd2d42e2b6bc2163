"""Hard sharing: one encoder and one pyramid for all tasks."""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn

from visionmtl.modeling.sharing.base import Sharing, Trunk
from visionmtl.structures import Maps


class Hard(Sharing, frozen=True):
    """Every task reads the same maps (Caruana 1997)."""

    type: Literal["hard"] = "hard"

    def build(self, encoder: nn.Module, pyramid: nn.Module, levels: Mapping[str, tuple[int, ...]]) -> Trunk:
        return _Hard(encoder, pyramid, levels)


class _Hard(Trunk):
    def __init__(self, encoder: nn.Module, pyramid: nn.Module, levels: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.encoder = encoder
        self.pyramid = pyramid
        self.levels = dict(levels)
        self.out_channels = int(pyramid.out_channels)  # type: ignore[arg-type]

    def forward(self, image: Tensor) -> Maps:
        maps: Maps = self.pyramid(self.encoder(image))
        return maps

    def split(self, shared: Maps) -> Mapping[str, Maps]:
        return {task: {level: shared[level] for level in levels} for task, levels in self.levels.items()}
