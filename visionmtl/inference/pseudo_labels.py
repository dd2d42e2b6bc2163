"""Predictions as a data set that the `folder` reader reads back, alone or for what another data set lacks.

DIR/images/PATH.EXT          the images: links, copies, or one link to their folder
DIR/boxes.json               COCO annotations
DIR/segmentation/PATH.png    8 bit, class ids, 255 where nobody is sure
DIR/depth/PATH.png           16 bit, metres x units, 0 where nobody is sure; PATH.npy where measured depths are kept
DIR/data.yaml                a data block that reads them
DIR/labels.json              what made them, and which were there before
"""

import io
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from numpy.typing import NDArray

from visionmtl.data.collate import pad
from visionmtl.data.label_spaces import Spaces, align, supervises
from visionmtl.data.transforms.augment import fit
from visionmtl.datasets import NamedDataset
from visionmtl.engine.evaluator import forward, mirror_contents
from visionmtl.inference.results_io import MAX_CODE, fitting_depth_units
from visionmtl.io.atomic import write_bytes, write_json, write_text
from visionmtl.io.images import SUFFIXES, list_images, read_image, write_png
from visionmtl.io.paths import stays_inside, without_ending
from visionmtl.network import MultiTaskNet
from visionmtl.ops.precision import Precision
from visionmtl.structures import Boxes, Intrinsics, LabelSpace
from visionmtl.tasks.base import Task

FIELDS = ("boxes", "segmentation", "depth_m")
"""The fields of `Sample` that the `folder` reader has."""
ImageMode = Literal["link", "copy", "refer"]


@dataclass(frozen=True)
class ImageRef:
    """An image to label."""

    path: str  # in the written data set, with / and without ending; of a data set: what precedes the image's id
    file: Path | None  # None: only its pixels are there
    dataset: NamedDataset | None = None
    index: int = 0  # in its data set


@dataclass
class Labelled:
    """An image with its labels by field of `Sample`, all at its own resolution."""

    path: str  # in the written data set, with / and without ending
    file: Path | None
    image: NDArray[np.uint8]  # [H, W, 3] RGB
    labels: dict[str, Any] = field(default_factory=dict)
    kept: tuple[str, ...] = ()  # the fields that were labelled before
    as_stored: bool = True  # whether `image` is what an image viewer makes of the file
    intrinsics: Intrinsics | None = None  # of the camera, where the data set knows it


def folder_sources(folder: Path) -> list[ImageRef]:
    """Every image in a folder and the folders in it, in the order of names; an image file alone is one source."""
    if folder.is_file():
        return [ImageRef(folder.stem, folder)]
    files = list_images(folder)
    if not files:
        found = f"{folder} {'holds no image' if folder.exists() else 'is not there'}"
        raise ValueError(f"{found}; one or more that end with {' '.join(SUFFIXES)} are needed; correct the path")
    return [ImageRef(without_ending(file.relative_to(folder).as_posix()), file) for file in files]


def dataset_sources(datasets: Sequence[NamedDataset], folders: bool) -> list[ImageRef]:
    """Every image of data sets; with `folders`, where there are several, below a folder with the data set's name."""
    sources = []
    for dataset in datasets:
        prefix = f"{dataset.name}/" if folders and len(datasets) > 1 else ""
        for index in range(len(dataset)):
            file = dataset.file(index)
            sources.append(ImageRef(prefix, None if file is None else Path(file), dataset, index))
    return sources


def datasets_of(sources: Sequence[ImageRef]) -> list[NamedDataset]:
    """The data sets that the images are of, each once."""
    return list({id(one.dataset): one.dataset for one in sources if one.dataset}.values())


def read_by_name(sources: Sequence[ImageRef], tasks: Mapping[str, Task], spaces: Spaces) -> list[ImageRef]:
    """The images of data sets in the classes that the tasks have learnt, as `align` reads them."""
    datasets = datasets_of(sources)
    everywhere = {name: task.model_copy(update={"learns_from": None}) for name, task in tasks.items()}
    aligned = dict(zip(map(id, datasets), align(datasets, everywhere, spaces), strict=True))
    return [replace(one, dataset=aligned[id(one.dataset)]) if one.dataset else one for one in sources]


