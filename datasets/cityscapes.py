"""Cityscapes: 5000 street scenes with boxes, 19 classes and stereo depth, read from the official tree as downloaded.

    ROOT/leftImg8bit/SPLIT/CITY/CITY_000000_000019_leftImg8bit.png  (1024x2048)
    ROOT/gtFine/SPLIT/CITY/*_gtFine_labelIds.png, *_gtFine_instanceIds.png
    ROOT/disparity/SPLIT/CITY/*_disparity.png  ROOT/camera/SPLIT/CITY/*_camera.json
    ROOT/gtFine/cityscapes_panoptic_SPLIT.json  (optional: boxes of images without instanceIds)

Cordts et al., "The Cityscapes Dataset for Semantic Urban Scene Understanding", CVPR 2016; for non-commercial research,
after registration at https://www.cityscapes-dataset.com. 2975 training, 500 validation and 1525 test images.
"""

from pathlib import Path
from typing import Literal, TypeGuard

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from visionmtl.config.text_files import read_json, shown
from visionmtl.datasets import Dataset, PartReader
from visionmtl.io.cityscapes import (
    CITYSCAPES7,
    CITYSCAPES19,
    THING_OF_CODE,
    THINGS8,
    UNKNOWN,
    PanopticBoxes,
    class_table,
)
from visionmtl.io.depth_maps import depth_from_codes
from visionmtl.io.images import read_map, read_photo
from visionmtl.io.label_maps import outlines
from visionmtl.io.paths import Files, composed, is_hidden
from visionmtl.structures import Boxes, Intrinsics, LabelSpace, ReadRequest, Sample

Label = Literal["boxes", "segmentation", "depth_m"]

_HIDDEN_IDS = (1, 2, 3)  # ego vehicle, rectification border, out of region of interest: stereo means nothing there

_MAX_BASELINE_M = 10.0  # official ones are 0.21 and 0.22; above, it was written in another unit
_MAX_FOCAL_PX = 1e6  # official ones are about 2260

_FILES = {  # by part: folder, ending
    "image": ("leftImg8bit", "_leftImg8bit.png"),
    "labelIds": ("gtFine", "_gtFine_labelIds.png"),
    "instanceIds": ("gtFine", "_gtFine_instanceIds.png"),
    "disparity": ("disparity", "_disparity.png"),
    "camera": ("camera", "_camera.json"),
}
_PACKAGE = {part: f"{folder}_trainvaltest.zip" for part, (folder, _) in _FILES.items()}


class Cityscapes(Dataset):
    """Cityscapes, fine annotations. What is missing for an image is not labelled there; the reader's notes count it.

    Boxes enclose the visible pixels of the 8 evaluated thing classes; groups of objects are crowds. Depth comes from
    the disparity and the image's own camera, in metres without a limit; ego vehicle and borders are not measured.
    """

    type: Literal["cityscapes"] = "cityscapes"
    root: str
    split: Literal["train", "val", "test"] = "train"
    classes: Literal[19, 7] = 19
    """19 classes as evaluated officially, or their 7 categories."""
    labels: tuple[Label, ...] = Field(default=("boxes", "segmentation", "depth_m"), min_length=1)
    """What to read. Leave out what no task needs: its files are neither required nor decoded."""

    def build(self) -> "CityscapesReader":
        return CityscapesReader(self)


