"""The detection head contract, and the decoupled towers that the heads share."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import TypedDict

import torch
from pydantic import Field
from torch import Tensor, nn

from visionmtl.layers import ConvBlock, Norm
from visionmtl.spec import Kind
from visionmtl.types import Maps


class RawBoxes(TypedDict):
    """A head's output over all A cells of all levels, finest level first, row by row."""

    logits: Tensor  # [B, A, K]
    distances: Tensor  # [B, A, 4 * n]
    quality: Tensor | None  # [B, A], where the head has such a branch
    shapes: list[tuple[int, int, int]]  # (level, h, w)


class Head(Kind, home="visionmtl.heads"):
    """Frozen settings of one dense detection head; its weights are shared by all levels."""

    levels: tuple[int, ...] = (3, 4, 5, 6, 7)
    num_convs: int = Field(4, ge=0, description="convolutions in each tower")
    channels: int = Field(0, ge=0, description="channels of the towers; 0 = those of the pyramid")
    norm: Norm = "group"
    separable: bool = False

    @abstractmethod
    def build(self, channels: int, num_classes: int) -> nn.Module:
        """module(maps) -> RawBoxes."""

    @abstractmethod
    def loss(
        self, raw: RawBoxes, boxes: Tensor, labels: Tensor, valid: Tensor, crowd: Tensor, labelled: Tensor
    ) -> dict[str, Tensor]:
        """Named parts. boxes: float [B, M, 4]; labels: int64 [B, M]; valid, crowd: bool [B, M]; labelled: bool [B]."""

    @abstractmethod
    def decode(self, raw: RawBoxes) -> tuple[Tensor, Tensor]:
        """Boxes float32 [B, A, 4] in input pixels and scores float32 [B, A, K] in 0..1."""


class Towers(nn.Module):
    """Two towers (class, box) over the levels, with one output convolution each and a learnt scale a level."""

    def __init__(
        self, spec: Head, channels: int, num_classes: int, num_distances: int, prior: float, with_quality: bool
    ) -> None:
        super().__init__()
        self.levels = spec.levels
        width = spec.channels or channels

        def tower() -> nn.Sequential:
            return nn.Sequential(
                *(
                    ConvBlock(channels if i == 0 else width, width, norm=spec.norm, separable=spec.separable)
                    for i in range(spec.num_convs)
                )
            )

        last = width if spec.num_convs else channels
        self.class_tower, self.box_tower = tower(), tower()
        self.logits = nn.Conv2d(last, num_classes, 3, padding=1)
        self.distances = nn.Conv2d(last, num_distances, 3, padding=1)
        self.quality = nn.Conv2d(last, 1, 3, padding=1) if with_quality else None
        self.scales = nn.Parameter(torch.ones(len(spec.levels)))

        for out in (self.logits, self.distances, self.quality):
            if out is not None:
                nn.init.normal_(out.weight, std=0.01)
                nn.init.zeros_(out.bias)  # type: ignore[arg-type]
        # sigmoid(bias) = prior: start nearly all-background, or the loss of the negatives explodes in the first steps
        nn.init.constant_(self.logits.bias, torch.logit(torch.tensor(prior)).item())  # type: ignore[arg-type]

    def forward(self, maps: Maps) -> RawBoxes:
        """maps: [B, channels, h, w] by level -> RawBoxes."""

        def rows(x: Tensor) -> Tensor:
            return x.flatten(2).transpose(1, 2)  # [B, h*w, C]

        logits, distances, quality = [], [], []
        for i, level in enumerate(self.levels):
            of_class, of_box = self.class_tower(maps[level]), self.box_tower(maps[level])
            logits.append(rows(self.logits(of_class)))
            distances.append(rows(self.distances(of_box) * self.scales[i]))
            if self.quality is not None:
                quality.append(rows(self.quality(of_box)).squeeze(-1))
        return {
            "logits": torch.cat(logits, dim=1),
            "distances": torch.cat(distances, dim=1),
            "quality": torch.cat(quality, dim=1) if quality else None,
            "shapes": map_shapes(maps, self.levels),
        }


def map_shapes(maps: Maps, levels: Sequence[int]) -> list[tuple[int, int, int]]:
    """(level, h, w) of the given levels."""
    return [(level, maps[level].shape[2], maps[level].shape[3]) for level in levels]