class Labeller:
    """A network that labels images; `Task.pseudo_labels` says what a confidence means for each task."""

    def __init__(
        self,
        net: MultiTaskNet,
        size: tuple[int, int],
        precision: Precision,
        *,
        confidence: Mapping[str, float],
        unsure: float | None = None,
        flip: bool = False,
    ) -> None:
        """net: with the tasks to label, one for each field; size: (H, W) of its input; confidence: by task.

        Raises ValueError for tasks whose labels a folder cannot hold.
        """
        self.net, self.size, self.precision = net.eval(), size, precision
        self.confidence, self.unsure, self.flip = dict(confidence), unsure, flip
        fields = Counter(task.field for task in net.tasks.values())
        for name, task in net.tasks.items():
            if task.field not in FIELDS:
                raise ValueError(
                    f"task {name!r} labels {task.field!r}, which data sets of type folder do not have; they have "
                    f"{', '.join(FIELDS)}; leave it out with --tasks"
                )
            if fields[task.field] > 1:
                several = [other for other, of in net.tasks.items() if of.field == task.field]
                raise ValueError(
                    f"tasks {', '.join(several)} all label {task.field!r}; a data set has one such label; choose with "
                    "--tasks"
                )

    @torch.inference_mode()
    def __call__(self, images: Sequence[NDArray[np.uint8]]) -> list[dict[str, Any]]:
        """Of each image the labels by field of `Sample`."""
        resized, metas = zip(*(fit(image, self.size, self.net.size) for image in images), strict=True)
        batch = pad(resized, self.size).to(self.net.mean.device)
        raw = forward(self.net, batch, self.precision)
        tasks = self.net.tasks
        asked = {name: self.flip or task.labels_need_mirror(self.confidence[name]) for name, task in tasks.items()}
        mirrored = forward(self.net, mirror_contents(batch, metas), self.precision) if any(asked.values()) else {}
        by_field = {
            task.field: task.pseudo_labels(
                raw[name], mirrored[name] if asked[name] else None, metas, self.size, self.confidence[name], self.unsure
            )
            for name, task in tasks.items()
        }
        return [{name: values[i] for name, values in by_field.items()} for i in range(len(images))]


def label(
    labeller: Labeller, sources: Sequence[ImageRef], batch_size: int, fill: bool, failed: list[str]
) -> Iterator[Labelled]:
    """The images of `sources` with labels. fill: those of their data sets stay, and only the others are predicted.

    failed: see `read_all`.
    Raises ValueError where a data set's labels are of another label space than the network's.
    """
    if fill:
        for dataset in datasets_of(sources):
            _check_spaces(dataset, labeller.net.tasks, labeller.net.spaces)
    waiting = read_all(sources, fill, failed)
    while images := list(islice(waiting, batch_size)):
        fields = {task.field for task in labeller.net.tasks.values()}
        lacking = [one for one in images if fields.difference(one.kept)]
        predicted = labeller([one.image for one in lacking]) if lacking else []
        for one, labels in zip(lacking, predicted, strict=True):
            one.labels = {**labels, **one.labels}
        yield from images


def read_all(sources: Sequence[ImageRef], fill: bool, failed: list[str]) -> Iterator[Labelled]:
    """Every image that can be read; the others are told of, and their names join `failed`."""
    for source in sources:
        try:
            yield read(source, fill)
        except ValueError as error:  # one damaged file does not end a folder
            print(f"error: {error}", file=sys.stderr)
            failed.append(source.path if source.dataset is None else f"{source.dataset.name} {source.index}")


def read(source: ImageRef, fill: bool) -> Labelled:
    """An image; with its own labels, if they are to stay."""
    if source.dataset is None:
        assert source.file is not None
        return Labelled(source.path, source.file, read_image(source.file))
    sample = source.dataset.read(source.index)
    own = {name: getattr(sample, name) for name in FIELDS} if fill else {}
    known = {name: value for name, value in own.items() if value is not None}
    file = source.file
    as_stored = False
    if file is not None and file.suffix.lower() in SUFFIXES and sample.image.shape[2] == 3:
        # a reader may have turned or cut the image, or taken it out of an archive
        as_stored = np.array_equal(read_image(file), sample.image)
    path = source.path + sample.image_id
    return Labelled(path, file, sample.image, known, tuple(known), as_stored, sample.intrinsics)


