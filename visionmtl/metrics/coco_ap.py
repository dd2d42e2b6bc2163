"""Average precision and recall as COCO defines them, and the twelve lines in which its own evaluator prints them."""

import contextlib
import importlib
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from visionmtl.io.coco.annotations import canonical, check_unit, encode, read_truth
from visionmtl.io.coco.results import Row, is_finite, read_rows
from visionmtl.structures import LabelSpace

Backend = Literal["pycocotools", "faster_coco_eval"]
IouType = Literal["bbox", "segm"]
Annotation = dict[str, Any]

_CUTS = (1, 10, 100)
RECALLS = tuple(round(number / 100, 2) for number in range(101))
SIZES = {"small": 1, "medium": 2, "large": 3}  # positions in pycocotools' areaRngLbl; 0 is all
AP50, AP75 = 0, 5  # positions in pycocotools' iouThrs

_LINES = (  # metric, title, IoU, area, position in maxDets
    ("ap", "Average Precision (AP)", "0.50:0.95", "all", -1),
    ("ap50", "Average Precision (AP)", "0.50", "all", -1),
    ("ap75", "Average Precision (AP)", "0.75", "all", -1),
    *((f"ap_{size}", "Average Precision (AP)", "0.50:0.95", size, -1) for size in SIZES),
    *((f"ar{cut}", "Average Recall    (AR)", "0.50:0.95", "all", at) for at, cut in enumerate((1, 10, 100))),
    *((f"ar_{size}", "Average Recall    (AR)", "0.50:0.95", size, -1) for size in SIZES),
)


def score_files(
    results: Path,
    truth: Path,
    backend: Backend = "pycocotools",
    kind: IouType | None = None,
    predicted: LabelSpace | None = None,
    by_name: bool | None = None,
) -> tuple[IouType, dict[str, Any], list[str]]:
    """A results file scored against an annotation file, with neither images nor a network.

    kind: what is scored; None: boxes where every result has one, else masks.
    predicted: the classes behind the category ids of the results, where they are known
    by_name: whether the image ids of the results are file names without ending; None: not known, they are where all
    are such names and not all are ids of `truth`
    Returns the kind, what `DetectionMeter.compute` gives over all images of `truth`, and what is odd about the files.
    Results of categories that the annotations do not have count nowhere, as in COCO's own evaluation; `ignored` tells
    how many. Results that are not finite are `dropped`.
    """
    rows, notes = read_rows(results), []
    has_boxes, has_masks = (sum(key in row for row in rows) for key in ("bbox", "segmentation"))
    if kind is None:
        kind = "bbox" if has_boxes or not rows else "segm"
        if kind == "bbox" and has_masks:
            notes.append(f"{results} holds masks too; its boxes are scored; --iou-type segm scores the masks")
    fitting = has_boxes if kind == "bbox" else has_masks
    if fitting < len(rows):
        what, other = ("boxes", "masks alone") if kind == "bbox" else ("masks", "boxes alone")
        raise ValueError(
            f"{results} has {what} in {fitting} of {len(rows)} results and {other} in others; every result needs what "
            "is scored; split the file, or choose with --iou-type bbox or segm"
        )
    annotated = read_truth(truth, masks=kind == "segm")
    notes += annotated.notes

    found_images = {row["image_id"] for row in rows}
    number_of = {image_id: number for number, image_id in enumerate(annotated.image_ids, start=1)}
    named = {} if by_name is False else _numbers_by_name(annotated.names)
    if named and found_images <= named.keys():
        if by_name or not found_images <= number_of.keys():
            number_of = named
            notes += [] if by_name else [f"{results} has file names of {truth} as image ids, and is scored by them"]
        elif elsewhere := sorted(one for one in found_images if named[one] != number_of[one]):
            notes.append(
                f"image_id {elsewhere[0]} of {results} is an id of {truth}, and the file name of another image there; "
                "ids count"
            )
    if strangers := sorted(found_images - number_of.keys()):
        raise ValueError(
            f"{results} has results for {len(strangers)} image(s) that {truth} does not list, the first is "
            f"{strangers[0]}; both must be of one split; give the annotations of the split that was predicted"
        )
    label_of = {category_id: label for label, (category_id, _) in enumerate(annotated.categories)}
    if predicted is not None:
        _check_numbers(results, truth, predicted, annotated.categories)
    known = [at for at, row in enumerate(rows) if row["category_id"] in label_of]
    if rows and not known:
        raise ValueError(
            f"{results}: none of {len(rows)} results has a category of {truth}; the first has category_id "
            f"{rows[0]['category_id']!r}, and {', '.join(map(str, label_of)):.200} are annotated; write these ids"
        )
    finite = [at for at in known if is_finite(rows[at])]
    if known and not finite:
        raise ValueError(
            f"{results}: none of {len(known)} results has numbers alone as box and score; finite ones are needed; "
            "look at what wrote NaN or infinity"
        )
    if kind == "bbox":
        sizes = {image["id"]: (image.get("height", 0), image.get("width", 0)) for image in annotated.images}
        found = [rows[at] for at in finite]
        xywh = np.array([row["bbox"] for row in found], np.float64).reshape(-1, 4)
        check_unit(str(results), xywh, np.array([sizes[number_of[row["image_id"]]] for row in found]).reshape(-1, 2))
    counted: list[Annotation] = []
    for at in finite:
        row: Row = {**rows[at], "image_id": number_of[rows[at]["image_id"]]}
        row["category_id"] = label_of[row["category_id"]]
        if kind == "segm":
            image = annotated.images[row["image_id"] - 1]
            size = [image.get("height", 0), image.get("width", 0)]
            row["segmentation"] = {"size": size, "counts": encode(results, "entry", at, rows, size)}
        counted.append(row)

    counts = [0] * len(label_of)
    for annotation in annotated.annotations:
        counts[annotation["category_id"]] += not annotation["iscrowd"]
    present = [label for label, count in enumerate(counts) if count]
    precision, recall = precision_and_recall(
        annotated.annotations, counted, annotated.images, present, _CUTS, kind, backend
    )
    names = [name for _, name in annotated.categories]
    result = summary(precision, recall, [names[label] for label in present], _CUTS)
    for label in present:
        result["per_class"][names[label]]["boxes"] = counts[label]
    summed = {
        "images": len(annotated.images),
        **result,
        "absent": [name for name, count in zip(names, counts, strict=True) if not count],
        "dropped": len(known) - len(finite),
        "ignored": len(rows) - len(known),
        "protocol": "coco",
    }
    return kind, summed, notes


