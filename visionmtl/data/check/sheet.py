"""A contact sheet: the numbers of each data set as charts, and some of its images with their labels drawn on them."""

from collections.abc import Iterator, Sequence

import cv2
import numpy as np
from PIL import Image, ImageDraw

from visionmtl.data.check.rules import Finding
from visionmtl.data.check.survey import Checked, Seen
from visionmtl.data.check.tally import Numbers, charts, sentences
from visionmtl.structures import IGNORE, Boxes, Detections, LabelSpace
from visionmtl.visualization import canvas, draw
from visionmtl.visualization.canvas import Bar, Picture
from visionmtl.visualization.draw import Titled

IMAGES = 4
"""Of each data set, spread evenly; then as many with findings."""
CELL = (600, 640)
"""(H, W) px that an image is made to fit into."""
MAX_BARS = 14
_ON_PHOTO = {"boxes", "image_labels"}  # labels that have no cell of their own
_TITLE_PX, _TEXT_PX, _GAP = 26, 17, 16


def draw_sheet(checked: Sequence[Checked], findings: Sequence[Finding]) -> Picture:
    """[H, W, 3] RGB. Images are read again; one must have been readable. findings: of all data sets."""
    # boxes are drawn on the photograph itself; each map has a cell of its own
    per_image = {(one.role, one.name): 1 + len(set(one.provides) - _ON_PHOTO) for one in checked if one.seen}
    columns = 3 if set(per_image.values()) <= {1, 3} else 4
    numbers = [one.numbers() for one in checked]
    pictures: list[Picture | None] = []
    for one, known in zip(checked, numbers, strict=True):
        cells = [cell for seen, rules in _chosen(one, findings) for cell in _cells(one, seen, rules, known)]
        num = columns // per_image[one.role, one.name] * per_image[one.role, one.name] if cells else 1
        rows = [cells[first : first + num] for first in range(0, len(cells), num)]
        pictures.append(
            draw.compare([[*row, *[None] * (columns - len(row))] for row in rows], CELL[1]) if rows else None
        )
    width = next(picture.shape[1] for picture in pictures if picture is not None)
    blocks: list[Picture] = []
    for one, known, picture in zip(checked, numbers, pictures, strict=True):
        blocks += [_header(one, known, width), *([] if picture is None else [picture])]
    return np.concatenate(blocks)


def _chosen(one: Checked, findings: Sequence[Finding]) -> Iterator[tuple[Seen, str]]:
    """Images, and the rules that each of them breaks."""
    broken: dict[str | None, list[str]] = {}
    for finding in findings:
        if (finding.role, finding.data_set) == (one.role, one.name):
            broken.setdefault(finding.image_id, []).append(finding.problem.rule)
    spread = {int(at) for at in np.linspace(0, len(one.seen) - 1, IMAGES).round()} if one.seen else set()
    odd = [at for at, seen in enumerate(one.seen) if seen.image_id in broken and at not in spread][:IMAGES]
    for at in [*sorted(spread), *odd]:
        yield one.seen[at], ", ".join(dict.fromkeys(broken.get(one.seen[at].image_id, ())))


def _cells(one: Checked, seen: Seen, rules: str, known: Numbers) -> Iterator[Titled]:
    """The photograph with its boxes, then each map."""
    assert one.source is not None
    sample = one.source.read(seen.index)
    size, image = sample.image.shape[:2], _fit(sample.image)
    name = seen.file.replace("\\", "/").rpartition("/")[2] if seen.file else seen.image_id
    title, picture = f"{name}  {size[0]}x{size[1]}" + (f"  ! {rules}" if rules else ""), image
    boxes, space = sample.boxes, one.provides.get("boxes")
    if boxes is not None and space is not None:
        title, picture = f"{title}  {len(boxes.labels)} boxes", _draw_boxes(image, boxes, space, size)
    elif "boxes" in one.provides:
        title += "  boxes not labelled"
    if (space := one.provides.get("image_labels")) is not None and sample.image_labels is not None:
        names = [space.classes[k] for k in sample.image_labels if 0 <= k < len(space.classes)]
        title += f"  {', '.join(names) or 'no class'}"
    yield title, _in_cell(picture)
    for field, space in one.provides.items():
        label = getattr(sample, field)
        if field in _ON_PHOTO:
            continue
        if label is None or label.shape[:2] != size:
            text = "not labelled" if label is None else "not of the image's size"
            picture = _in_cell(np.full_like(image, 236), text)
        else:
            picture = _in_cell(_draw_map(image, field, _fit(label, smooth=False), space, known))
        yield f"{field}: {space.name}" if space else field, picture