class CityscapesReader(PartReader):
    """The frames of one split, sorted by city and name. `notes`: one line for each thing that is not labelled."""

    def __init__(self, spec: Cityscapes) -> None:
        self._files, self._split = Files(Path(spec.root)), spec.split
        self._stems = _find_images(self._files.root / "leftImg8bit" / spec.split)
        self.notes: list[str] = []
        self._have = {part: self._find(part) for part in _FILES if part != "image"}
        space = CITYSCAPES19 if spec.classes == 19 else CITYSCAPES7
        self._table = class_table(space)
        self._panoptic: PanopticBoxes | None = None
        self.provides: dict[str, LabelSpace | None] = {}
        self._labelled: dict[str, NDArray[np.bool_]] = {}

        have = self._have
        spaces = {"boxes": THINGS8, "segmentation": space}
        for label in spec.labels:
            if label == "boxes":
                known, why = self._find_boxes()
            elif label == "segmentation":
                known, why = have["labelIds"], "no *_labelIds.png, see gtFine_trainvaltest.zip"
            else:
                known = have["disparity"] & have["camera"]
                why = "no *_disparity.png or no *_camera.json, see disparity_ and camera_trainvaltest.zip"
            if spec.split == "test" and label != "depth_m":
                # the files are there, but hold nothing besides the ego vehicle: read, they would say "no objects"
                known, why = np.zeros_like(known), "the labels of the test split are withheld"
            self._labelled[label] = known
            if known.any():
                self.provides[label] = spaces.get(label)
            self._note(label, "not labelled", ~known, why)
        if "depth_m" in spec.labels:
            bare = self._labelled["depth_m"] & ~have["labelIds"] & ~have["instanceIds"]
            self._note("depth_m", "measured on the ego vehicle too", bare, "no gtFine file that marks it")

    def __len__(self) -> int:
        return len(self._stems)

    def file(self, index: int) -> Path:
        """The image."""
        return self._file("image", index)

    def label_files(self, index: int) -> list[Path]:
        """The files that its labels come from."""
        own = [self._file(part, index) for part, have in self._have.items() if have[index]]
        return own if self._panoptic is None else [*own, self._panoptic.file]

    def read_part(self, index: int, request: ReadRequest) -> Sample:
        """What is requested of the sample. PNGs are not reduced."""
        image, size, _ = read_photo(self.file(index))
        labels = {label for label, known in self._labelled.items() if known[index] and label in request.fields}
        label_ids = instance_ids = None
        if self._have["labelIds"][index] and labels & {"depth_m", "segmentation"}:
            label_ids = self._read_codes("labelIds", index, size, np.uint8)
        if self._have["instanceIds"][index] and ("boxes" in labels or ("depth_m" in labels and label_ids is None)):
            instance_ids = self._read_codes("instanceIds", index, size, np.uint16)

        boxes = segmentation = depth_m = disparity_px_metre = intrinsics = None
        if "boxes" in labels and instance_ids is not None:
            boxes = find_boxes(instance_ids)
        elif "boxes" in labels:
            assert self._panoptic is not None
            boxes = self._panoptic.of_image(index, self.file(index), size)
        if "segmentation" in labels:
            assert label_ids is not None
            segmentation = self._to_classes(label_ids, index)
        if "depth_m" in labels:
            ids = instance_ids if label_ids is None else label_ids  # the same below 1000
            codes = self._read_codes("disparity", index, size, np.uint16)
            baseline_m, focal_px, intrinsics = _read_camera(self._file("camera", index))
            hidden = None if ids is None else (ids >= _HIDDEN_IDS[0]) & (ids <= _HIDDEN_IDS[-1])
            depth_m = depth_from_codes(codes, baseline_m, focal_px, hidden)
            disparity_px_metre = baseline_m * focal_px
        return Sample(
            image=image,
            image_id=str(self._stems[index]).partition("/")[2],
            boxes=boxes,
            segmentation=segmentation,
            depth_m=depth_m,
            disparity_px_metre=disparity_px_metre,
            intrinsics=intrinsics,
        )

    def _file(self, part: str, index: int) -> Path:
        folder, ending = _FILES[part]
        return self._files.path(f"{folder}/{self._split}/{self._stems[index]}{ending}")

    def _find(self, part: str) -> NDArray[np.bool_]:
        """bool [N]: which images have this file. Files that have no image are counted."""
        folder, ending = _FILES[part]
        base = self._files.root / folder / self._split
        stems = {composed(str(stem)) for stem in self._stems}
        alone = sorted(
            file
            for file in base.glob(f"*/*{ending}")
            if not is_hidden(file.name) and composed(_stem(file, ending)) not in stems
        )
        if alone:
            self.notes.append(
                f"cityscapes {self._split}: {len(alone)} *{ending} have no image and are not read, the first is "
                f"{alone[0]} (see {_PACKAGE['image']})"
            )
        return self._files.present([f"{folder}/{self._split}/{stem}{ending}" for stem in self._stems])

    def _find_boxes(self) -> tuple[NDArray[np.bool_], str]:
        """Which images have boxes, from their instanceIds or else from the panoptic json; and why the others have not.

        The json is opened only where instanceIds are missing: it would say the same."""
        known = self._have["instanceIds"]
        json_file = self._files.root / "gtFine" / f"cityscapes_panoptic_{self._split}.json"
        why = f"no *_instanceIds.png, see gtFine_trainvaltest.zip, and no entry in {json_file.name}"
        if known.all() or self._split == "test" or not json_file.exists():
            return known, why
        self._panoptic = PanopticBoxes(json_file, [str(stem).partition("/")[2] for stem in self._stems])
        self.notes += self._panoptic.report()
        return known | self._panoptic.listed, why

    def _note(self, label: str, what: str, where: NDArray[np.bool_], why: str) -> None:
        if where.any():
            count = f"{int(where.sum())} of {len(where)} images"
            self.notes.append(f"cityscapes {self._split}, {label}: {count} {what} ({why})")

    def _read_codes(self, part: str, index: int, size: tuple[int, ...], dtype: type) -> NDArray:
        file = self._file(part, index)
        codes = read_map(file, size)
        if codes.dtype != dtype:
            raise ValueError(
                f"{file} is {codes.dtype}; the official file has {np.dtype(dtype)}; unpack {_PACKAGE[part]} again"
            )
        return codes

    def _to_classes(self, label_ids: NDArray[np.uint8], index: int) -> NDArray[np.uint8]:
        classes = np.asarray(cv2.LUT(label_ids, self._table), np.uint8)
        unknown = classes == UNKNOWN
        if unknown.any():
            raise ValueError(
                f"{self._file('labelIds', index)} holds ids {np.unique(label_ids[unknown])[:5].tolist()}; official ids "
                f"are 0 to 33 and 255 (licence plate); unpack {_PACKAGE['labelIds']} again"
            )
        return classes


