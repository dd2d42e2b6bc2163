"""Counts over samples: small, so that many can be added up, and as plain data and sentences for people."""

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from visionmtl.structures import IGNORE, LABEL_FIELDS, MAX_CLASSES, Boxes, LabelSpace, Sample

Numbers = Mapping[str, Any]
"""What is known of a data set as plain data; see `Checked.numbers`."""

SMALL_PX2, LARGE_PX2 = 32**2, 96**2
"""COCO's limits of small and large objects."""
UNITS = {"boxes": "boxes", "segmentation": "pixels", "image_labels": "images"}
"""What is counted by class, by label field."""
_MAX_SIZES = 5
_MAX_RANGES = 16
_BINS_PER_OCTAVE = 64  # 1.1 % wide
_LOW, _HIGH = -10, 20  # octaves, 1 mm to 1000 km; what lies beyond counts in the outermost bins
_NUM_BINS = (_HIGH - _LOW) * _BINS_PER_OCTAVE


def _edge_m(bins: float) -> float:
    return float(2 ** (bins / _BINS_PER_OCTAVE + _LOW))


@dataclass
class Tally:
    """Counts over the samples of one data set that could be read."""

    images: int = 0
    unlabelled: int = 0  # images without any label
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)  # images by (H, W)
    labelled: Counter[str] = field(default_factory=Counter)  # images by label field
    boxes_an_image: Counter[int] = field(default_factory=Counter)  # images by number of boxes
    labels_an_image: Counter[int] = field(default_factory=Counter)  # images by number of image labels
    crowds: int = 0
    by_size: Counter[str] = field(default_factory=Counter)  # boxes: small, medium, large; without crowds
    objects: Counter[tuple[str, int]] = field(default_factory=Counter)  # boxes or pixels by (field, class id)
    shown: Counter[tuple[str, int]] = field(default_factory=Counter)  # images by (field, class id)
    depth: NDArray[np.int64] = field(default_factory=lambda: np.zeros(_NUM_BINS, np.int64))  # measured pixels
    depth_pixels: int = 0  # measured or not
    depth_range_m: tuple[float, float] = (np.inf, 0.0)
    channels: NDArray[np.float64] | None = None
    """[3, C] pixels, sum, and sum of squares of the values 0..1 of each channel; None: of RGB, which is not counted."""

    def add(self, sample: Sample) -> None:
        """Count a sample; what is broken in it counts as far as it can."""
        self.images += 1
        self.sizes[int(sample.image.shape[0]), int(sample.image.shape[1])] += 1
        if sample.image.shape[2] != 3:
            values = sample.image.reshape(-1, sample.image.shape[2]) / 255
            self._add_channels(np.stack([np.full(values.shape[1], len(values)), values.sum(0), (values**2).sum(0)]))
        known = [name for name in LABEL_FIELDS if getattr(sample, name) is not None]
        self.labelled.update(known)
        self.unlabelled += not known
        if sample.boxes is not None:
            self._add_boxes(sample.boxes)
        if sample.segmentation is not None:
            self._add_classes("segmentation", sample.segmentation.ravel())
        if sample.depth_m is not None:
            self._add_depth(sample.depth_m)
        if sample.image_labels is not None:
            labels = sample.image_labels
            self.labels_an_image[labels.size] += 1
            self._add_classes("image_labels", labels[(labels >= 0) & (labels < MAX_CLASSES)])

    def _add_channels(self, sums: NDArray[np.float64] | None) -> None:
        if sums is not None:
            self.channels = sums if self.channels is None else self.channels + sums

    def _add_boxes(self, boxes: Boxes) -> None:
        self.boxes_an_image[len(boxes.labels)] += 1
        self.crowds += int(np.count_nonzero(boxes.crowd))
        area = boxes.area[~boxes.crowd]
        small, large = int(np.count_nonzero(area < SMALL_PX2)), int(np.count_nonzero(area >= LARGE_PX2))
        self.by_size.update(small=small, medium=len(area) - small - large, large=large)
        self._add_classes("boxes", boxes.labels[(boxes.labels >= 0) & (boxes.labels < MAX_CLASSES)])

    def _add_classes(self, name: str, values: NDArray) -> None:
        counts = np.bincount(values)
        for k in np.flatnonzero(counts).tolist():
            self.objects[name, k] += int(counts[k])
            self.shown[name, k] += 1

    def _add_depth(self, depth_m: NDArray[np.float32]) -> None:
        measured = depth_m[np.isfinite(depth_m) & (depth_m > 0)]
        self.depth_pixels += depth_m.size
        if not measured.size:
            return
        position = (np.log2(measured) - np.float32(_LOW)) * np.float32(_BINS_PER_OCTAVE)
        bins = np.clip(position, 0, _NUM_BINS - 1, out=position).astype(np.int64)
        self.depth += np.bincount(bins, minlength=_NUM_BINS)
        low, high = self.depth_range_m
        self.depth_range_m = min(low, float(measured.min())), max(high, float(measured.max()))

    def merge(self, other: "Tally") -> None:
        """Add the counts of other samples."""
        low, high = self.depth_range_m
        for name, value in vars(other).items():
            if name == "depth_range_m":
                self.depth_range_m = min(low, value[0]), max(high, value[1])
            elif name == "channels":
                self._add_channels(value)
            else:
                setattr(self, name, getattr(self, name) + value)

    def classes(self, name: str, space: LabelSpace) -> list[int]:
        """Class ids of the space that occur in a label field."""
        return [k for k in range(len(space.classes)) if self.objects[name, k]]

    def depth_quantile_m(self, share: float) -> float:
        """The depth below which this share of the measured pixels lies, to 1.1 %; some must be measured.

        Between two pixels it is interpolated, so that the median of an even number is the mean of the middle two.
        """
        place, cumulated = share * (self.depth.sum() - 1), np.cumsum(self.depth)
        bins = np.searchsorted(cumulated, np.floor([place, place + 1]), side="right").clip(max=_NUM_BINS - 1)
        low, high = (float(np.clip(_edge_m(at + 0.5), *self.depth_range_m)) for at in bins)
        return low + (high - low) * float(place % 1)

    def numbers(self, provides: Mapping[str, LabelSpace | None]) -> dict[str, Any]:
        """As plain data; of label fields only those that some image carries. provides: see `DatasetReader.provides`."""
        count = {
            "boxes": self._boxes, "segmentation": self._segmentation, "depth_m": self._depth,
            "image_labels": self._image_labels,
        }  # fmt: skip
        return {
            "read": self.images,
            "without_any_label": self.unlabelled,
            "labelled": {name: self.labelled[name] for name in provides},
            "sizes": self._sizes(),
            **({} if self.channels is None else {"channels": self._channels(self.channels)}),
            **{name: count[name](space) for name, space in provides.items() if self.labelled[name] and name in count},
        }

    @staticmethod
    def _channels(sums: NDArray[np.float64]) -> dict[str, list[float]]:
        """Mean and standard deviation of each channel over all pixels, on the scale 0..1."""
        mean = sums[1] / sums[0]
        std = np.sqrt(np.maximum(sums[2] / sums[0] - mean**2, 0))
        return {"mean": mean.round(4).tolist(), "std": std.round(4).tolist()}

    def _sizes(self) -> dict[str, Any]:
        """Heights and widths, px."""
        if not self.sizes:
            return {"different": 0}
        heights, widths = zip(*self.sizes, strict=True)
        return {
            "different": len(self.sizes),
            "height": [min(heights), max(heights)],
            "width": [min(widths), max(widths)],
            "most": [{"height": h, "width": w, "images": n} for (h, w), n in self.sizes.most_common(_MAX_SIZES)],
        }

    def _boxes(self, space: LabelSpace | None) -> dict[str, Any]:
        counts = list(self.boxes_an_image.elements())
        return {
            **self._classes("boxes", space),
            "total": sum(counts),
            "crowds": self.crowds,
            "images_without": self.boxes_an_image[0],
            "an_image": {"mean": statistics.mean(counts), "median": statistics.median(counts), "max": max(counts)},
            **{size: self.by_size[size] for size in ("small", "medium", "large")},
        }

    def _segmentation(self, space: LabelSpace | None) -> dict[str, Any]:
        pixels = sum(count for (name, _), count in self.objects.items() if name == "segmentation")
        labelled_share = 1 - self.objects["segmentation", IGNORE] / pixels
        return {**self._classes("segmentation", space), "labelled_share": labelled_share}

    def _image_labels(self, space: LabelSpace | None) -> dict[str, Any]:
        an_image = {"min": min(self.labels_an_image), "max": max(self.labels_an_image)}
        return {**self._classes("image_labels", space), "an_image": an_image}

    def _classes(self, name: str, space: LabelSpace | None) -> dict[str, Any]:
        """The label space and its classes by id; shares are of all that is labelled."""
        total = sum(n for (field_name, k), n in self.objects.items() if field_name == name and k != IGNORE) or 1
        rows = [
            {"name": label, UNITS[name]: count, "images": self.shown[name, k], "share": count / total}
            for k, label in enumerate(space.classes if space else ())
            for count in [self.objects[name, k]]
        ]
        return {"space": space.name if space else None, "classes": rows}

    def _depth(self, space: LabelSpace | None) -> dict[str, Any]:
        measured = int(self.depth.sum())
        share = {"measured_share": measured / max(1, self.depth_pixels)}
        if not measured:
            return share
        (low, high), quantiles = self.depth_range_m, {"p01_m": 0.01, "median_m": 0.5, "p99_m": 0.99}
        middle = {name: self.depth_quantile_m(quantile) for name, quantile in quantiles.items()}
        return {**share, "min_m": low, **middle, "max_m": high, "histogram": self._histogram()}

    def _histogram(self) -> list[dict[str, float | None]]:
        """Half octaves, or wider where they would be too many; what is rare at the ends is one open range (None)."""
        total = self.depth.sum()
        cumulated = np.cumsum(self.depth) / total
        first, last = (int(np.searchsorted(cumulated, share)) for share in (0.001, 0.999))
        width = _BINS_PER_OCTAVE // 2
        while last // width - first // width + 1 > _MAX_RANGES:
            width *= 2
        edges = [edge * width for edge in range(first // width, last // width + 2)]
        shares = [float(self.depth[a:b].sum() / total) for a, b in pairwise([0, *edges, _NUM_BINS])]
        ends = pairwise([None, *map(_edge_m, edges), None])
        ranges = [{"from_m": low, "to_m": high, "share": part} for (low, high), part in zip(ends, shares, strict=True)]
        return [row for row in ranges if row["share"] or None not in (row["from_m"], row["to_m"])]


def sentences(numbers: Numbers) -> Iterator[str]:
    """A line on the images, one on what is labelled, and one on each label field."""
    read, asked, images = (numbers[name] for name in ("read", "asked", "images"))
    unreadable = f", {asked - read} could not be read" if asked > read else ""
    count = f"{read}{'' if asked == images else f' of {images}'} image{'' if images == 1 else 's'}"
    yield f"{count}{unreadable}, {_size_text(**numbers['sizes'])}"
    if channels := numbers.get("channels"):
        yield f"channels: mean {channels['mean']}, std {channels['std']} (for model.encoder.mean and std)"
    labelled = ", ".join(f"{name} {count}" for name, count in numbers["labelled"].items()) or "nothing"
    yield f"labelled: {labelled}; without any label {numbers['without_any_label']}"
    if boxes := numbers.get("boxes"):
        yield (
            "boxes: {total}, {crowds} of them crowds; an image has {an_image[mean]:.1f} (median {an_image[median]:g}), "
            "at most {an_image[max]}; {images_without} {have} none; {small} small, {medium} medium, {large} large"
        ).format(**boxes, have="has" if boxes["images_without"] == 1 else "have")
    if segmentation := numbers.get("segmentation"):
        yield f"segmentation: {segmentation['labelled_share']:.1%} of the pixels labelled"
    if labels := numbers.get("image_labels"):
        yield "image_labels: {min} to {max} an image".format(**labels["an_image"])
    if depth := numbers.get("depth_m"):
        text = "depth_m: {measured_share:.1%} of the pixels measured"
        if "median_m" in depth:
            text += "; {min_m:.3g} to {max_m:.4g} m, median {median_m:.3g}, 98 % within {p01_m:.3g} to {p99_m:.3g}"
        yield text.format(**depth)


def _size_text(
    different: int, height: Sequence[int] = (), width: Sequence[int] = (), most: Sequence[Mapping[str, int]] = ()
) -> str:
    if not different:
        return "no sizes"
    size = "{height}x{width}".format(**most[0])
    if different == 1:
        return f"all {size} px"
    (low, high), (narrow, wide) = height, width
    ranges = f"{low}..{high} x {narrow}..{wide} px (height x width)"
    return f"{ranges}: {different} sizes, most often {size} ({most[0]['images']})"


def most_frequent(classes: Sequence[Numbers], unit: str, most: int) -> list[dict[str, Any]]:
    """At most so many rows of classes that occur, the rarest as one; `id` is that of the class, None of several."""
    order = sorted(({**row, "id": k} for k, row in enumerate(classes) if row[unit]), key=lambda row: -row[unit])
    if len(order) <= most:
        return order
    rest = order[most - 1 :]
    others = {key: sum(row[key] for row in rest) for key in (unit, "share")}
    return [*order[: most - 1], {"name": f"{len(rest)} others", "images": None, "id": None, **others}]


class Chart(NamedTuple):
    """Shares of a whole; each row has a `name`, a `share` and the columns."""

    field: str
    title: str
    columns: tuple[str, ...]
    rows: Sequence[Mapping[str, Any]]


def charts(numbers: Numbers, most: int) -> Iterator[Chart]:
    """The most frequent classes of each label field, and measured depths."""
    for field_name, unit in UNITS.items():
        if field_name in numbers:
            space, classes = numbers[field_name]["space"], numbers[field_name]["classes"]
            occurring = sum(row[unit] > 0 for row in classes)
            what = "class occurs" if len(classes) == 1 else "classes occur"
            title = f"{unit} of {space}: {occurring} of {len(classes)} {what}"
            yield Chart(field_name, title, tuple(dict.fromkeys((unit, "images"))), most_frequent(classes, unit, most))
    if histogram := numbers.get("depth_m", {}).get("histogram"):
        rows = [{"name": _range_name(row["from_m"], row["to_m"]), "share": row["share"]} for row in histogram]
        yield Chart("depth_m", "measured depths", (), rows)


def _range_name(low: float | None, high: float | None) -> str:
    return f"< {high:.3g} m" if low is None else f">= {low:.3g} m" if high is None else f"{low:.3g} to {high:.3g} m"
