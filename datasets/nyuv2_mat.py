"""NYUv2 read straight from the official `nyu_depth_v2_labeled.mat`: the samples that its prepared folder gives.

    ROOT/nyu_depth_v2_labeled.mat (MATLAB 7.3, i.e. HDF5; 1449 images)  ROOT/splits.mat  ROOT/classMapping40.mat
    ROOT/class13Mapping.mat (only compared); the small ones may lie in a folder below ROOT

HDF5 shows MATLAB's axes reversed: images [N, 3, W, H], everything else [N, W, H]. Depth is rounded to whole
millimetres, as the prepared folder stores it: at most 0.5 mm off, where the Kinect's own steps are 3 mm at 1 m.
Paper, licence and download: see `nyuv2`; the class mappings: https://github.com/ankurhanda/nyuv2-meta-data
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from visionmtl.datasets.nyuv2 import (
    CLASSES,
    INTRINSICS,
    SIZE,
    NYUv2,
    blacken_border,
    class_space,
    metres,
    scene_label,
    scene_space,
    things_space,
)
from visionmtl.io.depth_maps import unit_notes
from visionmtl.io.image_headers import check_pixels
from visionmtl.io.label_maps import outlines
from visionmtl.io.mat_files import Variable, read_numbers
from visionmtl.structures import Boxes, LabelSpace, Sample

MAT = "nyu_depth_v2_labeled.mat"
UNITS_PER_METRE = 1000.0
# labels13 of class13Mapping.mat, with void 0 in front
_13_OF_40 = "0 12 5 6 1 4 9 10 12 13 6 8 6 13 10 6 13 6 7 7 5 7 3 2 6 11 7 7 7 7 7 7 6 7 7 7 7 7 7 6 7"
SEG40_TO_13 = np.array(_13_OF_40.split(), np.uint8)
_ARRAYS = {"images": "u", "labels": "u", "instances": "u", "depths": "f", "rawDepths": "f"}  # kinds: unsigned, float
_DEPTHS = {"inpainted": "depths", "raw": "rawDepths"}
_DAMAGED = (OSError, RuntimeError, KeyError)  # what h5py raises where the file's own structure is wrong
_GET_IT = "get it as datasets/README.md says, or correct `root`"


class NYUv2Mat(NYUv2):
    """NYUv2 from the official files; the settings are those of the prepared folder.

    To look at the data without preparing it; the prepared folder is the one made for training.
    """

    type: Literal["nyuv2_mat"] = "nyuv2_mat"

    def build(self) -> "_Reader":
        return _Reader(self)


class _Reader:
    def __init__(self, spec: NYUv2Mat) -> None:
        self._spec, self._official = spec, (official := Official(Path(spec.root)))
        spaces = {
            "boxes": things_space(), "segmentation": class_space(spec.classes), "image_labels": scene_space(),
        }  # fmt: skip
        self.provides: dict[str, LabelSpace | None] = {name: spaces.get(name) for name in spec.labels}
        self._numbers = official.splits[spec.split]
        if not len(self._numbers):
            problem = f"splits.mat in {spec.root} has no {spec.split} images"
            raise ValueError(f"{problem}; choose the other split or {_GET_IT}")
        self.notes: list[str] = []
        """What is worth knowing about the labels, a sentence each."""
        if "depth_m" in spec.labels:
            where = f"{official.file}, {_DEPTHS[spec.depth]}"
            self.notes += unit_notes(self._read_depth, len(self), where, "metres, which the official file has")
        if "image_labels" in spec.labels:
            self._scenes = official.scenes()

    def __len__(self) -> int:
        return len(self._numbers)

    def file(self, index: int) -> Path:
        """The file of all images."""
        return self._official.file

    def sample_name(self, index: int) -> str:
        """The image's file in the prepared layout, so that a `subset` is the same of both."""
        return f"{self._numbers[index]:04}.png"

    def read(self, index: int) -> Sample:
        """The sample at full size."""
        number, official = int(self._numbers[index]), self._official
        image = official.image(number)
        if self._spec.black_border:
            blacken_border(image, official.file)

        labels: dict[str, Any] = {}
        if "boxes" in self.provides:
            labels["boxes"] = official.objects(number)
        if "segmentation" in self.provides:  # wraps: void 0 becomes 255 = IGNORE
            labels["segmentation"] = official.codes(number, self._spec.classes) - np.uint8(1)
        if "depth_m" in self.provides:
            labels["depth_m"] = self._read_depth(index)
        if "image_labels" in self.provides:
            labels["image_labels"] = self._scenes[number - 1 : number]
        camera = INTRINSICS if image.shape[:2] == SIZE else None
        return Sample(image=image, image_id=f"{number:04}", intrinsics=camera, **labels)

    def _read_depth(self, index: int) -> NDArray[np.float32]:
        return metres(self._official.millimetres(int(self._numbers[index]), self._spec.depth), UNITS_PER_METRE)


