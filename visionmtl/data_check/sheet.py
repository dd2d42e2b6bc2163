"""A contact sheet: the numbers of each data set as charts, and some of its images with all labels drawn on."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw

from visionmtl.data_check.bars import bar_chart, class_bars, depth_bars
from visionmtl.data_check.base import Finding
from visionmtl.data_check.survey import Checked, Seen
from visionmtl.data_check.tables import sizes, summaries
from visionmtl.structures import IGNORE, Boxes, Detections, LabelSpace
from visionmtl.visualization import canvas
from visionmtl.visualization.canvas import Picture
from visionmtl.visualization.draw import Titled, compare, draw_boxes, draw_depth, draw_normals, draw_segmentation

IMAGES = 4
"""Of each data set, spread evenly; then as many with findings."""
CELL = (600, 640)
"""(H, W) px that an image is made to fit into."""
_TITLE_PX, _TEXT_PX, _GAP = 26, 17, 16


def draw_sheet(
    checked: Sequence[Checked], numbers: Sequence[Mapping[str, Any]], findings: Sequence[Finding]
) -> Picture:
    """[H, W, 3] RGB. Images are read again; one must have been readable.

    numbers: `statistics.statistics` of each data set. findings: of all of them.
    """
    widths = {_columns(one) for one in checked if one.seen}
    columns = max(3 if widths <= {1, 3} else 4, *widths)
    pairs = list(zip(checked, numbers, strict=True))
    rows = [compare(_rows(one, known, findings, columns), CELL[1]) if one.seen else None for one, known in pairs]
    width = next(row.shape[1] for row in rows if row is not None)
    blocks = []
    for (one, known), row in zip(pairs, rows, strict=True):
        blocks += [_header(one, known, width)] if row is None else [_header(one, known, width), row]
    return np.concatenate(blocks)


def _columns(one: Checked) -> int:
    """Cells that one image takes: boxes are drawn on the photograph itself."""
    return 1 + len(set(one.data_set.provides) - {"boxes"})


def _rows(
    one: Checked, known: Mapping[str, Any], findings: Sequence[Finding], columns: int
) -> list[list[Titled | None]]:
    """All rows are equally long, so that the blocks of all data sets are equally wide."""
    cells = [cell for seen, why in _chosen(one, findings) for cell in _cells(one, seen, why, known)]
    per_row = columns // _columns(one) * _columns(one)
    rows = [cells[first : first + per_row] for first in range(0, len(cells), per_row)]
    return [[*row, *[None] * (columns - len(row))] for row in rows]


def _chosen(one: Checked, findings: Sequence[Finding]) -> Iterator[tuple[Seen, str]]:
    """Images, and what was found wrong with each of them."""
    wrong: dict[str | None, list[str]] = {}
    for finding in findings:
        if (finding.role, finding.data_set) == (one.data_set.role, one.data_set.name):
            wrong.setdefault(finding.image_id, []).append(finding.problem.rule)
    spread = {int(at) for at in np.linspace(0, len(one.seen) - 1, IMAGES).round()}
    odd = [at for at, seen in enumerate(one.seen) if seen.image_id in wrong and at not in spread][:IMAGES]
    for at in [*sorted(spread), *odd]:
        yield one.seen[at], ", ".join(dict.fromkeys(wrong.get(one.seen[at].image_id, ())))


def _cells(one: Checked, seen: Seen, why: str, known: Mapping[str, Any]) -> Iterator[Titled]:
    source = one.data_set.source
    assert source is not None
    sample, provides = source.read(seen.index), source.provides
    image = _fit(sample.image)
    height, width = sample.image.shape[:2]
    name = seen.file.replace("\\", "/").rpartition("/")[2] if seen.file else seen.image_id
    title = f"{name}  {height}x{width}" + (f"  ! {why}" if why else "")

    boxes, box_space = sample.boxes, provides.get("boxes")
    if boxes is not None and box_space is not None:
        scale = np.array([image.shape[1] / width, image.shape[0] / height] * 2, np.float32)
        yield f"{title}  {len(boxes.labels)} boxes", _padded(_draw_boxes(image, boxes, box_space, scale))
    else:
        yield title + ("  boxes not labelled" if "boxes" in provides else ""), _padded(image)
    for field in provides:
        if field != "boxes":
            label = getattr(sample, field)
            if label is None or label.shape[:2] != sample.image.shape[:2]:
                text = "not labelled" if label is None else "not of the image's size"
                yield field, _padded(np.full_like(image, 236), text)
            else:
                space = provides[field]
                title = f"{field}: {space.name}" if space else field
                yield title, _padded(_draw_map(image, field, _fit(label, smooth=False), space, known))


def _draw_boxes(image: Picture, boxes: Boxes, space: LabelSpace, scale: np.ndarray) -> Picture:
    sound = np.isfinite(boxes.xyxy).all(axis=1) & (boxes.labels >= 0) & (boxes.labels < len(space.classes))
    sound &= (boxes.xyxy[:, 2:] > boxes.xyxy[:, :2]).all(axis=1)
    truth = Detections(boxes.xyxy[sound] * scale, np.full(int(sound.sum()), np.nan, np.float32), boxes.labels[sound])
    return draw_boxes(image, truth, space, crowd=boxes.crowd[sound])


def _draw_map(
    image: Picture, field: str, label: np.ndarray, space: LabelSpace | None, known: Mapping[str, Any]
) -> Picture:
    if field == "depth_m":
        depth = known.get("depth_m", {})
        return draw_depth(image, np.nan_to_num(label, posinf=0).clip(0), depth.get("p01_m"), depth.get("p99_m"))
    if field == "normals":
        return draw_normals(image, np.nan_to_num(label))
    assert space is not None
    return draw_segmentation(image, np.where(label < len(space.classes), label, IGNORE).astype(np.uint8), space)


def _fit(values: np.ndarray, smooth: bool = True) -> np.ndarray:
    """Scaled to fit into CELL; maps keep their values."""
    scale = min(CELL[0] / values.shape[0], CELL[1] / values.shape[1])
    size = max(1, round(values.shape[1] * scale)), max(1, round(values.shape[0] * scale))
    how = (cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC) if smooth else cv2.INTER_NEAREST
    return cv2.resize(values, size, interpolation=how)


def _padded(picture: Picture, text: str = "") -> Picture:
    """As wide as a cell, on paper; text: in its middle."""
    picture = picture[:, : CELL[1]]
    paper = np.full((picture.shape[0], CELL[1], 3), canvas.PAPER, np.uint8)
    paper[:, : picture.shape[1]] = picture
    if not text:
        return paper
    sheet = Image.fromarray(paper)
    middle = (picture.shape[1] / 2, picture.shape[0] / 2)
    canvas.write(ImageDraw.Draw(sheet), middle, text, _TEXT_PX, canvas.FAINT, "mm")
    return np.asarray(sheet)


def _header(one: Checked, known: Mapping[str, Any], width: int) -> Picture:
    """Title, counts and charts."""
    lines = [f"{known['read']} images, {sizes(known['sizes'])}", *summaries(known)]
    lines = lines if one.seen else ["no image could be read"]
    head = Image.new("RGB", (width, round(_TITLE_PX * 2.2 + len(lines) * _TEXT_PX * 1.5 + _GAP)), canvas.PAPER)
    draw = ImageDraw.Draw(head)
    draw.rectangle((0, 0, width, _TITLE_PX * 1.9), fill=canvas.INK)
    canvas.write(draw, (_GAP, _TITLE_PX * 0.95), f"{known['role']}: {known['name']}", _TITLE_PX, canvas.PAPER)
    for number, line in enumerate(lines):
        at = (_GAP, _TITLE_PX * 2.2 + (number + 0.7) * _TEXT_PX * 1.5)
        canvas.write(draw, at, canvas.shorten(line, width - 2 * _GAP, _TEXT_PX), _TEXT_PX, canvas.INK)

    charts = [*_charts(one, known, (width - 4 * _GAP) // 3)]
    height = max((chart.shape[0] for chart in charts), default=0)
    band = np.full((height, width, 3), canvas.PAPER, np.uint8)
    for number, chart in enumerate(charts):
        left = _GAP + number * (chart.shape[1] + _GAP)
        band[: chart.shape[0], left : left + chart.shape[1]] = chart
    return np.concatenate([np.asarray(head), band])


def _charts(one: Checked, known: Mapping[str, Any], width: int) -> Iterator[Picture]:
    for field, unit in (("boxes", "boxes"), ("segmentation", "pixels")):
        space = one.data_set.provides.get(field)
        if field in known and space is not None:
            classes = known[field]["classes"]
            occur = f"{sum(k[unit] > 0 for k in classes)} of {len(classes)} classes occur"
            yield bar_chart(f"{unit} of {space.name}: {occur}", class_bars(classes, unit, space), width)
    if "histogram" in known.get("depth_m", {}):
        yield bar_chart("measured depths", depth_bars(known["depth_m"]["histogram"]), width)
