"""What is wrong with one sample: each field by itself, against its image, and against its label space."""

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from visionmtl.data.check.rules import MAX_BEYOND_PX, MIN_SIDE_PX, UNIT_TOLERANCE, Problem
from visionmtl.io.depth_maps import PLAUSIBLE_M
from visionmtl.structures import IGNORE, LABEL_FIELDS, Boxes, LabelSpace, Sample

_BOTTOM = 8  # the last eighth of the rows, in which a cut JPEG shows first


def find_problems(sample: Sample, provides: Mapping[str, LabelSpace | None], channels: int = 3) -> list[Problem]:
    """All that is wrong, at most one problem for each rule and field.

    provides: see `DatasetReader.provides`; channels: that the images shall have
    """
    if bad := _image_form(sample.image, channels):
        return [bad]
    problems = list(_image(sample.image))
    for field in LABEL_FIELDS:
        label = getattr(sample, field)
        if label is None:
            continue
        if field not in provides:
            problems.append(Problem("field_unexpected", field, f"labelled, but provided are {', '.join(provides)}"))
        elif field == "image_labels":
            problems += _image_labels(label, provides[field])
        elif isinstance(label, Boxes):
            problems += _boxes(label, provides[field], sample.image.shape[:2])
        elif bad := _map_form(field, label):
            problems.append(bad)
        elif label.shape[:2] != sample.image.shape[:2]:
            sizes = " and ".join(f"{values.shape[0]}x{values.shape[1]}" for values in (label, sample.image))
            problems.append(Problem("size_differs", field, f"label and image are {sizes} px"))
        elif field == "segmentation":
            problems += _segmentation(label, provides[field])
        elif field == "depth_m":
            problems += _depth(label)
        else:
            problems += _normals(label)
    return problems


def _image_form(image: NDArray, channels: int) -> Problem | None:
    if image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == channels and image.size:
        return None
    return Problem("image_form", "image", f"{image.dtype} {list(image.shape)}")


