"""A folder of your own images, with any of boxes, label PNGs, depth and image labels, described in YAML.

    {type: folder, root: /data/mine, split: train, images: "images/{split}/*.jpg",
     boxes: {file: "annotations/{split}.json"},
     segmentation: {files: "labels/{split}/{stem}.png", classes: [floor, shelf, person], ignore: [255]},
     depth: {files: "depth/{split}/{stem}.png", metres_per_unit: 0.001}, image_labels: {file: "rooms/{split}.json"}}

Boxes may also lie in a file an image: YOLO txt, Pascal VOC xml, LabelMe json, or a PNG that numbers the objects:

    boxes: {files: "labels/{split}/{stem}.txt", classes: data.yaml}

In paths, all relative to `root`, {split} stands for the field `split`, {stem} for the image's file name without
ending, and {path} for the same with the folders that the wildcards of `images` matched. Where `images` itself has
{stem}, as in "rgb/{stem}_rgb.png", it is what stands there; so with {folder}, which stands for folders. Whatever the
format, boxes become COCO's and pass its checks, so that training, checking and scoring see one truth. Licence: that of
your images.
"""

import os
import re
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError
from typing_extensions import Self

from visionmtl.config.registry import Spec
from visionmtl.config.suggest import did_you_mean
from visionmtl.config.text_files import read_json, shown
from visionmtl.datasets import Dataset, PartReader, shortened
from visionmtl.io import labelme, voc, yolo
from visionmtl.io.channels import read_channels, to_bytes
from visionmtl.io.coco.annotations import box_index, read_boxes
from visionmtl.io.depth_maps import check_positions, read_depth, to_metres, unit_notes
from visionmtl.io.images import SUFFIXES, has_alpha, has_palette, image_size, is_turned, read_photo, read_png
from visionmtl.io.label_maps import (
    Colors,
    by_value,
    class_file,
    color_file,
    color_table,
    colors_to_classes,
    instance_objects,
    label_table,
    pixel_range,
    to_classes,
    undeclared_values,
)
from visionmtl.io.objects import ImageObjects, left_out_notes, to_class_map, to_coco
from visionmtl.io.paths import (
    ABSENT,
    AMBIGUOUS,
    FilePerImage,
    Files,
    ImagePattern,
    Names,
    RelativePath,
    any_case,
    check_distinct,
    composed,
    fixed_part,
    image_glob,
    is_hidden,
    is_unicode,
    name_parts,
    read_list,
    without_ending,
)
from visionmtl.io.yolo import read_classes
from visionmtl.structures import IGNORE, MAX_CLASSES, Boxes, JpegScale, LabelSpace, ReadRequest, Sample
from visionmtl.visualization.palette import palette


def _pixel_value(key: int | str) -> int | str:
    values = pixel_range(key, 65535)
    if values is None:
        text = f"{key!r} is no pixel value; write a whole number such as 7, or a range such as 1-254; correct it"
        raise PydanticCustomError("pixel_value", "{text}", {"text": text})
    return values[0] if len(values) == 1 else str(key)


def _each_once(names: tuple[str, ...]) -> tuple[str, ...]:
    if twice := [name for name in names if names.count(name) > 1]:
        text = f"{twice[0]!r} stands twice in a list of classes; each class has a name of its own; remove or rename one"
        raise PydanticCustomError("classes", "{text}", {"text": text})
    return names


ClassName = Annotated[str, AfterValidator(composed)]
ClassNames = Annotated[tuple[ClassName, ...], Field(min_length=1, max_length=MAX_CLASSES), AfterValidator(_each_once)]
MapClassNames = Annotated[tuple[ClassName, ...], Field(min_length=1, max_length=IGNORE), AfterValidator(_each_once)]
Missing = Literal["error", "unlabelled"]
BoxFormat = Literal["coco", "yolo", "voc", "labelme", "instances"]
Byte = Annotated[int, Field(ge=0, le=255)]
Rgb = tuple[Byte, Byte, Byte]
PixelValue = Annotated[int | str, AfterValidator(_pixel_value)]
"""7, or 1-254: a pixel value, or the range with both ends."""
MAX_SCANNED = 500
"""Label files that are searched for undeclared values once one is found."""


def _rising(ends: tuple[float, float]) -> tuple[float, float]:
    if not ends[0] < ends[1]:
        text = f"range is {list(ends)}; the lower value comes first, and the other is larger; correct it"
        raise PydanticCustomError("range", "{text}", {"text": text})
    return ends


ValueRange = Annotated[tuple[float, float], AfterValidator(_rising)]


