"""What a report shows beyond a split's numbers: its best and worst images, confusions, and depth errors by distance."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visionmtl.inference.ranking import image_metric, ranked
from visionmtl.metrics.base import Meter
from visionmtl.metrics.segmentation import SegmentationMeter
from visionmtl.structures import LabelSpace, Sample
from visionmtl.tasks.base import Task
from visionmtl.visualization import draw
from visionmtl.visualization.canvas import Picture
from visionmtl.visualization.draw import DrawOptions
from visionmtl.visualization.palette import recolour
from visionmtl.visualization.panels import at_cell_size, common_range, errors, is_depth, with_distances

NUM_WORST, NUM_BEST = 2, 1
"""Images shown of each task."""
CELL_PX = 640
DISTANCE_EDGES_M = 2.0 ** np.arange(-2, 8.5, 0.5)
"""Depth errors are collected by true distance, two bins an octave from 0.25 to 256 m."""


@dataclass(frozen=True)
class ImagePanels:
    """One image with pictures of what each task predicts, what is true, and where they differ."""

    title: str
    image: Picture
    panels: Mapping[str, Mapping[str, Picture]]
    """By task: "prediction", "truth" and "errors", those that there are; the top left is where the image lies."""


@dataclass
class _Kept:
    """An image that is among the best or worst so far."""

    sample: Sample
    predictions: Mapping[str, Any]
    evaluated: Sequence[str]
    value: float


@dataclass
class Evidence:
    """Sees every image of an evaluation (`add` is its `on_image`) and keeps what a report shows of it."""

    tasks: Mapping[str, Task]
    spaces: Mapping[str, LabelSpace | None]
    meters: Mapping[str, Meter] = field(default_factory=dict)
    """Fresh ones by task, where they are not the tasks' own."""
    _kept: dict[tuple[str, str], list[_Kept]] = field(default_factory=dict)  # by task, and "best" or "worst"
    _errors: dict[str, NDArray[np.float64]] = field(default_factory=dict)  # [2, bins]: sums of relative errors, pixels

    def add(self, sample: Sample, predictions: Mapping[str, Any], evaluated: Sequence[str]) -> None:
        """Look at one image; predictions by task, in user units; evaluated: the tasks that it is labelled for."""
        for name in evaluated:
            task, prediction = self.tasks[name], predictions[name]
            meter = self.meters.get(name) or task.meter(self.spaces[name])
            value = image_metric(meter, sample, prediction, task.primary_metric)
            if value is not None:
                for kind, num in (("worst", NUM_WORST), ("best", NUM_BEST)):
                    self._keep(name, kind, num, _Kept(sample, predictions, evaluated, value))
            if is_depth(prediction) and sample.depth_m is not None:
                self._add_depth(name, prediction, sample.depth_m)

    def _keep(self, name: str, kind: str, num: int, new: _Kept) -> None:
        kept = [*self._kept.get((name, kind), ()), new]
        order = ranked([of.value for of in kept], self.tasks[name])
        self._kept[name, kind] = [kept[at] for at in (order if kind == "worst" else order[::-1])[:num]]

    def _add_depth(self, name: str, depth_m: NDArray[np.float32], true_m: NDArray[np.float32]) -> None:
        known = true_m > 0
        relative = np.abs(depth_m[known] / true_m[known] - 1)
        bins = np.digitize(true_m[known], DISTANCE_EDGES_M) - 1
        inside = (bins >= 0) & (bins < len(DISTANCE_EDGES_M) - 1)
        num = len(DISTANCE_EDGES_M) - 1
        sums = np.bincount(bins[inside], relative[inside], num), np.bincount(bins[inside], minlength=num)
        self._errors[name] = self._errors.get(name, 0) + np.asarray(sums, np.float64)

    def depth_by_distance(self) -> dict[str, list[tuple[float, float, float]]]:
        """By task: (metres in the middle of a bin, mean relative error, share of pixels); rare distances left out."""
        middles = np.sqrt(DISTANCE_EDGES_M[1:] * DISTANCE_EDGES_M[:-1])
        by_task = {}
        for name, (sums, counts) in self._errors.items():
            shares = counts / max(counts.sum(), 1)
            by_task[name] = [
                (float(middle), float(total / count), float(share))
                for middle, total, count, share in zip(middles, sums, counts, shares, strict=True)
                if share >= 1e-3
            ]
        return by_task

    def images(self) -> list[ImagePanels]:
        """The worst images of each task, then its best."""
        titles: dict[int, list[str]] = {}  # one image may be several tasks' best or worst
        chosen: dict[int, _Kept] = {}
        for (name, kind), kept in self._kept.items():
            for of in kept:
                metric = self.tasks[name].primary_metric
                titles.setdefault(id(of.sample), []).append(f"{kind} {name}: {metric} {of.value:.4g}")
                chosen[id(of.sample)] = of
        return [
            self._panels(f"{'; '.join(titles[key])} (image {of.sample.image_id})", of) for key, of in chosen.items()
        ]

    def _panels(self, title: str, kept: _Kept) -> ImagePanels:
        sample, predictions = kept.sample, kept.predictions
        image = at_cell_size(sample.image, CELL_PX)
        options, spaces = DrawOptions(), recolour(self.spaces)
        truth = {name: self.tasks[name].truth(sample) if name in kept.evaluated else None for name in predictions}
        rows = {
            row: {
                name: draw.scaled(value, sample.image.shape[:2], image.shape[:2])
                for name, value in with_distances(values, options.min_score).items()
            }
            for row, values in (("prediction", predictions), ("truth", truth))
        }
        options = replace(options, depth_range_m=common_range(rows))
        panels: dict[str, dict[str, Picture]] = {}
        for name, prediction in rows["prediction"].items():
            task, space, true = self.tasks[name], spaces[name], rows["truth"][name]
            panels[name] = {"prediction": task.draw(image, prediction, space, options)}
            if true is not None:
                panels[name]["truth"] = task.draw(image, true, space, options)
            if (wrong := errors(task, image, prediction, true, space, options)) is not None:
                panels[name]["errors"] = wrong
        return ImagePanels(title, image, panels)


@dataclass(frozen=True)
class Confusion:
    """How often a class was taken for another."""

    classes: Sequence[str]
    shares: NDArray[np.float64]
    """[K, K]: of the pixels of a true class (row), the share predicted as each class; NaN rows have no pixel."""

    def largest(self, num: int) -> list[tuple[str, str, float]]:
        """(true class, predicted class, share) of the largest shares off the diagonal of 1 % or more."""
        off = np.where(np.eye(len(self.classes), dtype=bool), 0, np.nan_to_num(self.shares))
        order = np.argsort(-off, axis=None)[:num]
        pairs = [np.unravel_index(at, off.shape) for at in order]
        return [(self.classes[t], self.classes[p], float(off[t, p])) for t, p in pairs if off[t, p] >= 0.01]


def confusions(meters: Mapping[str, Meter]) -> dict[str, Confusion]:
    """By name of the results, for meters that count pixels by class."""
    by_name = {}
    for name, meter in meters.items():
        if isinstance(meter, SegmentationMeter):
            table = meter.confusion().astype(np.float64)
            totals = table.sum(axis=1, keepdims=True)
            shares = np.where(totals > 0, table / np.maximum(totals, 1), np.nan)
            by_name[name] = Confusion(meter.classes, shares)
    return by_name