def _image(image: NDArray[np.uint8]) -> Iterator[Problem]:
    height, width = image.shape[:2]
    if min(height, width) < MIN_SIDE_PX:
        yield Problem("image_small", "image", f"{height}x{width} px")
    colour = image[-1, -1]
    if _is_even(image[-max(1, height // _BOTTOM) :], colour):
        if _is_even(image, colour):
            yield Problem("image_constant", "image", f"every pixel is {colour.tolist()}")
        elif colour.min() > 8 and colour.max() < 248:  # black and white are borders
            yield Problem("image_cut", "image", f"the lowest eighth is all {colour.tolist()}")


def _is_even(image: NDArray[np.uint8], colour: NDArray[np.uint8]) -> bool:
    return bool((image[0] == colour).all() and (image == colour).all())  # the first row decides nearly always


def _boxes(boxes: Boxes, space: LabelSpace | None, size: tuple[int, ...]) -> Iterator[Problem]:
    count = len(boxes.labels)
    shapes = [list(values.shape) for values in (boxes.xyxy, boxes.labels, boxes.crowd, boxes.area)]
    if shapes != [[count, 4], [count], [count], [count]]:
        yield Problem("form", "boxes", f"xyxy, labels, crowd and area are {shapes}")
        return
    xyxy, height, width = boxes.xyxy, *size
    finite = np.isfinite(xyxy).all(axis=1)
    empty = finite & ~(xyxy[:, 2:] > xyxy[:, :2]).all(axis=1)
    outside = finite & ~empty & ((xyxy[:, 2:] <= 0).any(axis=1) | (xyxy[:, :2] >= (width, height)).any(axis=1))
    over = np.concatenate([-xyxy[:, :2], xyxy[:, 2:] - (width, height)], axis=1).max(axis=1, initial=-np.inf)
    beyond = finite & ~empty & ~outside & (over > MAX_BEYOND_PX)
    num_classes = len(space.classes) if space else 0
    unknown = (boxes.labels < 0) | (boxes.labels >= num_classes)
    area = ~(np.isfinite(boxes.area) & (boxes.area >= 0))
    repeated = _repeated(np.column_stack([xyxy, boxes.labels, boxes.crowd]))

    checks = (
        ("box_not_finite", ~finite, "is", xyxy),
        ("box_empty", empty, "without width or height is", xyxy),
        ("box_outside", outside, f"outside its {height}x{width} px is", xyxy),
        ("box_beyond", beyond, f"over the edge of its {height}x{width} px is", xyxy),
        ("box_class", unknown, f"of a class outside 0 to {num_classes - 1} has", boxes.labels),
        ("box_area", area, "has area", boxes.area),
        ("box_repeated", repeated, "given before is", xyxy),
    )
    for rule, where, what, values in checks:
        if where.any():
            first = int(np.argmax(where))
            text = (
                f"{np.count_nonzero(where)} of {count} boxes; the first, number {first}, {what} {_short(values[first])}"
            )
            yield Problem(rule, "boxes", text)


def _repeated(rows: NDArray) -> NDArray[np.bool_]:
    """bool [N]: equal to an earlier row; NaN equals nothing."""
    _, first = np.unique(rows, axis=0, return_index=True)
    repeated = np.ones(len(rows), bool)
    repeated[first] = False
    return repeated & np.isfinite(rows).all(axis=1)


def _short(value: NDArray) -> str:
    return f"[{', '.join(f'{x:.6g}' for x in np.atleast_1d(value).tolist())}]"


def _image_labels(labels: NDArray[np.int64], space: LabelSpace | None) -> Iterator[Problem]:
    num_classes = len(space.classes) if space else 0
    if labels.ndim != 1 or labels.dtype != np.int64 or len(np.unique(labels)) < len(labels):
        yield Problem("form", "image_labels", f"{labels.dtype} {list(labels.shape)}: {labels.ravel()[:8].tolist()}")
    elif ((labels < 0) | (labels >= num_classes)).any():
        yield Problem("class_outside", "image_labels", f"values {labels[:8].tolist()}, of {num_classes} classes")


def _map_form(field: str, label: NDArray) -> Problem | None:
    dtype, axes = {"segmentation": (np.uint8, 2), "depth_m": (np.float32, 2), "normals": (np.float32, 3)}[field]
    if label.dtype == dtype and label.ndim == axes and label.shape[2:] in ((), (3,)):
        return None
    return Problem("form", field, f"{label.dtype} {list(label.shape)}")


def _segmentation(classes: NDArray[np.uint8], space: LabelSpace | None) -> Iterator[Problem]:
    num_classes = len(space.classes) if space else 0
    counts = np.bincount(classes.ravel(), minlength=IGNORE + 1)
    outside = [int(k) for k in np.flatnonzero(counts) if k >= num_classes and k != IGNORE]
    if outside:
        share = counts[outside].sum() / classes.size
        text = f"values {outside[:8]} in {share:.2%} of the pixels, of {num_classes} classes"
        yield Problem("class_outside", "segmentation", text)
    if counts[IGNORE] == classes.size:
        yield Problem("nothing_labelled", "segmentation", f"all {classes.size} pixels are {IGNORE}")


def _depth(depth_m: NDArray[np.float32]) -> Iterator[Problem]:
    finite = np.isfinite(depth_m)
    if not finite.all():
        yield Problem("depth_not_finite", "depth_m", f"{np.count_nonzero(~finite)} pixels are NaN or infinite")
    if (depth_m < 0).any():
        text = f"{np.count_nonzero(depth_m < 0)} pixels are negative, down to {depth_m[finite].min():.6g}"
        yield Problem("depth_negative", "depth_m", text)
    measured = depth_m[finite & (depth_m > 0)]
    if not measured.size:
        yield Problem("nothing_labelled", "depth_m", "no pixel is measured")
        return
    low, high = PLAUSIBLE_M
    for what, beyond in (("below", measured < low), ("beyond", measured > high)):
        if np.count_nonzero(beyond) * 2 > measured.size:
            text = (
                f"half of the measured pixels are {what} {np.median(measured):.4g} m ({low:g} to {high:g} m is usual)"
            )
            yield Problem("depth_implausible", "depth_m", text)
    if measured.size > 1 and measured.min() == measured.max():
        yield Problem("depth_constant", "depth_m", f"all {measured.size} measured pixels are {measured[0]:.6g} m")


def _normals(normals: NDArray[np.float32]) -> Iterator[Problem]:
    length = np.linalg.norm(normals, axis=2)
    finite = np.isfinite(length)
    if not finite.all():
        yield Problem("normals_not_finite", "normals", f"{np.count_nonzero(~finite)} pixels are NaN or infinite")
    known = finite & (length > 0)
    wrong = known & (abs(length - 1) > UNIT_TOLERANCE)
    if wrong.any():
        text = f"{np.count_nonzero(wrong)} vectors are not of length 1, the first is {length[wrong][0]:.4g}"
        yield Problem("normals_length", "normals", text)
    if not known.any():
        yield Problem("nothing_labelled", "normals", "no pixel is known")