class BoxFile(Spec):
    """Boxes: one file in COCO's instances format, or a file an image."""

    file: RelativePath | None = None
    """COCO's json; classes are its categories, by id."""
    files: FilePerImage | None = None
    """A file an image."""
    format: BoxFormat | None = None
    """Default: by the ending of the path: .json coco (of `files`: labelme), .txt yolo, .xml voc, .png instances."""
    classes: ClassNames | RelativePath | None = None
    """yolo: names by number, or a data.yaml or text file with them. voc, labelme: names in their order; default: all
    that occur, by name; needed where a split may lack some. instances: the one class of all objects; or leave it to
    values."""
    values: dict[PixelValue, ClassName] | None = None
    """instances: by id of an object its class, ranges such as 1000-1999 allowed."""
    ignore: tuple[Annotated[int, Field(ge=0, le=65535)], ...] | None = None
    """instances: ids of no object; default: 0."""
    first_pixel: Literal[0, 1] | None = None
    """voc: the number of the first column and row; default: 0 where a box begins there, else 1, the standard's."""
    space: str = "folder_boxes"
    """Name of the label space; different lists of classes need different names."""
    missing: Literal["error", "unlabelled", "empty"] = "error"
    """What to do with images that the file does not list, or that have none: stop; count them and take them as not
    labelled; or, where each has a file of its own, as looked at and empty, which is YOLO's convention."""

    @model_validator(mode="after")
    def _every_setting_has_an_effect(self) -> Self:
        if (self.file is None) == (self.files is None):
            raise ValueError(
                "boxes need one of `file` (one COCO json for all images) and `files` (a file an image, with {stem} or "
                f"{{path}}); {'both' if self.file else 'none'} is set; set one"
            )
        form, per_image = self.chosen, self.files is not None
        if form is None or per_image == (form == "coco"):
            raise ValueError(
                f"boxes.format is {self.format!r} for {self.files or self.file!r}; `file` is coco, and `files` are "
                "yolo, voc, labelme or instances, by their ending .txt, .xml, .json or .png unless `format` says so; "
                "set format, or correct the path"
            )
        effect = {"classes": per_image, "values": form == "instances", "ignore": form == "instances",
                  "first_pixel": form == "voc"}  # fmt: skip
        idle = [name for name, has in effect.items() if getattr(self, name) is not None and not has]
        if idle or (self.missing == "empty" and not per_image):
            only = "voc" if "first_pixel" in idle else "instances" if idle and idle != ["classes"] else "`files`"
            raise ValueError(
                f"boxes.{idle[0] if idle else 'missing: empty'} has no effect with format {form}; it is for {only}; "
                "remove it"
            )
        if form == "yolo" and self.classes is None:
            raise ValueError(
                "boxes in YOLO files are numbers; `classes` must name them: a list, or the path of the data.yaml or "
                "classes.txt; set boxes.classes"
            )
        one_class = isinstance(self.classes, tuple) and len(self.classes) == 1
        if form == "instances" and (self.values is None) != one_class:
            raise ValueError(
                "boxes of instance maps need `classes` with the one class of all objects, or `values` with the class "
                "of each id, such as {1000-1999: car, 2000-2999: person}; set one of the two"
            )
        return self

    @property
    def chosen(self) -> BoxFormat | None:
        """The format, set or by the ending; None where neither says it."""
        endings: dict[str, BoxFormat] = {"txt": "yolo", "xml": "voc", "json": "labelme", "png": "instances"}
        by_ending = "coco" if self.file else endings.get((self.files or "").rpartition(".")[2].lower())
        return self.format or by_ending


class LabelFiles(Spec):
    """One PNG an image: 8-bit grey or with a palette, where value or index is the class; or, with `colors`, RGB.

    Or one file of polygons an image, LabelMe's json or YOLO's txt: smaller objects lie above larger ones.
    """

    files: FilePerImage
    format: Literal["png", "labelme", "yolo"] | None = None
    """Default: by the ending of the path, .json labelme, .txt yolo, else png."""
    outside: ClassName | None = None
    """Of polygons: the class, one of `classes`, of pixels in none of them; default: they are not labelled."""
    classes: MapClassNames | RelativePath | None = None
    """Names; or a YAML or JSON file with a list of names, or with a mapping from pixel value to name. With `colors`:
    those of its names that are classes, in their order; what has another name is ignored; default: all."""
    values: dict[PixelValue, ClassName] | None = None
    """By pixel value, or range such as 1-254, the class, which several may share; default: a class's position in
    `classes`."""
    colors: dict[ClassName, Rgb | tuple[Rgb, ...]] | RelativePath | None = None
    """By class its colour, or several; or a file with them: label_colors.txt, class_dict.csv, labelmap.txt."""
    ignore: tuple[Annotated[int, Field(ge=0, le=255)], ...] = (IGNORE,)
    """Pixel values that are no class."""
    ignore_colors: tuple[Rgb, ...] = ()
    """Colours that are no class."""
    space: str = "folder_segmentation"
    missing: Missing = "error"

    @model_validator(mode="after")
    def _every_setting_has_an_effect(self) -> Self:
        if self.chosen != "png":
            return self._of_polygons()
        if self.outside is not None:
            raise ValueError("segmentation.outside has no effect without polygons; use `values` or `ignore`; remove it")
        if self.classes is None and self.colors is None:
            raise ValueError(
                "segmentation has neither `classes` (of values in grey or palette PNGs) nor `colors` (of RGB PNGs); "
                "one names the classes; set it"
            )
        if self.colors is not None and (self.values is not None or self.ignore != (IGNORE,)):
            raise ValueError(
                "segmentation.values and ignore are for PNGs whose values are classes, and have no effect with "
                "`colors`; use ignore_colors; remove them"
            )
        if self.ignore_colors and self.colors is None:
            raise ValueError("segmentation.ignore_colors has no effect without `colors`; use `ignore`; remove it")
        return self

    @property
    def chosen(self) -> Literal["png", "labelme", "yolo"]:
        """The format, set or by the ending."""
        if self.format is not None:
            return self.format
        ending = self.files.rpartition(".")[2].lower()
        return "labelme" if ending == "json" else "yolo" if ending == "txt" else "png"

    def _of_polygons(self) -> Self:
        listed = isinstance(self.classes, tuple) or (self.chosen == "yolo" and self.classes is not None)
        idle = self.values is not None or self.colors is not None or self.ignore != (IGNORE,) or self.ignore_colors
        if not listed or idle:
            raise ValueError(
                f"segmentation of polygons ({self.chosen}) needs `classes` (a list; for yolo also the path of a "
                "data.yaml), and values, colors, ignore and ignore_colors, which are for PNGs, have no effect; correct "
                "it"
            )
        if self.outside is not None and isinstance(self.classes, tuple) and self.outside not in self.classes:
            raise ValueError(
                f"segmentation.outside is {self.outside!r}{did_you_mean(self.outside, self.classes)}; it is one of "
                f"`classes` ({', '.join(self.classes)}); add it there, last for yolo, or correct it"
            )
        return self


