"""COCO 2017: 118,287 training and 5,000 validation photographs with boxes and three kinds of class maps, no depth.

    ROOT/SPLIT2017/000000000139.jpg (or ROOT/images/SPLIT2017)   ROOT/annotations/instances_SPLIT2017.json
    ROOT/annotations/panoptic_SPLIT2017.json and panoptic_SPLIT2017/000000000139.png (or ROOT/panoptic_SPLIT2017)
    ROOT/stuffthingmaps/SPLIT2017/000000000139.png

Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014; Kirillov et al., "Panoptic Segmentation", CVPR
2019; Caesar et al., "COCO-Stuff", CVPR 2018. https://cocodataset.org/#download; annotations CC BY 4.0, photographs as
Flickr's users licensed them.
"""

from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError
from typing_extensions import Self

from visionmtl.datasets import Dataset, PartReader
from visionmtl.io.coco.annotations import AnnotationIndex, BoxIndex, read_boxes
from visionmtl.io.coco.panoptic import SegmentIndex, read_segments
from visionmtl.io.images import read_map, read_photo
from visionmtl.io.paths import Files
from visionmtl.structures import IGNORE, Boxes, LabelSpace, ReadRequest, Sample
from visionmtl.visualization.palette import palette

Label = Literal["boxes", "segmentation"]
Maps = Literal["panoptic", "stuffthingmaps", "instances", "instances_and_background"]
_PAINTED = ("instances", "instances_and_background")

# official names and ids; _ stands for a space
_THINGS = (
    "person bicycle car motorcycle airplane bus train truck boat traffic_light fire_hydrant stop_sign parking_meter "
    "bench bird cat dog horse sheep cow elephant bear zebra giraffe backpack umbrella handbag tie suitcase frisbee "
    "skis snowboard sports_ball kite baseball_bat baseball_glove skateboard surfboard tennis_racket bottle wine_glass "
    "cup fork knife spoon bowl banana apple sandwich orange broccoli carrot hot_dog pizza donut cake chair couch "
    "potted_plant bed dining_table toilet tv laptop mouse remote keyboard cell_phone microwave oven toaster sink "
    "refrigerator book clock vase scissors teddy_bear hair_drier toothbrush"
)
_NO_THING_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)  # of 1 to 90: planned, never labelled
_STUFF = (  # ids 92 to 182
    "banner blanket branch bridge building-other bush cabinet cage cardboard carpet ceiling-other ceiling-tile cloth "
    "clothes clouds counter cupboard curtain desk-stuff dirt door-stuff fence floor-marble floor-other floor-stone "
    "floor-tile floor-wood flower fog food-other fruit furniture-other grass gravel ground-other hill house leaves "
    "light mat metal mirror-stuff moss mountain mud napkin net paper pavement pillow plant-other plastic platform "
    "playingfield railing railroad river road rock roof rug salad sand sea shelf sky-other skyscraper snow "
    "solid-other stairs stone straw structural-other table tent textile-other towel tree vegetable wall-brick "
    "wall-concrete wall-other wall-panel wall-stone wall-tile wall-wood water-other waterdrops window-blind "
    "window-other wood"
)
# the stuff of the panoptic task: some of the above under their id, the rest merged into ids 184 to 200
_PANOPTIC_IDS = (
    92, 93, 95, 100, 107, 109, 112, 118, 119, 122, 125, 128, 130, 133, 138, 141, 144, 145, 147, 148, 149, 151, 154, 155,
    156, 159, 161, 166, 168, 171, 175, 176, 177, 178, 180, 181,
)  # fmt: skip
_MERGED = (
    "tree fence ceiling sky-other cabinet table floor-other pavement mountain grass dirt paper food-other "
    "building-other rock wall-other rug"
)


def _space(name: str, classes: dict[int, str]) -> LabelSpace:
    names = tuple(text.replace("_", " ") for text in classes.values())
    return LabelSpace(name, names, palette(len(classes)), tuple(classes))


_thing_ids = [number for number in range(1, 91) if number not in _NO_THING_IDS]
_things = dict(zip(_thing_ids, _THINGS.split(), strict=True))
_stuff = dict(enumerate(_STUFF.split(), start=92))
_merged = dict(enumerate((f"{name}-merged" for name in _MERGED.split()), start=184))
COCO80 = _space("coco80", _things)
COCO133 = _space("coco133", {**_things, **{number: _stuff[number] for number in _PANOPTIC_IDS}, **_merged})
COCO171 = _space("coco171", {**_things, **_stuff})
COCO81 = _space("coco80_and_background", {**_things, 0: "background"})
_SPACES: dict[Maps, LabelSpace] = {
    "panoptic": COCO133,
    "stuffthingmaps": COCO171,
    "instances": COCO80,
    "instances_and_background": COCO81,
}

