"""A contact sheet: the numbers of each data set as charts, and some of its images with all labels drawn on."""

from collections.abc import Iterator, Sequence

import cv2
import numpy as np
from PIL import Image, ImageDraw

from visionmtl.data.check.rules import Finding
from visionmtl.data.check.survey import Checked, Seen
from visionmtl.data.check.tally import UNITS, Numbers, most_frequent, range_name, sentences
from visionmtl.structures import IGNORE, Boxes, Detections, LabelSpace
from visionmtl.visualization import canvas, draw
from visionmtl.visualization.canvas import Bar, Picture
from visionmtl.visualization.draw import Titled

IMAGES = 4
"""Of each data set, spread evenly; then as many with findings."""
CELL = (600, 640)
"""(H, W) px that an image is made to fit into."""
MAX_BARS = 14
_TITLE_PX, _TEXT_PX, _GAP = 26, 17, 16


def draw_sheet(checked: Sequence[Checked], findings: Sequence[Finding]) -> Picture:
    """[H, W, 3] RGB. Images are read again; one must have been readable. findings: of all data sets."""
    needed = {_cells_an_image(one) for one in checked if one.seen}
    columns = 3 if needed <= {1, 3} else 4
    numbers = [one.numbers() for one in checked]
    pictures = [
        draw.compare(_rows(one, known, findings, columns), CELL[1]) if one.seen else None
        for one, known in zip(checked, numbers, strict=True)
    ]
    width = next(picture.shape[1] for picture in pictures if picture is not None)
    blocks: list[Picture] = []
    for one, known, picture in zip(checked, numbers, pictures, strict=True):
        blocks += [_header(one, known, width), *([] if picture is None else [picture])]
    return np.concatenate(blocks)


def _cells_an_image(one: Checked) -> int:
    """Boxes are drawn on the photograph itself; each map has a cell of its own."""
    return 1 + len(set(one.provides) - {"boxes"})


def _rows(one: Checked, known: Numbers, findings: Sequence[Finding], columns: int) -> list[list[Titled | None]]:
    """All rows are equally long, so that the blocks of all data sets are equally wide."""
    cells = [cell for seen, broken in _chosen(one, findings) for cell in _cells(one, seen, broken, known)]
    per_row = columns // _cells_an_image(one) * _cells_an_image(one)
    rows = [cells[first : first + per_row] for first in range(0, len(cells), per_row)]
    return [[*row, *[None] * (columns - len(row))] for row in rows]


def _chosen(one: Checked, findings: Sequence[Finding]) -> Iterator[tuple[Seen, str]]:
    """Images, and the rules that each of them breaks."""
    broken: dict[str | None, list[str]] = {}
    for finding in findings:
        if (finding.role, finding.data_set) == (one.role, one.name):
            broken.setdefault(finding.image_id, []).append(finding.problem.rule)
    spread = {int(at) for at in np.linspace(0, len(one.seen) - 1, IMAGES).round()}
    odd = [at for at, seen in enumerate(one.seen) if seen.image_id in broken and at not in spread][:IMAGES]
    for at in [*sorted(spread), *odd]:
        yield one.seen[at], ", ".join(dict.fromkeys(broken.get(one.seen[at].image_id, ())))


def _cells(one: Checked, seen: Seen, broken: str, known: Numbers) -> Iterator[Titled]:
    """The photograph with its boxes, then each map."""
    assert one.source is not None
    sample = one.source.read(seen.index)
    size, image = sample.image.shape[:2], _fit(sample.image)
    name = seen.file.replace("\\", "/").rpartition("/")[2] if seen.file else seen.image_id
    title = f"{name}  {size[0]}x{size[1]}" + (f"  ! {broken}" if broken else "")
    boxes, space = sample.boxes, one.provides.get("boxes")
    if boxes is not None and space is not None:
        scale = np.array([image.shape[1] / size[1], image.shape[0] / size[0]] * 2, np.float32)
        yield f"{title}  {len(boxes.labels)} boxes", _in_cell(_draw_boxes(image, boxes, space, scale))
    else:
        yield title + ("  boxes not labelled" if "boxes" in one.provides else ""), _in_cell(image)
    for field, space in one.provides.items():
        label = getattr(sample, field)
        title = f"{field}: {space.name}" if space else field
        if field == "boxes":
            continue
        if label is None or label.shape[:2] != size:
            text = "not labelled" if label is None else "not of the image's size"
            yield title, _in_cell(np.full_like(image, 236), text)
        else:
            yield title, _in_cell(_draw_map(image, field, _fit(label, smooth=False), space, known))


def _draw_boxes(image: Picture, boxes: Boxes, space: LabelSpace, scale: np.ndarray) -> Picture:
    """Boxes that can be drawn at all."""
    sound = np.isfinite(boxes.xyxy).all(axis=1) & (boxes.labels >= 0) & (boxes.labels < len(space.classes))
    sound &= (boxes.xyxy[:, 2:] > boxes.xyxy[:, :2]).all(axis=1)
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
    """Title, counts and charts."""
    lines = list(sentences(known)) if one.seen else ["no image could be read"]
    charts = list(_charts(one, known, (width - 4 * _GAP) // 3))
    top, line = round(_TITLE_PX * 2.2), round(_TEXT_PX * 1.5)
    below = top + len(lines) * line + _GAP
    sheet = Image.new("RGB", (width, below + max((chart.shape[0] for chart in charts), default=0)), canvas.PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.rectangle((0, 0, width, _TITLE_PX * 1.9), fill=canvas.INK)
    canvas.write(pen, (_GAP, _TITLE_PX * 0.95), f"{one.role}: {one.name}", _TITLE_PX, canvas.PAPER)
    for number, text in enumerate(lines):
        text = canvas.shorten(text, width - 2 * _GAP, _TEXT_PX)
        canvas.write(pen, (_GAP, top + (number + 0.7) * line), text, _TEXT_PX, canvas.INK)
    for number, chart in enumerate(charts):
        sheet.paste(Image.fromarray(chart), (_GAP + number * (chart.shape[1] + _GAP), below))
    return np.asarray(sheet)


def _charts(one: Checked, known: Numbers, width: int) -> Iterator[Picture]:
    """Classes in their colours, and depths."""
    for field, unit in UNITS.items():
        space = one.provides.get(field)
        if field in known and space is not None:
            classes, names = known[field]["classes"], draw.class_names(space)
            bars = [
                Bar(
                    names[row["id"]] if row["id"] is not None else row["name"],
                    row[unit],
                    f"{row[unit]:,}  {row['share']:.1%}" if field == "boxes" else f"{row['share']:.1%}",
                    canvas.FAINT if row["id"] is None else space.colours[row["id"]],
                )
                for row in most_frequent(classes, unit, MAX_BARS)
            ]
            occur = f"{sum(row[unit] > 0 for row in classes)} of {len(classes)} classes occur"
            yield canvas.bar_chart(f"{unit} of {space.name}: {occur}", bars, width)
    if "histogram" in known.get("depth_m", {}):
        ranges = known["depth_m"]["histogram"]
        bars = [Bar(range_name(one), one["share"], f"{one['share']:.1%}") for one in ranges]
        yield canvas.bar_chart("measured depths", bars, width)
