"""Predictions as files in the official submission formats, written and read back.

DIR/TASK.json                       boxes: COCO results (image_id, official category_id, bbox xywh, score), where asked
                                    for with distance_m, distance_spread_m and position_m
DIR/TASK.json                       image labels: [{"image_id": ..., "scores": {class name: score, ...}}, ...]
DIR/TASK/IMAGE.png                  segmentation: official ids where the label space has them, else class ids; 8 bit
DIR/TASK/IMAGE_pred_labelIds.png    the same for Cityscapes, as its evaluation looks for it
DIR/TASK/IMAGE.png                  depth: 16 bit, metres x 256 as KITTI has it, or millimetres; 0 = no prediction
DIR/TASK/IMAGE.png                  normals: 16 bit RGB, (vector + 1) / 2 x 65535
DIR/submission.json                 by task: what its values mean

Several processes write into one folder, which all must see: each the PNGs of its images, the first the rest. The files
do not tell how many there were: boxes are in the order of image ids.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from visionmtl.config.paths import home_path
from visionmtl.config.registry import did_you_mean
from visionmtl.config.text_files import check_object, read_json, read_object, shown
from visionmtl.data.label_spaces import Spaces
from visionmtl.datasets import NamedDataset
from visionmtl.engine.distributed import gather_objects
from visionmtl.io.atomic import write_json, write_text
from visionmtl.io.coco.annotations import canonical, check_unit
from visionmtl.io.coco.results import read_rows, rows_of
from visionmtl.io.images import read_png, write_png
from visionmtl.io.label_maps import label_table, undeclared_values
from visionmtl.io.paths import Files, composed, is_hidden, is_unicode
from visionmtl.metrics.distance import box_columns
from visionmtl.structures import IGNORE, Detections, ImageClasses, LabelSpace, ReadRequest, Sample
from visionmtl.tasks.base import Task
from visionmtl.tasks.depth import Depth
from visionmtl.visualization.palette import palette

MANIFEST = "submission.json"
KITTI_UNITS, MILLIMETRES = 256, 1000
"""Depth units per metre: those of KITTI's files, and others that programs expect."""
MAX_CODE = 65535
"""Of 16 bits."""

_CITYSCAPES_ENDING = "_pred_labelIds"
_JSON_FIELDS = ("boxes", "image_labels")
"""Predictions that are one JSON file for all images."""
_NORMALS_RANGE = 65535


