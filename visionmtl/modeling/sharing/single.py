"""Separate networks for the tasks, side by side: the reference that sharing is compared with."""

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from visionmtl.modeling.sharing.base import Parts, Sharing, Trunk
from visionmtl.structures import Maps


class Single(Sharing, frozen=True):
    """An encoder and a pyramid for each task, which share nothing but the image and the optimiser's step."""

    type: Literal["single"] = "single"

    def build(self, parts: Parts) -> Trunk:
        encoders = {task: parts.encoder(levels[-1]) for task, levels in parts.levels.items()}
        return SeparateTrunk(parts, encoders)


class SeparateTrunk(Trunk):
    """An encoder and a pyramid for each task; where something joins the encoders, `encode` is overridden."""

    shared_maps = False
    splits_by_modules = False
    of_each_task: tuple[str, ...] = ("encoder", "pyramid")

    encoder: nn.ModuleDict

    def __init__(self, parts: Parts, encoders: Mapping[str, Any]) -> None:
        super().__init__(parts)
        self.encoder = nn.ModuleDict(encoders)
        self.pyramid = nn.ModuleDict(
            {task: parts.pyramid(encoders[task].channels, levels) for task, levels in parts.levels.items()}
        )
        self.out_channels = next(iter(self.pyramid.values())).out_channels  # type: ignore[assignment]

    def encode(self, image: Tensor) -> Mapping[str, Maps]:
        """Normalised float [B, in_chans, H, W] -> each encoder's maps, by task."""
        return {task: encoder(image) for task, encoder in self.encoder.items()}

    def forward(self, image: Tensor) -> dict[str, Maps]:
        maps = self.encode(image)
        return {task: pyramid(maps[task]) for task, pyramid in self.pyramid.items()}

    def split(self, shared: Mapping[str, Maps]) -> Mapping[str, Maps]:
        return shared
