"""Predictions as files in the official submission formats, written and read back.

    DIR/TASK.json                       boxes: COCO results (image_id, official category_id, bbox xywh, score)
    DIR/TASK/IMAGE.png                  segmentation: official ids where the label space has them, else class ids; 8 bit
    DIR/TASK/IMAGE_pred_labelIds.png    the same for Cityscapes, as its evaluation looks for it
    DIR/TASK/IMAGE.png                  depth: 16 bit, metres x 256 as KITTI has it, or millimetres; 0 = no prediction
    DIR/TASK/IMAGE.png                  normals: 16 bit RGB, (vector + 1) / 2 x 65535
    DIR/submission.json                 by task: what its values mean
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from visionmtl.ops.photos import read_png
from visionmtl.spaces import Spaces
from visionmtl.tasks.base import Task
from visionmtl.types import IGNORE, Detections, LabelSpace, Sample

MANIFEST = "submission.json"
KITTI_UNITS = 256
"""Depth units per metre of KITTI's files; 1000 are millimetres."""

_CITYSCAPES_ENDING = "_pred_labelIds"
_OFFICIAL_ENDINGS = ("", _CITYSCAPES_ENDING)


class SubmissionWriter:
    """Writes each prediction as it comes; `close` writes what belongs to the whole split, once over all ranks."""

    def __init__(self, folder: Path, tasks: Mapping[str, Task], spaces: Spaces, units_per_metre: int = KITTI_UNITS):
        unknown = [name for name, task in tasks.items() if task.field not in _WRITERS]
        if unknown:
            raise ValueError(
                f"there is no file format for {', '.join(unknown)}; those of {', '.join(_WRITERS)} can be written; "
                "leave out --save-predictions"
            )
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(
                f"{folder} is not empty; predictions go into a folder of their own, so that no old file is scored "
                "with the new ones; name another folder, or delete this one"
            )
        self.folder, self._tasks, self._spaces, self._units = folder, dict(tasks), spaces, units_per_metre
        self._rows: dict[str, list[dict[str, Any]]] = {name: [] for name, t in tasks.items() if t.field == "boxes"}
        for name in tasks.keys() - self._rows.keys():
            (folder / name).mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, sample: Sample, predictions: Mapping[str, Any]) -> None:
        """Keep the predictions of one image, by task."""
        for name, prediction in predictions.items():
            task, space = self._tasks[name], self._spaces[name]
            if task.field == "boxes":
                assert space is not None
                self._rows[name] += coco_results(sample.image_id, prediction, space)
                continue
            file = self.folder / name / f"{_safe(sample.image_id)}{_ending(space)}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            if not cv2.imwrite(str(file), _WRITERS[task.field](prediction, space, self._units)):
                raise OSError(f"{file} could not be written; the folder must be writable and have room; check it")

    def close(self) -> None:
        """Write the files of boxes, joined over ranks, and what the values mean."""
        for name, rows in self._rows.items():
            if dist.is_initialized():
                parts: list[Any] = [None] * dist.get_world_size()
                dist.all_gather_object(parts, rows)
                rows = sorted((row for part in parts for row in part), key=lambda row: str(row["image_id"]))
            if not dist.is_initialized() or dist.get_rank() == 0:
                (self.folder / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
        meaning: dict[str, Any] = {}
        for name, task in self._tasks.items():
            space = self._spaces[name]
            meaning[name] = {"field": task.field, "space": space and space.plain()}
            if task.field == "depth_m":
                meaning[name]["units_per_metre"] = self._units
        (self.folder / MANIFEST).write_text(json.dumps(meaning, indent=1) + "\n", encoding="utf-8")


def coco_results(image_id: str, found: Detections, space: LabelSpace) -> list[dict[str, Any]]:
    """The boxes of one image as COCO wants them: a number for an image id that is one, official category ids."""
    corners = found.xyxy.astype(np.float64)
    xywh = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1).tolist()
    ids = space.ids or tuple(range(len(space.classes)))
    number = int(image_id) if image_id.isdecimal() else image_id
    return [
        {"image_id": number, "category_id": ids[label], "bbox": box, "score": score}
        for box, label, score in zip(xywh, found.labels.tolist(), found.scores.tolist(), strict=True)
    ]


@dataclass(frozen=True)
class Predictions:
    """The predictions of one task in files, wherever they were made."""

    read: Callable[[Sample], Any]
    """The prediction for an image. Raises ValueError where there is none."""
    ignored: int = 0
    """Boxes of categories that the label space does not have."""


def open_predictions(
    path: Path, task: Task, space: LabelSpace | None, units_per_metre: float | None = None
) -> Predictions:
    """A JSON file for boxes, a folder of PNGs for everything else.

    units_per_metre: of depth files; None: as the folder's submission.json says, else KITTI_UNITS.
    """
    if task.field == "boxes":
        assert space is not None
        return _open_boxes(path, space)
    if task.field not in _READERS:
        raise ValueError(f"there is no file format for {task.field!r}; it can be {', '.join(_READERS)}; leave it out")
    if not path.is_dir():
        raise ValueError(f"{path} is no folder; {task.field} is read from one PNG an image; name their folder")
    files = {str(file.relative_to(path).with_suffix("")).replace("\\", "/"): file for file in path.rglob("*.png")}
    files |= {name.rpartition("/")[2]: file for name, file in files.items()}
    units = units_per_metre or _declared_units(path) or KITTI_UNITS

    def read(sample: Sample) -> Any:
        names = [f"{part}{ending}" for part in (sample.image_id, _last(sample.image_id)) for ending in _OFFICIAL_ENDINGS]
        name = next((name for name in names if name in files), None)
        if name is None:
            raise ValueError(
                f"image {sample.image_id!r} has no prediction in {path}, which holds {len(files)} PNGs; every labelled "
                f"image needs one, called {names[0]}.png or {names[1]}.png; add it, or rename the files"
            )
        return _READERS[task.field](files[name], read_png(files[name]), space, units)

    return Predictions(read)


