"""COCO average precision and recall of boxes, image by image and over ranks."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from visionmtl.metrics.base import Direction
from visionmtl.metrics.coco_ap import Annotation, Backend, check_backend, precision_and_recall, summary
from visionmtl.structures import Boxes, Detections, LabelSpace, Sample

_Image = tuple[str, Boxes, Detections]


class DetectionMeter:
    """The COCO protocol: IoU .50:.05:.95, 101 recall points, size bins on the truth's `area`, crowds neither hit
    nor miss.

    max_detections: cut per image *and class*, as in pycocotools; a cap per image is the model's job.
    backend: who counts; pycocotools is the reference, faster_coco_eval gives the same numbers sooner.
    Every labelled image counts, also one without boxes. Classes without (non-crowd) truth are left out and named, and
    so are those that a data set does not annotate (`Sample.annotated`), with what was found of them.
    """

    metrics: ClassVar[Mapping[str, Direction | None]] = {
        **dict.fromkeys(("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"), "max"),
        **dict.fromkeys(("ar[0-9]*", "ar_small", "ar_medium", "ar_large"), "max"),  # ar1, ar10, ar<max_detections>
        **dict.fromkeys(("per_class/*/ap", "per_class/*/ap50"), "max"),
        **dict.fromkeys(("per_class/*/boxes", "dropped")),
    }

    def __init__(self, space: LabelSpace, max_detections: int = 100, backend: Backend = "pycocotools") -> None:
        if max_detections < 1:
            raise ValueError(f"max_detections is {max_detections}; allowed is 1 or more; COCO's own value is 100")
        check_backend(backend)
        self.space = space
        self.max_detections = max_detections
        self.backend = backend
        self._images: list[_Image] = []
        self._dropped = 0
        self._annotated = np.zeros(len(space.classes), np.bool_)  # in some image

    def update(self, prediction: Detections, sample: Sample) -> None:
        """Count one image. Detections that are not finite are dropped, and the report says how many."""
        if sample.boxes is None:
            return
        for whose, labels in (("truth", sample.boxes.labels), ("prediction", prediction.labels)):
            if labels.size and not 0 <= labels.min() <= labels.max() < len(self.space.classes):
                raise ValueError(
                    f"image {sample.image_id!r}: the {whose} has class ids {labels.min()} to {labels.max()}; "
                    f"label space {self.space.name!r} has 0 to {len(self.space.classes) - 1}; "
                    "give the meter the space in which the labels were made"
                )

        finite = np.isfinite(prediction.xyxy).all(axis=1) & np.isfinite(prediction.scores)
        self._dropped += int((~finite).sum())
        annotated = sample.annotated.get("boxes")
        self._annotated |= True if annotated is None else annotated
        counted = finite if annotated is None else finite & annotated[prediction.labels]
        kept = Detections(prediction.xyxy[counted], prediction.scores[counted], prediction.labels[counted])
        self._images.append((sample.image_id, sample.boxes, kept))

    def state(self) -> dict[str, Any]:
        """Everything counted; pickles."""
        return {"images": list(self._images), "dropped": self._dropped, "annotated": self._annotated.copy()}

    def merge(self, state: dict[str, Any]) -> None:
        """Add another rank's images."""
        self._images.extend(state["images"])
        self._dropped += state["dropped"]
        self._annotated |= state["annotated"]

    def compute(self) -> dict[str, Any]:
        """ap, ap50, ap75, ap_small/medium/large, ar1, ar10, ar100, ar_small/medium/large; None where no truth exists.

        With another `max_detections` than 100 the last recall is called after it. Also: per_class {name: {ap, ap50,
        boxes}}, pr_curves (precision at 101 recalls, mean over classes, at IoU .5 and .75), absent (names of the
        classes without truth), dropped (detections that were not finite), protocol; where some classes are not
        annotated, also not_annotated (their names).
        """
        # ties between equal scores are broken by image order: by number, as COCO's ids, whatever rank an image was on
        images = sorted(self._images, key=lambda image: (len(image[0]), image[0]))
        counts = np.zeros(len(self.space.classes), np.int64)
        truth: list[Annotation] = []
        found: list[Annotation] = []
        for number, (_, boxes, detections) in enumerate(images, start=1):
            counts += np.bincount(boxes.labels[~boxes.crowd], minlength=len(counts))
            truth += _annotations(number, boxes.xyxy, boxes.labels, area=boxes.area, iscrowd=boxes.crowd)
            found += _annotations(number, detections.xyxy, detections.labels, score=detections.scores)
        present = np.flatnonzero(counts).tolist()

        cuts = sorted({cut for cut in (1, 10, self.max_detections) if cut <= self.max_detections})
        numbers = [{"id": number} for number in range(1, len(images) + 1)]
        precision, recall = precision_and_recall(truth, found, numbers, present, cuts, backend=self.backend)
        result = summary(precision, recall, [self.space.classes[label] for label in present], cuts)
        for label in present:
            result["per_class"][self.space.classes[label]]["boxes"] = int(counts[label])
        annotated = self._annotated | ~self._annotated.any()
        classes = list(zip(self.space.classes, counts, annotated, strict=True))
        result["absent"] = [name for name, count, known in classes if known and not count]
        result["dropped"] = self._dropped
        result["protocol"] = "coco" if self.max_detections == 100 else f"coco with maxDets {self.max_detections}"
        if not annotated.all():
            result["protocol"] += f", over the {annotated.sum()} of {len(annotated)} classes that are annotated"
            result["not_annotated"] = [name for name, _, known in classes if not known]
        return result


def _annotations(number: int, xyxy: NDArray[Any], labels: NDArray[Any], **columns: NDArray[Any]) -> list[Annotation]:
    corners = xyxy.astype(np.float64)
    boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)  # xywh
    rows = zip(boxes.tolist(), labels.tolist(), *(column.tolist() for column in columns.values()), strict=True)
    return [
        {"image_id": number, "bbox": bbox, "category_id": label, **dict(zip(columns, rest, strict=True))}
        for bbox, label, *rest in rows
    ]