def _draw_boxes(image: Picture, boxes: Boxes, space: LabelSpace, size: Sequence[int]) -> Picture:
    """Boxes that can be drawn at all; size: (H, W) of the image that they are given in."""
    sound = np.isfinite(boxes.xyxy).all(axis=1) & (boxes.labels >= 0) & (boxes.labels < len(space.classes))
    sound &= (boxes.xyxy[:, 2:] > boxes.xyxy[:, :2]).all(axis=1)
    scale = np.array([image.shape[1] / size[1], image.shape[0] / size[0]] * 2, np.float32)
    truth = Detections(boxes.xyxy[sound] * scale, np.full(int(sound.sum()), np.nan, np.float32), boxes.labels[sound])
    return draw.draw_boxes(image, truth, space, crowd=boxes.crowd[sound])


def _draw_map(image: Picture, field: str, label: np.ndarray, space: LabelSpace | None, known: Numbers) -> Picture:
    if field == "depth_m":
        depth = known.get("depth_m", {})
        return draw.draw_depth(image, np.nan_to_num(label, posinf=0).clip(0), depth.get("p01_m"), depth.get("p99_m"))
    if field == "normals":
        return draw.draw_normals(image, np.nan_to_num(label))
    assert space is not None
    return draw.draw_segmentation(image, np.where(label < len(space.classes), label, IGNORE).astype(np.uint8), space)


def _fit(values: np.ndarray, smooth: bool = True) -> np.ndarray:
    """Scaled to fit into CELL; maps keep their values."""
    scale = min(CELL[0] / values.shape[0], CELL[1] / values.shape[1])
    size = max(1, round(values.shape[1] * scale)), max(1, round(values.shape[0] * scale))
    how = (cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC) if smooth else cv2.INTER_NEAREST
    return cv2.resize(values, size, interpolation=how)


def _in_cell(picture: Picture, text: str = "") -> Picture:
    """As wide as a cell, on paper; text: in the middle of the picture."""
    height, width = picture.shape[0], min(picture.shape[1], CELL[1])
    cell = Image.new("RGB", (CELL[1], height), canvas.PAPER)
    cell.paste(Image.fromarray(picture[:, :width]))
    canvas.write(ImageDraw.Draw(cell), (width / 2, height / 2), text, _TEXT_PX, canvas.FAINT, "mm")
    return np.asarray(cell)


def _header(one: Checked, known: Numbers, width: int) -> Picture:
    """Title, sentences and charts."""
    lines = list(sentences(known)) if one.seen else ["no image could be read"]
    chart_width = (width - 4 * _GAP) // 3
    bar_charts = []
    for chart in charts(known, MAX_BARS):
        space, bars = one.provides.get(chart.field), []
        for row in chart.rows:
            name, colour, k = row["name"], canvas.FAINT, row.get("id")
            if space is not None and k is not None:
                name, colour = draw.class_names(space)[k], space.colours[k]
            count = f"{row['boxes']:,}  " if "boxes" in row else ""
            bars.append(Bar(name, row["share"], f"{count}{row['share']:.1%}", colour))
        bar_charts.append(canvas.bar_chart(chart.title, bars, chart_width))

    top, line = round(_TITLE_PX * 2.2), round(_TEXT_PX * 1.5)
    below = top + len(lines) * line + _GAP
    height = below + max((picture.shape[0] for picture in bar_charts), default=0)
    sheet = Image.new("RGB", (width, height), canvas.PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.rectangle((0, 0, width, _TITLE_PX * 1.9), fill=canvas.INK)
    canvas.write(pen, (_GAP, _TITLE_PX * 0.95), f"{one.role}: {one.name}", _TITLE_PX, canvas.PAPER)
    for number, text in enumerate(lines):
        text = canvas.shorten(text, width - 2 * _GAP, _TEXT_PX)
        canvas.write(pen, (_GAP, top + (number + 0.7) * line), text, _TEXT_PX, canvas.INK)
    for number, picture in enumerate(bar_charts):
        sheet.paste(Image.fromarray(picture), (_GAP + number * (chart_width + _GAP), below))
    return np.asarray(sheet)
