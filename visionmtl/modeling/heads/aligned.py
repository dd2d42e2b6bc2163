"""The default detection head: task-aligned assignment, quality focal loss, GIoU, optional distribution focal loss."""

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from visionmtl.modeling.heads.base import DecoupledHead, Head, RawBoxes, one_hot
from visionmtl.ops.assignment import Assignment, task_aligned
from visionmtl.ops.boxes import anchor_points, from_distances, generalised_iou, to_distances
from visionmtl.ops.ranks import num_ranks, sum_over_ranks


class Aligned(Head, frozen=True):
    """Anchor-free head with task-aligned targets (TOOD, arXiv:2108.07755; its aligned predictor is left out)."""

    type: Literal["aligned"] = "aligned"
    counts_predictions: ClassVar[bool] = True
    topk: int = Field(13, ge=1, description="candidate cells for each box")
    alpha: float = Field(1.0, ge=0, description="exponent of the score in the alignment metric")
    beta: float = Field(6.0, ge=0, description="exponent of the IoU in the alignment metric")
    focal_power: float = Field(2.0, ge=0, description="beta of quality focal loss")
    box_weight: float = Field(2.0, gt=0)
    bins: int = Field(
        0, ge=0, description="largest distance in strides of distribution focal loss; 0 = plain distances"
    )
    bins_weight: float | None = Field(None, gt=0, description="weight of distribution focal loss; unset = 0.25")

    @model_validator(mode="after")
    def _bins_have_a_loss(self) -> Self:
        if self.bins_weight is not None and not self.bins:
            raise ValueError(
                f"bins_weight is {self.bins_weight}, but bins is 0, so it would have no effect; "
                "set bins to the largest distance in strides, e.g. 16, or remove bins_weight"
            )
        return self

    def build(self, channels: int, num_classes: int) -> nn.Module:
        num_distances = 4 * (self.bins + 1) if self.bins else 4
        return DecoupledHead(self, channels, num_classes, num_distances, prior=0.01, with_quality=False)

    def _distances_px(self, raw: RawBoxes, strides: Tensor) -> Tensor:
        """float32 [B, A, 4], left top right bottom."""
        distances = raw["distances"].float()
        if self.bins:  # expectation over bins 0..n (Generalized Focal Loss, arXiv:2006.04388, eq. 4)
            shares = distances.unflatten(-1, (4, self.bins + 1)).softmax(dim=-1)
            steps = shares @ torch.arange(self.bins + 1, device=distances.device, dtype=torch.float32)
        else:
            # exp(1.4) = 4: boxes start 8 strides wide, the middle of what a level sees; the clamp keeps exp finite
            steps = (distances + 1.4).clamp(max=8.0).exp()
        return steps * strides[:, None]

    def decode(self, raw: RawBoxes) -> tuple[Tensor, Tensor]:
        centres, strides = anchor_points(raw["shapes"], raw["logits"])
        return from_distances(self._distances_px(raw, strides), centres), raw["logits"].float().sigmoid()

    def count(
        self, boxes: Tensor, labels: Tensor, valid: Tensor, crowd: Tensor, size: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Nothing: TOOD divides by the sum of the target qualities, which depend on the predictions."""
        return {}

    def count_predictions(
        self, raw: RawBoxes, boxes: Tensor, labels: Tensor, valid: Tensor, crowd: Tensor
    ) -> dict[str, Tensor]:
        """The sum of the target qualities."""
        return {"quality": self._assign(raw, boxes, labels, valid, crowd)[0].quality.sum()}

    def _assign(
        self, raw: RawBoxes, boxes: Tensor, labels: Tensor, valid: Tensor, crowd: Tensor
    ) -> tuple[Assignment, Tensor]:
        """The targets of all cells, and the predicted boxes [B, A, 4], through which gradients flow."""
        centres, strides = anchor_points(raw["shapes"], raw["logits"])
        predicted = from_distances(self._distances_px(raw, strides), centres)
        with torch.no_grad():
            target = task_aligned(
                raw["logits"].float().sigmoid(), predicted, raw["shapes"], boxes, labels, valid, crowd,
                topk=self.topk, alpha=self.alpha, beta=self.beta,
            )  # fmt: skip
        return target, predicted

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
        """Parts "class" (quality focal), "box" (GIoU) and, with bins, "bins" (distribution focal)."""
        logits = raw["logits"].float()
        target, predicted = self._assign(raw, boxes, labels, valid, crowd)
        scores = one_hot(target.labels, logits.shape[2]) * target.quality[..., None]
        quality = totals["quality"] if "quality" in totals else sum_over_ranks(target.quality.sum()) / num_ranks()
        total = quality.clamp(min=1 / num_ranks())  # at least 1 in all, or one poor box would blow up all negatives

        # quality focal loss (arXiv:2006.04388, eq. 2): |target - score|^beta * cross-entropy
        counts = (labelled[:, None] & ~target.ignored)[..., None]
        focal = (scores - logits.sigmoid()).abs().pow(self.focal_power)
        class_loss = F.binary_cross_entropy_with_logits(logits, scores, reduction="none") * focal
        parts = {"class": torch.where(counts, class_loss, 0.0).sum() / total}

        giou = generalised_iou(predicted, target.boxes)
        box_loss = torch.where(target.positive, (1 - giou) * target.quality, 0.0)
        parts["box"] = self.box_weight * box_loss.sum() / total

        if self.bins:
            # the last bin is never the lower neighbour, hence just below it
            centres, strides = anchor_points(raw["shapes"], logits)
            steps = (to_distances(target.boxes, centres) / strides[:, None]).clamp(0, self.bins - 0.01)
            low = steps.floor()
            logs = raw["distances"].float().unflatten(-1, (4, self.bins + 1)).log_softmax(dim=-1)
            at_low = logs.gather(-1, low.long()[..., None]).squeeze(-1)
            at_high = logs.gather(-1, low.long()[..., None] + 1).squeeze(-1)
            bins_loss = -(at_low * (low + 1 - steps) + at_high * (steps - low)).mean(dim=-1)
            bins_loss = torch.where(target.positive, bins_loss * target.quality, 0.0)
            parts["bins"] = (self.bins_weight or 0.25) * bins_loss.sum() / total
        return parts