def check_empty(folder: Path) -> None:
    """Raises ValueError when predictions of another time would be mixed with new ones."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"{folder} is not an empty folder; predictions go into a folder of their own, so that no old file is "
            "scored with the new ones; name another folder, or delete this one"
        )


class SubmissionWriter:
    """Writes each prediction as it comes; `close` writes what belongs to the whole split, once over all ranks."""

    def __init__(
        self, folder: Path, tasks: Mapping[str, Task], spaces: Spaces, units_per_metre: int = KITTI_UNITS,
        distances: bool = False, datasets: Sequence[NamedDataset] = (),
    ) -> None:  # fmt: skip
        """distances: write those of boxes beside them where depth is predicted, see `metrics.distance.box_columns`.

        datasets: those of the images, whose ids are kept with what they are; (): images are named by their files
        """
        kinds = {getattr(one.reader, "ids_are_names", None) for one in datasets} or {True}
        self._by_name = kinds.pop() if len(kinds) == 1 else None
        for task in tasks.values():
            _check_field(task)
        check_depth_units(tasks, units_per_metre)
        self.folder, self._tasks, self._spaces, self._units = folder, dict(tasks), spaces, units_per_metre
        depth_tasks = [name for name, task in tasks.items() if task.field == "depth_m"]
        self._depth_task = depth_tasks[0] if depth_tasks and distances else None
        self._seen: dict[str, str] = {}  # image ids, by what they mean in a results file
        self._rows: dict[str, list[dict[str, Any]]] = {name: [] for name, t in tasks.items() if t.field in _JSON_FIELDS}
        for name in tasks.keys() - self._rows.keys():
            (folder / name).mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, sample: Sample, predictions: Mapping[str, Any]) -> None:
        """Keep the predictions of one image, by task."""
        check_ids([sample.image_id], self._seen)
        for name, prediction in predictions.items():
            space = self._spaces[name]
            if name in self._rows:
                assert space is not None
                if self._tasks[name].field == "boxes":
                    depth_m = predictions.get(self._depth_task) if self._depth_task else None
                    columns = None if depth_m is None else box_columns(depth_m, prediction.xyxy, sample.intrinsics)
                    self._rows[name] += rows_of(sample.image_id, prediction, space, columns)
                else:
                    self._rows[name] += _score_rows(sample.image_id, prediction, space)
                continue
            file = self.folder / self._png(name, sample.image_id)
            write_png(file, _PNG[self._tasks[name].field].encode(prediction, space, self._units))

    def close(self) -> None:
        """Write the files of boxes, joined over ranks, and what the values mean.

        Raises ValueError, on all ranks, when two of them had an image of one name, whose files would be mixed; on the
        first, when it does not find what the others wrote.
        """
        parts = gather_objects((self._rows, list(self._seen.values())))
        ids = [image_id for _, seen in parts for image_id in seen]
        counts = Counter(map(_key, ids))
        if repeated := sorted(image_id for image_id in ids if counts[_key(image_id)] > 1):
            raise _twice(repeated[0], repeated[0])
        if dist.is_initialized() and dist.get_rank() != 0:
            return
        self._check_pngs(ids)
        for name in self._rows:
            rows = sorted((row for of_rank, _ in parts for row in of_rank[name]), key=_by_image)
            write_text(self.folder / f"{name}.json", json.dumps(rows))

        meaning: dict[str, Any] = {}
        for name, task in self._tasks.items():
            space = self._spaces[name]
            meaning[name] = {"field": task.field, "space": space and space.plain()}
            if task.field == "depth_m":
                meaning[name]["units_per_metre"] = self._units
            if task.field == "boxes" and self._by_name is not None:
                meaning[name]["images_by_name"] = self._by_name
        write_json(self.folder / MANIFEST, meaning)

    def _png(self, name: str, image_id: str) -> str:
        """The file of an image's prediction, relative to the folder."""
        if image_id.startswith("/") or ".." in image_id.split("/"):
            raise ValueError(
                f"image id {image_id!r} leads out of the folder of the predictions; ids are relative and without ..; "
                "correct the data set's ids"
            )
        space = self._spaces[name]
        ending = _CITYSCAPES_ENDING if space is not None and space.name == "cityscapes19" else ""
        return f"{name}/{image_id}{ending}.png"

    def _check_pngs(self, ids: Sequence[str]) -> None:
        pngs = [self._png(name, image_id) for name in self._tasks.keys() - self._rows.keys() for image_id in ids]
        missing = ~Files(self.folder).present(pngs)
        if missing.any():
            raise ValueError(
                f"{np.count_nonzero(missing)} of {len(pngs)} PNGs are not in {self.folder} as the first process sees "
                "it; all processes must write into one folder; name one that all machines share"
            )


def paths_by_task(arguments: Sequence[str], tasks: Mapping[str, Task]) -> dict[str, Path]:
    """The files of each task. arguments: TASK=PATH, or a folder with TASK.json and TASK/ as written here."""
    paths: dict[str, Path] = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if equals:
            if name not in tasks:
                raise ValueError(
                    f"--from-predictions {argument}: there is no task {name!r}{did_you_mean(name, tasks)}; it can be "
                    f"{', '.join(tasks)}; correct it"
                )
            _check_once(argument, [name], paths)
            paths[name] = home_path(path)
            continue
        folder = home_path(argument)
        candidates = {name: folder / (f"{name}.json" if t.field in _JSON_FIELDS else name) for name, t in tasks.items()}
        existing = {name: path for name, path in candidates.items() if path.exists()}
        if not existing:
            raise ValueError(
                f"{folder} holds predictions of none of the tasks {', '.join(tasks)}; TASK.json (boxes, image "
                "labels) or TASK/ (PNGs) are looked for there; name each task's own file or folder as TASK=PATH"
            )
        _check_once(argument, existing, paths)
        paths |= existing
    return paths