class Official:
    """The opened official files. Images have their official numbers, from 1; one image is in memory at a time."""

    def __init__(self, root: Path) -> None:
        self.file = root / MAT
        if not self.file.is_file():
            raise ValueError(f"found no {self.file}; it holds images and labels (2.8 GB); {_GET_IT}")
        self._open: Any = None
        self._check_arrays()
        names = self.names()
        self.splits = _splits(_find(root, "splits.mat"), self._arrays()["images"].shape[0])
        self._to_40 = _label_mapping(_find(root, "classMapping40.mat"), names)
        _compare_13(root)

        things = things_space()
        self._thing_of = np.full(41, -1, np.int64)  # by number of the 40 classes, 0 = void
        self._thing_of[list(things.ids)] = np.arange(len(things.ids))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None}  # every process opens the file for itself

    def image(self, number: int) -> NDArray[np.uint8]:
        """[H, W, 3] RGB."""
        return np.ascontiguousarray(self._read("images", number).transpose(2, 1, 0))

    def codes(self, number: int, classes: int) -> NDArray[np.uint8]:
        """[H, W] numbers of the 13 or 40 classes, from 1; 0 = void."""
        codes = self._to_40[self._labels(number)]
        return SEG40_TO_13[codes] if classes == 13 else codes

    def millimetres(self, number: int, kind: str) -> NDArray[np.uint16]:
        """[H, W], 0 = not measured. kind: "inpainted" or "raw"."""
        depth = self._read(_DEPTHS[kind], number).T.astype(np.float64)
        measured = np.isfinite(depth) & (depth > 0)
        codes = np.rint(np.where(measured, depth, 0) * UNITS_PER_METRE)
        if codes.max() > np.iinfo(np.uint16).max:
            raise ValueError(
                f"{self.file}: {_DEPTHS[kind]} of image {number} reaches {depth[measured].max():.6g}; allowed are "
                "metres up to 65.5 (the camera sees 10 m); the file is not the official one: get it again"
            )
        return np.ascontiguousarray(codes.astype(np.uint16))

    def objects(self, number: int) -> Boxes:
        """One for each (label, instance) pair of a thing class, by label, then instance; area is its pixels."""
        instances = self._read("instances", number).T
        span = int(instances.max()) + 1
        pairs = self._labels(number).astype(np.int32) * span + instances
        thing_of_label = self._thing_of[self._to_40]
        things = outlines(pairs, np.repeat(thing_of_label >= 0, span))
        labels = thing_of_label[things.ids // span]
        return Boxes(things.xyxy, labels, np.zeros(len(labels), np.bool_), things.area)

    def names(self) -> list[str]:
        """What the labels 1, 2, ... are called."""
        return self._texts("names")

    def scenes(self) -> NDArray[np.int64]:
        """[N] the scene type of every image."""
        names = self._texts("sceneTypes")
        if len(names) != (count := self._arrays()["images"].shape[0]):
            raise ValueError(f"{self.file} has {len(names)} sceneTypes for {count} images; each has one; {_GET_IT}")
        where = f"{self.file}: sceneTypes of image"
        return np.array([scene_label(name, f"{where} {i}") for i, name in enumerate(names, start=1)], np.int64)

    def _texts(self, name: str) -> list[str]:
        """A cell array of texts, which the file holds as references to arrays of character codes."""
        arrays = self._arrays()
        try:
            references = np.asarray(arrays[name]).ravel()
            return ["".join(map(chr, np.asarray(arrays[reference]).ravel())) for reference in references]
        except (*_DAMAGED, TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"{self.file}: {name} cannot be read: {error}; the official file has references to texts; {_GET_IT}"
            ) from error

    def _labels(self, number: int) -> NDArray[np.uint16]:
        labels = self._read("labels", number).T
        if labels.max() >= len(self._to_40):
            raise ValueError(
                f"{self.file}: image {number} has label {labels.max()}, but only {len(self._to_40) - 1} labels have a "
                "name and a class; the file is damaged or not the official one: get it again"
            )
        return labels

    def _read(self, name: str, number: int) -> NDArray:
        try:
            return np.asarray(self._arrays()[name][number - 1])
        except _DAMAGED as error:
            raise ValueError(
                f"{self.file}: {name} of image {number} cannot be read: {error}; the official file is complete HDF5; "
                f"{_GET_IT}"
            ) from error

    def _arrays(self) -> Any:
        if self._open is None:
            self._open = _open_hdf5(self.file)
        return self._open

    def _check_arrays(self) -> None:
        arrays = self._arrays()
        try:
            elsewhere = sorted(name for name in (*_ARRAYS, "names", "sceneTypes") if _lies_elsewhere(arrays, name))
            missing = sorted(name for name in (*_ARRAYS, "names") if not hasattr(arrays.get(name), "shape"))
        except _DAMAGED as error:
            raise ValueError(
                f"{self.file} cannot be read: {error}; the official file is complete HDF5; {_GET_IT}"
            ) from error
        if elsewhere:
            raise ValueError(
                f"{self.file}: {', '.join(elsewhere)} lie in other files, to which it leads; the official file holds "
                f"everything itself; {_GET_IT}"
            )
        if missing:
            raise ValueError(
                f"{self.file} has no {', '.join(missing)}; wanted are {', '.join(_ARRAYS)} and names; it is not the "
                f"labelled set of NYUv2: {_GET_IT}"
            )
        count, *size = arrays["labels"].shape or (0,)
        if len(size) == 2:
            check_pixels(self.file, *size)
        for name, kind in _ARRAYS.items():
            shape, dtype = arrays[name].shape, arrays[name].dtype
            expected = (count, 3, *size) if name == "images" else (count, *size)
            if len(size) != 2 or shape != expected or dtype.kind != kind or (name == "images" and dtype != np.uint8):
                raise ValueError(
                    f"{self.file}: {name} are {dtype} {list(shape)} beside labels {[count, *size]}; expected are uint8 "
                    "images [N, 3, W, H] and labels, instances (unsigned) and depths (float) [N, W, H]; the file is "
                    "damaged or was written anew in another way: get the official one"
                )


def _lies_elsewhere(arrays: Any, name: str) -> bool:
    """Whether an array is read from another file: HDF5 has three ways to name one, anywhere on the disk."""
    link = arrays.get(name, getlink=True)
    if link is None or type(link).__name__ == "ExternalLink":
        return link is not None
    array = arrays.get(name)
    return bool(getattr(array, "is_virtual", False) or getattr(array, "external", None))


def _open_hdf5(file: Path) -> Any:
    try:
        import h5py
    except ImportError as error:
        raise ValueError(
            f"{file} is HDF5, which needs h5py, and h5py is not installed; pip install 'visionmtl[prepare]'"
        ) from error
    try:
        return h5py.File(file, "r")
    except OSError as error:
        raise ValueError(
            f"{file} cannot be opened: {error}; the official file is complete HDF5 of 2.8 GB; download it again"
        ) from error


def _candidates(root: Path, name: str) -> list[Path]:
    return [*root.glob(name), *sorted(root.glob(f"*/{name}"))]


def _find(root: Path, name: str) -> Path:
    files = _candidates(root, name)
    if not files:
        raise ValueError(f"found no {name} in {root} nor in a folder there; it belongs to {MAT}; {_GET_IT}")
    return files[0]


def _load(file: Path, key: str) -> Variable:
    """One variable of a small MATLAB file."""
    content = read_numbers(file)
    if key not in content:
        known = ", ".join(content) or "none"
        raise ValueError(
            f"{file} has no numbers {key}, only {known}; it is not the official file of this name; get it again"
        )
    return content[key]


def _whole(file: Path, key: str) -> NDArray[np.int64]:
    """[N] whole numbers of one variable."""
    values = np.ravel(np.asarray(_load(file, key)))
    if values.dtype.kind not in "uif" or not np.isfinite(values).all() or (values != np.rint(values)).any():
        raise ValueError(
            f"{file}: {key} holds {values.dtype} {values[:3].tolist()}; whole numbers are needed; it is not the "
            "official file of this name: get it again"
        )
    return values.astype(np.int64)


def _splits(file: Path, num_images: int) -> dict[str, NDArray[np.int64]]:
    splits = {name: _whole(file, key) for name, key in (("train", "trainNdxs"), ("test", "testNdxs"))}
    both = np.concatenate(list(splits.values()))
    if both.size == 0 or both.min() < 1 or both.max() > num_images or len(np.unique(both)) < len(both):
        raise ValueError(
            f"{file} numbers {len(both)} images {both.min(initial=0)} to {both.max(initial=0)}, "
            f"{len(both) - len(np.unique(both))} of them twice; {MAT} has {num_images}, numbered from 1, each in one "
            "split; get the two files from one place"
        )
    return splits


def _label_mapping(file: Path, names: list[str]) -> NDArray[np.uint8]:
    """uint8 [1 + labels]: which of the 40 classes, from 1, a label belongs to; 0 for unlabelled."""
    mapping = _whole(file, "mapClass")
    wrong = ""
    if len(mapping) != len(names):
        wrong = f"maps {len(mapping)} labels, but {MAT} names {len(names)}"
    elif not ((mapping >= 1) & (mapping <= 40)).all():
        wrong = f"maps to classes {mapping.min()} to {mapping.max()}, allowed are 1 to 40"
    else:
        # a mapping of another order has the right length; the labels called as a class is tell
        for number, name in enumerate(CLASSES[40], start=1):
            if name in names and mapping[names.index(name)] != number:
                wrong = f"maps label {name!r} to {CLASSES[40][mapping[names.index(name)] - 1]!r}"
    if wrong:
        raise ValueError(f"{file} {wrong}; it does not belong to the labels of {MAT}; get the official class mapping")
    return np.concatenate([[0], mapping]).astype(np.uint8)


def _compare_13(root: Path) -> None:
    """The 13 classes are written down here; a file that says otherwise is not ignored."""
    for file in _candidates(root, "class13Mapping.mat"):
        content = _load(file, "classMapping13")
        labels = content.get("labels13") if isinstance(content, dict) else content
        if not np.array_equal(np.ravel(np.asarray(labels)), SEG40_TO_13[1:]):
            raise ValueError(
                f"{file} differs from the official 13 classes; allowed is labels13 = 12 5 6 1 4 9 10 12 ...; get the "
                "official file, or delete this one"
            )
