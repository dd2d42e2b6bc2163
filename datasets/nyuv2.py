"""NYUv2: 1449 indoor photographs with boxes, segmentation and depth, in the layout `tools/prepare.py nyuv2` writes.

    ROOT/image/SPLIT/0001.png (or .jpg)  seg13/SPLIT/0001.png  seg40/SPLIT/0001.png  (480x640, 0 = void)
    ROOT/depth/SPLIT/0001.png (holes filled)  depth_raw/SPLIT/0001.png (as measured, 0 = hole)
    ROOT/annotations/*_SPLIT.json (COCO format)  ROOT/SPLIT.txt (one image number a line)  ROOT/meta.json
    ROOT/scene_types.txt (a line an image: its number and scene type, as in "0001 kitchen")

Silberman et al., "Indoor Segmentation and Support Inference from RGBD Images", ECCV 2012; offered for research use.
795 training and 654 test images: https://cs.nyu.edu/~fergus/datasets/nyu_depth_v2.html
"""

import os
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError
from typing_extensions import Self

from visionmtl.config.suggest import did_you_mean
from visionmtl.config.text_files import read_json, shown
from visionmtl.datasets import Dataset, PartReader
from visionmtl.io.coco.annotations import BoxesByStem
from visionmtl.io.depth_maps import unit_notes
from visionmtl.io.images import read_map, read_photo, read_png
from visionmtl.io.paths import Files, check_distinct, is_hidden, leads_out, read_lines
from visionmtl.structures import LabelSpace, ReadRequest, Sample, at_full_size
from visionmtl.visualization.palette import palette

INTRINSICS = (518.85790117450188, 519.46961112127485, 325.58244941119034 - 0.5, 253.73616633400465 - 0.5)
"""Of the colour camera, onto which depth is projected: fx_rgb, fy_rgb, cx_rgb, cy_rgb of camera_params.m in the
official toolbox (https://cs.nyu.edu/~fergus/datasets/nyu_depth_v2.html); MATLAB's first pixel centre is 1, ours 0.5."""
SIZE = 480, 640
"""(H, W) of the official images, to which INTRINSICS refer."""

Label = Literal["boxes", "segmentation", "depth_m", "image_labels"]

# class13Mapping.mat and classMapping40.mat, spelling theirs; class id = value in the PNG - 1
_NAMES_13 = "bed books ceiling chair floor furniture objects picture sofa table tv wall window"
_NAMES_40 = (
    "wall floor cabinet bed chair sofa table door window bookshelf picture counter blinds desk shelves curtain dresser "
    "pillow mirror floor_mat clothes ceiling books refridgerator television paper towel shower_curtain box whiteboard "
    "person night_stand toilet sink lamp bathtub bag otherstructure otherfurniture otherprop"
)
CLASSES = {
    len(names.split()): tuple(name.replace("_", " ") for name in names.split()) for names in (_NAMES_13, _NAMES_40)
}
SCENE_TYPES = tuple(
    name.replace("_", " ")
    for name in (
        "basement bathroom bedroom bookstore cafe classroom computer_lab conference_room dinette dining_room "
        "exercise_room foyer furniture_store home_office home_storage indoor_balcony kitchen laundry_room living_room "
        "office office_kitchen playroom printer_room reception_room student_lounge study study_room"
    ).split()
)
"""The 27 values of `sceneTypes` in the official file."""
SCENE_FILE = "scene_types.txt"
NO_THINGS = ("wall", "floor", "ceiling")
_DEPTH_FOLDERS = {"inpainted": "depth", "raw": "depth_raw"}
_MAX_UNITS = 1e6  # a micrometre
_GET_IT = "make the folder with `python tools/prepare.py nyuv2 SRC DST`, or correct `root`"


