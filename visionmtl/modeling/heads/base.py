"""The detection head contract, and the decoupled towers that the heads share."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, ClassVar, TypedDict

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from visionmtl.config.registry import Configurable, EachOnce
from visionmtl.modeling.layers import Norm, convolution, norm_layer
from visionmtl.structures import Maps


class RawBoxes(TypedDict):
    """A head's output over all A cells of all levels, finest level first, row by row."""

    logits: Tensor  # [B, A, K]
    distances: Tensor  # [B, A, 4 * n]
    quality: Tensor | None  # [B, A], where the head has such a branch
    shapes: list[tuple[int, int, int]]  # (level, h, w)


class Head(Configurable, package="visionmtl.modeling.heads"):
    """Frozen settings of one dense detection head; its weights are shared by all levels."""

    counts_predictions: ClassVar[bool] = False
    """Whether `count_predictions` counts anything."""

    levels: Annotated[tuple[int, ...], EachOnce] = Field((3, 4, 5, 6, 7), min_length=1)
    num_convs: int = Field(2, ge=0, description="convolutions in each tower; papers have 4, at twice the cost")
    channels: int = Field(0, ge=0, description="channels of the towers; 0 = those of the pyramid")
    norm: Norm = "group"
    separable: bool = False

    @model_validator(mode="after")
    def _towers_have_channels(self) -> Self:
        if self.channels and not self.num_convs:
            raise ValueError(
                f"channels is {self.channels}, but num_convs is 0, so there are no towers to have them; "
                "set num_convs to at least 1, or remove channels"
            )
        return self

    @abstractmethod
    def build(self, channels: int, num_classes: int) -> nn.Module:
        """module(maps) -> RawBoxes."""

    @abstractmethod
    def count(
        self, boxes: Tensor, labels: Tensor, valid: Tensor, crowd: Tensor, size: tuple[int, int]
    ) -> dict[str, Tensor]:
        """What the loss is a mean over, by name, for inputs of `size` = (H, W); see `tasks.base.Task.count`."""

    def count_predictions(
        self, raw: RawBoxes, boxes: Tensor, labels: Tensor, valid: Tensor, crowd: Tensor
    ) -> dict[str, Tensor]:
        """What the loss is a mean over and only predictions tell; see `tasks.base.Task.count_predictions`."""
        return {}

    @abstractmethod
    def loss(
        self,
        raw: RawBoxes,
        boxes: Tensor,
        labels: Tensor,
        valid: Tensor,
        crowd: Tensor,
        labelled: Tensor,
        totals: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """Named parts. boxes: float [B, M, 4]; labels: int64 [B, M]; valid, crowd: bool [B, M]; labelled: bool [B].

        valid: False in unlabelled images; totals: of the step, by the names of `count`; see `tasks.base.Task.loss`.
        """

    @abstractmethod
    def decode(self, raw: RawBoxes) -> tuple[Tensor, Tensor]:
        """Boxes float32 [B, A, 4] in input pixels and scores float32 [B, A, K] in 0..1."""


class ConvTower(nn.Module):
    """Convolutions shared by the levels, each followed by a normalisation and ReLU.

    BatchNorm is each level's own: training normalises every level by itself, so running statistics mixed over levels
    would fit none of them in evaluation (as in EfficientDet, arXiv:1911.09070).
    """

    def __init__(self, spec: Head, channels: int, width: int) -> None:
        super().__init__()
        num_sets = 1 if spec.norm == "group" else len(spec.levels)
        self.convolutions = nn.ModuleList(
            nn.Sequential(*convolution(width if i else channels, width, 3, separable=spec.separable))
            for i in range(spec.num_convs)
        )
        self.norms = nn.ModuleList(
            nn.ModuleList(norm_layer(spec.norm, width) for _ in range(num_sets)) for _ in range(spec.num_convs)
        )

    def forward(self, x: Tensor, position: int) -> Tensor:
        """x: [B, channels, h, w] of the level at `position` in the head's levels."""
        for convolve, norms in zip(self.convolutions, self.norms, strict=True):
            assert isinstance(norms, nn.ModuleList)
            x = F.relu(norms[position % len(norms)](convolve(x)), inplace=True)
        return x


class DecoupledHead(nn.Module):
    """Two towers (class, box) over the levels, with one output convolution each and a learnt scale a level."""

    def __init__(
        self, spec: Head, channels: int, num_classes: int, num_distances: int, prior: float, with_quality: bool
    ) -> None:
        super().__init__()
        self.levels = spec.levels
        width = spec.channels or channels

        last = width if spec.num_convs else channels
        self.class_tower, self.box_tower = ConvTower(spec, channels, width), ConvTower(spec, channels, width)
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
            of_class, of_box = self.class_tower(maps[level], i), self.box_tower(maps[level], i)
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


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """Bool [..., K] of int64 [...]: compared instead of scattered, which a compiler merges with what reads it."""
    return labels[..., None] == torch.arange(num_classes, device=labels.device)
