"""A contact sheet: the numbers of each data set as charts, and some of its images with their labels drawn on them."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain

import cv2
import numpy as np
from PIL import Image, ImageDraw

from visionmtl.data.check.rules import Finding
from visionmtl.data.check.survey import Checked, Seen
from visionmtl.data.check.tally import Numbers, charts, sentences
from visionmtl.structures import IGNORE, Boxes, Detections, LabelSpace, channels_shown
from visionmtl.visualization import canvas, draw
from visionmtl.visualization.canvas import Bar, Picture
from visionmtl.visualization.draw import Titled
from visionmtl.visualization.palette import recolour
from visionmtl.visualization.panels import at_cell_size

IMAGES = 4
"""Of each data set, spread evenly; then as many with findings."""
CELL_PX = 640
"""The width at which an image is drawn."""
MAX_BARS = 14
_ON_PHOTO = {"boxes", "image_labels"}  # labels that have no cell of their own
_TITLE_PX, _TEXT_PX, _GAP = 26, 17, 16


def draw_sheet(checked: Sequence[Checked], findings: Sequence[Finding]) -> Picture:
    """[H, W, 3] RGB. Images are read again; one must have been readable. findings: of all data sets."""
    # boxes are drawn on the photograph itself; each map has a cell of its own
    num_cells = {1 + len(set(data_set.provides) - _ON_PHOTO) for data_set in checked if data_set.seen}
    columns = 3 if num_cells <= {1, 3} else 4
    blank = "", np.zeros((1, CELL_PX, 3), np.uint8)
    width = draw.compare([[blank] * columns], CELL_PX).shape[1]
    blocks: list[Picture] = []
    for data_set in checked:
        numbers = data_set.numbers()
        blocks.append(_header(data_set, numbers, width))
        images = [list(_cells(data_set, seen, rules, numbers)) for seen, rules in _chosen(data_set, findings)]
        per_row = max(1, columns // len(images[0])) if images else 1
        rows = [list(chain(*images[first : first + per_row])) for first in range(0, len(images), per_row)]
        if rows:
            blocks.append(draw.compare([[*row, *[None] * (columns - len(row))] for row in rows], CELL_PX))
    return np.concatenate(blocks)


def _chosen(data_set: Checked, findings: Sequence[Finding]) -> Iterator[tuple[Seen, str]]:
    """Images, and the rules that each of them breaks."""
    broken: dict[str | None, dict[str, None]] = defaultdict(dict)
    for finding in findings:
        if (finding.role, finding.data_set) == (data_set.role, data_set.name):
            broken[finding.image_id][finding.problem.rule] = None
    count = len(data_set.seen)
    evenly = sorted({int(at) for at in np.linspace(0, count - 1, IMAGES).round()}) if count else []
    odd = [at for at, seen in enumerate(data_set.seen) if seen.image_id in broken and at not in evenly]
    for at in [*evenly, *odd[:IMAGES]]:
        yield data_set.seen[at], ", ".join(broken.get(data_set.seen[at].image_id, ()))


def _cells(data_set: Checked, seen: Seen, rules: str, numbers: Numbers) -> Iterator[Titled]:
    """The photograph with its boxes and image labels, then each map."""
    assert data_set.source is not None
    sample, spaces = data_set.source.read(seen.index), recolour(data_set.provides)
    size, image = sample.image.shape[:2], at_cell_size(sample.image, CELL_PX)
    name = seen.file.replace("\\", "/").rpartition("/")[2] if seen.file else seen.image_id
    shown = channels_shown(sample.image.shape[2])
    title = f"{name}  {size[0]}x{size[1]}" + (f"  {shown}" if shown else "") + (f"  ! {rules}" if rules else "")
    if (space := spaces.get("image_labels")) is not None and sample.image_labels is not None:
        names = [space.classes[k] for k in sample.image_labels if 0 <= k < len(space.classes)]
        title += f"  {', '.join(names) or 'no class'}"
    boxes, space = sample.boxes, spaces.get("boxes")
    if boxes is not None and space is not None:
        count = f"{len(boxes.labels)} box{'' if len(boxes.labels) == 1 else 'es'}"
        yield f"{title}  {count}", _draw_boxes(image, boxes, space, size)
    else:
        yield title + ("  boxes not labelled" if space else ""), image
    for field, space in spaces.items():
        if field not in _ON_PHOTO:
            label = getattr(sample, field)
            title = f"{field}: {space.name}" if space else field
            if label is None or label.shape[:2] != size:
                yield title, _blank(image, "not labelled" if label is None else "not of the image's size")
            else:
                label = cv2.resize(label, image.shape[1::-1], interpolation=cv2.INTER_NEAREST)
                yield title, _draw_map(image, field, label, space, numbers)


def _draw_boxes(image: Picture, boxes: Boxes, space: LabelSpace, size: Sequence[int]) -> Picture:
    """Boxes that can be drawn at all; size: (H, W) of the image that they are given in."""
    sound = np.isfinite(boxes.xyxy).all(axis=1) & (boxes.labels >= 0) & (boxes.labels < len(space.classes))
    sound &= (boxes.xyxy[:, 2:] > boxes.xyxy[:, :2]).all(axis=1)
    scale = np.array([image.shape[1] / size[1], image.shape[0] / size[0]] * 2, np.float32)
    scores = np.full(int(sound.sum()), np.nan, np.float32)
    truth = Detections(boxes.xyxy[sound] * scale, scores, boxes.labels[sound], crowd=boxes.crowd[sound])
    return draw.draw_boxes(image, truth, space)


def _draw_map(image: Picture, field: str, label: np.ndarray, space: LabelSpace | None, numbers: Numbers) -> Picture:
    if field == "depth_m":
        depth = numbers.get("depth_m", {})
        return draw.draw_depth(image, np.nan_to_num(label, posinf=0).clip(0), depth.get("p01_m"), depth.get("p99_m"))
    if field == "normals":
        return draw.draw_normals(image, np.nan_to_num(label))
    assert space is not None
    return draw.draw_segmentation(image, np.where(label < len(space.classes), label, IGNORE).astype(np.uint8), space)


def _blank(image: Picture, text: str) -> Picture:
    """Grey of the image's size, with a text in the middle."""
    cell = Image.new("RGB", (image.shape[1], image.shape[0]), (236, 236, 236))
    canvas.write(ImageDraw.Draw(cell), (cell.width / 2, cell.height / 2), text, _TEXT_PX, canvas.FAINT, "mm")
    return np.asarray(cell)


