"""Classification of whole images: one class of several, or any number of them."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from visionmtl.metrics.base import Meter
from visionmtl.metrics.classification import ClassificationMeter
from visionmtl.ops.losses import mean_over_labelled, smoothing_shares
from visionmtl.structures import IGNORE, MAX_CLASSES, ImageClasses, ImageMeta, LabelSpace, Maps, Sample
from visionmtl.tasks.base import NO_CLASS_LOGIT, TEMPERATURE, ClassTask, SoftLoss, Task, check_class_weights
from visionmtl.visualization.draw import DrawOptions, draw_classes


class Classification(ClassTask, frozen=True):
    """Settings of image classification. Prediction: `ImageClasses` with every class, best first.

    The mean of the coarsest map, dropout and one linear layer, as classifiers of ImageNet end.
    """

    type: Literal["classification"] = "classification"
    field: ClassVar[str] = "image_labels"
    result_field: ClassVar[str | None] = "classification"
    counting_when_trained: ClassVar = ("learns_from", "rename")
    meter_type: ClassVar = ClassificationMeter
    soft_settings: ClassVar[tuple[str, ...]] = ("temperature",)

    many: bool = Field(False, description="an image may have any number of the classes, each by itself; else one")
    level: int = Field(5, ge=2, le=7, description="the pyramid level that is averaged; 5 has a stride of 32 px")
    dropout: float = Field(0.1, ge=0, lt=1, description="share of features dropped before the linear layer")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="for one class an image")
    class_weights: tuple[float, ...] | None = Field(None, description="one factor a class; unset = all 1")

    @model_validator(mode="after")
    def _smooths_one_class(self) -> Self:
        if self.many and self.label_smoothing:
            raise ValueError(
                f"label_smoothing is {self.label_smoothing}, but many is true, where it would have no effect: it "
                "divides one label among classes; remove one of the two"
            )
        return self

    @property
    def primary_metric(self) -> str:  # type: ignore[override]
        """Mean average precision of many labels, accuracy of one."""
        return "map" if self.many else "accuracy"

    @property
    def levels(self) -> tuple[int, ...]:
        return (self.level,)

    def build(self, channels: int, space: LabelSpace | None) -> nn.Module:
        assert space is not None
        check_class_weights(self.class_weights, space)
        return _PooledLinear(self.level, channels, len(space.classes), self.dropout)

    def collate(self, samples: Sequence[Sample | None], size: tuple[int, int]) -> dict[str, Tensor]:
        """One label: label int64 [B], IGNORE where there is none, or not labelled. Many: present bool [B, MAX_CLASSES].

        Both: counted bool [B], which images the loss is over. With `classes` also annotated, see `collate_annotated`.
        """
        known = [None if sample is None else sample.image_labels for sample in samples]
        annotated = self.collate_annotated(samples)
        if self.many:
            present = torch.zeros(len(samples), MAX_CLASSES, dtype=torch.bool)
            for row, labels in zip(present, known, strict=True):
                if labels is not None:
                    row[torch.from_numpy(labels)] = True
            return {"present": present, "counted": torch.tensor([one is not None for one in known]), **annotated}
        label = torch.full((len(samples),), IGNORE, dtype=torch.int64)
        for i, (sample, labels) in enumerate(zip(samples, known, strict=True)):
            if labels is not None and len(labels):
                assert sample is not None
                label[i] = _only(labels, sample.image_id)
        return {"label": label, "counted": label != IGNORE, **annotated}

    def count(self, targets: dict[str, Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
        """Images with a label; of many labels also those that are known to have none."""
        return {"images": targets["counted"].sum().float()}

    def loss(
        self, raw: Tensor, targets: dict[str, Tensor], labelled: Tensor, totals: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Part "cross_entropy", the mean over images of softmax cross-entropy, or of its binary form over classes.

        With `classes` that is over the classes which an image's data set annotates.
        """
        counted, logits = targets["counted"] & labelled, raw.float()
        known = torch.ones_like(logits, dtype=torch.bool)
        if "annotated" in targets:
            known = targets["annotated"][:, : raw.shape[1]]
            logits = torch.where(known, logits, NO_CLASS_LOGIT)
        weights = torch.ones_like(logits[0])
        if self.class_weights is not None:  # filled one by one: torch.tensor(list) on a device makes the host wait
            weights = torch.stack([torch.full_like(weights[0], weight) for weight in self.class_weights])
        if self.many:
            present = targets["present"][:, : raw.shape[1]].to(logits.dtype)
            values = weights * F.binary_cross_entropy_with_logits(logits, present, reduction="none")
            of_image = torch.where(known, values, 0.0).sum(dim=1) / known.sum(dim=1).clamp(min=1)
        else:
            label = torch.where(counted, targets["label"], 0)[:, None]
            logs = logits.log_softmax(dim=1)
            of_image = -(1 - self.label_smoothing) * weights[label[:, 0]] * logs.gather(1, label).squeeze(1)
            if self.label_smoothing:
                shares = smoothing_shares(known, weights, self.label_smoothing)
                of_image = of_image - (logs * shares).sum(dim=1)
        return {"cross_entropy": mean_over_labelled(of_image, counted, totals["images"])}

    def check_teacher(self, teacher: Task) -> None:
        """One class an image is taught by one, any number by any number."""
        assert isinstance(teacher, Classification)
        if teacher.many != self.many:
            raise ValueError(
                f"the teacher's `many` is {teacher.many} and the student's {self.many}; one class is not compared with "
                "many; choose another teacher"
            )

    def soft_targets(
        self, raw: Tensor, settings: SoftLoss, order: Tensor | None, mirrored: bool, zoom: float
    ) -> dict[str, Tensor]:
        """shares: [B, K] of the classes, or of each by itself, at the temperature."""
        logits = (raw.float() if order is None else raw.float().index_select(1, order)) / (
            settings.temperature or TEMPERATURE
        )
        return {"shares": logits.sigmoid() if self.many else logits.softmax(dim=1)}

    def count_soft(self, soft: dict[str, Tensor]) -> dict[str, Tensor]:
        """Images."""
        return {"soft_images": torch.ones_like(soft["shares"][:, 0]).sum()}

    def distill(
        self, raw: Tensor, soft: dict[str, Tensor], totals: dict[str, Tensor], settings: SoftLoss
    ) -> dict[str, Tensor]:
        """Part "kl", T^2 times the divergence as for segmentation; of many labels its mean over classes."""
        temperature, shares = settings.temperature or TEMPERATURE, soft["shares"]
        logits = raw.float() / temperature
        if self.many:
            entropy = -(torch.xlogy(shares, shares) + torch.xlogy(1 - shares, 1 - shares))
            of_class = F.binary_cross_entropy_with_logits(logits, shares, reduction="none") - entropy
            of_image = of_class.mean(dim=1)
        else:
            of_image = (torch.xlogy(shares, shares) - shares * logits.log_softmax(dim=1)).sum(dim=1)
        return {"kl": temperature**2 * of_image.clamp(min=0).sum() / totals["soft_images"]}

    def predict(self, raw: Tensor, metas: Sequence[ImageMeta], size: tuple[int, int]) -> list[ImageClasses]:
        return self._ranked(self._scores(raw, metas))

    def predict_mirrored(
        self, raw: Tensor, mirrored: Tensor, metas: Sequence[ImageMeta], size: tuple[int, int]
    ) -> list[ImageClasses]:
        """The mean of the scores of both views."""
        return self._ranked((self._scores(raw, metas) + self._scores(mirrored, metas)) / 2)

    def _scores(self, raw: Tensor, metas: Sequence[ImageMeta]) -> Tensor:
        """float32 [B, K] in 0..1."""
        logits, annotated = raw.float(), self.annotated_classes(metas, raw)
        if annotated is not None:
            logits = torch.where(annotated, logits, NO_CLASS_LOGIT)
        return logits.sigmoid() if self.many else logits.softmax(dim=1)

    def _ranked(self, scores: Tensor) -> list[ImageClasses]:
        values, labels = (x.cpu().numpy() for x in scores.sort(dim=1, descending=True, stable=True))
        return [ImageClasses(label, value) for label, value in zip(labels, values, strict=True)]

    decoded_outputs: ClassVar[dict[str, str]] = {"scores": "float32 [B, K]: of each class, 0..1"}

    def decode_in_graph(self, raw: Tensor, size: tuple[int, int], content: Tensor, zoom: float) -> dict[str, Tensor]:
        return {"scores": self._scores(raw, ())}

    def from_decoded(self, outputs: dict[str, NDArray[Any]], metas: Sequence[ImageMeta]) -> list[ImageClasses]:
        return self._ranked(torch.from_numpy(outputs["scores"]))

    def meter(self, space: LabelSpace | None) -> Meter:
        assert space is not None
        return ClassificationMeter(space, self.many)

    def truth(self, sample: Sample) -> ImageClasses | None:
        """The labels with score 1."""
        labels = sample.image_labels
        return None if labels is None else ImageClasses(labels, np.ones(len(labels), np.float32))

    def draw(
        self, image: NDArray[np.uint8], prediction: ImageClasses, space: LabelSpace | None, options: DrawOptions
    ) -> NDArray[np.uint8]:
        assert space is not None
        return draw_classes(image, prediction, space, options.min_score)


def _only(labels: NDArray[np.int64], image_id: str) -> int:
    if len(labels) > 1:
        raise ValueError(
            f"image {image_id!r} has {len(labels)} image labels, classes {labels.tolist()}; this task learns one class "
            "an image; set many: true on it, or correct the labels"
        )
    return int(labels[0])


class _PooledLinear(nn.Module):
    """Mean of one map, dropout, linear: maps -> logits [B, K]."""

    def __init__(self, level: int, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.level = level
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(channels, num_classes)

    def forward(self, maps: Maps) -> Tensor:
        logits: Tensor = self.out(self.dropout(maps[self.level].mean(dim=(2, 3))))
        return logits
