"""Results files in COCO's format: a list of {image_id, category_id, bbox or segmentation, score}."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visionmtl.config.text_files import read_json
from visionmtl.io.atomic import plain_json
from visionmtl.io.coco.annotations import bad, check_objects, check_unit, ids_of, is_number
from visionmtl.structures import Detections, LabelSpace

Row = dict[str, Any]


def rows_of(
    image_id: str | int, detections: Detections, space: LabelSpace, columns: Mapping[str, NDArray[Any]] | None = None
) -> list[Row]:
    """The boxes of one image as COCO wants them: a number for an image id that is one, official category ids.

    columns: more to say of each box, [D] or [D, n] by name; readers of COCO results pass over it.
    Boxes that are not finite are left out: JSON has no way to write them."""
    corners = detections.xyxy.astype(np.float64)
    xywh = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1).tolist()
    ids = space.official_ids
    # digits of other scripts, and more than 64 bits hold, are names: JSON readers would make another number of them
    if isinstance(image_id, str) and image_id.isascii() and image_id.isdecimal() and len(image_id) <= 18:
        image_id = int(image_id)
    rows = [
        {"image_id": image_id, "category_id": ids[label], "bbox": box, "score": score}
        for box, label, score in zip(xywh, detections.labels.tolist(), detections.scores.tolist(), strict=True)
    ]
    for name, values in (columns or {}).items():
        for row, value in zip(rows, plain_json(values), strict=True):
            row[name] = value
    return [row for row in rows if is_finite(row)]


def read_rows(file: Path) -> list[Row]:
    """The entries of a results file, with ids as `annotations.canonical` writes them; each has boxes, masks or both.

    Raises ValueError naming the entry for what is none. NaN and infinity pass, see `is_finite`; masks are checked
    where their image's size is known, by `annotations.encode`.
    """
    if not file.is_file():
        raise ValueError(f"{file} is no file; a COCO results file (.json) is needed; correct the path")
    rows = read_json(file)
    if not isinstance(rows, list):
        raise ValueError(
            f"{file} holds a {type(rows).__name__}; COCO results are a list of {{image_id, category_id, bbox, score}}; "
            "give the results to --from-predictions and the annotations to --truth"
        )
    check_objects(file, "entry", rows)
    for number, row in enumerate(rows):
        if not is_number(row.get("score")):
            raise bad(file, "entry", number, rows, "a number as score")
        box = row.get("bbox")
        is_box = isinstance(box, list) and len(box) == 4 and all(map(is_number, box))
        if not is_box and (box is not None or not isinstance(row.get("segmentation"), dict | list)):
            raise bad(file, "entry", number, rows, "bbox [x, y, width, height], or a segmentation (RLE)")
    boxes = np.array([row["bbox"] for row in rows if row.get("bbox") is not None], np.float64).reshape(-1, 4)
    check_unit(str(file), boxes)
    images, categories = (ids_of(file, "entry", rows, key) for key in ("image_id", "category_id"))
    return [
        {
            "image_id": image_id, "category_id": category_id, "score": float(row["score"]),
            **{key: row[key] for key in ("bbox", "segmentation") if row.get(key) is not None},
        }
        for row, image_id, category_id in zip(rows, images, categories, strict=True)
    ]  # fmt: skip


def is_finite(row: Row) -> bool:
    """Whether its score and box are numbers one can count with."""
    return all(math.isfinite(value) for value in (row["score"], *row.get("bbox", ())))