class NYUv2(Dataset):
    """NYUv2 with 13 or 40 segmentation classes. Void pixels and depth 0 are not labelled.

    Multi-task papers read the in-painted depth; depth papers the raw one, of images with a black border.
    """

    type: Literal["nyuv2"] = "nyuv2"
    root: str
    split: Literal["train", "test"] = "train"
    classes: Literal[13, 40] = 13
    labels: tuple[Label, ...] = Field(default=("boxes", "segmentation", "depth_m"), min_length=1)
    """What to read. Leave out what no task needs: its files are neither required nor decoded. image_labels: the type
    of the scene, of 27."""
    depth: Literal["inpainted", "raw"] = "inpainted"
    """Official `depths`, where holes are filled, or `rawDepths`, where they are 0."""
    black_border: bool = False
    """Blacken the image outside rows 7:474 and columns 7:632, where the undistorted photograph has no content."""

    @model_validator(mode="after")
    def _depth_is_read(self) -> Self:
        if self.depth != "inpainted" and "depth_m" not in self.labels:
            raise PydanticCustomError(
                "no_effect", "depth: raw has no effect, since `labels` leaves depth_m out; add it there or drop `depth`"
            )
        return self

    def build(self) -> "_Reader":
        return _Reader(self)


class _Reader(PartReader):
    ids_are_names = True

    def __init__(self, spec: NYUv2) -> None:
        root = Path(spec.root)
        self._spec, self._split, self._files = spec, spec.split, Files(root)
        self._stems = _stems(root / f"{spec.split}.txt")
        self._suffix = _image_suffix(root / "image" / spec.split)
        self.provides: dict[str, LabelSpace | None] = {}
        self.notes: list[str] = []
        """What is worth knowing about the labels, a sentence each."""
        self._boxes: BoxesByStem | None = None
        self._map_folders: list[str] = []
        self._require("image", self._suffix)
        if "boxes" in spec.labels:
            self._boxes = BoxesByStem(_annotation_file(root, spec.split), self._stems, _GET_IT)
            self.most_boxes = self._boxes.most
            ids, names = self._boxes.ids, self._boxes.names
            self.provides["boxes"] = LabelSpace(f"nyu_things{len(ids)}", names, palette(len(ids)), ids)
            self.notes += self._boxes.notes
        if "segmentation" in spec.labels:
            self._require(f"seg{spec.classes}")
            _check_classes(root / "meta.json", spec.classes)
            self.provides["segmentation"] = class_space(spec.classes)
        if "depth_m" in spec.labels:
            self._depth_folder = _DEPTH_FOLDERS[spec.depth]
            self._require(self._depth_folder)
            self._units_per_metre = _units_per_metre(root / "meta.json")
            self.provides["depth_m"] = None
            unit = f"depth_scale {self._units_per_metre:g} in meta.json (usual units per metre: 25.5 in 8 bits, "
            unit += "1000 for millimetres in 16 bits)"
            folder = root / self._depth_folder / spec.split
            self.notes += unit_notes(lambda index: self._read_depth(index, None), len(self), folder, unit)
        if "image_labels" in spec.labels:
            self._scenes = _read_scenes(root / SCENE_FILE, self._stems)
            self.provides["image_labels"] = scene_space()

    def _require(self, folder: str, suffix: str = ".png") -> None:
        names = [f"{folder}/{self._split}/{stem}{suffix}" for stem in self._stems]
        self._files.require(names, f"{self._split}.txt", f"{_GET_IT}, or leave the label out of `labels`")
        self._map_folders.append(folder)

    def __len__(self) -> int:
        return len(self._stems)

    def file(self, index: int) -> Path:
        """The image."""
        return self._file("image", index, self._suffix)

    def label_files(self, index: int) -> list[Path]:
        """The files that its labels come from."""
        maps = [self._file(folder, index) for folder in self._map_folders[1:]]
        lists = [self._boxes.file] if self._boxes else []
        if "image_labels" in self.provides:
            lists.append(self._files.root / SCENE_FILE)
        return [*maps, *lists, self._files.root / "meta.json"]

    def read_part(self, index: int, request: ReadRequest) -> Sample:
        file, border = self.file(index), self._spec.black_border
        # the border ends at odd pixels, so a reduced image cannot show it
        pixels, size, jpeg_scale = read_photo(file, at_full_size if border else request.choose_scale)
        if border:
            blacken_border(pixels, file)
        labels = request.fields & self.provides.keys()
        return Sample(
            image=pixels,
            image_id=self._stems[index],
            boxes=self._boxes.of(index, size, file) if self._boxes and "boxes" in labels else None,
            segmentation=self._read_segmentation(index, size) if "segmentation" in labels else None,
            depth_m=self._read_depth(index, size) if "depth_m" in labels else None,
            image_labels=self._scenes[index : index + 1] if "image_labels" in labels else None,
            intrinsics=INTRINSICS if size == SIZE else None,
            full_size=size,
            jpeg_scale=jpeg_scale,
        )

    def _file(self, folder: str, index: int, suffix: str = ".png") -> Path:
        return self._files.path(f"{folder}/{self._split}/{self._stems[index]}{suffix}")

    def _read_segmentation(self, index: int, size: tuple[int, ...]) -> NDArray[np.uint8]:
        file = self._file(f"seg{self._spec.classes}", index)
        codes = read_map(file, size)
        if codes.dtype != np.uint8 or codes.max() > self._spec.classes:
            raise ValueError(
                f"{file} holds {codes.dtype} values up to {codes.max()}; allowed are uint8 0 (void) to "
                f"{self._spec.classes}; prepare the folder again"
            )
        return codes - np.uint8(1)  # wraps: void 0 becomes 255 = IGNORE

    def _read_depth(self, index: int, size: tuple[int, ...] | None) -> NDArray[np.float32]:
        file, units_per_metre = self._file(self._depth_folder, index), self._units_per_metre
        codes = read_png(file) if size is None else read_map(file, size)
        # 8 bits hold 10 m at 25.5 a metre, 16 bits hold 65 m at 1000: the wrong one of the two reads 40 times off
        expected = np.uint8 if units_per_metre < 256 else np.uint16
        if codes.dtype != expected:
            raise ValueError(
                f"{file} is {codes.dtype}, but meta.json declares {units_per_metre:g} units per metre; "
                f"{np.dtype(expected)} goes with that; correct `depth_scale` there or prepare the folder again"
            )
        return metres(codes, units_per_metre)


