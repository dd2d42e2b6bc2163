"""The FCOS detection head: size ranges a level, focal loss, GIoU and centre-ness; the simple verified baseline."""

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss
from typing_extensions import Self

from visionmtl.modeling.heads.base import DecoupledHead, Head, RawBoxes, one_hot
from visionmtl.ops.assignment import fcos
from visionmtl.ops.boxes import anchor_points, from_distances, generalised_iou
from visionmtl.ops.ranks import num_ranks


class FCOS(Head, frozen=True):
    """FCOS with its later improvements (arXiv:2006.09214): centre sampling, GIoU, centre-ness on the box tower."""

    type: Literal["fcos"] = "fcos"
    radius: float = Field(1.5, gt=0, description="centre sampling radius in strides")
    focal_alpha: float = Field(0.25, gt=0, lt=1)
    focal_gamma: float = Field(2.0, ge=0)

    @model_validator(mode="after")
    def _finest_first(self) -> Self:
        if list(self.levels) != sorted(self.levels):
            raise ValueError(
                f"levels of the head are {self.levels}; the finest comes first; write {tuple(sorted(self.levels))}"
            )
        return self

    def build(self, channels: int, num_classes: int) -> nn.Module:
        return DecoupledHead(self, channels, num_classes, 4, prior=0.01, with_quality=True)

    def _ranges(self) -> list[tuple[float, float]]:
        """Pixels, by level: a level of stride s handles 4s up to 4s of the next, the finest from 0 on."""
        lowest = [0.0, *(4.0 * 2**level for level in self.levels[1:])]
        return list(zip(lowest, [*lowest[1:], math.inf], strict=True))

    def _boxes(self, raw: RawBoxes, centres: Tensor, strides: Tensor) -> Tensor:
        return from_distances(F.relu(raw["distances"].float() + 1.0) * strides[:, None], centres)

    def decode(self, raw: RawBoxes) -> tuple[Tensor, Tensor]:
        centres, strides = anchor_points(raw["shapes"], raw["logits"])
        assert raw["quality"] is not None
        scores = (raw["logits"].float().sigmoid() * raw["quality"].float().sigmoid()[..., None]).sqrt()
        return self._boxes(raw, centres, strides), scores

    def count(
        self, boxes: Tensor, labels: Tensor, valid: Tensor, crowd: Tensor, size: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Positive cells, and the sum of their centre-ness."""
        shapes = [(level, -(-size[0] // 2**level), -(-size[1] // 2**level)) for level in self.levels]
        target = fcos(shapes, self._ranges(), boxes, labels, valid, crowd, radius=self.radius)
        return {"positive": target.positive.sum().float(), "centreness": target.quality.sum()}

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
        """Parts "class" (focal), "box" (GIoU weighted by centre-ness) and "centreness" (cross-entropy)."""
        logits = raw["logits"].float()
        assert raw["quality"] is not None
        centres, strides = anchor_points(raw["shapes"], logits)
        predicted = self._boxes(raw, centres, strides)
        with torch.no_grad():
            of_level = dict(zip(self.levels, self._ranges(), strict=True))
            # initial predictions are of some levels alone, and divided by what all of them have
            ranges = [of_level[level] for level, _, _ in raw["shapes"]]
            target = fcos(raw["shapes"], ranges, boxes, labels, valid, crowd, radius=self.radius)
            # one cell at least, or the negatives of a step without boxes would count without measure
            num_positive = totals["positive"].clamp(min=1 / num_ranks())
            wanted = (one_hot(target.labels, logits.shape[2]) & target.positive[..., None]).float()

        counts = (labelled[:, None] & ~target.ignored)[..., None]
        focal = sigmoid_focal_loss(logits, wanted, alpha=self.focal_alpha, gamma=self.focal_gamma, reduction="none")
        giou = generalised_iou(predicted, target.boxes)
        centreness = F.binary_cross_entropy_with_logits(raw["quality"].float(), target.quality, reduction="none")
        return {
            "class": torch.where(counts, focal, 0.0).sum() / num_positive,
            "box": torch.where(target.positive, (1 - giou) * target.quality, 0.0).sum() / totals["centreness"],
            "centreness": torch.where(target.positive, centreness, 0.0).sum() / num_positive,
        }
