"""How far an exported file's outputs are from those of the network in eager mode, task by task."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from visionmtl.data.collate import pad
from visionmtl.data.transforms.augment import fit
from visionmtl.export.exported import ExportedModel, Pixels
from visionmtl.export.graph import raw_tensors
from visionmtl.network import MultiTaskNet
from visionmtl.ops.boxes import pairwise_iou
from visionmtl.structures import Detections, ImageClasses, ImageMeta

MAP_TOLERANCE = 1e-3
"""Largest difference of a map, relative to its largest value."""
SCORE_TOLERANCE = 1e-3
LEAST_IOU = 0.99
LEAST_EQUAL = 0.999
"""Share of pixels with the same class: where two classes are equally likely, rounding decides."""
MOST_MISSING = 1e-3
"""Share of boxes without their like: of two with the same score, rounding decides which one takes away the other."""
STEP = 4
"""Images at once."""


@dataclass(frozen=True)
class Parity:
    """Of one task."""

    task: str
    text: str
    kept: bool
    """Whether it is within the tolerances."""


def compare(net: MultiTaskNet, exported: ExportedModel, images: Iterable[Pixels]) -> list[Parity]:
    """Compare an exported file with the network that it was made from, in float32 on the CPU.

    Raw outputs as they are, decoded ones as predictions at the size of the resized image.
    """
    net = net.float().cpu().eval()
    stream, chunks = iter(images), []
    while chunk := list(islice(stream, STEP)):
        of_chunk = _compare_decoded if exported.description["decoded"] else _compare_raw
        chunks.append(of_chunk(net, exported, chunk))
    return [_joined(name, [chunk[name] for chunk in chunks]) for name in net.tasks]


_Pairs = list[tuple[Any, Any]]
"""What eager gave, and what the file gave."""


def _compare_raw(net: MultiTaskNet, exported: ExportedModel, images: Sequence[Pixels]) -> dict[str, "_Differences"]:
    resized = [fit(image, exported.size)[0] for image in images]
    outputs = exported.run_padded(resized)
    with torch.inference_mode():
        raw = net(pad(resized, exported.size))
    return {
        name: _maps([(x.numpy(), outputs[key]) for key, x in raw_tensors(name, raw[name]).items()])
        for name in net.tasks
    }


def _compare_decoded(net: MultiTaskNet, exported: ExportedModel, images: Sequence[Pixels]) -> dict[str, "_Differences"]:
    resized, metas = zip(*(fit(image, exported.size, net.size) for image in images), strict=True)
    here = [ImageMeta(meta.content_size, meta.content_size, meta.zoom) for meta in metas]
    predictions = exported.predictions(exported.run_padded(resized), here)
    with torch.inference_mode():
        raw = net(pad(resized, exported.size))
    differences: dict[str, _Differences] = {}
    for name, task in net.tasks.items():
        expected = task.predict(raw[name], here, exported.size)
        pairs = [(eager, one[name]) for eager, one in zip(expected, predictions, strict=True)]
        if isinstance(expected[0], Detections):
            low = getattr(task, "min_score", 0.0)
            differences[name] = _boxes(pairs, low, getattr(task, "max_detections", None))
        elif isinstance(expected[0], ImageClasses):
            differences[name] = _maps([(_by_label(a), _by_label(b)) for a, b in pairs])
        elif expected[0].dtype.kind in "iu":
            differences[name] = _Differences(
                pixels=sum(a.size for a, _ in pairs), equal_pixels=sum(int((a == b).sum()) for a, b in pairs)
            )
        else:
            differences[name] = _maps(pairs)
    return differences


@dataclass(frozen=True)
class _Differences:
    relative: float | None = None
    """Of maps: the largest difference, relative to the largest value."""
    pixels: int = 0
    equal_pixels: int = 0
    boxes: int | None = None
    """Compared in all, of both."""
    missing: int = 0
    """Of these, without their like in the other."""
    at_limit: int = 0
    """Further ones without their like whose score is within the tolerance of where boxes are cut off."""
    worst_iou: float = 1.0
    worst_score: float = 0.0


def _maps(pairs: _Pairs) -> _Differences:
    scale = [max(float(np.abs(a).max()), 1e-12) for a, _ in pairs]
    # not max(), which passes over NaN
    return _Differences(float(np.max([np.abs(a - b).max() / s for (a, b), s in zip(pairs, scale, strict=True)])))


def _by_label(classes: ImageClasses) -> NDArray[np.float32]:
    return classes.scores[np.argsort(classes.labels)]


def _boxes(pairs: _Pairs, min_score: float, keep: int | None) -> _Differences:
    boxes, missing, at_limit, worst_iou, worst_score = 0, 0, 0, 1.0, 0.0
    for pair in pairs:
        cut = [one.scores.min() if len(one.scores) == keep else min_score for one in pair if len(one.scores)]
        limit = max(cut, default=min_score) + SCORE_TOLERANCE
        for one, other in (pair, pair[::-1]):
            boxes += len(one.scores)
            alike = _alike(one, other)
            overlaps = alike >= LEAST_IOU
            worst_iou = min([worst_iou, *alike.max(axis=1, initial=0)[overlaps.any(axis=1)]])
            differences = np.abs(one.scores[:, None] - other.scores[None])
            nearest = np.where(overlaps, differences, np.inf).min(axis=1, initial=np.inf)
            alone = nearest > SCORE_TOLERANCE
            worst_score = max([worst_score, *nearest[~alone]])
            missing += int((alone & (one.scores > limit)).sum())
            at_limit += int((alone & (one.scores <= limit)).sum())
    return _Differences(
        boxes=boxes, missing=missing, at_limit=at_limit, worst_iou=float(worst_iou), worst_score=float(worst_score)
    )


def _alike(one: Detections, other: Detections) -> NDArray[np.float32]:
    """IoU of every pair of one class, 0 of others, [D, D']."""
    overlaps = pairwise_iou(torch.from_numpy(one.xyxy)[None], torch.from_numpy(other.xyxy)[None])[0].numpy()
    return np.asarray(overlaps * (one.labels[:, None] == other.labels[None]), np.float32)


def _joined(task: str, parts: Sequence[_Differences]) -> Parity:
    if parts[0].boxes is not None:
        boxes, missing = sum(part.boxes or 0 for part in parts), sum(part.missing for part in parts)
        at_limit = sum(part.at_limit for part in parts)
        text = (
            f"{boxes - missing - at_limit} of {boxes} boxes equal (IoU >= {LEAST_IOU}, score within "
            f"{SCORE_TOLERANCE:g}), {missing} not, {at_limit} not at the score where boxes are cut off; worst IoU "
            f"{min(part.worst_iou for part in parts):.6f}, score {max(part.worst_score for part in parts):.1e}"
        )
        return Parity(task, text, missing <= MOST_MISSING * boxes and at_limit <= 0.01 * boxes)
    if parts[0].relative is not None:
        relative = float(np.max([part.relative for part in parts]))
        return Parity(task, f"largest difference {relative:.1e} of the largest value", relative <= MAP_TOLERANCE)
    share = sum(part.equal_pixels for part in parts) / sum(part.pixels for part in parts)
    return Parity(task, f"{share:.5%} of pixels equal", share >= LEAST_EQUAL)