class DepthFiles(Spec):
    """One file an image, along the optical axis: PNG, TIFF, OpenEXR or .npy, by its ending."""

    files: FilePerImage
    metres_per_unit: Annotated[float, Field(gt=0)]
    """1 for metres, 0.001 for millimetres, 1/256 = 0.00390625 where metres = value / 256."""
    invalid: tuple[float, ...] = (0,)
    """Stored values that mean "not measured"; negative and non-finite ones always do."""
    missing: Missing = "error"


class ChannelFiles(Spec):
    """One file an image with further channels: PNG, TIFF or .npy."""

    files: FilePerImage
    range: ValueRange | None = None
    """The stored values that become 0 and 255; what lies beyond is clipped. Needed unless the values have 8 bits."""


class ImageLabels(Spec):
    """Classes of whole images: the name of the folder that an image lies in, as in images/train/KITCHEN/1.jpg."""

    file: RelativePath | None = None
    """Or a JSON object: by file name of an image, as COCO's json has it, its class or a list of its classes."""
    classes: ClassNames | None = None
    """The classes in their order; default: all that occur, by name. Needed where a split may lack some."""
    space: str = "folder_image_labels"
    missing: Missing = "error"


class Folder(Dataset):
    """Your own images. What the data set does not have is left out; what it should have and has not is an error."""

    type: Literal["folder"] = "folder"
    root: str
    images: ImagePattern
    """Glob pattern; ** matches any number of folders, but none that is a link. {stem} and {folder} match a part of the
    file name and folders, for which they stand in the paths of labels: "{folder}/rgb/{stem}_rgb.png"."""
    split: Annotated[str, Field(pattern=r"^[\w-][\w.-]*$")] | None = None
    list_file: RelativePath | None = None
    """Text file that names the images of the split, one a line; default: all that `images` matches."""
    boxes: BoxFile | None = None
    segmentation: LabelFiles | None = None
    depth: DepthFiles | None = None
    image_labels: ImageLabels | None = None
    channels: Annotated[int, Field(ge=1, le=64)] = 3
    """Of an image, with those of `more_channels`; model.encoder.in_chans must be the same. With another number than 3,
    images may also be .npy files and TIFFs of many bands, and all their channels are read, RGB first in colour
    files."""
    image_range: ValueRange | None = None
    """The values of `images` that become 0 and 255, for images that are not of 8 bits; what lies beyond is clipped."""
    more_channels: tuple[ChannelFiles, ...] = ()
    """Files whose channels come behind those of the image, such as depth or infrared; of the image's size."""
    upright: bool = True
    """Turn images as their EXIF orientation says, as most annotation tools show them; false: pixels as stored."""

    @model_validator(mode="after")
    def _channels_add_up(self) -> Self:
        if self.more_channels and self.channels <= len(self.more_channels):
            text = (
                f"channels is {self.channels}, but more_channels are {len(self.more_channels)} files of one channel "
                "or more beside the image's own; write the number of all channels together, 4 for RGB-D"
            )
            raise PydanticCustomError("channels", "{text}", {"text": text})
        return self

    @model_validator(mode="after")
    def _split_is_used(self) -> Self:
        paths = self.model_dump_json(exclude={"root", "images"})
        if "{folder}" in paths and "{folder}" not in self.images:
            text = "paths of labels have {folder}, and `images` has not; write it where the folders stand in `images`"
            raise PydanticCustomError("folder", "{text}", {"text": text})
        used = "{split}" in self.model_dump_json(exclude={"root", "split"})
        if used != (self.split is not None):
            text = "paths have {split}, but `split` is not set; set it" if used else (
                "`split` has no effect, since no path has {split}; write it into the paths that differ, or drop it"
            )  # fmt: skip
            raise PydanticCustomError("split", "{text}", {"text": text})
        return self

    def build(self) -> "FolderReader":
        return FolderReader(self)