def _numbers_by_name(names: Sequence[str]) -> dict[str, int]:
    """The number of the image of each name, and of each name without its folders that only one image has."""
    numbers = {name: number for number, name in enumerate(names, start=1) if name}
    short = {name: canonical(name.rpartition("/")[2]) or "" for name in numbers}
    counts = Counter(short.values())
    return {short[name]: number for name, number in numbers.items() if counts[short[name]] == 1} | numbers


def _check_numbers(results: Path, truth: Path, predicted: LabelSpace, categories: Sequence[tuple[str, str]]) -> None:
    """Raise ValueError where the annotations give a predicted class another id than the results have for it."""
    ids = {name: category_id for category_id, name in categories}
    for name, number in zip(predicted.classes, predicted.official_ids, strict=True):
        if ids.get(name, str(number)) != str(number):
            raise ValueError(
                f"{results} has category_id {number} for {name!r}, as submission.json beside it says, and in {truth} "
                f"it is {ids[name]}; both must number classes alike; predict for the data set of these annotations, "
                "whose ids `eval --save-predictions` writes"
            )


def precision_and_recall(
    truth: Sequence[Annotation],
    found: Sequence[Annotation],
    images: Sequence[Mapping[str, Any]],
    classes: Sequence[int],
    cuts: Sequence[int],
    kind: IouType = "bbox",
    backend: Backend = "pycocotools",
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Precision [T, R, K, A, M] and recall [T, K, A, M]; -1 where there is no truth.

    T IoU thresholds .50:.05:.95, R the 101 recalls, K classes, A areas (all, small, medium, large), M `cuts`.
    truth, found: annotations of COCO's json; ids are given anew, since pycocotools reads an id of 0 as "unmatched".
    """
    if not classes:
        return np.zeros((10, len(RECALLS), 0, 4, len(cuts))), np.zeros((10, 0, 4, len(cuts)))
    coco_class, evaluation_class = check_backend(backend)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints at every step
        truth_index = _index(coco_class, truth, images, classes)
        found_index = _index(coco_class, [_whole(one, kind) for one in found], images, classes)
        evaluation = evaluation_class(truth_index, found_index, kind)
        evaluation.params.maxDets = list(cuts)
        evaluation.evaluate()
        evaluation.accumulate()
    shape = len(evaluation.params.iouThrs), len(evaluation.params.recThrs), len(classes), 4, len(cuts)
    precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]
    return np.asarray(precision).reshape(shape), np.asarray(recall).reshape(shape[0], *shape[2:])


def summary(
    precision: NDArray[np.float64], recall: NDArray[np.float64], names: Sequence[str], cuts: Sequence[int]
) -> dict[str, Any]:
    """ap, ap50, ap75, ap_small/medium/large, an ar for each of `cuts`, ar_small/medium/large; None without truth.

    Also per_class {name: {ap, ap50}} and pr_curves {"iou50", "iou75"}: precision at RECALLS, mean over the classes.
    """
    result: dict[str, Any] = {
        "ap": _mean(precision[:, :, :, 0, -1]),
        "ap50": _mean(precision[AP50, :, :, 0, -1]),
        "ap75": _mean(precision[AP75, :, :, 0, -1]),
    }
    for name, area in SIZES.items():
        result[f"ap_{name}"] = _mean(precision[:, :, :, area, -1])
    for position, cut in enumerate(cuts):
        result[f"ar{cut}"] = _mean(recall[:, :, 0, position])
    for name, area in SIZES.items():
        result[f"ar_{name}"] = _mean(recall[:, :, area, -1])
    result["per_class"] = {
        name: {"ap": _mean(precision[:, :, k, 0, -1]), "ap50": _mean(precision[AP50, :, k, 0, -1])}
        for k, name in enumerate(names)
    }
    result["pr_curves"] = {
        f"iou{iou}": [_mean(at) for at in precision[threshold, :, :, 0, -1]]
        for iou, threshold in ((50, AP50), (75, AP75))
    }
    return result


def official_lines(result: Mapping[str, Any]) -> list[str]:
    """The twelve lines of COCO's own evaluator, letter by letter; -1.000 where there is no truth."""
    missing = [metric for metric, *_ in _LINES if metric not in result]
    if missing:
        raise ValueError(
            f"the result has no {', '.join(missing)}; COCO's table is defined for 1, 10 and 100 detections; "
            "evaluate with max_detections=100"
        )
    return [
        f" {title} @[ IoU={iou:<9} | area={area:>6} | maxDets={(1, 10, 100)[at]:>3} ] = "
        f"{-1.0 if result[metric] is None else result[metric]:.3f}"
        for metric, title, iou, area, at in _LINES
    ]


def check_backend(name: Backend) -> tuple[Any, Any]:
    """Its classes of annotations and of evaluation. Raises ValueError where it is not installed."""
    if name == "pycocotools":
        return COCO, COCOeval
    try:
        package = importlib.import_module("faster_coco_eval")
    except ModuleNotFoundError as error:
        raise ValueError(
            "backend 'faster_coco_eval' is not installed; 'pycocotools' always is; "
            "run `pip install visionmtl[fast]`, or choose 'pycocotools'"
        ) from error
    return package.COCO, package.COCOeval_faster


def _whole(found: Annotation, kind: IouType) -> Annotation:
    """A result with the fields that the evaluator derives from it."""
    if kind == "bbox":
        return {**found, "area": found["bbox"][2] * found["bbox"][3], "iscrowd": 0}
    return {**found, "area": float(masks.area(found["segmentation"])), "iscrowd": 0}


def _index(
    coco_class: Any, annotations: Sequence[Annotation], images: Sequence[Mapping[str, Any]], classes: Sequence[int]
) -> Any:
    coco = coco_class()
    coco.dataset = {
        "images": [dict(image) for image in images],
        "categories": [{"id": label, "name": str(label)} for label in classes],
        "annotations": [{**one, "id": number} for number, one in enumerate(annotations, start=1)],
    }
    coco.createIndex()
    return coco


def _mean(values: NDArray[np.float64]) -> float | None:
    known = values[values > -1]
    return float(known.mean()) if known.size else None