_NOT_A_CLASS = 254  # no space has so many classes
_STUFFTHING_TABLE = np.full(256, _NOT_A_CLASS, np.uint8)  # stuffthingmaps hold id - 1
_STUFFTHING_TABLE[np.array(COCO171.ids) - 1] = np.arange(len(COCO171.ids))
_STUFFTHING_TABLE[255] = IGNORE

_GET_IT = "unpack the official files as datasets/README.md says, or correct `root`"


class COCO(Dataset):
    """Boxes of 80 classes and, if chosen, one of four kinds of class maps.

    EXIF orientation is not applied to the photographs, since the annotations refer to the pixels as they are stored.
    """

    type: Literal["coco"] = "coco"
    root: str
    split: Literal["train", "val"] = "train"
    labels: tuple[Label, ...] = Field(default=("boxes",), min_length=1)
    """What to read. Leave out what no task needs: its files are neither required nor decoded."""
    maps: Maps | None = None
    """Where class maps come from; needed when `labels` has segmentation.
    panoptic: 133 classes of things and stuff, void is not labelled; stuffthingmaps: 171 classes of COCO-Stuff;
    instances: the masks of the 80 classes, larger ones below smaller ones, everything else (and crowds) not labelled;
    instances_and_background: the same with everything else as class 80, crowds not labelled."""

    @model_validator(mode="after")
    def _maps_are_chosen_when_read(self) -> Self:
        if ("segmentation" in self.labels) != (self.maps is not None):
            state = "chosen, but `labels` has no segmentation" if self.maps else "not chosen, but segmentation is read"
            text = (
                f"maps: {state}; class maps come from one of {', '.join(_SPACES)}; set `maps` and name segmentation in "
                "`labels`, or neither"
            )
            raise PydanticCustomError("maps_and_labels", "{text}", {"text": text})
        return self

    def build(self) -> "_Reader":
        root, name = Path(self.root), f"{self.split}2017"
        boxes = segments = None
        if "boxes" in self.labels or self.maps != "panoptic":
            masks = self.maps in _PAINTED
            boxes = read_boxes(root / "annotations" / f"instances_{name}.json", masks)
            _check_categories(boxes, COCO80)
        if self.maps == "panoptic":
            segments = read_segments(root / "annotations" / f"panoptic_{name}.json")
            _check_categories(segments, COCO133)
        return _Reader(self, boxes, segments)