def read_results(path: Path) -> list[dict[str, Any]]:
    """The entries of a COCO results file. Raises ValueError for what is none."""
    if not path.is_file():
        raise ValueError(f"{path} is no file; a COCO results JSON is needed; correct the path")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); a whole results file is needed; write it again") from error
    if not isinstance(rows, list):
        raise ValueError(
            f"{path} holds a {type(rows).__name__}; COCO results are a list of {{image_id, category_id, bbox, score}}; "
            "give the results here and the annotations to --truth"
        )
    for number, row in enumerate(rows):
        shape = isinstance(row, dict) and ("bbox" in row or "segmentation" in row)
        if not shape or not {"image_id", "category_id", "score"} <= row.keys():
            raise ValueError(
                f"{path}: entry {number} is {str(row)[:80]}; each needs image_id, category_id, score, and bbox "
                "[x, y, width, height] or segmentation; correct it"
            )
    return rows


def _open_boxes(path: Path, space: LabelSpace) -> Predictions:
    classes = {official: label for label, official in enumerate(space.ids or range(len(space.classes)))}
    by_image: dict[str, list[tuple[list[float], float, int]]] = {}
    ignored = 0
    for row in read_results(path):
        if row["category_id"] not in classes:
            ignored += 1
            continue
        of_image = by_image.setdefault(_canonical(row["image_id"]), [])
        of_image.append((row["bbox"], row["score"], classes[row["category_id"]]))

    def read(sample: Sample) -> Detections:
        rows = by_image.get(_canonical(sample.image_id), [])
        xywh = np.array([row[0] for row in rows], np.float64).reshape(-1, 4)
        corners = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1).astype(np.float32)
        scores, labels = np.array([row[1] for row in rows]), np.array([row[2] for row in rows], np.int64)
        return Detections(corners, scores.astype(np.float32), labels)

    return Predictions(read, ignored)


def _declared_units(folder: Path) -> float | None:
    manifest = folder.parent / MANIFEST
    declared = json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else {}
    value: float | None = declared.get(folder.name, {}).get("units_per_metre")
    return value


def _canonical(image_id: object) -> str:
    """000000000139, "139" and 139 are one image."""
    text = str(image_id)
    return str(int(text)) if text.isdecimal() else text


def _last(image_id: str) -> str:
    return image_id.rpartition("/")[2]


def _safe(image_id: str) -> str:
    if image_id.startswith("/") or ".." in image_id.split("/"):
        raise ValueError(
            f"image id {image_id!r} leads out of the folder of the predictions; ids are relative and without ..; "
            "correct the data set's ids"
        )
    return image_id


def _ending(space: LabelSpace | None) -> str:
    return _CITYSCAPES_ENDING if space is not None and space.name == "cityscapes19" else ""


def _write_classes(classes: NDArray[np.uint8], space: LabelSpace | None, units: float) -> NDArray[Any]:
    assert space is not None
    table = np.zeros(256, np.uint8) if space.ids else np.full(256, IGNORE, np.uint8)  # official files: 0 is unlabelled
    table[: len(space.classes)] = space.ids or range(len(space.classes))
    return table[classes]


def _write_depth(depth_m: NDArray[np.float32], space: LabelSpace | None, units: float) -> NDArray[Any]:
    # 0 means "no prediction": what is nearer than a step becomes the first step
    return np.clip(np.rint(depth_m.astype(np.float64) * units), 1, 65535).astype(np.uint16)


def _write_normals(normals: NDArray[np.float32], space: LabelSpace | None, units: float) -> NDArray[Any]:
    codes = np.rint((normals.astype(np.float64).clip(-1, 1) + 1) / 2 * 65535).astype(np.uint16)
    return np.ascontiguousarray(codes[..., ::-1])  # OpenCV writes BGR


def _read_classes(file: Path, values: NDArray[Any], space: LabelSpace | None, units: float) -> NDArray[np.uint8]:
    assert space is not None
    if values.ndim != 2 or values.dtype != np.uint8:
        raise ValueError(f"{file} is {values.dtype} {list(values.shape)}; one channel of 8 bits is needed; convert it")
    table = np.full(256, IGNORE, np.uint8)
    table[list(space.ids or range(len(space.classes)))] = np.arange(len(space.classes))
    return table[values]


def _read_depth(file: Path, values: NDArray[Any], space: LabelSpace | None, units: float) -> NDArray[np.float32]:
    if values.ndim != 2 or values.dtype != np.uint16:
        raise ValueError(f"{file} is {values.dtype} {list(values.shape)}; one channel of 16 bits is needed; convert it")
    return (values / np.float64(units)).astype(np.float32)


def _read_normals(file: Path, values: NDArray[Any], space: LabelSpace | None, units: float) -> NDArray[np.float32]:
    if values.ndim != 3 or values.shape[2] != 3 or values.dtype != np.uint16:
        raise ValueError(f"{file} is {values.dtype} {list(values.shape)}; RGB of 16 bits is needed; convert it")
    return (values[..., ::-1] / 65535 * 2 - 1).astype(np.float32)


_WRITERS = {"boxes": None, "segmentation": _write_classes, "depth_m": _write_depth, "normals": _write_normals}
_READERS = {"segmentation": _read_classes, "depth_m": _read_depth, "normals": _read_normals}