def metres(codes: NDArray[np.integer], units_per_metre: float) -> NDArray[np.float32]:
    """Stored depth in metres; 0 = not measured stays 0."""
    return np.divide(codes, np.float32(units_per_metre), dtype=np.float32)  # one pass over fresh memory, not two


def blacken_border(image: NDArray[np.uint8], file: Path) -> None:
    """Set the image [480, 640, 3] to 0, in place, where the undistorted photograph has no content."""
    if image.shape != (480, 640, 3):
        raise ValueError(
            f"{file}: the image is {list(image.shape)}, but the black border is defined for [480, 640, 3]; set "
            "black_border: false for images of another size"
        )
    for border in (np.s_[:7], np.s_[474:], np.s_[:, :7], np.s_[:, 632:]):
        image[border] = 0


def class_space(classes: int) -> LabelSpace:
    """nyu13 or nyu40."""
    return LabelSpace(f"nyu{classes}", CLASSES[classes], palette(classes))


def things_space() -> LabelSpace:
    """Objects of the 40 classes; a class keeps its number there, 1 to 40, as its id.

    NYUv2 has no published convention for boxes. Ours: every (label, instance) pair of the official file is an object,
    except of wall, floor, ceiling and unlabelled; its class is that of the 40 which its label belongs to.
    """
    ids = tuple(number for number, name in enumerate(CLASSES[40], start=1) if name not in NO_THINGS)
    names = tuple(CLASSES[40][number - 1] for number in ids)
    return LabelSpace(f"nyu_things{len(ids)}", names, palette(len(ids)), ids)


def scene_space() -> LabelSpace:
    """nyu_scenes27: what kind of room an image shows."""
    return LabelSpace("nyu_scenes27", SCENE_TYPES, palette(len(SCENE_TYPES)))


def scene_label(name: str, where: str) -> int:
    """The class of an official scene type; where: it stands, for messages."""
    name = name.replace("_", " ")
    if name not in SCENE_TYPES:
        raise ValueError(
            f"{where} is {name!r}{did_you_mean(name, SCENE_TYPES)}; allowed are {', '.join(SCENE_TYPES)}; {_GET_IT}"
        )
    return SCENE_TYPES.index(name)