class _Reader(PartReader):
    """The images of the instances file; of the panoptic file where it alone is read."""

    ids_are_names = False

    def __init__(self, spec: COCO, boxes: BoxIndex | None, segments: SegmentIndex | None) -> None:
        root, name = Path(spec.root), f"{spec.split}2017"
        images: AnnotationIndex | None = segments if boxes is None else boxes
        assert images is not None  # one of the labels needs one of them
        for index in (boxes, segments):
            if index is not None and not len(index):
                raise ValueError(f"{index.file} lists no images; a split needs at least one; {_GET_IT}")
        self.provides: dict[str, LabelSpace | None] = {}
        self.notes: list[str] = boxes.report() if boxes is not None else []
        """What is worth knowing about the labels, a sentence each."""
        self.most_boxes = None if boxes is None else boxes.most
        self._spec, self._images, self._boxes, self._segments = spec, images, boxes, segments
        self._photos = Files(_one_of(root / name, root / "images" / name))
        self._photos.require([images.name(row) for row in range(len(images))], images.file.name, _GET_IT)

        if "boxes" in spec.labels:
            self.provides["boxes"] = COCO80
        if spec.maps:
            self.provides["segmentation"] = _SPACES[spec.maps]
            labelled = self._find_maps(root, name)
            self.notes.append(f"segmentation: {_SPACES[spec.maps].name} from {spec.maps}")
            if labelled < len(self):
                self.notes.append(f"{len(self) - labelled} of {len(self)} images have no class map: not labelled")

    def _find_maps(self, root: Path, name: str) -> int:
        """Where the class map of each image is; returns how many have one. Raises ValueError when none has."""
        everything = len(self)
        if self._segments is not None:
            self._maps = Files(_one_of(root / "annotations" / f"panoptic_{name}", root / f"panoptic_{name}"))
            row_of = {image_id: row for row, image_id in enumerate(self._segments.image_ids.tolist())}
            rows = np.array([row_of.get(image_id, -1) for image_id in self._images.image_ids.tolist()])
            pngs = self._segments.arrays["pngs"][rows]
            self._map_rows = np.where((rows >= 0) & (pngs != b""), rows, -1).astype(np.int32)
            listed = [png.decode() for png in pngs[self._map_rows >= 0].tolist()]
            self._maps.require(listed, f"panoptic_{name}.json", _GET_IT)
        elif self._spec.maps == "stuffthingmaps":
            self._maps = Files(root / "stuffthingmaps" / name)
            pngs = [self._images.name(row).rpartition(".")[0] + ".png" for row in range(everything)]
            self._map_rows = np.where(self._maps.present(pngs), np.arange(everything), -1).astype(np.int32)
        else:
            return everything
        count = int(np.count_nonzero(self._map_rows >= 0))
        if not count:
            raise ValueError(
                f"none of the {everything} images has a class map in {self._maps.root}; some must; {_GET_IT}, or "
                "choose other `maps`"
            )
        return count

    def __len__(self) -> int:
        return len(self._images)

    def boxes_of(self, index: int, size: tuple[int, ...] | None = None) -> Boxes | None:
        """The boxes alone, without opening a file. size: (H, W) of the image, where it was read, for a check."""
        return self._boxes.of(index, size) if self._boxes is not None and "boxes" in self._spec.labels else None

    def file(self, index: int) -> Path:
        """The image."""
        return self._photos.path(self._images.name(index))

    def label_files(self, index: int) -> list[Path]:
        """The files that its labels come from."""
        lists = [lists.file for lists in (self._boxes, self._segments) if lists is not None]
        png = self._map_file(index) if self._spec.maps else None
        return lists if png is None else [*lists, png]

    def read_part(self, index: int, request: ReadRequest) -> Sample:
        """What is requested of the sample; `image_id` is COCO's number."""
        file = self.file(index)
        pixels, size, jpeg_scale = read_photo(file, request.choose_scale)
        self._images.check_size(index, file, size, "EXIF rotation does not count; fetch the official file")
        return Sample(
            image=pixels,
            image_id=self._images.image_id(index),
            boxes=self.boxes_of(index, size) if "boxes" in request.fields else None,
            segmentation=self._read_classes(index, size) if "segmentation" in request.fields else None,
            full_size=size,
            jpeg_scale=jpeg_scale,
        )

    def _map_file(self, index: int) -> Path | None:
        """The PNG of class maps that are not painted; None for an image without one."""
        if self._spec.maps in _PAINTED or self._map_rows[index] < 0:
            return None
        if self._segments is not None:
            return self._maps.path(str(self._segments.png(int(self._map_rows[index]))))
        return self._maps.path(self._images.name(index).rpartition(".")[0] + ".png")

    def _read_classes(self, index: int, size: tuple[int, ...]) -> NDArray[np.uint8] | None:
        if self._spec.maps is None:
            return None
        if self._boxes is not None and self._spec.maps in _PAINTED:
            return paint_masks(self._boxes, index, IGNORE if self._spec.maps == "instances" else len(COCO80.classes))
        file = self._map_file(index)
        if file is None:
            return None
        if self._segments is not None:
            return self._segments.read(file, int(self._map_rows[index]), size)

        codes = read_map(file, size)
        if codes.dtype != np.uint8 or (_STUFFTHING_TABLE[codes] == _NOT_A_CLASS).any():
            raise ValueError(
                f"{file} holds {codes.dtype} values that are no class; allowed are uint8 ids - 1 of COCO-Stuff's 171 "
                "classes and 255; use the PNGs of stuffthingmaps_trainval2017.zip as they are"
            )
        return _STUFFTHING_TABLE[codes]


def paint_masks(boxes: BoxIndex, row: int, rest: int) -> NDArray[np.uint8]:
    """Class ids [H, W]: crowds as IGNORE, then objects from the largest to the smallest, `rest` where there is none."""
    classes, objects, masks = np.full(boxes.size(row), rest, np.uint8), boxes.of(row), boxes.masks(row)
    for number in np.lexsort((-objects.area, ~objects.crowd)):
        classes[masks[number]] = IGNORE if objects.crowd[number] else objects.labels[number]
    return classes


def _check_categories(index: AnnotationIndex, space: LabelSpace) -> None:
    official = tuple(zip(space.ids, space.classes, strict=True))
    if index.categories != official:
        odd = sorted(set(index.categories) ^ set(official))[:3]
        raise ValueError(
            f"{index.file} lists {len(index.categories)} categories that are not COCO's {len(official)}, e.g. {odd}; "
            "only the official list keeps ids and results comparable; fetch the official file, or read yours as "
            "type: folder"
        )


def _one_of(*folders: Path) -> Path:
    """The first that exists, else the first."""
    return next((folder for folder in folders if folder.is_dir()), folders[0])
