"""Pictures of predictions and labels: one drawing per kind of value, then panels and sheets made of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from visionmtl.metrics.distance import match
from visionmtl.structures import IGNORE, Detections, ImageClasses, LabelSpace
from visionmtl.visualization import canvas
from visionmtl.visualization.canvas import Picture
from visionmtl.visualization.palette import Colour, is_background

Titled = tuple[str, Picture]

CROWDED = 15
"""With more boxes than this, tags are smaller, or they hide what they name."""
MIN_SCORE = 0.4
"""Boxes below are left out of pictures, unless another score is asked for."""
MAX_NAMED = 5
"""Predicted classes of a whole image that are written under it."""
MAX_RELATIVE_ERROR = 0.5
"""Of depth, at which the colours of errors end."""
MAX_ANGLE_DEG = 45
RIGHT: Colour = (86, 180, 233)
WRONG: Colour = (213, 94, 0)
MISSED: Colour = (240, 228, 66)
"""Of hits, false positives and misses: sky blue, vermilion and yellow of Okabe and Ito, whatever the kind of sight."""


@dataclass(frozen=True)
class DrawOptions:
    """How values are drawn."""

    min_score: float = MIN_SCORE
    """Boxes and image classes below are left out."""
    depth_range_m: tuple[float, float] | Literal["auto"] | None = "auto"
    """Ends of the colours of depth; "auto": the picture's own, None: the task's farthest and a twentieth of it."""
    all_classes: bool = False
    """Legends name every class, also those that the picture lacks, so that the frames of a video have one size."""

    def __post_init__(self) -> None:
        check_score(self.min_score)


def check_score(min_score: Any) -> None:
    """Raise ValueError for a least score outside 0 to 1."""
    if isinstance(min_score, bool) or not isinstance(min_score, int | float | np.number) or not 0 <= min_score <= 1:
        raise ValueError(f"min_score is {min_score!r}; scores are numbers from 0 to 1; correct it")


DEFAULTS = DrawOptions()


def class_names(space: LabelSpace) -> tuple[str, ...]:
    """As pictures show them: with the class id in front where no font has the script, so that no two look alike."""
    return tuple(f"{k} {name}" if canvas.is_spelled(name) else name for k, name in enumerate(space.classes))


def draw_boxes(
    image: Picture,
    detections: Detections,
    space: LabelSpace,
    min_score: float = 0.0,
    distances_m: NDArray[np.float32] | None = None,
) -> Picture:
    """Outlines in the colour of the class, each with a tag such as "chair 0.83  2.4 m"; small images are enlarged.

    Truth knows which boxes are crowds, or has NaN as scores: it is drawn whatever min_score says, and its tags carry no
    score. Crowds are dashed and hatched. Where no box is left, the picture says so.
    distances_m: [D], NaN = not known; None = those of `detections`, if it has them
    """
    scores = detections.scores
    is_truth = np.isnan(scores) | (detections.crowd is not None)
    chosen = np.flatnonzero(is_truth | (scores >= min_score))
    distances_m = detections.distance_m if distances_m is None else distances_m
    names = class_names(space)
    crowd = _crowds(detections)

    tags = {}
    for i in chosen.tolist():
        more = (" (crowd)" if crowd[i] else "") + ("" if is_truth[i] else f" {scores[i]:.2f}")
        if distances_m is not None and np.isfinite(distances_m[i]):
            more += f"  {metres(float(distances_m[i]))}"
        tags[i] = names[detections.labels[i]], more
    colours = {i: space.colours[detections.labels[i]] for i in tags}
    picture = _outlined(image, detections, tags, colours)
    if len(chosen):
        return picture
    if not len(scores):
        return canvas.note(picture, "no box")
    best = int(np.argmax(scores))
    shown = math.floor(scores[best] * 100) / 100  # rounded up, it could read as the limit
    text = f"no box of score {min_score:g} or more; the best: {names[detections.labels[best]]} {shown:.2f}"
    return canvas.note(picture, text)


def draw_box_errors(
    image: Picture, detections: Detections, truth: Detections, space: LabelSpace, min_score: float = 0.0
) -> Picture:
    """Hits, false positives and misses in three colours, with their counts below.

    A box of `min_score` or more is a hit where COCO's evaluation pairs it with a true one at an IoU of .5; others that
    lie on a crowd of their class are not drawn.
    """
    kept = detections.scores >= min_score
    found = Detections(detections.xyxy[kept], detections.scores[kept], detections.labels[kept])
    objects = np.flatnonzero(~_crowds(truth))
    pairs = match(found, truth.xyxy[objects], truth.labels[objects])
    hits, seen = {i for i, _ in pairs}, {int(objects[j]) for _, j in pairs}
    drawn = hits | set(np.flatnonzero(~_on_crowd(found, truth)).tolist())
    missed = [j for j in objects.tolist() if j not in seen]

    names = class_names(space)
    tags = {i: (names[found.labels[i]], f" {found.scores[i]:.2f}") for i in sorted(drawn)}
    colours = {i: RIGHT if i in hits else WRONG for i in tags}
    shift = len(found.labels)
    tags |= {shift + j: (names[truth.labels[j]], "") for j in missed}
    colours |= {shift + j: MISSED for j in missed}
    both = Detections(
        np.concatenate([found.xyxy, truth.xyxy]),
        np.concatenate([found.scores, truth.scores]),
        np.concatenate([found.labels, truth.labels]),
    )
    picture = _outlined(image, both, tags, colours)
    num_wrong = sum(colour == WRONG for colour in colours.values())
    entries: list[tuple[str, Colour | None]] = [
        (f"{len(hits)} right", RIGHT), (f"{num_wrong} wrong", WRONG), (f"{len(missed)} missed", MISSED),
    ]  # fmt: skip
    return canvas.above(picture, lambda width: canvas.legend(entries, width, canvas.text_px(picture.shape[:2])))


def _on_crowd(detections: Detections, truth: Detections) -> NDArray[np.bool_]:
    """[D]: half of the box or more lies in a crowd of its class, so that COCO's evaluation passes over it."""
    low = np.maximum(detections.xyxy[:, None, :2], truth.xyxy[None, :, :2])
    high = np.minimum(detections.xyxy[:, None, 2:], truth.xyxy[None, :, 2:])
    area = (detections.xyxy[:, 2:] - detections.xyxy[:, :2]).clip(0).prod(axis=1)
    share = (high - low).clip(0).prod(axis=2) / np.maximum(area, 1e-9)[:, None]
    same = detections.labels[:, None] == truth.labels[None]
    return (same & _crowds(truth) & (share >= 0.5)).any(axis=1)