def _check_once(argument: str, tasks: Iterable[str], paths: Mapping[str, Path]) -> None:
    if twice := [name for name in tasks if name in paths]:
        raise ValueError(
            f"--from-predictions {argument} gives {twice[0]!r} files a second time, after {paths[twice[0]]}; each task "
            "is scored on one file or folder; leave one out"
        )


@dataclass(frozen=True)
class Predictions:
    """The predictions of one task in files, wherever they were made."""

    read: Callable[[Sample], tuple[str, Any]]
    """Which prediction is that of an image, and its values. Raises ValueError where there is none."""
    num_ignored: int = 0
    """Boxes of categories that the label space does not have."""
    images_unread: set[str] = field(default_factory=set)
    """Images in a JSON file that `read` was not asked for so far."""
    files_unread: set[str] = field(default_factory=set)
    """PNGs in a folder that were the prediction of no image so far."""

    def notes(self, path: Path) -> list[str]:
        """What of `path` was not scored, after `read` was called for every labelled image; on all ranks the same."""
        notes, spare = [], sorted(set.intersection(*gather_objects(self.files_unread)))
        if self.num_ignored:
            notes.append(f"ignored {self.num_ignored} boxes of categories that {path} should not have")
        if spare:
            notes.append(f"not scored: {len(spare)} PNGs of {path} that no labelled image asked for, as {spare[0]}.png")
        return notes


def open_predictions(
    path: Path, task: Task, space: LabelSpace | None, units_per_metre: float | None = None
) -> Predictions:
    """A JSON file for boxes and image labels, a folder of PNGs for everything else.

    units_per_metre: of depth files; None: as the folder's submission.json says, else KITTI_UNITS.
    """
    _check_field(task)
    space, declared = _declared(path, task, space)
    if task.field == "boxes":
        assert space is not None
        return _open_boxes(path, space)
    if task.field == "image_labels":
        assert space is not None
        return _open_scores(path, space)
    if not path.is_dir():
        raise ValueError(f"{path} is no folder; {task.field} is read from one PNG an image; name their folder")
    pngs = [file for file in path.rglob("*.png") if not is_hidden(file.name)]
    files = {composed(file.relative_to(path).with_suffix("").as_posix()): file for file in pngs}
    by_file_name: dict[str, list[str]] = {}
    for name in files:
        by_file_name.setdefault(name.rpartition("/")[2], []).append(name)
    units = units_per_metre or declared or KITTI_UNITS
    unread = set(files)

    def read(sample: Sample) -> tuple[str, Any]:
        image_id = composed(sample.image_id)
        names = [image_id, image_id + _CITYSCAPES_ENDING]
        file_names = [name.rpartition("/")[2] for name in names]  # all in one folder, whatever the id says
        matches = [name for name in (*names, *file_names) if name in files][:1]
        if not matches:  # below folders that the id does not name
            pairs = zip(names, file_names, strict=True)
            matches = [m for name, last in pairs for m in by_file_name.get(last, ()) if m.endswith(f"/{name}")]
        if len(matches) > 1:
            raise ValueError(
                f"image {sample.image_id!r} has {len(matches)} predictions in {path}: {', '.join(matches)}; each image "
                "needs one; name the folder that holds them once"
            )
        if not matches:
            raise ValueError(
                f"image {sample.image_id!r} has no prediction in {path}, which holds {len(files)} PNGs; every labelled "
                f"image needs one, called {names[0]}.png or {names[1]}.png; add it, or rename the files"
            )
        unread.discard(matches[0])
        prediction = _PNG[task.field].read(files[matches[0]], space, units)
        if task.field == "depth_m":
            _check_dense(files[matches[0]], prediction, sample.depth_m)
        return matches[0], prediction

    return Predictions(read, files_unread=unread)