def _or_error(read: Callable[[int], ImageObjects], index: int) -> "ImageObjects | ValueError":
    try:
        return read(index)
    except ValueError as error:
        return error


class FolderReader(PartReader):
    """The images in the order of their names, or of the list. `notes`: one line for each thing that was counted."""

    ids_are_names = True

    def __init__(self, spec: Folder) -> None:
        self._spec, self._root, self._files = spec, Path(spec.root), Files(Path(spec.root))
        self.notes: list[str] = []
        self.provides: dict[str, LabelSpace | None] = {}
        self.channels = spec.channels
        """Of an image, see `DatasetReader`."""
        images = self._find_images()
        if spec.list_file:
            chosen = read_list(self._one_file(spec.list_file), images, self._folder)
            images = [images[position] for position in chosen]
        self._images = np.array([image.encode() for image in images])  # one array: it is sent to all workers
        self._labelled: dict[str, NDArray[np.bool_]] = {}
        self._patterns: dict[str, str] = {}
        self._all_undeclared: tuple[int, ...] | None = None
        for number, more in enumerate(spec.more_channels):
            files = [self._partner(more.files, image) for image in images]
            self._files.require(
                files, f"more_channels[{number}] ({more.files})", "add what is missing, or correct the path"
            )
        self._note_channels()
        check_distinct([self._partner("{path}", image) for image in images], "names without ending", "rename one")

        if spec.boxes:
            self._open_boxes(spec.boxes, images)
            self.most_boxes = self._boxes.most
            ids = tuple(number for number, _ in self._boxes.categories)
            names = tuple(name for _, name in self._boxes.categories)
            self.provides["boxes"] = LabelSpace(spec.boxes.space, names, palette(len(ids)), ids)
            self.notes += self._boxes.report()
        if spec.segmentation:
            self._find_partners("segmentation", spec.segmentation, images)
            self.provides["segmentation"] = self._open_segmentation(spec.segmentation)
        if spec.depth:
            self._find_partners("depth_m", spec.depth, images)
            self.provides["depth_m"] = None
            self._check_range()
        if spec.image_labels:
            self.provides["image_labels"] = self._find_image_labels(spec.image_labels, images)

    def __len__(self) -> int:
        return len(self._images)

    def file(self, index: int) -> Path:
        """The image."""
        return self._root / self._name(index)

    def label_files(self, index: int) -> list[Path]:
        """The files that its labels come from."""
        files = [self._file(label, index) for label in self._patterns if self._labelled[label][index]]
        boxes, segmentation, image_labels = self._spec.boxes, self._spec.segmentation, self._spec.image_labels
        shared = [
            *((boxes.file, boxes.classes) if boxes else ()),
            *((segmentation.classes, segmentation.colors) if segmentation else ()),
            *((image_labels.file,) if image_labels else ()),
        ]
        image = self._name(index)
        files += [self._files.path(self._partner(more.files, image)) for more in self._spec.more_channels]
        return [*files, *(self._one_file(path) for path in shared if isinstance(path, str))]

    def read_part(self, index: int, request: ReadRequest) -> Sample:
        pixels, size, jpeg_scale = self._read_image(index, request.choose_scale)
        known = {label for label, labelled in self._labelled.items() if labelled[index] and label in request.fields}
        return Sample(
            image=pixels,
            image_id=self._partner("{path}", self._name(index)),
            boxes=self._read_boxes(index, size) if "boxes" in known else None,
            segmentation=self._read_classes(index, size) if "segmentation" in known else None,
            depth_m=self._read_depth(index, size) if "depth_m" in known else None,
            image_labels=self._labels[slice(*self._label_ends[index : index + 2])] if "image_labels" in known else None,
            full_size=size,
            jpeg_scale=jpeg_scale,
        )

    def _read_image(self, index: int, choose_scale: JpegScale) -> tuple[NDArray[np.uint8], tuple[int, int], int]:
        """As `read_photo`; with other channels than RGB at full size."""
        spec, file = self._spec, self.file(index)
        if self._is_photo:
            return read_photo(file, choose_scale, spec.upright)
        if spec.upright and file.suffix.lower() != ".npy" and is_turned(file):
            raise ValueError(
                f"{file} has an EXIF orientation, and channels other than RGB are read as stored; set upright: false "
                "if the labels are made for that, or turn the file"
            )
        as_photo = spec.image_range is None and spec.channels - len(spec.more_channels) == 3
        if as_photo and file.suffix.lower() not in (".npy", ".tif", ".tiff"):  # RGB beside depth or the like
            parts = [(file, read_photo(file, upright=spec.upright)[0])]
        else:
            parts = [(file, to_bytes(read_channels(file), spec.image_range, file, "image_range"))]
        for number, more in enumerate(spec.more_channels):
            other = self._files.path(self._partner(more.files, self._name(index)))
            values = to_bytes(read_channels(other), more.range, other, f"more_channels.{number}.range")
            parts.append((other, values))
        size = (parts[0][1].shape[0], parts[0][1].shape[1])
        for other, part in parts[1:]:
            self._same_size(other, part.shape[:2], index, size)
        counts = [part.shape[2] for _, part in parts]
        if sum(counts) != spec.channels:
            of_each = ", ".join(f"{part.shape[2]} of {other}" for other, part in parts)
            raise ValueError(
                f"{file} has {sum(counts)} channels ({of_each}), and `channels` is {spec.channels}; all images have "
                "the same number, and none is left out; set channels, or write the file with those that you mean"
            )
        return np.ascontiguousarray(np.concatenate([part for _, part in parts], axis=2)), size, 1

    @property
    def _is_photo(self) -> bool:
        spec = self._spec
        return spec.channels == 3 and spec.image_range is None and not spec.more_channels

    def _note_channels(self) -> None:
        """What becomes of channels that are no RGB, from the first image."""
        first = self.file(0)
        if self._is_photo:
            if has_alpha(first):
                self.notes.append(
                    f"images have an alpha channel, the first is {first}: "
                    + ("transparency shows white" if self._spec.upright else "it is dropped")
                    + "; if it holds something else, set channels: 4"
                )
            return
        declared = (self._spec.image_range, *(more.range for more in self._spec.more_channels))
        ranges = [f"{ends[0]:g} to {ends[1]:g}" for ends in declared if ends is not None]
        scaled = f"; values of {' and '.join(ranges)} become 0 to 255" if ranges else ""
        self.notes.append(f"images have {self._spec.channels} channels, at 8 bits each{scaled}")

    def _read_boxes(self, index: int, size: tuple[int, ...]) -> Boxes:
        row = int(self._rows[index])
        if self._boxes.size(row) != (0, 0):
            file = self._file("boxes", index) if "boxes" in self._patterns else self._boxes.file
            self._same_size(file, self._boxes.size(row), index, size)
        return self._boxes.of(row, size)

    def _read_classes(self, index: int, size: tuple[int, int]) -> NDArray[np.uint8]:
        file = self._file("segmentation", index)
        if self._polygons is not None:
            of_yolo = self._spec.segmentation is not None and self._spec.segmentation.chosen == "yolo"
            of_image = yolo.read_objects(file, size, self._polygons) if of_yolo else labelme.read_objects(file)
            self._same_size(file, of_image.size, index, size)
            space, outside = self.provides["segmentation"], self._spec.segmentation and self._spec.segmentation.outside
            assert space is not None
            return to_class_map(
                of_image, size, space.classes, space.classes.index(outside) if outside else IGNORE, file
            )
        values = read_png(file, palette_indices=self._colors is None)
        if self._colors is not None:
            classes = colors_to_classes(values, self._colors, file)
            self._same_size(file, classes.shape, index, size)
            return classes
        others = self._undeclared() if undeclared_values(values, self._table) else ()
        classes = to_classes(values, self._table, file, others)
        self._same_size(file, classes.shape, index, size)
        return classes

    def _undeclared(self) -> tuple[int, ...]:
        """All undeclared values of the label files, of the first MAX_SCANNED at least: to be mended in one go."""
        if self._all_undeclared is None:
            unknown: set[int] = set()
            for index in np.flatnonzero(self._labelled["segmentation"])[:MAX_SCANNED].tolist():
                try:
                    values = read_png(self._file("segmentation", index), palette_indices=True)
                    unknown |= undeclared_values(values, self._table)
                except ValueError:
                    continue  # a damaged file is an error of its own when it is read
            self._all_undeclared = tuple(sorted(unknown))
        return self._all_undeclared

    def _read_depth(self, index: int, size: tuple[int, ...] | None = None) -> NDArray[np.float32]:
        spec = self._spec.depth
        assert spec is not None
        file = self._file("depth_m", index)
        depth_m = to_metres(read_depth(file), spec.metres_per_unit, file, spec.invalid)
        if size is not None:
            self._same_size(file, depth_m.shape, index, size)
        return depth_m

    def _same_size(self, file: Path, labelled: tuple[int, ...], index: int, size: tuple[int, ...]) -> None:
        if labelled != size:
            hint = "change `upright` if the image has an EXIF orientation" if labelled == size[::-1] else "make it anew"
            raise ValueError(
                f"{file} is made for {labelled[0]}x{labelled[1]} px, but {self._root / self._name(index)} is "
                f"{size[0]}x{size[1]}; labels and image need one size; {hint}"
            )

    def _name(self, index: int) -> str:
        return bytes(self._images[index]).decode()

    def _file(self, label: str, index: int) -> Path:
        return self._files.path(self._partner(self._patterns[label], self._name(index)))

    def _one_file(self, path: str) -> Path:
        """The file that a setting names."""
        path = self._fill(path)
        self._files.present([path])
        return self._files.path(path)

    def _fill(self, path: str) -> str:
        return path.replace("{split}", self._spec.split or "")

    def _partner(self, pattern: str, image: str) -> str:
        path = without_ending(image.removeprefix(self._folder))
        parts = name_parts(self._pattern, image) if "{" in self._pattern else {}
        folders, slash, stem = path.rpartition("/")
        own, stem = stem, parts.get("stem", stem)  # which may be empty: {folder}/rgb{stem}.png
        words = {"{path}": f"{folders}{slash}{stem or own}", "{stem}": stem, "{folder}": parts.get("folder", "")}
        # all at once: the name of an image may hold {stem} itself
        return re.sub("|".join(words), lambda match: words[match[0]], self._fill(pattern))

    def _find_images(self) -> list[str]:
        written = self._fill(self._spec.images)
        # the names of its folders may be in another Unicode form on the disk
        forms = dict.fromkeys((written, composed(written), unicodedata.normalize("NFD", written)))
        self._pattern = next((form for form in forms if next(self._root.glob(image_glob(form)), None)), written)
        pattern = image_glob(self._pattern)
        self._folder = fixed_part(pattern)
        endings = SUFFIXES if self._spec.channels == 3 and self._spec.image_range is None else (*SUFFIXES, ".npy")
        matched = list(self._root.glob(pattern))
        files = [file for file in matched if file.suffix.lower() in endings]
        images = sorted(image for image in map(self._inside, files) if not self._is_passed_over(image))
        if not images:
            raise ValueError(
                f"found no image as {self._root}/{pattern}; at least one file that ends with {' '.join(endings)} is "
                "needed; correct `root`, `images` or `split`"
            )
        if strange := [image for image in images if not is_unicode(image)]:
            raise ValueError(
                f"{len(strange)} of {len(images)} images have names that are not in UTF-8, the first is "
                f"{os.fsencode(strange[0])!r} in {self._root}; results could not name them; rename them"
            )
        others = set(self._root.glob(any_case(pattern))).difference(matched)
        if not_read := sorted(file for file in others if not self._is_passed_over(self._inside(file))):
            but_for = f"match {pattern!r} but for the case of their ending and are not read"
            self.notes.append(f"{len(not_read)} files {but_for}, the first is {not_read[0]}")
        return images

    def _inside(self, file: Path) -> str:
        return file.relative_to(self._root).as_posix()

    def _is_passed_over(self, image: str) -> bool:
        """Whether it is hidden, or in .thumbs/, .ipynb_checkpoints/, __MACOSX/ that a wildcard of `images` matched."""
        return any(map(is_hidden, image.removeprefix(self._folder).split("/")))

    def _find_image_labels(self, spec: ImageLabels, images: list[str]) -> LabelSpace:
        """Find the classes of each image; returns all classes."""
        if spec.file is None:
            folders = [image.removeprefix(self._folder).rpartition("/")[0].rpartition("/")[2] for image in images]
            names: list[tuple[str, ...] | None] = [(composed(folder),) if folder else None for folder in folders]
            source = f"folder of its own below {self._root / self._folder}, whose name is its class"
        else:
            file = self._one_file(spec.file)
            names, source = self._listed_labels(file, images), f"entry in {file}"
        self._count_missing("image_labels", np.array([one is not None for one in names]), images, spec.missing, source)
        occurring = sorted({name for of_image in names for name in of_image or ()})
        classes = spec.classes or tuple(occurring)
        if strange := [name for name in occurring if name not in classes]:
            raise ValueError(
                f"{self._root}: images have the class {strange[0]!r}{did_you_mean(strange[0], classes)}, which "
                f"image_labels.classes does not name; it has {', '.join(classes)}; add it, or correct the label"
            )
        number = {name: label for label, name in enumerate(classes)}
        # two arrays instead of a list for each image: they are sent to all workers
        self._labels = np.array([number[name] for of_image in names for name in of_image or ()], np.int64)
        self._label_ends = np.cumsum([0, *(len(of_image or ()) for of_image in names)])
        return LabelSpace(spec.space, classes, palette(len(classes)))

    def _listed_labels(self, file: Path, images: list[str]) -> list[tuple[str, ...] | None]:
        """By image the classes that a JSON file gives it, each once; None where it does not list the image."""
        content = read_json(file)
        if not isinstance(content, dict):
            raise ValueError(
                f"{file} holds a {type(content).__name__}; an object of file names with their classes is needed, as "
                '{"0001.jpg": "kitchen"}; write it anew'
            )
        found, others = Names(images, self._folder), 0
        labels: list[tuple[str, ...] | None] = [None] * len(images)
        for name, value in content.items():
            classes = [value] if isinstance(value, str) else value
            if not isinstance(classes, list) or not all(isinstance(one, str) and one for one in classes):
                raise ValueError(
                    f"{file}: {name!r} is {shown(value, 50)}; a class name or a list of them is needed; correct it"
                )
            position = found.find(name)
            if position == ABSENT:
                others += 1
            elif position == AMBIGUOUS or labels[position] is not None:
                raise ValueError(
                    f"{file}: {name!r} means several images, or one that another entry means too; needed are paths "
                    f"below {self._root / self._folder}; write more of the path"
                )
            else:
                labels[position] = tuple(dict.fromkeys(composed(one) for one in classes))
        if others:
            self.notes.append(f"{file}: {others} of its {len(content)} images are not among those read")
        return labels

    def _open_boxes(self, spec: BoxFile, images: list[str]) -> None:
        """Index the boxes, and find the row of each image among them."""
        if spec.file is not None:
            self._boxes = read_boxes(self._one_file(spec.file))
            self._rows = self._match(images)
            example = f", which lists names such as {self._boxes.name(0)!r}" if len(self._boxes) else ""
            source = f"entry in {self._boxes.file}{example}"
            self._count_missing("boxes", self._rows >= 0, images, spec.missing, source)
            return
        assert spec.files is not None
        self._find_partners("boxes", spec, images)
        there = self._files.present([self._partner(spec.files, image) for image in images])
        read = self._object_reader(spec, there)
        where = self._root / self._fill(spec.files)
        known = np.flatnonzero(self._labelled["boxes"]).tolist()
        threads = min(8, os.cpu_count() or 1)  # decoders and disks let others work meanwhile
        with ThreadPoolExecutor(threads) as pool:
            tried = list(pool.map(lambda at: _or_error(read, at) if there[at] else ImageObjects((0, 0), []), known))
        objects = [one for one in tried if isinstance(one, ImageObjects)]
        if errors := [one for one in tried if isinstance(one, ValueError)]:
            more = f" (and {len(errors) - 1} more files of {where} cannot be read)" if len(errors) > 1 else ""
            raise ValueError(f"{errors[0]}{more}") from errors[0]
        classes = spec.classes if spec.chosen != "instances" else None
        if isinstance(classes, str):
            classes = read_classes(self._one_file(classes))
        if spec.values is not None:
            classes = tuple(dict.fromkeys(spec.values.values()))
        content = to_coco([images[at] for at in known], objects, classes or self._one_class(spec), str(where))
        self._boxes = box_index(content, where)
        self._rows = np.full(len(images), -1)
        self._rows[known] = np.arange(len(known))
        guessed = "" if spec.format else f" (by the ending of {spec.files!r})"
        self.notes.append(f"boxes: read as {spec.chosen}{guessed}, {len(content['annotations'])} boxes")
        if classes is None and spec.chosen != "instances":
            names = shortened([entry["name"] for entry in content["categories"]])
            self.notes.append(f"boxes: classes are all that occur, by name: {names}")
        self.notes += left_out_notes(objects, str(where))

    def _one_class(self, spec: BoxFile) -> tuple[str, ...] | None:
        return spec.classes if spec.chosen == "instances" and isinstance(spec.classes, tuple) else None

    def _object_reader(self, spec: BoxFile, there: NDArray[np.bool_]) -> Callable[[int], ImageObjects]:
        """What reads the boxes of the image at a position."""

        def file(index: int) -> Path:
            return self._file("boxes", index)

        if spec.chosen == "yolo":
            names = read_classes(self._one_file(spec.classes)) if isinstance(spec.classes, str) else spec.classes
            assert names is not None
            return lambda at: yolo.read_objects(file(at), self._size(at), names)
        if spec.chosen == "voc":
            first: int | None = spec.first_pixel
            if first is None:
                of_split = [file(at) for at in np.flatnonzero(there).tolist()]
                first = voc.counts_from(dict.fromkeys([*of_split, *self._of_all_splits(spec.files or "")]))
                why = "a box begins at 0" if first == 0 else "as in the standard"
                self.notes.append(f"boxes: corners are counted from {first}, {why} (boxes.first_pixel)")
            begin = first
            return lambda at: voc.read_objects(file(at), begin)
        if spec.chosen == "labelme":
            return lambda at: labelme.read_objects(file(at))
        ignore = (0,) if spec.ignore is None else spec.ignore
        name = self._one_class(spec)
        ids = dict.fromkeys(range(65536), name[0]) if name else by_value(spec.values or {}, "boxes.values", 65535)
        return lambda at: instance_objects(read_png(file(at), palette_indices=True), ids, ignore, file(at))

    def _size(self, index: int) -> tuple[int, int]:
        """(H, W) of an image as it is read, from its header where that tells it."""
        file = self.file(index)
        if self._is_photo or file.suffix.lower() not in (".npy", ".tif", ".tiff"):
            return image_size(file, self._spec.upright)
        height, width = read_channels(file).shape[:2]
        return height, width

    def _of_all_splits(self, pattern: str) -> list[Path]:
        """The files of every split, where a path names it: what is guessed of one holds for all."""
        if "{split}" not in pattern:
            return []
        expression = re.escape(pattern)
        for word, one in {"{path}": ".+", "{folder}": ".+", "{stem}": "[^/]+", "{split}": "[^/]+"}.items():
            expression = expression.replace(re.escape(word), one)
        above = self._root / pattern.partition("{")[0].rpartition("/")[0]
        found = above.rglob(f"*{Path(pattern).suffix}")
        return sorted(file for file in found if re.fullmatch(expression, self._inside(file)))

    def _open_segmentation(self, spec: LabelFiles) -> LabelSpace:
        """Read the tables of values or colours; returns the classes."""
        self._colors: Colors | None = None
        self._polygons: tuple[str, ...] | None = None
        classes = spec.classes
        if spec.chosen != "png":
            numbered = read_classes(self._one_file(classes)) if isinstance(classes, str) else classes
            assert numbered is not None
            if spec.outside and spec.outside not in numbered:
                numbered = (*numbered, spec.outside)  # behind those that files number
            self._polygons = numbered
            return LabelSpace(spec.space, numbered, palette(len(numbered)))
        if spec.colors is not None:
            if isinstance(spec.colors, str):
                colors = color_file(self._one_file(spec.colors))
            else:
                several = {
                    name: value if isinstance(value[0], tuple) else (value,) for name, value in spec.colors.items()
                }
                colors = {name: tuple(value) for name, value in several.items()}
            if isinstance(classes, str):
                classes = class_file(self._one_file(classes))[0]
            names = classes or tuple(colors)
            self._colors = color_table(colors, names, spec.ignore_colors)
            if ignored := [name for name in colors if name not in names]:
                self.notes.append(f"segmentation: {len(ignored)} colours are no class: {shortened(ignored)}")
            return LabelSpace(spec.space, tuple(names), self._colors.shown)
        values = by_value(spec.values, "segmentation.values") if spec.values is not None else None
        if isinstance(classes, str):
            file = self._one_file(classes)
            classes, own_values = class_file(file)
            if values is not None and own_values is not None:
                raise ValueError(f"{file} maps pixel values, and so does `values`; one of them may; drop the other")
            values = own_values or values
        assert classes is not None
        self._table = label_table(classes, values, spec.ignore)
        first = self._file("segmentation", int(np.argmax(self._labelled["segmentation"])))
        if has_palette(first):
            self.notes.append(
                f"segmentation: the PNGs have a palette, whose indices are the values; the first is {first}"
            )
        return LabelSpace(spec.space, classes, palette(len(classes)))

    def _match(self, images: list[str]) -> NDArray[np.int64]:
        """Row in the annotation file of each image; -1 where it does not list the image."""
        names, rows, others = Names(images, self._folder), np.full(len(images), -1), 0
        for row in range(len(self._boxes)):
            name = self._boxes.name(row)
            position = names.find(name)
            if position == ABSENT:
                others += 1
            elif position == AMBIGUOUS or rows[position] >= 0:
                raise ValueError(
                    f"{self._boxes.file}: file_name {name!r} means several images, or one that another entry means "
                    f"too; needed are paths below {self._root / self._folder}; write more of the path"
                )
            else:
                rows[position] = row
        if others:
            self.notes.append(f"{self._boxes.file}: {others} of its {len(self._boxes)} images are not among those read")
        return rows

    def _find_partners(self, label: str, spec: BoxFile | LabelFiles | DepthFiles, images: list[str]) -> None:
        assert spec.files is not None
        files = [self._partner(spec.files, image) for image in images]
        check_distinct(files, f"files of {label}", "write {path} instead of {stem}")
        self._patterns[label] = spec.files
        self._count_missing(label, self._files.present(files), files, spec.missing, "file")

    def _count_missing(self, label: str, known: NDArray[np.bool_], names: list[str], missing: str, source: str) -> None:
        """Note the images without this label, or refuse them. source: what each of `names` should have."""
        self._labelled[label] = known
        if known.all():
            return
        first = names[int(np.argmin(known))]
        count = f"{np.count_nonzero(~known)} of {len(known)} images"
        one = np.count_nonzero(~known) == 1
        text = f"{label}: {count} {'has' if one else 'have'} no {source}, {'' if one else 'the first is '}{first}"
        if missing != "error" and not known.any():
            raise ValueError(
                f"{text}; a label that no image has teaches and judges nothing; correct the path, or leave {label} out "
                "of this data set"
            )
        if missing == "error":
            raise ValueError(
                f"{text}; in {self._root} every image needs its label; add what is missing, correct the path, or set "
                "missing: unlabelled to take those images as not labelled"
                + (", or missing: empty if nothing is to be seen there" if label == "boxes" else "")
            )
        if missing == "empty":
            self._labelled[label] = np.ones(len(known), np.bool_)
        unlabelled = "it is not labelled" if one else "they are not labelled"
        empty = "it counts as looked at and empty" if one else "they count as looked at and empty"
        self.notes.append(f"{text}; {empty if missing == 'empty' else unlabelled}")

    def _check_range(self) -> None:
        assert self._spec.depth is not None
        labelled = np.flatnonzero(self._labelled["depth_m"])
        where = f"{self._file('depth_m', int(labelled[0]))} and {len(check_positions(len(labelled))) - 1} others"
        usual = "1 for metres, 0.01 for centimetres, 0.001 for millimetres"
        unit = f"metres_per_unit {self._spec.depth.metres_per_unit:g} ({usual})"
        self.notes += unit_notes(lambda at: self._read_depth(int(labelled[at])), len(labelled), where, unit)