def _crowds(detections: Detections) -> NDArray[np.bool_]:
    return np.zeros(len(detections.labels), bool) if detections.crowd is None else detections.crowd


def metres(value: float) -> str:
    """A distance in as many digits as a tag has room for: "0.85 m", "2.4 m", "31 m"."""
    return f"{value:.2f} m" if value < 1 else f"{value:.1f} m" if value < 20 else f"{value:.0f} m"


def _outlined(
    image: Picture, detections: Detections, tags: dict[int, tuple[str, str]], colours: dict[int, Colour]
) -> Picture:
    """The boxes that have a tag, best first: a name, which is cut where it is too long, and what stands behind it.

    Small images are enlarged.
    """
    picture = canvas.enlarge(image)
    height, width = picture.shape[:2]
    boxes = np.clip(detections.xyxy * (height / image.shape[0]), 0, (width, height, width, height))
    size_px, line = canvas.text_px((height, width)), max(2, round(min(height, width) / 200))
    picture = canvas.widened(picture)
    width = picture.shape[1]  # for tags
    chosen, crowd = list(tags), _crowds(detections)
    picture = _hatch_crowd(picture, boxes[[i for i in chosen if crowd[i]]])
    sheet = Image.fromarray(picture)
    draw = ImageDraw.Draw(sheet)
    for i in chosen[::-1]:  # the best on top
        _outline(draw, boxes[i], colours[i], line, dashed=bool(crowd[i]))

    if len(chosen) > CROWDED:
        size_px = max(11, size_px * 3 // 4)
    taken: list[NDArray[np.float32]] = []
    for i in chosen:
        name, more = tags[i]
        text = canvas.shorten(name, width - size_px - canvas.text_width(more, size_px), size_px) + more
        tag = (canvas.text_width(text, size_px) + size_px * 0.6, size_px * 1.35)
        place = canvas.place_tag(boxes[i], tag, (height, width), taken, boxes[chosen])
        taken.append(place)
        draw.rectangle(tuple(np.round(place)), fill=colours[i])
        middle = (place[0] + size_px * 0.3, (place[1] + place[3]) / 2 + 0.5)
        canvas.write(draw, middle, text, size_px, canvas.legible_on(colours[i]))
    return np.asarray(sheet)


def draw_segmentation(
    image: Picture, class_map: NDArray[np.uint8], space: LabelSpace, *, all_classes: bool = False
) -> Picture:
    """Class colours over the grey image, white outlines, a legend of the classes present; IGNORE is hatched.

    Background (`palette.is_background`) stays clear.
    class_map: [H, W] of the image's size. all_classes: the legend names the others, too.
    """
    picture, classes = tint_classes(image, class_map, space)
    present, counts = np.unique(class_map, return_counts=True)
    present = present[np.argsort(-counts, kind="stable")]
    size_px = canvas.text_px(picture.shape[:2])
    names = class_names(space)
    named = {int(k): names[k] for k in present if k != IGNORE and not is_background(names[k])}
    picture = _name_regions(picture, classes, named, size_px)
    listed = range(len(names)) if all_classes else [int(k) for k in present if k != IGNORE]
    entries: list[tuple[str, Colour | None]] = [(names[k], space.colours[k]) for k in listed]
    if IGNORE in present:
        entries.append(("not labelled", None))
    return canvas.above(picture, lambda width: canvas.legend(entries, width, size_px))


def tint_classes(
    image: Picture, class_map: NDArray[np.uint8], space: LabelSpace, strength: float = 0.62
) -> tuple[Picture, NDArray[np.uint8]]:
    """The picture of `draw_segmentation` without names and legend, and the map, both enlarged where they are small."""
    _check_size(image, class_map, "class map")
    picture = canvas.enlarge(image)
    classes = canvas.enlarge(class_map, smooth=False)
    palette = np.zeros((256, 3), np.uint8)
    palette[: len(space.colours)] = space.colours
    strengths = np.full((256, 1), strength, np.float32)
    strengths[[k for k, name in enumerate(space.classes) if is_background(name)]] = 0
    blended = _over_grey(picture, palette[classes], strengths[classes])
    unknown = classes == IGNORE
    if unknown.any():
        blended = canvas.hatched(np.where(unknown[..., None], picture, blended), unknown)
    edges = _edges(classes)
    blended[edges] = blended[edges] // 3 + 170
    return blended, classes


def draw_segmentation_errors(image: Picture, class_map: NDArray[np.uint8], truth: NDArray[np.uint8]) -> Picture:
    """Right pixels in RIGHT, wrong ones in WRONG over the grey image; without a label they are hatched."""
    _check_size(image, class_map, "class map")
    _check_size(image, truth, "truth")
    labelled, wrong = truth != IGNORE, (class_map != truth) & (truth != IGNORE)
    picture = canvas.enlarge(image)
    kinds = canvas.enlarge(np.where(labelled, wrong, 2).astype(np.uint8), smooth=False)
    colours = np.asarray([RIGHT, WRONG, canvas.MISSING], np.uint8)[kinds]
    blended = _over_grey(picture, colours, np.asarray([[0.25], [0.75], [0]], np.float32)[kinds])
    unknown = kinds == 2
    if unknown.any():
        blended = canvas.hatched(np.where(unknown[..., None], picture, blended), unknown)
    share = wrong.sum() / max(labelled.sum(), 1)
    entries: list[tuple[str, Colour | None]] = [(f"{1 - share:.1%} right", RIGHT), (f"{share:.1%} wrong", WRONG)]
    if not labelled.all():
        entries.append(("not labelled", None))
    return canvas.above(blended, lambda width: canvas.legend(entries, width, canvas.text_px(picture.shape[:2])))


def draw_classes(image: Picture, classes: ImageClasses, space: LabelSpace, min_score: float = 0.0) -> Picture:
    """The image above the names of its classes with their scores, best first: a few of `min_score` or more.

    The best one is named whatever its score. Truth has only 1.0 as scores, which are not written; predictions name all
    classes.
    """
    scores, names = classes.scores, class_names(space)
    is_truth = bool((scores == 1).all())
    chosen = [i for i in range(len(scores)) if is_truth or i == 0 or scores[i] >= min_score]
    entries: list[tuple[str, Colour | None]] = []
    for i in chosen if is_truth else chosen[:MAX_NAMED]:
        label = int(classes.labels[i])
        entries.append((names[label] + ("" if is_truth else f" {scores[i]:.2f}"), space.colours[label]))
    picture = canvas.enlarge(image)
    size_px = canvas.text_px(picture.shape[:2])
    return canvas.above(picture, lambda width: canvas.legend(entries or [("no class", None)], width, size_px))


def draw_depth(
    image: Picture, depth_m: NDArray[np.float32], min_m: float | None = None, max_m: float | None = None
) -> Picture:
    """Depth as colour on a logarithmic scale, near is red, with a bar in metres; 0 = not measured is dark grey.

    min_m, max_m: ends of the scale, to compare pictures by eye; max_m alone starts at a twentieth of it. Without
    both the picture has its own range (`depth_range`, which takes several maps, too).
    """
    _check_size(image, depth_m, "depth map")
    if max_m is None:
        own_min, max_m = depth_range(depth_m)
        min_m = own_min if min_m is None else min_m
    low = max_m / 20 if min_m is None else min_m
    high = max(max_m, low * 1.01)
    depth = canvas.enlarge(depth_m, smooth=False)
    known = depth > 0

    position = np.log(np.where(known, depth, low) / low) / np.log(high / low)
    colours = _turbo(1 - position)
    colours[~known] = canvas.MISSING

    ticks = [(np.log(tick / low) / np.log(high / low), f"{tick:g} m") for tick in _ticks(low, high)]
    ramp = _turbo(1 - np.linspace(0, 1, 256)[None])
    note = "" if known.all() else "not measured"
    size_px = canvas.text_px(depth.shape)
    return canvas.above(colours, lambda width: canvas.colour_bar(ramp, ticks, note, width, size_px))


def draw_depth_errors(image: Picture, depth_m: NDArray[np.float32], truth_m: NDArray[np.float32]) -> Picture:
    """The relative error of each pixel: blue is too near, red too far, white right; dark grey is not measured."""
    _check_size(image, depth_m, "depth map")
    _check_size(image, truth_m, "truth")
    known = canvas.enlarge((truth_m > 0).astype(np.uint8), smooth=False) > 0
    relative = np.where(truth_m > 0, depth_m / np.where(truth_m > 0, truth_m, 1) - 1, 0)
    colours = _diverging(canvas.enlarge(relative.astype(np.float32), smooth=False) / MAX_RELATIVE_ERROR)
    colours[~known] = canvas.MISSING
    limit = f"{MAX_RELATIVE_ERROR:.0%}"
    ticks = [(0.0, f"{limit} too near"), (0.5, "right"), (1.0, f"{limit} too far")]
    ramp = _diverging(np.linspace(-1, 1, 256)[None])
    mean = float(np.abs(relative[truth_m > 0]).mean()) if (truth_m > 0).any() else 0.0
    size_px = canvas.text_px(known.shape)
    note = "" if known.all() else "not measured"
    picture = canvas.note(colours, f"mean {mean:.1%}")
    return canvas.above(picture, lambda width: canvas.colour_bar(ramp, ticks, note, width, size_px))


def draw_angle_errors(image: Picture, normals: NDArray[np.float32], truth: NDArray[np.float32]) -> Picture:
    """The angle between predicted and true normals [H, W, 3], bright is wrong; dark grey is not measured."""
    _check_size(image, normals, "normal map")
    _check_size(image, truth, "truth")
    known = np.linalg.norm(truth, axis=2) > 0.5
    lengths = np.maximum(np.linalg.norm(normals, axis=2) * np.linalg.norm(truth, axis=2), 1e-9)
    degrees = np.degrees(np.arccos(np.clip((normals * truth).sum(axis=2) / lengths, -1, 1)))
    share = canvas.enlarge(np.where(known, degrees / MAX_ANGLE_DEG, 0).astype(np.float32), smooth=False)
    colours = _over_grey(canvas.enlarge(image), np.full((1, 1, 3), WRONG), share[..., None].clip(0, 1))
    colours[canvas.enlarge(known.astype(np.uint8), smooth=False) == 0] = canvas.MISSING
    mean = float(degrees[known].mean()) if known.any() else 0.0
    entries: list[tuple[str, Colour | None]] = [(f"{MAX_ANGLE_DEG}° wrong or more", WRONG)]
    if not known.all():
        entries.append(("not measured", canvas.MISSING))
    picture = canvas.note(colours, f"mean {mean:.1f}°")
    return canvas.above(picture, lambda width: canvas.legend(entries, width, canvas.text_px(picture.shape[:2])))


def depth_range(*depth_m: NDArray[np.float32]) -> tuple[float, float]:
    """A range in metres that holds all but the outer 1 % of the measured depths, rounded outwards to half octaves."""
    known = np.concatenate([depth[depth > 0] for depth in depth_m])
    if not known.size:
        return 1.0, 10.0
    low, high = np.percentile(known, (1, 99))
    steps = np.asarray([0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 40, 60, 80, 100, 150, 250])
    below, above = steps[steps <= low], steps[steps >= high]
    least = float(below[-1]) if below.size else float(low)
    return least, float(above[0]) if above.size else float(high)


def draw_normals(image: Picture, normals: NDArray[np.float32]) -> Picture:
    """Surface normals [H, W, 3] as colour: red = right, green = up, blue = towards the camera; 0 0 0 is dark grey."""
    _check_size(image, normals, "normal map")
    size = canvas.enlarge(image).shape[:2]
    known = np.linalg.norm(normals, axis=2) > 0.5
    colours = _normal_colours(normals)
    colours[~known] = canvas.MISSING
    colours = canvas.enlarge(colours, smooth=False)

    size_px = canvas.text_px(size)
    entries: list[tuple[str, Colour | None]] = [
        ("faces right", (255, 128, 128)),
        ("faces up", (128, 255, 128)),
        ("faces the camera", (128, 128, 255)),
        ("faces left", (0, 128, 128)),
    ]
    if not known.all():
        entries.append(("not measured", canvas.MISSING))
    return canvas.above(colours, lambda width: canvas.legend(entries, width, size_px))


def scaled(value: Any, size: tuple[int, int], new_size: tuple[int, int]) -> Any:
    """A value that belongs to an image of size (H, W) as it belongs to the image resized to new_size.

    Boxes move, maps take the nearest pixel, anything else stays as it is.
    """
    if size == new_size:
        return value
    if isinstance(value, Detections):
        factors = np.asarray([new_size[1] / size[1], new_size[0] / size[0]] * 2, np.float32)
        return replace(value, xyxy=value.xyxy * factors)
    if isinstance(value, np.ndarray) and value.shape[:2] == size:
        return cv2.resize(value, new_size[::-1], interpolation=cv2.INTER_NEAREST)
    return value


def compare(rows: Sequence[Sequence[Titled | None]], cell_px: int | None = None) -> Picture:
    """Rows of pictures below their titles in columns of one width (`cell_px`, or that of the widest).

    Wider pictures are reduced, and higher ones than MAX_CELL_ASPECT times the width; none is enlarged. None leaves a
    cell empty; a row without any title takes no room for titles.
    """
    shown = [cell for row in rows for cell in row if cell is not None]
    if not shown:
        raise ValueError("there is no picture to lay out; at least one is needed; check what was asked for")
    cell_px = cell_px or max(picture.shape[1] for _, picture in shown)
    width = max(len(row) for row in rows)
    size_px = max(13, round(cell_px / 32))
    gap = size_px
    bands: list[Picture] = [np.full((gap // 2, width * (cell_px + gap) + gap, 3), canvas.PAPER, np.uint8)]
    for row in rows:
        cells = {place: cell for place, cell in enumerate(row) if cell is not None}
        pictures = {place: to_cell(picture, cell_px) for place, (_, picture) in cells.items()}
        top = round(size_px * 1.9) if any(title for title, _ in cells.values()) else gap // 2
        height = max((picture.shape[0] for picture in pictures.values()), default=0)
        sheet = Image.new("RGB", (bands[0].shape[1], top + height + gap), canvas.PAPER)
        for place, (title, _) in cells.items():
            left = gap + place * (cell_px + gap)
            sheet.paste(Image.fromarray(pictures[place]), (left, top))
            title = canvas.shorten(title, cell_px, size_px)
            canvas.write(ImageDraw.Draw(sheet), (left, top / 2 + 1), title, size_px, canvas.INK)
        bands.append(np.asarray(sheet))
    return np.concatenate(bands)


MAX_CELL_ASPECT = 2


def to_cell(image: Picture, width_px: int) -> Picture:
    """The image reduced to a width, and to a height of MAX_CELL_ASPECT times it; its aspect is kept."""
    factor = min(width_px / image.shape[1], width_px * MAX_CELL_ASPECT / image.shape[0])
    return resized(image, factor) if factor < 1 else image


def resized(image: Picture, factor: float) -> Picture:
    """The image times a factor, at least one pixel wide and high."""
    height, width = (max(1, round(side * factor)) for side in image.shape[:2])
    if (height, width) == image.shape[:2]:
        return image
    how = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(image, (width, height), interpolation=how), np.uint8)


def _check_size(image: Picture, values: NDArray, what: str) -> None:
    if image.shape[:2] != values.shape[:2]:
        raise ValueError(
            f"the {what} is {values.shape[0]}x{values.shape[1]} px, "
            f"the image {image.shape[0]}x{image.shape[1]} px; "
            "both must have one size; resize the values first"
        )


def _over_grey(image: Picture, colours: NDArray, strength: NDArray[np.float32]) -> Picture:
    """Colours over the image's brightness: its own colours would falsify those of the classes. strength: 0..1."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None].astype(np.float32)
    return np.round(grey * (1 - strength) + colours * strength).astype(np.uint8)


def _edges(classes: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """The last pixel before another class, to the right and below."""
    edges = np.zeros(classes.shape, bool)
    edges[:, :-1] |= classes[:, :-1] != classes[:, 1:]
    edges[:-1] |= classes[:-1] != classes[1:]
    return edges


def _name_regions(picture: Picture, classes: NDArray[np.uint8], names: dict[int, str], size_px: int) -> Picture:
    """Each class's name where its region is widest, if it fits there."""
    sheet = Image.fromarray(picture)
    draw = ImageDraw.Draw(sheet)
    for k, name in names.items():
        inside = np.pad((classes == k).astype(np.uint8), 1)  # the picture's border bounds a region too
        room = cv2.distanceTransform(inside, cv2.DIST_L2, 3)[1:-1, 1:-1]
        y, x = np.unravel_index(int(np.argmax(room)), room.shape)
        if room[y, x] > max(size_px, canvas.text_width(name, size_px) / 2):
            canvas.write(draw, (int(x), int(y)), name, size_px, canvas.PAPER, "mm", rim=canvas.INK)
    return np.asarray(sheet)


def _turbo(position: NDArray) -> Picture:
    bytes_ = np.round(np.clip(position, 0, 1) * 225 + 15).astype(np.uint8)  # the map's ends are nearly black
    return cv2.cvtColor(cv2.applyColorMap(bytes_, cv2.COLORMAP_TURBO), cv2.COLOR_BGR2RGB)


def _diverging(position: NDArray) -> Picture:
    """-1 is blue, 0 white, 1 red (ends of ColorBrewer's RdBu, safe for colour-blind eyes)."""
    ends = np.where(position[..., None] < 0, (33, 102, 172), (178, 24, 43))
    share = np.abs(np.clip(position, -1, 1))[..., None]
    return np.round(247 * (1 - share) + ends * share).astype(np.uint8)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers within the range: 1-2-5 over a wide range, finer over a narrow one."""
    digits = (1, 2, 5) if high / low > 12 else (1, 1.5, 2, 3, 4, 5, 6, 8)
    ticks = [digit * 10.0**power for power in range(-3, 4) for digit in digits]
    return [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001] or [low, high]


def _normal_colours(normals: NDArray[np.float32]) -> Picture:
    flipped = normals * np.asarray([1, -1, -1], np.float32)  # up and towards the camera are positive
    return np.round((flipped + 1) * 127.5).clip(0, 255).astype(np.uint8)


def _hatch_crowd(picture: Picture, boxes: NDArray[np.float32]) -> Picture:
    picture = picture.copy()
    lines = canvas.hatch(picture.shape[:2], max(8, min(picture.shape[:2]) // 30))
    for x1, y1, x2, y2 in np.round(boxes).astype(int):
        inside = picture[y1:y2, x1:x2]
        inside[lines[y1:y2, x1:x2]] = inside[lines[y1:y2, x1:x2]] // 2 + 110
    return picture


def _outline(draw: ImageDraw.ImageDraw, box: NDArray[np.float32], colour: Colour, line: int, dashed: bool) -> None:
    x1, y1, x2, y2 = (int(value) for value in np.round(box))
    x2, y2 = max(x2 - 1, x1), max(y2 - 1, y1)  # x2 and y2 are exclusive
    if not dashed:
        rim = canvas.legible_on(colour)  # so that it shows on any ground
        draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=rim, width=line + 2)
        draw.rectangle((x1, y1, x2, y2), outline=colour, width=line)
        return
    dash = line * 4
    for x in range(x1, x2, 2 * dash):
        for y in (y1, y2):
            draw.line((x, y, min(x + dash, x2), y), fill=colour, width=line)
    for y in range(y1, y2, 2 * dash):
        for x in (x1, x2):
            draw.line((x, y, x, min(y + dash, y2)), fill=colour, width=line)