def find_boxes(instance_ids: NDArray[np.uint16]) -> Boxes:
    """The boxes of a map of instanceIds: class * 1000 + number for an object, the class alone for a group of them."""
    ids, xyxy, area = outlines(instance_ids, THING_OF_CODE >= 0)
    return Boxes(xyxy, labels=THING_OF_CODE[ids].astype(np.int64), crowd=ids < 1000, area=area)


def _stem(file: Path, ending: str) -> str:
    """ "city/stem"."""
    return f"{file.parent.name}/{file.name.removesuffix(ending)}"


def _find_images(folder: Path) -> NDArray[np.str_]:
    """[N] "city/stem" of every image, in one array: it is sent to all workers."""
    ending = _FILES["image"][1]
    stems = [_stem(file, ending) for file in folder.glob(f"*/*{ending}") if not is_hidden(file.name)]
    if not stems:
        raise ValueError(
            f"found no images in {folder}; the official tree has {folder}/CITY/*{ending}; unpack "
            f"{_PACKAGE['image']} into `root` (from https://www.cityscapes-dataset.com), or correct `root`"
        )
    return np.array(sorted(stems))


def _read_camera(file: Path) -> tuple[float, float, Intrinsics | None]:
    """Baseline in metres, horizontal focal length in pixels, and the intrinsics where the file has all four."""
    camera = read_json(file)
    parts = [camera.get(name) if isinstance(camera, dict) else None for name in ("extrinsic", "intrinsic")]
    names, limits = ("baseline", "fx"), (_MAX_BASELINE_M, _MAX_FOCAL_PX)
    values = [part.get(name) if isinstance(part, dict) else None for part, name in zip(parts, names, strict=True)]
    sound = [float(v) for v, limit in zip(values, limits, strict=True) if _is_number(v) and 0 < v < limit]
    if len(sound) < 2:
        raise ValueError(
            f"{file} has extrinsic.baseline {shown(values[0], 50)} and intrinsic.fx {shown(values[1], 50)}; both "
            "must be numbers above 0, in "
            f"metres (below {_MAX_BASELINE_M:g}) and pixels; unpack {_PACKAGE['camera']} again"
        )
    inner = camera["intrinsic"]
    rest = [inner.get(name) for name in ("fy", "u0", "v0")]
    if not all(_is_number(value) for value in rest):
        return sound[0], sound[1], None
    fy, u0, v0 = map(float, rest)
    return sound[0], sound[1], (sound[1], fy, u0 + 0.5, v0 + 0.5)  # u0 and v0 count from the first pixel's centre


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300
