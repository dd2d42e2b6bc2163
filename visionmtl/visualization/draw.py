"""Pictures of predictions and labels: one drawing per kind of value, then panels and sheets made of them."""

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from visionmtl.structures import IGNORE, Detections, ImageClasses, LabelSpace
from visionmtl.visualization import canvas
from visionmtl.visualization.canvas import Colour, Picture

Titled = tuple[str, Picture]

CROWDED = 15
"""With more boxes than this, tags are smaller, or they hide what they name."""


MAX_NAMED = 5
"""Predicted classes of a whole image that are written under it."""


def class_names(space: LabelSpace) -> tuple[str, ...]:
    """As pictures show them: with the class id in front where no font has the script, so that no two look alike."""
    return tuple(f"{k} {name}" if canvas.is_spelled(name) else name for k, name in enumerate(space.classes))


def draw_boxes(
    image: Picture,
    detections: Detections,
    space: LabelSpace,
    min_score: float = 0.0,
    crowd: NDArray[np.bool_] | None = None,
    distances_m: NDArray[np.float32] | None = None,
) -> Picture:
    """Outlines in the colour of the class, each with a tag; small images are enlarged first.

    Truth has NaN (or only 1.0) as scores: it is drawn whatever min_score says, and its tags carry no score.
    crowd: bool [D], regions of many objects: dashed and hatched.
    distances_m: [D] metres, on the tags; NaN = not measured, not shown.
    """
    scores = detections.scores
    is_truth = np.isnan(scores) | bool(len(scores) and (scores == 1).all())
    chosen = np.flatnonzero(is_truth | (scores >= min_score))
    crowd = np.zeros(len(scores), bool) if crowd is None else crowd

    picture = canvas.enlarge(image)
    height, width = picture.shape[:2]
    boxes = np.clip(detections.xyxy * (height / image.shape[0]), 0, (width, height, width, height))
    picture = _hatch_crowd(picture, boxes[chosen[crowd[chosen]]])
    sheet = Image.fromarray(picture)
    draw = ImageDraw.Draw(sheet)
    line = max(2, round(min(height, width) / 200))
    for i in chosen[::-1]:  # the best on top
        _outline(draw, boxes[i], space.colours[detections.labels[i]], line, dashed=bool(crowd[i]))

    size_px = canvas.text_px((height, width))
    if len(chosen) > CROWDED:
        size_px = max(11, size_px * 3 // 4)
    taken: list[NDArray[np.float32]] = []
    names = class_names(space)
    for i in chosen:
        text = names[detections.labels[i]] + (" (crowd)" if crowd[i] else "")
        text += "" if is_truth[i] else f" {scores[i]:.2f}"
        text += "" if distances_m is None or np.isnan(distances_m[i]) else f"  {distances_m[i]:.1f} m"
        text = canvas.shorten(text, width - size_px, size_px)
        tag = (canvas.text_width(text, size_px) + size_px * 0.6, size_px * 1.35)
        place = canvas.place_tag(boxes[i], tag, (height, width), taken, boxes[chosen])
        taken.append(place)
        colour = space.colours[detections.labels[i]]
        draw.rectangle(tuple(np.round(place)), fill=colour)
        middle = (place[0] + size_px * 0.3, (place[1] + place[3]) / 2 + 0.5)
        canvas.write(draw, middle, text, size_px, canvas.legible_on(colour))
    return np.asarray(sheet)


def draw_segmentation(image: Picture, class_map: NDArray[np.uint8], space: LabelSpace) -> Picture:
    """Class colours over the grey image, white outlines, a legend of the classes present; IGNORE is hatched.

    class_map: [H, W] of the image's size.
    """
    _check_size(image, class_map, "class map")
    picture = canvas.enlarge(image)
    classes = canvas.enlarge(class_map, smooth=False)
    present, counts = np.unique(class_map, return_counts=True)
    present = present[np.argsort(-counts, kind="stable")]

    palette = np.zeros((256, 3), np.uint8)
    palette[: len(space.colours)] = space.colours
    blended = _over_grey(picture, palette[classes], 0.62)
    unknown = classes == IGNORE
    blended = canvas.hatched(np.where(unknown[..., None], picture, blended), unknown)
    edges = _edges(classes)
    blended[edges] = blended[edges] // 3 + 170

    size_px = canvas.text_px(picture.shape[:2])
    names = class_names(space)
    blended = _name_regions(blended, classes, {int(k): names[k] for k in present if k != IGNORE}, size_px)
    entries: list[tuple[str, Colour | None]] = [(names[k], space.colours[k]) for k in present if k != IGNORE]
    if unknown.any():
        entries.append(("not labelled", None))
    return np.concatenate([blended, canvas.legend(entries, picture.shape[1], size_px)])


def draw_classes(image: Picture, classes: ImageClasses, space: LabelSpace, min_score: float = 0.0) -> Picture:
    """The image above the names of its classes with their scores, best first: a few of `min_score` or more.

    The best one is named whatever its score. Truth has only 1.0 as scores, which are not written.
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
    return np.concatenate([picture, canvas.legend(entries or [("no class", None)], picture.shape[1], size_px)])


def draw_depth(
    image: Picture, depth_m: NDArray[np.float32], min_m: float | None = None, max_m: float | None = None
) -> Picture:
    """Depth as colour on a logarithmic scale, near is red, with a bar in metres; 0 = not measured is dark grey.

    min_m, max_m: ends of the scale, to compare pictures by eye; max_m alone starts at a twentieth of it. Without
    both the picture has its own range (`depth_range`, which takes several maps, too).
    """
    _check_size(image, depth_m, "depth map")
    own_min, own_max = depth_range(depth_m)
    high = max_m or own_max
    low = min_m or (max_m / 20 if max_m else own_min)
    high = max(high, low * 1.01)
    depth = canvas.enlarge(depth_m, smooth=False)
    known = depth > 0

    position = np.log(np.where(known, depth, low) / low) / np.log(high / low)
    colours = _turbo(1 - position)
    colours[~known] = canvas.MISSING

    ticks = [(np.log(tick / low) / np.log(high / low), f"{tick:g} m") for tick in _ticks(low, high)]
    ramp = _turbo(1 - np.linspace(0, 1, 256)[None])
    note = "" if known.all() else "not measured"
    bar = canvas.colour_bar(ramp, ticks, note, depth.shape[1], canvas.text_px(depth.shape))
    return np.concatenate([colours, bar])


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
    return np.concatenate([colours, canvas.legend(entries, size[1], size_px)])


def compare(rows: Sequence[Sequence[Titled | None]], cell_px: int | None = None) -> Picture:
    """Rows of pictures below their titles, all brought to one width (`cell_px`, or that of the widest).

    None leaves a cell empty; a row without any title takes no room for titles.
    """
    shown = [cell for row in rows for cell in row if cell is not None]
    if not shown:
        raise ValueError("there is no picture to lay out; at least one is needed; check what was asked for")
    cell_px = cell_px or max(picture.shape[1] for _, picture in shown)
    width = max(len(row) for row in rows)
    size_px = max(13, round(cell_px / 36))
    gap = size_px
    bands: list[Picture] = [np.full((gap // 2, width * (cell_px + gap) + gap, 3), canvas.PAPER, np.uint8)]
    for row in rows:
        cells = {place: cell for place, cell in enumerate(row) if cell is not None}
        pictures = {place: to_width(picture, cell_px) for place, (_, picture) in cells.items()}
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


def contact_sheet(images: Sequence[Picture], columns: int, width_px: int = 2400) -> Picture:
    """All pictures on one sheet about width_px wide at most, row by row; never larger than they are."""
    columns = min(columns, len(images)) or 1
    cells: list[Titled | None] = [("", image) for image in images]
    cell_px = min(max((image.shape[1] for image in images), default=1), width_px * 35 // (36 * columns) - 13)
    return compare([cells[first : first + columns] for first in range(0, len(cells), columns)], cell_px)


def to_width(image: Picture, width_px: int) -> Picture:
    """The image resized to a width, aspect kept."""
    if image.shape[1] == width_px:
        return image
    height = max(1, round(image.shape[0] * width_px / image.shape[1]))
    how = cv2.INTER_AREA if width_px < image.shape[1] else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(image, (width_px, height), interpolation=how), np.uint8)


def _check_size(image: Picture, values: NDArray, what: str) -> None:
    if image.shape[:2] != values.shape[:2]:
        raise ValueError(
            f"the {what} is {values.shape[0]}x{values.shape[1]} px, "
            f"the image {image.shape[0]}x{image.shape[1]} px; "
            "both must have one size; resize the values first"
        )


def _over_grey(image: Picture, colours: Picture, strength: float) -> Picture:
    """Colours over the image's brightness: its own colours would falsify those of the classes."""
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
