"""One image with the values of several tasks: side by side in panels, or over each other."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from visionmtl.metrics.distance import box_distances
from visionmtl.structures import IGNORE, Detections, LabelSpace, as_rgb, channels_shown
from visionmtl.visualization import canvas, draw
from visionmtl.visualization.canvas import Picture
from visionmtl.visualization.draw import DEFAULTS, DrawOptions, Titled
from visionmtl.visualization.palette import recolour

MAX_PICTURE_PX = 3200
"""The width of panels; an overlay has the size of its image."""
MAX_CELL_PX = 960

Spaces = Mapping[str, LabelSpace | None]
"""By task."""


class Drawer(Protocol):
    """What panels need of `tasks.base.Task`."""

    def draw(self, image: Picture, prediction: Any, space: LabelSpace | None, options: DrawOptions) -> Picture:
        """A picture of the value."""
        ...

    def draw_errors(
        self, image: Picture, prediction: Any, truth: Any, space: LabelSpace | None, options: DrawOptions
    ) -> Picture | None:
        """A picture of where the values differ."""
        ...


def draw_panels(
    tasks: Mapping[str, Drawer],
    spaces: Spaces,
    image: Picture,
    rows: Mapping[str, Mapping[str, Any]],
    options: DrawOptions = DEFAULTS,
    image_title: str = "image",
) -> Picture:
    """The image and beside it a drawing for each task and each of `rows`, one row below the other.

    A single row is wrapped to about the shape of a screen. Rows "prediction" and "truth" are followed by one of errors.
    rows: by a title such as "prediction" or "truth": values by task in the form of a prediction; None or a missing
    task leaves the place empty.
    """
    image_title, image = f"{image_title} {channels_shown(image.shape[2])}".strip(), as_rgb(image)
    num = 1 + sum(any(values.get(name) is not None for values in rows.values()) for name in tasks)
    columns = _columns(num, image.shape[:2]) if len(rows) == 1 else 1 + len(tasks)
    cell_px = min(MAX_CELL_PX, MAX_PICTURE_PX // columns)
    spaces, shown = recolour(spaces), at_cell_size(image, cell_px)
    rows = {
        title: {
            name: draw.scaled(value, image.shape[:2], shown.shape[:2])
            for name, value in with_distances(values, options.min_score).items()
        }
        for title, values in rows.items()
    }
    if options.depth_range_m == "auto":
        options = replace(options, depth_range_m=common_range(rows))

    table: list[list[Titled | None]] = []
    for title, values in rows.items():
        cells: list[Titled | None] = [None if table else (image_title, shown)]
        for name, task in tasks.items():
            value = values.get(name)
            drawn = None if value is None else task.draw(shown, value, spaces[name], options)
            cells.append(None if drawn is None else (f"{name}: {title}", drawn))
        table.append(cells)
    if {"prediction", "truth"} <= rows.keys():
        cells = [None]
        for name, task in tasks.items():
            drawn = errors(task, shown, rows["prediction"].get(name), rows["truth"].get(name), spaces[name], options)
            cells.append(None if drawn is None else (f"{name}: errors", drawn))
        table += [cells] if any(cells) else []
    if len(table) == 1:
        cells = [cell for cell in table[0] if cell is not None]
        table = [cells[first : first + columns] for first in range(0, len(cells), columns)]
    return draw.compare(table, cell_px)


class SteadyRange:
    """Ends of the colours of depth over a video: those of the frames, followed slowly, so that nothing flickers."""

    def __init__(self, frames_per_s: float) -> None:
        self._share = 1 / max(1.0, 2 * frames_per_s)  # a change shows within about two seconds
        self._ends: NDArray[np.float64] | None = None  # logarithms

    def update(self, depth_m: NDArray[np.float32]) -> tuple[float, float]:
        """The range in metres for this frame; depth_m: [H, W], 0 = not measured."""
        known = depth_m[depth_m > 0]
        if known.size:
            low, high = np.percentile(known, (1, 99))
            new = np.log([low / 1.1, high * 1.1])
            self._ends = new if self._ends is None else self._ends + self._share * (new - self._ends)
        low, high = (1.0, 10.0) if self._ends is None else np.exp(self._ends)
        return float(low), float(high)


def with_distances(values: Mapping[str, Any], min_score: float) -> dict[str, Any]:
    """The values with the distances of the boxes that are drawn, where a depth map stands beside them."""
    depth_m = next((value for value in values.values() if is_depth(value)), None)
    if depth_m is None:
        return dict(values)
    measured: dict[str, Any] = {}
    for name, value in values.items():
        measured[name] = value
        if isinstance(value, Detections):
            distances = np.full(len(value.scores), np.nan, np.float32)
            drawn = ~(value.scores < min_score)  # scores of NaN are those of labels
            distances[drawn] = box_distances(depth_m, value.xyxy[drawn])[0]
            measured[name] = replace(value, distance_m=distances)
    return measured


def errors(
    task: Drawer, image: Picture, prediction: Any, truth: Any, space: LabelSpace | None, options: DrawOptions
) -> Picture | None:
    """Where the prediction of a task differs from the truth; None where one of them is missing."""
    if prediction is None or truth is None:
        return None
    return task.draw_errors(image, prediction, truth, space, options)


def at_cell_size(image: Picture, cell_px: int) -> Picture:
    """The image, of any channels, as a cell shows it, so that text is drawn at the size at which it is seen."""
    image = as_rgb(image)
    factor = min(cell_px / image.shape[1], cell_px * draw.MAX_CELL_ASPECT / image.shape[0])
    return draw.resized(image, factor)


def _columns(num: int, size: tuple[int, int]) -> int:
    """Into how many columns `num` images of (H, W) go: close to the shape of a screen, and with few empty cells."""
    aspect = size[1] / size[0]

    def distance(columns: int) -> float:
        rows = -(-num // columns)
        return abs(np.log(aspect * columns / rows / 1.6)) + 0.5 * (1 - num / (columns * rows))

    return min(range(1, num + 1), key=distance)


def common_range(rows: Mapping[str, Mapping[str, Any]]) -> tuple[float, float]:
    """Of all depth maps among the values."""
    maps = [value for values in rows.values() for value in values.values() if is_depth(value)]
    return draw.depth_range(*maps) if maps else (1.0, 10.0)


def is_depth(value: Any) -> bool:
    """Whether a value is a map of one float a pixel."""
    return isinstance(value, np.ndarray) and value.ndim == 2 and value.dtype.kind == "f"


def draw_overlay(
    spaces: Spaces,
    image: Picture,
    values: Mapping[str, Any],
    options: DrawOptions = DEFAULTS,
    tasks: Mapping[str, Drawer] | None = None,
) -> Picture:
    """All values on the image itself, at its own size: classes as tint, boxes above them, distances in their tags.

    Depth is shown as colours where there is nothing else to see, by its task where `tasks` are given, else, and without
    `options.depth_range_m`, in the picture's own range.
    """
    spaces, values = recolour(spaces), with_distances(values, options.min_score)
    picture = canvas.enlarge(as_rgb(image))
    size, new = image.shape[:2], picture.shape[:2]
    legend: list[tuple[str, draw.Colour | None]] = []
    for name, value in values.items():
        space = spaces[name]
        if space is not None and isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 2:
            classes = draw.scaled(value, size, new)
            picture = _tinted(picture, classes, space)
            names, present = draw.class_names(space), set(np.unique(classes).tolist())
            listed = range(len(names)) if options.all_classes else [k for k in range(len(names)) if k in present]
            legend += [(names[k], space.colours[k]) for k in listed]
            legend += [("not labelled", None)] if IGNORE in present else []
    boxes = {name: value for name, value in values.items() if isinstance(value, Detections)}
    for name, value in boxes.items():
        space = spaces[name]
        assert space is not None
        picture = draw.draw_boxes(picture, draw.scaled(value, size, new), space, options.min_score)
    depth = next((name for name, value in values.items() if is_depth(value)), None)
    if depth is not None and not legend and not boxes:
        value = draw.scaled(values[depth], size, new)
        if tasks is not None:
            return tasks[depth].draw(picture, value, None, options)
        limits = () if options.depth_range_m in (None, "auto") else options.depth_range_m
        return draw.draw_depth(picture, value, *limits)
    if not legend:
        return picture
    return canvas.above(picture, lambda width: canvas.legend(legend, width, canvas.text_px(new)))


def _tinted(picture: Picture, classes: NDArray[np.uint8], space: LabelSpace) -> Picture:
    """Class colours over the image in its own colours: an overlay stands for the photograph, too."""
    tinted, _ = draw.tint_classes(picture, classes, space)
    return np.asarray(cv2.addWeighted(picture, 0.5, tinted, 0.5, 0), np.uint8)


def contact_sheet(images: Sequence[Picture], width_px: int) -> Picture:
    """All pictures on one sheet at most width_px wide, in one column where they are wide, else in two."""
    columns = 1 if len(images) == 1 or images[0].shape[1] > 3 * images[0].shape[0] else 2
    cell_px = min(max(image.shape[1] for image in images), width_px * 32 // (33 * columns) - 40)
    cells: list[Titled | None] = [("", image) for image in images]
    return draw.compare([cells[first : first + columns] for first in range(0, len(cells), columns)], cell_px)