def _open_boxes(path: Path, space: LabelSpace) -> Predictions:
    labels = {str(official): label for label, official in enumerate(space.official_ids)}
    by_image: dict[str, list[tuple[list[float], float, int]]] = {}
    num_ignored = 0
    for number, row in enumerate(read_rows(path)):
        if "bbox" not in row:
            raise ValueError(
                f"{path}: entry[{number}] has a mask and no box; every result needs bbox [x, y, width, height] here; "
                "masks are scored with --truth alone"
            )
        of_image = by_image.setdefault(row["image_id"], [])
        if row["category_id"] in labels:
            of_image.append((row["bbox"], row["score"], labels[row["category_id"]]))
        else:
            num_ignored += 1
    if num_ignored and not any(by_image.values()):
        raise ValueError(
            f"{path}: none of the {num_ignored} boxes has a category that is scored; category_id must be one of "
            f"{', '.join(labels):.200}; write these ids"
        )
    unread = set(by_image)

    def read(sample: Sample) -> tuple[str, Detections]:
        key = _key(sample.image_id)
        unread.discard(key)
        rows = by_image.get(key, [])
        xywh = np.array([row[0] for row in rows], np.float64).reshape(-1, 4)
        check_unit(f"{path}: image {sample.image_id!r}", xywh, np.tile(sample.size, (len(xywh), 1)))
        corners = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1).astype(np.float32)
        scores, classes = np.array([row[1] for row in rows]), np.array([row[2] for row in rows], np.int64)
        return key, Detections(corners, scores.astype(np.float32), classes)

    return Predictions(read, num_ignored, unread)


def check_images(path: Path, predictions: Predictions, datasets: Sequence[NamedDataset]) -> None:
    """Raises ValueError, on all ranks, if a JSON file names an image that is in no data set.

    To be called on all ranks after `read` was called for every labelled image. Only where the file has more images are
    the data sets read once more, for the ids of images without labels.
    """
    unknown = set.intersection(*gather_objects(predictions.images_unread))
    for dataset in datasets:
        for index in range(len(dataset) if unknown else 0):
            unknown.discard(_key(dataset.read_part(index, ReadRequest(frozenset())).image_id))
    if unknown:
        names = ", ".join(dataset.name for dataset in datasets)
        raise ValueError(
            f"{path} has results for {len(unknown)} image(s) that are not in {names}, the first is "
            f"{min(unknown)}; both must be of one split; give the results of this split, or choose the split that was "
            "predicted with --split"
        )


def _score_rows(image_id: str, prediction: ImageClasses, space: LabelSpace) -> list[dict[str, Any]]:
    scores = zip(prediction.labels, prediction.scores, strict=True)
    # a float32 in as few digits as give it back
    return [{"image_id": image_id, "scores": {space.classes[label]: float(str(score)) for label, score in scores}}]


