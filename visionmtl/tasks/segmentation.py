"""Semantic segmentation: a class for every pixel."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor, nn
from typing_extensions import Self

from visionmtl.metrics.base import Meter
from visionmtl.metrics.segmentation import SegmentationMeter
from visionmtl.modeling.decoders.base import Decoder
from visionmtl.modeling.decoders.top_down import TopDown
from visionmtl.ops.fused import upsampled_cross_entropy
from visionmtl.ops.losses import (
    cross_entropy,
    dice,
    each_to_original,
    hardest,
    lovasz_softmax,
    mean_over_labelled,
)
from visionmtl.ops.resize import resize, upsample
from visionmtl.ops.soft_losses import resize_like, soft_cross_entropy
from visionmtl.structures import IGNORE, ImageMeta, LabelSpace, Maps, Sample
from visionmtl.tasks.base import (
    NO_CLASS_LOGIT,
    TEMPERATURE,
    ClassTask,
    SoftLoss,
    Task,
    check_class_weights,
    count_true,
)
from visionmtl.visualization.draw import DrawOptions, draw_segmentation, draw_segmentation_errors


class Segmentation(ClassTask, frozen=True):
    """Settings of semantic segmentation. Prediction: uint8 [H, W] class ids at the original size."""

    type: Literal["segmentation"] = "segmentation"
    field: ClassVar[str] = "segmentation"
    result_field: ClassVar[str | None] = "segmentation"
    counting_when_trained: ClassVar = ("learns_from", "rename")
    meter_type: ClassVar = SegmentationMeter
    primary_metric: ClassVar[str] = "miou"
    soft_settings: ClassVar[tuple[str, ...]] = ("temperature",)

    decoder: Decoder = TopDown()
    dropout: float = Field(0.1, ge=0, lt=1, description="share of channels dropped before the classifier")
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    class_weights: tuple[float, ...] | None = Field(None, description="one factor a class; unset = all 1")
    hardest: float | None = Field(None, gt=0, le=1, description="learn from this share of the hardest pixels (OHEM)")
    region_loss: Literal["dice", "lovasz"] | None = Field(None, description="added to cross-entropy")
    region_weight: float | None = Field(None, gt=0, description="factor of region_loss; unset = 1")

    late_losses_from: float | None = Field(
        None, gt=0, lt=1, description="share of the epochs after which hardest and region_loss begin; unset = at once"
    )

    @model_validator(mode="after")
    def _no_idle_settings(self) -> Self:
        if self.late_losses_from is not None and self.hardest is None and self.region_loss is None:
            raise ValueError(
                f"late_losses_from is {self.late_losses_from}, but hardest and region_loss are unset, so it would have "
                "no effect; set one of them, or remove late_losses_from"
            )
        if self.region_weight is not None and self.region_loss is None:
            raise ValueError(
                f"region_weight is {self.region_weight}, but region_loss is unset, so it would have no effect; "
                "choose region_loss 'dice' or 'lovasz', or remove region_weight"
            )
        return self

    @property
    def levels(self) -> tuple[int, ...]:
        return self.decoder.levels

    def build(self, channels: int, space: LabelSpace | None) -> nn.Module:
        assert space is not None
        if len(space.classes) < 2:
            raise ValueError(
                f"label space {space.name!r} has one class, {space.classes[0]!r}, which every pixel would be, so that "
                "nothing is learnt; two classes or more are needed; name the background a class, too"
            )
        check_class_weights(self.class_weights, space)
        return _Classifier(self.decoder.build(channels), len(space.classes), self.dropout)

    def collate(self, samples: Sequence[Sample | None], size: tuple[int, int]) -> dict[str, Tensor]:
        """classes: uint8 [B, H, W], IGNORE in the padding and where not labelled.

        With `classes` also annotated, see `collate_annotated`.
        """
        classes = torch.full((len(samples), *size), IGNORE, dtype=torch.uint8)
        for i, sample in enumerate(samples):
            if sample is not None and sample.segmentation is not None:
                height, width = sample.segmentation.shape
                classes[i, :height, :width] = torch.from_numpy(sample.segmentation)
        return {"classes": classes, **self.collate_annotated(samples)}

    def count(self, targets: dict[str, Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
        """Labelled pixels."""
        return {"pixels": count_true(targets["classes"].numpy() != IGNORE)}

    def early(self) -> tuple[float, Task] | None:
        """Plain cross-entropy before `late_losses_from`."""
        if self.late_losses_from is None:
            return None
        plain = {"hardest": None, "region_loss": None, "region_weight": None, "late_losses_from": None}
        return self.late_losses_from, self.model_copy(update=plain)

    def loss(
        self, raw: Tensor, targets: dict[str, Tensor], labelled: Tensor, totals: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Parts "cross_entropy" and, when chosen, "dice" or "lovasz"; at full resolution.

        Cross-entropy alone is summed up without ever holding the logits at full resolution. `hardest` ranks all pixels
        and a region loss sums over them, so these take the plain way and its memory.
        With `classes`, the softmax of an image is over the classes that its data set annotates.
        """
        classes = torch.where(labelled[:, None, None], targets["classes"], IGNORE)
        counts = classes != IGNORE
        weights = None
        if self.class_weights is not None:  # filled one by one: torch.tensor(list) on a device makes the host wait
            weights = torch.stack([raw.new_full((), weight, dtype=torch.float32) for weight in self.class_weights])
        logits, annotated = raw.float(), targets.get("annotated")
        if annotated is not None:
            annotated = annotated[:, : raw.shape[1]]
            logits = torch.where(annotated[:, :, None, None], logits, NO_CLASS_LOGIT)
        if self.hardest is None and self.region_loss is None:
            total = upsampled_cross_entropy(
                logits,
                classes,
                ignore=IGNORE,
                weights=weights,
                label_smoothing=self.label_smoothing,
                smooth_over=annotated if self.label_smoothing else None,
            )
            return {"cross_entropy": total / totals["pixels"]}

        target = classes.long()
        logits = upsample(logits, target.shape[1] // raw.shape[2])
        pixel_loss = cross_entropy(logits, target, IGNORE, weights, self.label_smoothing, annotated)
        if self.hardest is None:
            parts = {"cross_entropy": mean_over_labelled(pixel_loss, counts, totals["pixels"])}
        else:
            parts = {"cross_entropy": hardest(pixel_loss, counts, self.hardest, totals["pixels"])}

        if self.region_loss is not None:
            region_loss = lovasz_softmax if self.region_loss == "lovasz" else dice
            loss = region_loss(logits, target, counts, totals["pixels"])
            parts[self.region_loss] = (self.region_weight or 1.0) * loss
        return parts

    def check_teacher(self, teacher: Task) -> None:
        """Any decoder teaches any other."""

    def soft_targets(
        self, raw: Tensor, settings: SoftLoss, order: Tensor | None, mirrored: bool, zoom: float
    ) -> dict[str, Tensor]:
        """shares: [B, K, h, w] of the classes, at the temperature."""
        logits = raw.float() if order is None else raw.float().index_select(1, order)
        shares = (logits / (settings.temperature or TEMPERATURE)).softmax(dim=1)
        return {"shares": shares.flip(-1) if mirrored else shares}

    def distill(
        self, raw: Tensor, soft: dict[str, Tensor], totals: dict[str, Tensor], settings: SoftLoss
    ) -> dict[str, Tensor]:
        """Part "kl", over all pixels of images."""
        logits = raw.float()
        temperature = settings.temperature or TEMPERATURE
        shares = resize_like(soft["shares"], logits)
        loss = soft_cross_entropy(logits, shares, soft["content"], totals["soft_area"], temperature=temperature)
        return {"kl": loss}

    def predict(self, raw: Tensor, metas: Sequence[ImageMeta], size: tuple[int, int]) -> list[NDArray[np.uint8]]:
        return [classes.cpu().numpy() for classes in self.predict_for_meter(raw, metas, size)]

    def predict_for_meter(self, raw: Tensor, metas: Sequence[ImageMeta], size: tuple[int, int]) -> list[Tensor]:
        return [_best(one, dim=0) for one in each_to_original(self._annotated(raw, metas), size, metas)]

    def predict_mirrored(
        self, raw: Tensor, mirrored: Tensor, metas: Sequence[ImageMeta], size: tuple[int, int]
    ) -> list[NDArray[np.uint8]]:
        """The classes of the summed logits."""
        both = self._annotated(raw, metas), self._annotated(mirrored, metas)
        views = zip(*(each_to_original(one, size, metas) for one in both), strict=True)
        return [_best(one + other.flip(-1), dim=0).cpu().numpy() for one, other in views]

    def pseudo_labels(
        self,
        raw: Tensor,
        mirrored: Tensor | None,
        metas: Sequence[ImageMeta],
        size: tuple[int, int],
        confidence: float,
        unsure: float | None,
    ) -> list[NDArray[np.uint8]]:
        """The predicted classes; IGNORE where the best one's share is below `confidence`."""
        labels = []
        views = [raw] if mirrored is None else [raw, mirrored]
        each = [each_to_original(self._annotated(view, metas), size, metas) for view in views]
        for one, *others in zip(*each, strict=True):
            logits = (one + others[0].flip(-1)) / 2 if others else one
            shares, classes = logits.softmax(dim=0).max(dim=0)
            labels.append(torch.where(shares >= confidence, classes, IGNORE).byte().cpu().numpy())
        return labels

    def _annotated(self, raw: Tensor, metas: Sequence[ImageMeta]) -> Tensor:
        """The logits, without those of classes that the data set of an image does not look for."""
        annotated = self.annotated_classes(metas, raw)
        return raw if annotated is None else torch.where(annotated[..., None, None], raw.float(), NO_CLASS_LOGIT)

    decoded_outputs: ClassVar[dict[str, str]] = {"classes": "uint8 [B, H, W]: class ids, at the input's size"}

    def decode_in_graph(self, raw: Tensor, size: tuple[int, int], content: Tensor, zoom: float) -> dict[str, Tensor]:
        return {"classes": _best(resize(raw.float(), size), dim=1)}

    def from_decoded(self, outputs: dict[str, NDArray[Any]], metas: Sequence[ImageMeta]) -> list[NDArray[np.uint8]]:
        """Nearest class of the input's pixels; `predict` mixes logits instead, which is finer along edges."""
        predictions = []
        for classes, meta in zip(outputs["classes"], metas, strict=True):
            inside = meta.content_of(classes)
            nearest = cv2.resize(inside, meta.size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
            predictions.append(np.asarray(nearest, np.uint8))
        return predictions

    def meter(self, space: LabelSpace | None) -> Meter:
        assert space is not None
        return SegmentationMeter(space)

    def truth(self, sample: Sample) -> NDArray[np.uint8] | None:
        return sample.segmentation

    def draw(
        self, image: NDArray[np.uint8], prediction: NDArray[np.uint8], space: LabelSpace | None, options: DrawOptions
    ) -> NDArray[np.uint8]:
        assert space is not None
        return draw_segmentation(image, prediction, space, all_classes=options.all_classes)

    def draw_errors(
        self,
        image: NDArray[np.uint8],
        prediction: NDArray[np.uint8],
        truth: NDArray[np.uint8],
        space: LabelSpace | None,
        options: DrawOptions,
    ) -> NDArray[np.uint8]:
        return draw_segmentation_errors(image, prediction, truth)


def _best(logits: Tensor, dim: int) -> Tensor:
    """uint8 ids of the classes with the largest logit, the first of equal ones.

    torch's `argmax` takes three times as long as its `max` on a CPU, along an axis that is not the last one in memory;
    compiled and exported it is the faster one.
    """
    best = logits.argmax(dim=dim) if torch.compiler.is_compiling() else logits.max(dim=dim).indices
    return best.to(torch.uint8)


class _Classifier(nn.Module):
    """Decoder, dropout, one 1x1 convolution: maps -> logits [B, K, h, w]."""

    def __init__(self, decoder: nn.Module, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.decoder = decoder
        self.dropout = nn.Dropout2d(dropout)
        self.out = nn.Conv2d(int(decoder.out_channels), num_classes, 1)  # type: ignore[arg-type]

    def forward(self, maps: Maps) -> Tensor:
        logits: Tensor = self.out(self.dropout(self.decoder(maps)))
        return logits
