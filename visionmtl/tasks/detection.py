"""Detection: boxes with classes, by any dense head; scored as COCO does."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from visionmtl.metrics.base import Meter
from visionmtl.metrics.coco_ap import Backend
from visionmtl.metrics.detection import DetectionMeter
from visionmtl.modeling.heads.aligned import Aligned
from visionmtl.modeling.heads.base import Head, RawBoxes
from visionmtl.ops.boxes import box_area, generalised_iou, nms, nms_in_graph
from visionmtl.ops.ranks import num_ranks
from visionmtl.structures import Boxes, Detections, ImageMeta, LabelSpace, Sample
from visionmtl.tasks.base import NO_CLASS_LOGIT, ClassTask, SoftLoss, Task
from visionmtl.visualization.draw import DrawOptions, draw_box_errors, draw_boxes

BUCKETS = (32, 64, 128, 256)
"""Padded numbers of boxes: few shapes, so that few graphs are compiled. More boxes than the last raise its multiple."""

MIN_SOFT_SCORE = 0.05
"""Cells whose best class a teacher scores lower teach no box."""
SOFT_BOX_WEIGHT = 2.0  # as of the task-aligned head's own boxes


def _padded(num_boxes: int) -> int:
    """The number of boxes that so many are padded to."""
    return next((m for m in BUCKETS if m >= num_boxes), -(-num_boxes // BUCKETS[-1]) * BUCKETS[-1])


class Detection(ClassTask, frozen=True):
    """Settings of detection. Prediction: `Detections` in pixels of the original image."""

    type: Literal["detection"] = "detection"
    field: ClassVar[str] = "boxes"
    result_field: ClassVar[str | None] = "boxes"
    counting_when_trained: ClassVar = (
        "ap_backend",
        "candidates",
        "learns_from",
        "max_detections",
        "max_iou",
        "min_score",
        "rename",
    )
    meter_type: ClassVar = DetectionMeter
    primary_metric: ClassVar[str] = "ap"

    head: Head = Aligned()
    max_detections: int = Field(100, ge=1, description="boxes kept an image")
    min_score: float = Field(0.01, ge=0, lt=1, description="candidates below are dropped before suppression")
    max_iou: float = Field(0.6, gt=0, le=1, description="boxes of one class that overlap more are one object")
    candidates: int = Field(1000, ge=1, description="candidates an image that enter suppression")
    ap_backend: Backend = Field(
        "pycocotools", description="what computes AP; faster_coco_eval gives the same numbers in a sixth of the time"
    )

    @property
    def levels(self) -> tuple[int, ...]:
        return self.head.levels

    def build(self, channels: int, space: LabelSpace | None) -> nn.Module:
        assert space is not None
        return self.head.build(channels, len(space.classes))

    def collate(self, samples: Sequence[Sample | None], size: tuple[int, int]) -> dict[str, Tensor]:
        """boxes float [B, M, 4] xyxy px, labels int64, valid and crowd bool [B, M]; M from BUCKETS.

        With `classes` also annotated, see `collate_annotated`.
        """
        counts = [0 if s is None or s.boxes is None else len(s.boxes.labels) for s in samples]
        padded = _padded(max(counts))
        targets = {
            "boxes": torch.zeros(len(samples), padded, 4),
            "labels": torch.zeros(len(samples), padded, dtype=torch.int64),
            "valid": torch.zeros(len(samples), padded, dtype=torch.bool),
            "crowd": torch.zeros(len(samples), padded, dtype=torch.bool),
        }
        for i, (sample, count) in enumerate(zip(samples, counts, strict=True)):
            if sample is not None and sample.boxes is not None:
                targets["boxes"][i, :count] = torch.from_numpy(sample.boxes.xyxy)
                targets["labels"][i, :count] = torch.from_numpy(sample.boxes.labels)
                targets["crowd"][i, :count] = torch.from_numpy(sample.boxes.crowd)
                targets["valid"][i, :count] = True
        return targets | self.collate_annotated(samples)

    def worst_case(self, targets: dict[str, Tensor], size: tuple[int, int], most: int | None) -> dict[str, Tensor]:
        """As many boxes in each image as in the fullest, all over the image; the last bucket where that is unknown."""
        num_images, num_boxes = len(targets["boxes"]), BUCKETS[-1] if most is None else max(most, 1)
        boxes, labels = torch.zeros(num_images, _padded(num_boxes), 4), targets["labels"].new_zeros(1)
        corners = torch.rand(num_images, num_boxes, 2, 2, generator=torch.Generator().manual_seed(0)).sort(dim=2).values
        boxes[:, :num_boxes] = corners.flatten(2) * torch.tensor([size[1], size[0]] * 2)
        valid = (torch.arange(boxes.shape[1]) < num_boxes).expand(boxes.shape[:2]).clone()
        blank = {"labels": labels.expand(boxes.shape[:2]).clone(), "crowd": torch.zeros_like(valid)}
        return {**targets, **blank, "boxes": boxes, "valid": valid}

    def with_most_predictions(self) -> Self:
        """No score is too low."""
        return self.model_copy(update={"min_score": 0.0})

    def count(self, targets: dict[str, Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
        """What the head's loss is a mean over."""
        return self.head.count(targets["boxes"], targets["labels"], targets["valid"], targets["crowd"], size)

    def num_objects(self, targets: dict[str, Tensor]) -> Tensor:
        """Boxes to find; what is a crowd is none."""
        return (targets["valid"] & ~targets["crowd"]).sum()

    @property
    def counts_predictions(self) -> bool:
        return self.head.counts_predictions

    def count_predictions(self, raw: RawBoxes, targets: dict[str, Tensor], labelled: Tensor) -> dict[str, Tensor]:
        """What the head's loss is a mean over and only its predictions tell."""
        valid = targets["valid"] & labelled[:, None]
        return self.head.count_predictions(raw, targets["boxes"], targets["labels"], valid, targets["crowd"])

    def loss(
        self, raw: RawBoxes, targets: dict[str, Tensor], labelled: Tensor, totals: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The head's parts.

        Where a data set does not annotate a class, its logits are replaced by a constant: their scores are 0 then, as
        nothing of that class is labelled, so that they add exactly nothing to any head's loss.
        """
        boxes, valid = targets["boxes"], targets["valid"] & labelled[:, None]
        if "annotated" in targets:
            annotated = targets["annotated"][:, None, : raw["logits"].shape[2]]
            raw = {**raw, "logits": torch.where(annotated, raw["logits"], NO_CLASS_LOGIT)}
        return self.head.loss(raw, boxes, targets["labels"], valid, targets["crowd"], labelled, totals)

    def check_teacher(self, teacher: Task) -> None:
        """The cells must be the same; the heads need not be, since scores and boxes are compared."""
        assert isinstance(teacher, Detection)
        if teacher.head.levels != self.head.levels:
            raise ValueError(
                f"the teacher's boxes are on levels {teacher.head.levels} and the student's on {self.head.levels}; "
                "teaching cell by cell needs the same; set head.levels to the teacher's"
            )

    def soft_targets(
        self, raw: RawBoxes, settings: SoftLoss, order: Tensor | None, mirrored: bool, zoom: float
    ) -> dict[str, Tensor]:
        """scores [B, A, K] in 0..1; quality [B, A], the best of them; weighted_boxes [B, A, 4]: xyxy px * quality.

        The mean box of several teachers is then the one weighted by quality.
        """
        boxes, scores = self.head.decode(raw)
        scores = scores if order is None else scores.index_select(2, order)
        if mirrored:
            widths = {width * 2**level for level, _, width in raw["shapes"]}
            if len(widths) > 1:
                raise ValueError(
                    f"inputs are {min(widths)} px wide, which is no multiple of the coarsest level's stride "
                    f"{2 ** max(level for level, _, _ in raw['shapes'])}: cells of an image turned left to right lie "
                    "elsewhere; choose such a data.size, or set distill.flip=false"
                )
            x1, y1, x2, y2 = _flip_cells(boxes, raw["shapes"]).unbind(dim=-1)
            boxes = torch.stack([min(widths) - x2, y1, min(widths) - x1, y2], dim=-1)
            scores = _flip_cells(scores, raw["shapes"])
        quality = scores.amax(dim=2)
        return {"scores": scores, "quality": quality, "weighted_boxes": boxes * quality[..., None]}

    def count_soft(self, soft: dict[str, Tensor]) -> dict[str, Tensor]:
        """The sum of the qualities that teach boxes."""
        return {"soft_quality": _box_weights(soft).sum()}

    def distill(
        self, raw: RawBoxes, soft: dict[str, Tensor], totals: dict[str, Tensor], settings: SoftLoss
    ) -> dict[str, Tensor]:
        """Parts "class" and "box", for any head: both compare what `head.decode` gives, cell by cell.

        Quality focal loss against the teachers' scores (Dense Teacher, arXiv:2207.02541, eq. 3), and GIoU against their
        boxes weighted by their best scores, in place of that paper's choice of the best hundredth of cells. FCOS's
        score is the root of class times centre-ness, so its two branches learn together.
        """
        boxes, scores = self.head.decode(raw)
        total = totals["soft_quality"].clamp(min=1 / num_ranks())  # as for labels, see the task-aligned head
        focal = (soft["scores"] - scores).abs().square()
        class_loss = F.binary_cross_entropy(scores, soft["scores"], reduction="none") * focal
        wanted = soft["weighted_boxes"] / soft["quality"].clamp(min=1e-6)[..., None]
        box_loss = (1 - generalised_iou(boxes, wanted)) * _box_weights(soft)
        return {"class": class_loss.sum() / total, "box": SOFT_BOX_WEIGHT * box_loss.sum() / total}

    def predict(self, raw: RawBoxes, metas: Sequence[ImageMeta], size: tuple[int, int]) -> list[Detections]:
        return self._originals(*self._inside(raw, metas), metas)

    def predict_mirrored(
        self, raw: RawBoxes, mirrored: RawBoxes, metas: Sequence[ImageMeta], size: tuple[int, int]
    ) -> list[Detections]:
        """The boxes of both views, suppressed together."""
        boxes, scores = self._inside(raw, metas)
        others, other_scores = self._inside(mirrored, metas)
        widths = torch.tensor([meta.content_size[1] for meta in metas]).to(others)[:, None]
        x1, y1, x2, y2 = others.unbind(dim=-1)
        turned = torch.stack([widths - x2, y1, widths - x1, y2], dim=-1)
        return self._originals(torch.cat([boxes, turned], dim=1), torch.cat([scores, other_scores], dim=1), metas)

    def pseudo_labels(
        self,
        raw: RawBoxes,
        mirrored: RawBoxes | None,
        metas: Sequence[ImageMeta],
        size: tuple[int, int],
        confidence: float,
        unsure: float | None,
    ) -> list[Boxes]:
        """Boxes with scores from `confidence` on; those from `unsure` to there are crowds: neither hit nor miss."""
        found = (
            self.predict(raw, metas, size) if mirrored is None else self.predict_mirrored(raw, mirrored, metas, size)
        )
        labels = []
        for boxes in found:
            kept = boxes.scores >= (confidence if unsure is None else unsure)
            xyxy = boxes.xyxy[kept]
            area = (xyxy[:, 2] - xyxy[:, 0]) * (xyxy[:, 3] - xyxy[:, 1])
            labels.append(Boxes(xyxy, boxes.labels[kept], boxes.scores[kept] < confidence, area))
        return labels

    decoded_outputs: ClassVar[dict[str, str]] = {
        "boxes": "float32 [B, D, 4]: x1 y1 x2 y2 in pixels of the input, best first",
        "scores": "float32 [B, D]: 0..1; 0 = an empty place, behind all boxes",
        "labels": "int64 [B, D]: class ids; -1 in empty places",
    }

    def decode_in_graph(self, raw: RawBoxes, size: tuple[int, int], content: Tensor, zoom: float) -> dict[str, Tensor]:
        boxes, scores = self._clipped(raw, content.flip(1).repeat(1, 2))
        best = nms_in_graph(
            boxes, scores, max_iou=self.max_iou, min_score=self.min_score, candidates=self.candidates,
            keep=self.max_detections,
        )  # fmt: skip
        return dict(zip(self.decoded_outputs, best, strict=True))

    def from_decoded(self, outputs: dict[str, NDArray[Any]], metas: Sequence[ImageMeta]) -> list[Detections]:
        boxes, scores, labels = (outputs[name] for name in self.decoded_outputs)
        counts = (scores > 0).sum(axis=1)
        return [
            Detections(boxes[i, :count] * _scale(meta), scores[i, :count], labels[i, :count].astype(np.int64))
            for i, (count, meta) in enumerate(zip(counts, metas, strict=True))
        ]

    def _clipped(self, raw: RawBoxes, limits: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes [B, A, 4] cut at the limits [B, 4] (W, H, W, H of the contents, px), and scores [B, A, K]."""
        boxes, scores = self.head.decode(raw)
        boxes = torch.minimum(boxes.clamp(min=0), limits.to(boxes)[:, None])
        return boxes, scores * (box_area(boxes) > 0)[..., None]  # what lies in the padding is no detection

    def _inside(self, raw: RawBoxes, metas: Sequence[ImageMeta]) -> tuple[Tensor, Tensor]:
        """Boxes [B, A, 4] cut at the edges of the contents, and scores [B, A, K]."""
        limits = torch.tensor([[f.content_size[1], f.content_size[0]] * 2 for f in metas])
        boxes, scores = self._clipped(raw, limits)
        annotated = self.annotated_classes(metas, scores.transpose(1, 2))
        return boxes, scores if annotated is None else scores * annotated[:, None]

    def _originals(self, boxes: Tensor, scores: Tensor, metas: Sequence[ImageMeta]) -> list[Detections]:
        """Suppressed, in pixels of the original images."""
        kept = nms(
            boxes, scores, max_iou=self.max_iou, min_score=self.min_score, candidates=self.candidates,
            keep=self.max_detections,
        )  # fmt: skip

        predictions = []
        for meta, (xyxy, score, label) in zip(metas, kept, strict=True):
            predictions.append(Detections(xyxy.numpy() * _scale(meta), score.numpy(), label.numpy()))
        return predictions

    def meter(self, space: LabelSpace | None) -> Meter:
        assert space is not None
        return DetectionMeter(space, self.max_detections, self.ap_backend)

    def truth(self, sample: Sample) -> Detections | None:
        """The labelled boxes with score 1."""
        if sample.boxes is None:
            return None
        boxes = sample.boxes
        return Detections(boxes.xyxy, np.ones(len(boxes.labels), np.float32), boxes.labels, crowd=boxes.crowd)

    def draw(
        self, image: NDArray[np.uint8], prediction: Detections, space: LabelSpace | None, options: DrawOptions
    ) -> NDArray[np.uint8]:
        assert space is not None
        return draw_boxes(image, prediction, space, options.min_score)

    def draw_errors(
        self,
        image: NDArray[np.uint8],
        prediction: Detections,
        truth: Detections,
        space: LabelSpace | None,
        options: DrawOptions,
    ) -> NDArray[np.uint8]:
        assert space is not None
        return draw_box_errors(image, prediction, truth, space, options.min_score)


def _scale(meta: ImageMeta) -> NDArray[np.float32]:
    """[4]: from pixels of the input to pixels of the original."""
    (height, width), (content_height, content_width) = meta.size, meta.content_size
    return np.array([width / content_width, height / content_height] * 2, dtype=np.float32)


def _box_weights(soft: dict[str, Tensor]) -> Tensor:
    """How much each cell's box teaches, [B, A]."""
    return torch.where(soft["quality"] >= MIN_SOFT_SCORE, soft["quality"], 0.0)


def _flip_cells(values: Tensor, shapes: Sequence[tuple[int, int, int]]) -> Tensor:
    """Values [B, A, n] of the cells of all levels, each level turned left to right."""
    levels = values.split([height * width for _, height, width in shapes], dim=1)
    turned = [x.unflatten(1, shape[1:]).flip(2).flatten(1, 2) for x, shape in zip(levels, shapes, strict=True)]
    return torch.cat(turned, dim=1)