def _open_scores(path: Path, space: LabelSpace) -> Predictions:
    rows: Any = read_json(path)
    by_image: dict[str, dict[str, float]] = {}
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds a {type(rows).__name__}; a list of entries is needed; write it anew")
    for number, row in enumerate(rows):
        scores = row.get("scores") if isinstance(row, dict) else None
        if not isinstance(scores, dict) or not all(_is_score(value) for value in scores.values()):
            raise ValueError(
                f"{path}: entry[{number}] is {shown(row, 80)}; it needs image_id, and as scores a number of 0..1 for "
                "each class name; correct it"
            )
        if strange := [name for name in scores if name not in space.classes]:
            raise ValueError(
                f"{path}: entry[{number}] has a score of {strange[0]!r}{did_you_mean(strange[0], space.classes)}, "
                f"which is no class of {space.name}; it has {', '.join(space.classes)[:200]}; correct it"
            )
        key = canonical(row.get("image_id"))
        if key is None or key in by_image:
            raise ValueError(
                f"{path}: entry[{number}] has image_id {row.get('image_id')!r}, which is "
                f"{'no id' if key is None else 'that of an earlier entry'}; each image has one entry; correct it"
            )
        by_image[key] = scores
    unread = set(by_image)

    def read(sample: Sample) -> tuple[str, ImageClasses]:
        key = _key(sample.image_id)
        if key not in by_image:
            raise ValueError(
                f"image {sample.image_id!r} has no entry in {path}, which has {len(by_image)}; every labelled image "
                "needs one; add it"
            )
        unread.discard(key)
        ranked = sorted(by_image[key].items(), key=lambda pair: -pair[1])
        labels = np.array([space.classes.index(name) for name, _ in ranked], np.int64)
        return key, ImageClasses(labels, np.array([score for _, score in ranked], np.float32))

    return Predictions(read, images_unread=unread)


def _is_score(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _check_field(task: Task) -> None:
    if task.field not in _JSON_FIELDS and task.field not in _PNG:
        raise ValueError(
            f"there is no file format for {task.field!r}; it can be {', '.join((*_JSON_FIELDS, *_PNG))}; leave that "
            "task out"
        )


def _manifest(path: Path) -> tuple[Path, dict[str, Any]]:
    """submission.json beside predictions, and what it says of them."""
    manifest, name = path.parent / MANIFEST, path.name if path.is_dir() else path.stem
    of_folder = (read_object(manifest) if manifest.is_file() else {}).get(name) or {}
    check_object(of_folder, f"{manifest}: {name}")
    return manifest, of_folder


def declared_space(path: Path) -> LabelSpace | None:
    """The classes that submission.json beside predictions says they are of. Raises ValueError where it cannot be read.

    path: a results file or a folder of PNGs
    """
    return _space_of(path, *_manifest(path))


def declared_by_name(path: Path) -> bool | None:
    """Whether submission.json beside a results file says that its image ids are file names; None: it does not say."""
    manifest, of_folder = _manifest(path)
    value = of_folder.get("images_by_name")
    if value is not None and not isinstance(value, bool):
        raise ValueError(
            f"{manifest}: {path.stem} has images_by_name {shown(value, 50)}; true or false is needed; correct it, or "
            "remove that entry"
        )
    return value


def _space_of(path: Path, manifest: Path, of_folder: Mapping[str, Any]) -> LabelSpace | None:
    plain = of_folder.get("space")
    if plain is None:
        return None
    try:
        colours = palette(len(plain["classes"]))
        space = LabelSpace.from_plain({"name": "", "colours": colours, "ids": (), **plain})
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{manifest}: {path.stem} has as space {shown(plain, 80)}, which is none ({error}); classes, and ids where "
            "they are not 0, 1, 2, are needed; write the predictions anew, or remove that entry"
        ) from error
    return space


def with_declared(spaces: Spaces, paths: Mapping[str, Path]) -> dict[str, LabelSpace | None]:
    """The spaces of data sets, wider where submission.json beside predictions says so.

    A split's annotation file may list fewer classes than the network has learnt that predicted for it.
    paths: the files by task
    """
    wider = dict(spaces)
    for name, path in paths.items():
        own, declared = spaces[name], declared_space(path)
        if own and declared and own.name == declared.name and set(own.classes) <= set(declared.classes):
            wider[name] = declared
    return wider


