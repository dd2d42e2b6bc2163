"""Results files in COCO's format: a list of {image_id, category_id, bbox or segmentation, score}."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from visionmtl.structures import Detections, LabelSpace

Row = dict[str, Any]


def rows_of(image_id: str, found: Detections, space: LabelSpace) -> list[Row]:
    """The boxes of one image as COCO wants them: a number for an image id that is one, official category ids.

    What is not finite is left out: JSON has no way to write it."""
    corners = found.xyxy.astype(np.float64)
    xywh = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1).tolist()
    ids = space.ids or tuple(range(len(space.classes)))
    number = int(image_id) if image_id.isdecimal() else image_id
    rows = [
        {"image_id": number, "category_id": ids[label], "bbox": box, "score": score}
        for box, label, score in zip(xywh, found.labels.tolist(), found.scores.tolist(), strict=True)
    ]
    return [row for row in rows if is_finite(row)]


def read_rows(path: Path) -> list[Row]:
    """The entries of a results file. Raises ValueError naming the entry for what is none; NaN passes."""
    if not path.is_file():
        raise ValueError(f"{path} is no file; a COCO results file (.json) is needed; correct the path")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); a whole results file is needed; write it again") from error
    if not isinstance(rows, list):
        raise ValueError(
            f"{path} holds a {type(rows).__name__}; COCO results are a list of {{image_id, category_id, bbox, score}}; "
            "give the results to --from-predictions and the annotations to --truth"
        )
    for number, row in enumerate(rows):
        if not _is_row(row):
            raise ValueError(
                f"{path}: entry {number} is {str(row)[:100]}; each needs image_id, category_id, a number as score, and "
                "bbox [x, y, width, height] or segmentation (RLE); correct it"
            )
    return rows


def is_finite(row: Row) -> bool:
    """Whether its score and box are numbers one can count with."""
    return all(math.isfinite(value) for value in (row["score"], *row.get("bbox", ())))


def canonical(image_id: object) -> str:
    """000000000139, "139" and 139 are one image."""
    text = str(image_id)
    return str(int(text)) if text.isdecimal() else text


def _is_row(row: object) -> bool:
    if not isinstance(row, dict) or not {"image_id", "category_id", "score"} <= row.keys():
        return False
    box = row.get("bbox")
    shaped = isinstance(row.get("segmentation"), dict) if box is None else _are_numbers(box) and len(box) == 4
    return shaped and _are_numbers([row["score"]]) and isinstance(row["category_id"], int)


def _are_numbers(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(value, int | float) for value in values)