def _check_spaces(dataset: NamedDataset, tasks: Mapping[str, Task], spaces: Spaces) -> None:
    for name, task in tasks.items():
        task = task.model_copy(update={"learns_from": None})
        if task.field in dataset.provides and not supervises(dataset, task, spaces[name]):
            own, learned = dataset.provides[task.field], spaces[name]
            raise ValueError(
                f"data set {dataset.name} labels {task.field!r} with the classes of {own and own.name}, and task "
                f"{name!r} has learnt those of {learned and learned.name}; one data set has one list of classes; "
                "leave the task out with --tasks, or label without --fill"
            )


class LabelWriter:
    """Writes a data set of type folder into an empty folder; `close` writes what belongs to all of it."""

    def __init__(
        self,
        folder: Path,
        sources: Sequence[ImageRef],
        tasks: Mapping[str, Task],
        spaces: Spaces,
        *,
        images: ImageMode = "link",
        fill: bool = False,
        common: Path | None = None,
    ) -> None:
        """tasks, spaces: of the network; common: the folder of the images, for `refer`."""
        self.folder, self.mode = folder.resolve(), images
        self._spaces: dict[str, LabelSpace | None] = {task.field: spaces[name] for name, task in tasks.items()}
        datasets = datasets_of(sources) if fill else []
        self._keep_spaces(datasets)
        self.left_out = sorted({name for dataset in datasets for name in dataset.provides if name not in FIELDS})
        """Fields that the images are labelled with and the written data set has no place for."""
        self._exact_depth = any("depth_m" in dataset.provides for dataset in datasets)
        self.units = fitting_depth_units(tasks)
        self._files: dict[str, str] = {}  # image file by path
        self._seen: dict[str, Path | None] = {}
        self._rows: list[tuple[str, tuple[int, int], Boxes]] = []
        self._counts: Counter[tuple[str, str]] = Counter()
        self._kept: dict[str, list[str]] = {}
        for source in sources:
            if source.dataset is None:
                self._check_path(source.path, source.file)
        self._seen.clear()
        if images == "refer" and (common is None or not common.is_dir()):
            raise ValueError("--images refer links to the folder of the images; a folder is needed; give one, or link")
        self.folder.mkdir(parents=True, exist_ok=True)
        if images == "refer":
            assert common is not None
            (self.folder / "images").symlink_to(common.resolve(), target_is_directory=True)

    def _keep_spaces(self, datasets: Sequence[NamedDataset]) -> None:
        """Labels that nothing is predicted for stay in their classes, of which all data sets have the same."""
        for name in [name for name in FIELDS if name not in self._spaces]:
            labelled = [dataset for dataset in datasets if name in dataset.provides]
            for dataset in labelled:
                space, other = dataset.provides[name], labelled[0]
                known = self._spaces.setdefault(name, space)
                if space and known and (space.name, space.classes) != (known.name, known.classes):
                    raise ValueError(
                        f"data sets {other.name} and {dataset.name} label {name!r} with the classes of {known.name} "
                        f"and of {space.name}; the data set that is written has one list; label each by its own command"
                    )

    def _check_path(self, path: str, file: Path | None) -> None:
        if not stays_inside(path):
            raise ValueError(
                f"image {path!r} has a name that files cannot have everywhere; needed are relative paths without '..', "
                "':' and '\\'; rename it"
            )
        if path in self._seen:
            raise ValueError(
                f"{file} and {self._seen[path]} are both called {path!r} without ending; labels are found by that "
                "name; rename one"
            )
        self._seen[path] = file

    def add(self, one: Labelled) -> None:
        """Write one image and its labels."""
        path, size = one.path, (one.image.shape[0], one.image.shape[1])
        self._check_path(path, one.file)
        self._files[path] = self._write_image(one)
        for name, value in one.labels.items():
            self._counts[name, "kept" if name in one.kept else "predicted"] += 1
            if name == "boxes":
                self._rows.append((self._files[path], size, value))
            elif name == "segmentation":
                write_png(self.folder / f"segmentation/{path}.png", value)
            elif self._exact_depth:
                content = io.BytesIO()
                np.save(content, value.astype(np.float32))
                write_bytes(self.folder / f"depth/{path}.npy", content.getvalue())
            else:
                codes = np.rint(value.astype(np.float64) * self.units)
                codes = np.where(value > 0, np.clip(codes, 1, MAX_CODE), 0)
                write_png(self.folder / f"depth/{path}.png", codes.astype(np.uint16))
        if one.kept:
            self._kept[path] = list(one.kept)

    def close(self, record: Mapping[str, Any]) -> Path:
        """Write boxes, the data block and the record of what made the labels; returns the data block's file."""
        counts = self.counts
        if "boxes" in counts:
            write_json(self.folder / "boxes.json", self._coco(), indent=None)
        written = {"images": len(self._files), "labels": counts, "kept": self._kept}
        write_json(self.folder / "labels.json", {**record, **written})
        told = f"# written by visionmtl predict; labels.json beside it says from what\n# {len(self._files)} images\n"
        block = {"data": {"train": [self.settings(counts)]}}
        text = yaml.safe_dump(block, sort_keys=False, allow_unicode=True, width=120)
        file = self.folder / "data.yaml"
        write_text(file, told + text)
        return file

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """By field: of how many images such a label was predicted, and of how many kept."""
        fields = {name for name, _ in self._counts}
        return {name: {how: self._counts[name, how] for how in ("predicted", "kept")} for name in sorted(fields)}

    def settings(self, counts: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
        """Those of the data set; counts: by field how many images have such a label."""
        plain: dict[str, Any] = {"type": "folder", "root": str(self.folder), "images": "images/**/*"}
        parts: dict[str, dict[str, Any]] = {
            "boxes": {"file": "boxes.json"},
            "segmentation": {"files": "segmentation/{path}.png"},
            "depth_m": {
                "files": f"depth/{{path}}.{'npy' if self._exact_depth else 'png'}",
                "metres_per_unit": 1.0 if self._exact_depth else 1 / self.units,
            },
        }
        # a linked folder may hold images beside those that were labelled
        num_images = len(folder_sources(self.folder / "images")) if self.mode == "refer" else len(self._files)
        for name, settings in parts.items():
            if name not in counts:
                continue
            if (space := self._spaces[name]) is not None:
                settings["space"] = space.name
                settings |= {"classes": list(space.classes)} if name == "segmentation" else {}
            if sum(counts[name].values()) < num_images:
                settings["missing"] = "unlabelled"
            plain["depth" if name == "depth_m" else name] = settings
        return plain

    def _coco(self) -> dict[str, Any]:
        space = self._spaces["boxes"]
        assert space is not None
        # readers take classes in the order of their ids
        ids = space.ids if list(space.ids) == sorted(space.ids) and space.ids else range(1, len(space.classes) + 1)
        images: list[dict[str, Any]] = []
        objects: list[dict[str, Any]] = []
        for number, (file, (height, width), boxes) in enumerate(self._rows, 1):
            images.append({"id": number, "file_name": file, "height": height, "width": width})
            corners = boxes.xyxy.astype(np.float64)
            xywh = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
            for box, cls, crowd, area in zip(xywh, boxes.labels, boxes.crowd, boxes.area, strict=True):
                objects.append(
                    {
                        "id": len(objects) + 1, "image_id": number, "category_id": ids[int(cls)],
                        "bbox": box.tolist(), "area": float(area), "iscrowd": int(crowd),
                    }
                )  # fmt: skip
        categories = [{"id": number, "name": name} for number, name in zip(ids, space.classes, strict=True)]
        return {"images": images, "annotations": objects, "categories": categories}

    def _write_image(self, one: Labelled) -> str:
        """The image's file in the written data set, below images/."""
        path, file = one.path, one.file
        if file is None or not one.as_stored:
            write_png(self.folder / f"images/{path}.png", np.ascontiguousarray(one.image[..., ::-1]))
            return f"{path}.png"
        if self.mode != "refer":
            target = self.folder / f"images/{path}{file.suffix}"
            target.parent.mkdir(parents=True, exist_ok=True)
            if self.mode == "link":
                target.symlink_to(os.path.abspath(file))
            else:
                shutil.copyfile(file, target)
        return path + file.suffix


def parse_confidence(given: Iterable[str], tasks: Mapping[str, Task]) -> dict[str, float]:
    """By task, from "TASK=X" or "X" for all boxes; boxes 0.5 and everything else 0 where nothing is said."""
    chosen: dict[str, float] = {}
    for text in given:
        name, equals, number = text.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if not equals or name not in tasks or not 0 <= value <= 1:
            raise ValueError(
                f"--confidence {text}: TASK=X is needed, with a task of {', '.join(tasks)} and a number X from 0 to 1; "
                "correct it"
            )
        if name in chosen:
            raise ValueError(f"--confidence {text}: {name} has {chosen[name]:g} already; one is needed; leave one out")
        chosen[name] = value
    return {name: 0.5 if task.field == "boxes" else 0.0 for name, task in tasks.items()} | chosen