def _read_scenes(file: Path, stems: list[str]) -> NDArray[np.int64]:
    """[N] scene types of the images."""
    if not file.is_file():
        raise ValueError(
            f"found no {file}, which has the scene types; {_GET_IT}, or leave image_labels out of `labels`"
        )
    labels: dict[str, int] = {}
    for number, line in enumerate(read_lines(file), start=1):
        words = line.split()
        if len(words) != 2 or words[0] in labels:
            raise ValueError(
                f"{file}:{number} is {line!r}; a line has the number of an image, each once, and its scene type, as in "
                f"'0001 kitchen'; {_GET_IT}"
            )
        labels[words[0]] = scene_label(words[1], f"{file}:{number}")
    if missing := [stem for stem in stems if stem not in labels]:
        raise ValueError(
            f"{file} lists {len(labels)} images, but not {len(missing)} of the split, the first is {missing[0]}; each "
            f"needs a scene type; {_GET_IT}"
        )
    return np.array([labels[stem] for stem in stems], np.int64)


def _stems(file: Path) -> list[str]:
    stems = [word for line in read_lines(file) for word in line.split()] if file.is_file() else []
    if not stems:
        problem = f"{file} is empty" if file.is_file() else f"found no {file}"
        raise ValueError(f"{problem}; it lists the images of the split, one number a line; {_GET_IT}")
    if outside := [stem for stem in stems if leads_out(stem)]:
        raise ValueError(
            f"{file} names {shown(outside[0], 100)}, which leads out of the data set; it lists the images of the "
            f"split, one number a line; {_GET_IT}"
        )
    check_distinct(stems, str(file), "list it once")
    return stems


def _image_suffix(folder: Path) -> str:
    """PNG as `tools/prepare.py` writes, unless the folder holds JPEGs only."""
    present = [name for name in os.listdir(folder) if not is_hidden(name)] if folder.is_dir() else []
    return ".jpg" if present and not any(name.endswith(".png") for name in present) else ".png"


def _annotation_file(root: Path, split: str) -> Path:
    files = sorted(file for file in (root / "annotations").glob(f"*_{split}.json") if not is_hidden(file.name))
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "nothing"
        raise ValueError(
            f"found {names} as annotations/*_{split}.json in {root}; exactly one file is allowed, since different "
            f"files mean different boxes; move the others away, leave boxes out of `labels`, or {_GET_IT}"
        )
    return files[0]


def _read_meta(file: Path) -> dict[str, Any]:
    content: Any = read_json(file) if file.is_file() else {}
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds {shown(content, 50)}; an object {{...}} is needed; {_GET_IT}")
    return content


def _check_classes(meta: Path, classes: int) -> None:
    """Classes that meta.json lists must be those of this file."""
    expected, listed = ["void", *CLASSES[classes]], _read_meta(meta).get(f"seg{classes}")
    if listed not in (None, expected):
        raise ValueError(
            f"{meta} lists seg{classes} as {shown(listed, 100)}; officially 0 is void, 1 {expected[1]}, 2 "
            f"{expected[2]} ...; {_GET_IT}"
        )


def _units_per_metre(meta: Path) -> float:
    """`depth_scale` of meta.json: a number (units per metre) or a text that ends the formula with "/ NUMBER"."""
    declared = _read_meta(meta).get("depth_scale")
    if isinstance(declared, str):
        formula = re.search(r"/\s*([0-9]+(\.[0-9]+)?|\.[0-9]+)(?![0-9.])", declared)
        declared = float(formula.group(1)) if formula else None
    # True is an int, and no unit
    if not isinstance(declared, int | float) or isinstance(declared, bool) or not 0 < declared < _MAX_UNITS:
        raise ValueError(
            f"{meta} declares no depth scale; allowed is `depth_scale`: units per metre (25.5 for 8 bits, 1000 for "
            f"millimetres in 16 bits); add it, or {_GET_IT}"
        )
    return float(declared)