def _header(data_set: Checked, numbers: Numbers, width: int) -> Picture:
    """Title, sentences and charts."""
    lines = list(sentences(numbers)) if data_set.seen else ["no image could be read"]
    chart_width = (width - 4 * _GAP) // 3
    pictures, spaces = [], recolour(data_set.provides)
    for chart in charts(numbers, MAX_BARS):
        space, bars = spaces.get(chart.field), []
        for row in chart.rows:
            name, colour, k = row["name"], canvas.FAINT, row.get("id")
            if space is not None and k is not None:
                name, colour = draw.class_names(space)[k], space.colours[k]
            count = f"{row['boxes']:,}  " if "boxes" in row else ""
            bars.append(Bar(name, row["share"], f"{count}{row['share']:.1%}", colour))
        pictures.append(canvas.bar_chart(chart.title, bars, chart_width))

    top, line = round(_TITLE_PX * 2.2), round(_TEXT_PX * 1.5)
    below = top + len(lines) * line + _GAP
    sheet = Image.new("RGB", (width, below + max((len(picture) for picture in pictures), default=0)), canvas.PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.rectangle((0, 0, width, _TITLE_PX * 1.9), fill=canvas.INK)
    canvas.write(pen, (_GAP, _TITLE_PX * 0.95), f"{data_set.role}: {data_set.name}", _TITLE_PX, canvas.PAPER)
    for number, text in enumerate(lines):
        text = canvas.shorten(text, width - 2 * _GAP, _TEXT_PX)
        canvas.write(pen, (_GAP, top + (number + 0.7) * line), text, _TEXT_PX, canvas.INK)
    for number, picture in enumerate(pictures):
        sheet.paste(Image.fromarray(picture), (_GAP + number * (chart_width + _GAP), below))
    return np.asarray(sheet)