def _declared(path: Path, task: Task, space: LabelSpace | None) -> tuple[LabelSpace | None, float | None]:
    """The space with the ids, and the units a metre, that submission.json beside predictions declares.

    Raises ValueError where it says that they are of another field or of other classes.
    """
    manifest, of_folder = _manifest(path)
    if (labels := of_folder.get("field", task.field)) != task.field:
        raise ValueError(
            f"{manifest}: {path.stem} holds {shown(labels, 50)}, and the task scored needs {task.field}; both must be "
            "one; give the files of this task, as TASK=PATH"
        )
    if space and (declared := _space_of(path, manifest, of_folder)):
        if declared.classes != space.classes:
            raise ValueError(
                f"{manifest}: {path.stem} was predicted with classes {shown(list(declared.classes), 200)}, and is "
                f"scored with {shown(list(space.classes), 200)}; both must be the same, in the same order; score it "
                "with the data set that it was predicted for"
            )
        space = replace(space, ids=declared.ids) if "ids" in of_folder["space"] else space
    value = of_folder.get("units_per_metre")
    if value is not None and (type(value) not in (int, float) or not 0 < value < math.inf):
        raise ValueError(
            f"{manifest}: {path.stem} has units_per_metre {shown(value, 50)}; a number above 0 is needed; correct "
            "it, or give --depth-units"
        )
    return space, value


def check_depth_units(tasks: Mapping[str, Task], units_per_metre: int) -> None:
    """Raise ValueError where 16 bits do not hold the depths of a task."""
    for name, task in tasks.items():
        if isinstance(task, Depth) and task.max_depth_m * units_per_metre > MAX_CODE:
            raise ValueError(
                f"task {name!r} reaches {task.max_depth_m:g} m, and 16 bits hold {MAX_CODE / units_per_metre:.4g} m at "
                f"{units_per_metre} units a metre; {int(MAX_CODE / task.max_depth_m)} units or fewer are needed; lower "
                "--depth-units or max_depth_m, or leave the task out"
            )


def fitting_depth_units(tasks: Mapping[str, Task]) -> int:
    """Millimetres where 16 bits hold a task's depths, else KITTI_UNITS. Raises ValueError where those are too few."""
    limits = [task.max_depth_m for task in tasks.values() if isinstance(task, Depth)]
    units = MILLIMETRES if max(limits, default=0) * MILLIMETRES <= MAX_CODE else KITTI_UNITS
    check_depth_units(tasks, units)
    return units


def check_ids(ids: Iterable[str], seen: dict[str, str] | None = None) -> None:
    """Raise ValueError for an image that one submission cannot hold beside those seen, which it joins."""
    seen = {} if seen is None else seen
    for image_id in ids:
        if not is_unicode(image_id):
            raise ValueError(
                f"image {image_id!r} has a name that is not UTF-8, and files and JSON cannot hold it; a name in UTF-8 "
                "is needed; rename it"
            )
        if _key(image_id) in seen:
            raise _twice(seen[_key(image_id)], image_id)
        seen[_key(image_id)] = image_id


def _twice(first: str, second: str) -> ValueError:
    return ValueError(
        f"two images are called {first!r}{'' if first == second else f' and {second!r}, which mean the same'}; one "
        "submission holds each image once; rename one, or save one data set at a time, e.g. with ~data.val.1"
    )


def _by_image(row: Mapping[str, Any]) -> tuple[bool, int, str]:
    """Sorts rows by image: numbers first, by value; within an image, rows stay as they come, best first."""
    image_id = row["image_id"]
    return (False, image_id, "") if isinstance(image_id, int) else (True, 0, image_id)


def _key(image_id: str) -> str:
    """What the id means in a results file, where "007" and 7 are one image."""
    return canonical(image_id) or image_id


def encode_map(
    task: Task, prediction: Any, space: LabelSpace | None, units_per_metre: int = KITTI_UNITS
) -> NDArray[Any] | None:
    """The prediction of a map as the pixels of its PNG (BGR where there are three channels); None: it is no map."""
    form = _PNG.get(task.field)
    return None if form is None else form.encode(prediction, space, units_per_metre)


def _encode_classes(classes: NDArray[Any], space: LabelSpace | None, units: float) -> NDArray[Any]:
    return _official_ids(space)[classes]


def _decode_classes(values: NDArray[Any], space: LabelSpace | None, units: float) -> NDArray[Any]:
    assert space is not None
    ids = _official_ids(space)[: len(space.classes)].tolist()
    table = label_table(space.classes, dict(zip(ids, space.classes, strict=True)), sorted({_no_class(space), IGNORE}))
    if strange := undeclared_values(values, table):
        raise ValueError(
            f"holds the value {min(strange)}; {space.name} has {', '.join(map(str, ids))}, and {IGNORE} is no class; "
            "write those"
        )
    return table[values].astype(np.uint8)


def _official_ids(space: LabelSpace | None) -> NDArray[np.uint8]:
    """uint8 [256]: value in the file by class id."""
    assert space is not None
    table = np.full(256, _no_class(space), np.uint8)
    table[: len(space.classes)] = space.official_ids
    return table


def _no_class(space: LabelSpace) -> int:
    """0 in official files, IGNORE where that is a class's or ids are our own."""
    return IGNORE if not space.ids or 0 in space.ids else 0


def _encode_depth(depth_m: NDArray[Any], space: LabelSpace | None, units: float) -> NDArray[Any]:
    # 0 means "no prediction": what is nearer than a step becomes the first step
    return np.clip(np.rint(depth_m.astype(np.float64) * units), 1, MAX_CODE).astype(np.uint16)


def _decode_depth(values: NDArray[Any], space: LabelSpace | None, units: float) -> NDArray[Any]:
    return (values / np.float64(units)).astype(np.float32)


def _encode_normals(normals: NDArray[Any], space: LabelSpace | None, units: float) -> NDArray[Any]:
    codes = np.rint((normals.astype(np.float64).clip(-1, 1) + 1) / 2 * _NORMALS_RANGE).astype(np.uint16)
    return np.ascontiguousarray(codes[..., ::-1])  # OpenCV writes BGR


def _decode_normals(values: NDArray[Any], space: LabelSpace | None, units: float) -> NDArray[Any]:
    return (values[..., ::-1] / _NORMALS_RANGE * 2 - 1).astype(np.float32)


_Convert = Callable[[NDArray[Any], LabelSpace | None, float], NDArray[Any]]


def _check_dense(file: Path, depth_m: NDArray[Any], truth: NDArray[Any] | None) -> None:
    if truth is None or truth.shape != depth_m.shape:  # another size is the meter's to tell
        return
    if missing := np.count_nonzero((depth_m == 0) & (truth > 0)):
        raise ValueError(
            f"{file} has 0, no prediction, in {missing:,} pixels whose depth was measured; each of them is scored and "
            "needs one; fill them in"
        )


class _PngFormat(NamedTuple):
    """How the values of a map are stored. encode, decode: (values, label space, depth units per metre)."""

    dtype: type
    channels: int
    encode: _Convert
    decode: _Convert

    def read(self, file: Path, space: LabelSpace | None, units: float) -> NDArray[Any]:
        """The map in a file. Raises ValueError where it has another type or number of channels."""
        values = read_png(file)
        channels = 1 if values.ndim == 2 else values.shape[2]
        if values.dtype != self.dtype or channels != self.channels:
            raise ValueError(
                f"{file} has {channels} channel(s) of {values.dtype.itemsize * 8} bits; {self.channels} of "
                f"{np.dtype(self.dtype).itemsize * 8} bits are needed here; convert it"
            )
        try:
            return self.decode(values, space, units)
        except ValueError as error:
            raise ValueError(f"{file} {error}") from None


_PNG = {  # by field of `Sample`
    "segmentation": _PngFormat(np.uint8, 1, _encode_classes, _decode_classes),
    "depth_m": _PngFormat(np.uint16, 1, _encode_depth, _decode_depth),
    "normals": _PngFormat(np.uint16, 3, _encode_normals, _decode_normals),
}
