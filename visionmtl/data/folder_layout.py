"""What a folder of somebody's images holds, guessed from names and contents, and said: settings of a `folder` data set.

Nothing here decides how a file is read: the settings are written down, and `datasets/folder.py` reads by them.
"""

import glob
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
import yaml
from numpy.typing import NDArray

from visionmtl.config.text_files import read_json
from visionmtl.datasets import shortened
from visionmtl.io import voc, yolo
from visionmtl.io.channels import read_channels
from visionmtl.io.depth_maps import read_depth
from visionmtl.io.images import SUFFIXES, image_size, read_png, read_stored
from visionmtl.io.label_maps import color_file
from visionmtl.io.paths import (
    composed,
    fixed_part,
    image_glob,
    is_hidden,
    is_unicode,
    read_lines,
    read_names,
    without_ending,
)
from visionmtl.structures import MAX_CLASSES

Kind = Literal["photo", "channels", "classes", "colors", "instances", "depth", "text", "xml", "json"]

_SPLIT = re.compile(
    r"(?<![A-Za-z0-9])(?:train(?:ing)?|val(?:id(?:ation)?)?|test(?:ing)?|dev)(?:\d{4})?(?=$|[^A-Za-z0-9]|annot|labels|masks)",
    re.IGNORECASE,
)
_SUFFIX = re.compile(r"[_.-][A-Za-z][A-Za-z0-9]*(?:[_-][A-Za-z][A-Za-z0-9]*)*$")
_MAP_FOLDER = re.compile(r"mask|label|annot|segm|^gt$|ground.?truth", re.IGNORECASE)
_MAPS = (*SUFFIXES, ".npy", ".exr")
_TEXTS: dict[str, Kind] = {".txt": "text", ".xml": "xml", ".json": "json"}
_SAMPLED = 6  # files of a group that are looked into
_SCANNED = 400  # label files that are searched for values, colours, sizes
_MOST_COLORS = 64
_LEAST_MM = 200  # the middle of depths that are taken for millimetres
_MAX_GREYS = 64
_LEAST_DEPTHS = 256  # different values of 16 bits; fewer are numbers of objects or the like
_DOMINANT = 0.8  # of the photographs that lie in one folder: others are something else
_LEAST_MATCH = 0.25  # of the images that must have a file for it to be their label
_HELD_OUT = 0.2  # of the images, where nothing says which ones validate
_TARGET_PX = 384 * 512
_STEPS = 3000
_VOID = "the config has the line that ignores it"


class _Group(NamedTuple):
    """Files of one folder (of one for each split), ending and suffix of the name."""

    folder: str  # with {split} where splits have folders of their own; "" or ending with /
    suffix: str
    ending: str
    files: list[str]


@dataclass
class Layout:
    """What a folder was understood to hold."""

    root: Path
    settings: dict[str, Any]
    """Of a `folder` data set, without root and split."""
    train: str | None = None
    """What {split} stands for; None: no path has it."""
    val: str | None = None
    said: list[str] = field(default_factory=list)
    """What was understood, a sentence each."""
    num_images: int = 0
    num_train: int = 0
    """Images of the training split, or those that are not held out."""
    size: tuple[int, int] = (0, 0)
    """Median (H, W) of the images, pixels."""
    depth_m: tuple[float, float] | None = None
    """The range of measured depths, without the outermost hundredths."""
    channels: tuple[list[float], list[float]] | None = None
    """Mean and standard deviation of each channel, 0..1, of images that are no RGB."""

    @property
    def tasks(self) -> list[str]:
        """The tasks of `configs/folder.yaml` that the labels teach."""
        labels = {"boxes": "detection", "segmentation": "segmentation", "depth": "depth", "image_labels": "image_class"}
        return [task for label, task in labels.items() if label in self.settings]


def understand(root: Path, object_name: str = "object") -> Layout:
    """Look at a folder. Raises ValueError where it holds no images, or none with labels.

    object_name: the class of what instance maps number, which no file names
    """
    if not root.is_dir():
        raise ValueError(f"{root} is no folder; the folder with images and labels is needed; correct the path")
    files = _list(root)
    class_folders = _class_folders(files)
    groups = _groups(files, class_folders)
    kinds = {at: _kind(root, group) for at, group in enumerate(groups)}
    photos = [group for at, group in enumerate(groups) if kinds[at] in ("photo", "channels")]
    if not photos:
        pictures = sum(file.lower().endswith(SUFFIXES) for file in files)
        if not pictures:
            raise ValueError(
                f"{root} holds {len(files)} files and no photographs; images ({' '.join(SUFFIXES)}) are needed; name "
                "the folder that holds them and their labels"
            )
        raise ValueError(
            f"{root} holds {pictures} pictures, and which of them are photographs no folder, ending or end of "
            "a name tells; photographs and labels differ in one of these; move them, or, where each sample has a "
            "folder of its own, write a config with images: '{folder}/NAME.png' (docs/own_data.md)"
        )
    folders = (group.folder.replace("{split}", "") for group in groups)
    if odd := next((folder for folder in folders if re.search(r"[{}:\\]", folder)), None):
        raise ValueError(
            f"{str(root / odd)!r} has one of {{ }} : \\ in its name, which mean other things in the paths of a config; "
            "folders without them are needed; rename it"
        )
    finder = _Finder(root, files, photos, object_name, class_folders)
    if any(kinds[groups.index(group)] == "channels" for group in finder.photo_groups):
        finder.measure_channels()

    # numbers of classes go before their colours, folders of splits before others, many files before few
    def rank(at: int) -> tuple[bool, bool, int]:
        return kinds[at] == "colors", "{split}" not in groups[at].folder, -len(groups[at].files)

    for at in sorted(kinds, key=rank):
        group = groups[at]
        if group not in finder.photo_groups:
            finder.add(group, kinds[at])
    return finder.finish()


class _Finder:
    """Images first, then label after label, each of which must match them by name."""

    def __init__(
        self, root: Path, files: Sequence[str], photos: Sequence[_Group], object_name: str, class_folders: Set[str]
    ) -> None:
        self._class_folders = class_folders
        self._root, self._files, self._object = root, set(files), object_name
        self.layout = Layout(root, {})
        self._used: set[str] = set()
        self._list: str | None = None
        self._channels: dict[str, Any] = {}
        self._instances: str | None = None
        self._outlined: dict[str, Any] | None = None  # segmentation of the polygons that boxes are made of
        main = max(photos, key=lambda group: len(group.files))
        # photographs of other endings count to the same; those of another suffix where they have labels of their own
        named = Counter(map(_stem, files))

        def has_labels(group: _Group) -> bool:
            return sum(named[_stem(file)] > 1 for file in group.files) >= _LEAST_MATCH * len(group.files)

        same = [one for one in photos if one.suffix == main.suffix or (not main.suffix and has_labels(one))]
        in_main = [group for group in same if group.folder == main.folder]
        few_elsewhere = sum(len(group.files) for group in in_main) >= _DOMINANT * sum(
            len(group.files) for group in same
        )
        self.photo_groups = in_main if few_elsewhere else same
        self._photos = [file for group in self.photo_groups for file in group.files]
        read = {_of_training(tokens := self._tokens()), _of_validation(tokens)}
        if None not in read:  # what lies beside these folders, or in those of a third split, is not read
            self.photo_groups = [group for group in self.photo_groups if "{split}" in group.folder]
            self._photos = [photo for photo in self._photos if self._token(photo) in read]
        self._suffix = main.suffix
        self._above = ""  # {folder}
        self._used.update(self._photos)
        patterns = [folder + name for name in self._names() for folder in self._folders()]
        self._pattern = next((one for one in patterns if not self._amiss(one)), patterns[0])

    def _token(self, photo: str) -> str | None:
        return _template(photo, self._class_folders)[1]

    def _tokens(self) -> Counter[str]:
        return Counter(token for photo in self._photos if (token := self._token(photo)))

    def _amiss(self, pattern: str) -> list[str]:
        """Pictures that a pattern matches and that are no photographs, and photographs that it does not match."""
        matched: set[str] = set()
        for token in {self._token(photo) or "" for photo in self._photos}:
            found = self._root.glob(image_glob(pattern.replace("{split}", token)))
            matched.update(file.relative_to(self._root).as_posix() for file in found)
        strays = (name for name in matched.difference(self._photos) if name.lower().endswith((*SUFFIXES, ".npy")))
        seen = [name for name in strays if is_unicode(name) and not any(map(is_hidden, name.split("/")))]
        return sorted([*seen, *set(self._photos).difference(matched)])

    def _names(self) -> list[str]:
        """Glob patterns of the photographs' names, the plainest first: *.jpg, *[0-9].jpg, *[0-9].jp[eg]*."""
        endings = sorted({group.ending for group in self.photo_groups})
        shortest = min(map(len, endings))
        signs = (_one_of(letters) for letters in zip(*endings, strict=False))
        tail = "".join(signs) + ("*" if any(len(ending) > shortest for ending in endings) else "")
        tails = [tail] if len(endings) == 1 else [".*", tail]
        stems = (_stem(photo).removesuffix(self._suffix) for photo in self._photos)
        last = {stem[-1:] for stem in stems}
        heads = ["*", f"*{_one_of(last)}"] if all(sign.isascii() and sign.isalnum() for sign in last) else ["*"]
        return [f"{head}{self._suffix}{tail}" for head in heads for tail in tails]

    def _folders(self) -> list[str]:
        """Glob patterns of the photographs' folders, the plainest first."""
        folders = sorted({group.folder for group in self.photo_groups})
        if len(folders) == 1:
            return [glob.escape(folders[0])]
        parts = [folder.split("/")[:-1] for folder in folders]
        shared = len(list(takewhile(lambda level: len(set(level)) == 1, zip(*parts, strict=False))))
        self._above = "".join(f"{part}/" for part in parts[0][:shared])
        prefix = glob.escape(self._above)
        rests = [part[shared:] for part in parts]
        if all(len(rest) >= 2 for rest in rests) and len({rest[-1] for rest in rests}) == 1:
            return [f"{prefix}{{folder}}/{glob.escape(rests[0][-1])}/"]
        if not all(len(rest) == 1 for rest in rests):
            return [f"{prefix}**/"]
        signs = zip(*(rest[0] for rest in rests), strict=False)
        start = "".join(sign for sign, *_ in takewhile(lambda of_names: len(set(of_names)) == 1, signs))
        return [f"{prefix}*/", f"{prefix}{glob.escape(start)}*/"]

    def add(self, group: _Group, kind: Kind | None) -> None:
        """Take the files of a group as labels where their names match those of the images."""
        slots = {"text": "boxes", "xml": "boxes", "json": "boxes", "instances": "boxes", "classes": "segmentation",
                 "colors": "segmentation", "depth": "depth"}  # fmt: skip
        slot = slots.get(kind or "")
        if slot is None or slot in self.layout.settings:
            return
        match = self._match(group)
        if match is None:
            return
        pattern, share, drop = match
        count = round(share * len(self._photos))
        partners = {self._partner(pattern, photo, drop) for photo in self._photos}
        matched = sorted(partners & self._files)  # not classes.txt beside them
        files = [self._root / file for file in matched[:: max(1, len(matched) // _SCANNED)]]
        settings = getattr(self, f"_add_{kind}")(pattern, files)
        if settings is None:
            return
        if drop:  # from now on for all labels
            folder, slash, name = self._pattern.rpartition("/")
            self._pattern = f"{folder}{slash}{{stem}}{self._suffix}{name.partition(self._suffix)[2]}"
        if share < 1:
            settings["missing"] = "empty" if kind == "text" else "unlabelled"
            as_what = "images without objects, as YOLO means it" if kind == "text" else "not labelled"
            without, have = len(self._photos) - count, "has" if len(self._photos) - count == 1 else "have"
            self._say(f"{slot}: {without} of {len(self._photos)} images {have} no file: {as_what}")
        self.layout.settings[slot] = settings
        self._used |= partners
        if kind == "instances" and "segmentation" not in self.layout.settings:
            self._instances = pattern

    def _match(self, group: _Group) -> tuple[str, float, bool] | None:
        """The label's path, the share of the images that have one, whether {stem} leaves the images' suffix out."""
        best: tuple[str, float, bool] | None = None
        labels = self._files.difference(self._photos)
        for drop in (False, True) if self._suffix else (False,):
            if drop is False and "{stem}" in self._pattern:
                continue
            end = f"{group.suffix}{group.ending}"
            folder = group.folder
            places = [folder + "{stem}" + end]
            if "{folder}" in self._pattern:
                places = [f"{self._above}{{folder}}/{folder.split('/')[-2]}/{{stem}}{end}"]
            elif "*/" in self._pattern:
                places = [f"{'/'.join(folder.split('/')[:depth])}{'/' if depth else ''}{{path}}{end}"
                          for depth in range(folder.count("/") + 1)]  # fmt: skip
            for place in places:
                hits = sum(self._partner(place, photo, drop) in labels for photo in self._photos)
                if hits and (best is None or hits / len(self._photos) > best[1]):
                    best = place, hits / len(self._photos), drop
        return best if best and best[1] >= _LEAST_MATCH else None

    def _partner(self, pattern: str, photo: str, drop: bool) -> str:
        template, token = _template(photo, self._class_folders)
        path = without_ending(template)
        path = path.removesuffix(self._suffix) if drop else path
        inner = path.removeprefix(fixed_part(image_glob(self._pattern)))
        folder = path.removeprefix(self._above).rpartition("/")[0].rpartition("/")[0]
        text = pattern.replace("{path}", inner).replace("{stem}", path.rpartition("/")[2]).replace("{folder}", folder)
        return text.replace("{split}", token or "{split}")

    def measure_channels(self) -> None:
        """Settings for images of other channels than RGB, from some of them."""
        chosen = self._photos[:: max(1, len(self._photos) // _SAMPLED)]
        images = [read_channels(self._root / photo) for photo in chosen]
        count = images[0].shape[2]
        self._channels = {"channels": count}
        pixels = np.concatenate([image.reshape(-1, image.shape[2])[:, :count] for image in images]).astype(np.float64)
        scale = 255.0
        if images[0].dtype != np.uint8:
            low, high = (
                min(0.0, _rounded(float(np.nanquantile(pixels, 0.001)))),
                _rounded(float(np.nanquantile(pixels, 0.999))),
            )
            self._channels["image_range"] = [low, high]
            pixels, scale = np.clip(np.nan_to_num(pixels, nan=low), low, high) - low, high - low
        mean, std = ((values / scale).round(4).tolist() for values in (pixels.mean(0), np.maximum(pixels.std(0), 1e-3)))
        self.layout.channels = mean, std
        ends = (
            f", whose values {self._channels['image_range']} become 0 to 255" if "image_range" in self._channels else ""
        )
        self._say(f"channels: images have {count}{ends}; colour augmentation is off; timm adapts pretrained weights")

    def _say(self, text: str) -> None:
        self.layout.said.append(text)

    # ---- one method a kind: settings, or None where the files are something else ----

    def _add_text(self, pattern: str, files: list[Path]) -> dict[str, Any] | None:
        lines = [line.split() for file in files for line in read_lines(file) if line]
        if not all(len(line) >= 5 and _is_number(line) for line in lines):
            return None
        settings: dict[str, Any] = {"format": "yolo", "files": pattern}
        if lines and all(len(line) > 5 for line in lines):
            self._outlined = {}
        described = [file for file in sorted(self._files) if file.endswith((".yaml", ".yml")) and file.count("/") < 2]
        for file in described:
            if not yolo.names_classes(self._root / file):
                continue
            names = yolo.read_data_yaml(self._root / file)["names"]
            settings["classes"] = file
            self._say(f"boxes: YOLO txt at {pattern}; classes from {file}: {shortened(names)}")
            return settings
        for file in sorted(self._files):
            if re.search(r"(^|/)(classes\.txt|.*\.names)$", file):
                settings["classes"] = file
                listed = yolo.read_classes(self._root / file)
                self._say(f"boxes: YOLO txt at {pattern}; classes from {file}: {shortened(listed)}")
                return settings
        highest = max((int(float(line[0])) for line in lines), default=0)
        settings["classes"] = [f"class_{number}" for number in range(highest + 1)]
        self._say(
            f"boxes: YOLO txt at {pattern}; no data.yaml or classes.txt names the classes: they are called "
            f"{shortened(settings['classes'])}; write their names into boxes.classes"
        )
        return settings

    def _add_xml(self, pattern: str, files: list[Path]) -> dict[str, Any] | None:
        if voc.parse(files[0]).tag != "annotation":
            return None
        there = sorted(self._root / file for file in self._files if file.endswith(".xml"))
        roots = [(file, voc.parse(file)) for file in there]
        entries = (name for _, root in roots for name in root.findall("object/name"))
        names = sorted({composed((name.text or "").strip()) for name in entries})
        first = voc.counts_from(there)
        why = "a box begins at 0" if first == 0 else "as in the standard"
        self._say(
            f"boxes: Pascal VOC xml at {pattern}; {len(names)} classes: {shortened(names)}; corners counted from "
            f"{first} ({why})"
        )
        return {"format": "voc", "files": pattern, "classes": names, "first_pixel": first} if names else None

    def _add_json(self, pattern: str, files: list[Path]) -> dict[str, Any] | None:
        names: set[str] = set()
        kinds: Counter[str] = Counter()
        for file in sorted(self._root / name for name in self._files if name.endswith(files[0].suffix)):
            content = read_json(file)
            if isinstance(content, dict) and isinstance(content.get("shapes"), list):
                shapes = [one for one in content["shapes"] if isinstance(one, dict)]
                names |= {composed(str(one.get("label"))) for one in shapes}
                kinds.update(str(one.get("shape_type") or "polygon") for one in shapes)
        if not names:
            return None
        self._say(f"boxes: LabelMe json at {pattern}; {len(names)} classes: {shortened(sorted(names))}")
        if kinds["polygon"] * 2 > sum(kinds.values()) and not kinds.keys() - {"polygon", "rectangle", "circle"}:
            self._outlined = {"format": "labelme", "files": pattern, "classes": sorted(names)}
        return {"format": "labelme", "files": pattern, "classes": sorted(names)}

    def _add_instances(self, pattern: str, files: list[Path]) -> dict[str, Any]:
        ignore = sorted({0} | ({255} if any((_values(file) == 255).any() for file in files[:_SAMPLED]) else set()))
        self._say(
            f"boxes: PNGs at {pattern} number the objects of an image (1, 2, ...); all are of one class, called "
            f"{self._object} (--object NAME)"
        )
        return {"format": "instances", "files": pattern, "classes": [self._object], "ignore": ignore}

    def _add_classes(self, pattern: str, files: list[Path]) -> dict[str, Any]:
        counts: Counter[int] = Counter()
        for file in files:
            counts.update(np.unique(_values(file)).tolist())
        values = sorted(counts)
        if values in ([0, 255], [255]):
            self._say(f"segmentation: masks of 0 and 255 at {pattern}: background and {self._object} (--object NAME)")
            named = {0: "background", 255: self._object}
            return {"files": pattern, "classes": list(named.values()), "values": named, "ignore": []}
        values = [value for value in values if value != 255]
        names = self._listed_names(max(values, default=0) + 1)
        if names:
            self._say(f"segmentation: 8-bit PNGs at {pattern}; classes by number: {shortened(names)}")
            return {"files": pattern, "classes": names}
        named = {value: f"class_{value}" for value in values}
        self._say(
            f"segmentation: 8-bit PNGs at {pattern} with {_value_list(values)}, which no file names: write their names "
            "into segmentation.classes and values"
        )
        if 0 in named and len(named) > 1:
            self._say(f"segmentation: 0 is learnt as a class, class_0, though it is often void: {_VOID}")
        return {"files": pattern, "classes": list(named.values()), "values": named}

    def _add_colors(self, pattern: str, files: list[Path]) -> dict[str, Any] | None:
        seen: Counter[tuple[int, int, int]] = Counter()
        for file in files:
            codes, count = np.unique(_codes(read_png(file)), return_counts=True)
            pairs = zip(codes.tolist(), count.tolist(), strict=True)
            seen.update({(code >> 16, code >> 8 & 255, code & 255): number for code, number in pairs})
            if len(seen) > MAX_CLASSES:
                self._say(f"segmentation: PNGs at {pattern} have more than {MAX_CLASSES} colours: no classes; left out")
                return None
        for name in sorted(self._files):
            if name.rpartition("/")[2].lower().endswith((".txt", ".csv", ".yaml", ".json")) and name.count("/") < 2:
                try:
                    colors = color_file(self._root / name)
                except ValueError:
                    continue
                known = {color for of_name in colors.values() for color in of_name}
                if len(known & set(seen)) >= max(1, len(seen) // 2):
                    void = [key for key in colors if key.lower() in ("void", "unlabelled", "unlabeled", "ignore")]
                    names = [key for key in colors if key not in void]
                    self._say(
                        f"segmentation: colour-coded PNGs at {pattern}; colours of {len(names)} classes from {name}"
                        + (f"; {', '.join(void)} is no class" if void else "")
                    )
                    settings: dict[str, Any] = {"files": pattern, "colors": name, "classes": names}
                    if more := sorted(set(seen) - known):
                        self._say(f"segmentation: {len(more)} colours are not in {name} and ignored: {more[:4]}")
                        settings["ignore_colors"] = [list(color) for color in more]
                    return settings
        named = {f"color_{r}_{g}_{b}": [r, g, b] for (r, g, b), _ in seen.most_common()}
        self._say(
            f"segmentation: colour-coded PNGs at {pattern} with {_count(len(named), 'colour')}, which no file "
            "names: write their names into segmentation.colors"
        )
        if "color_0_0_0" in named and len(named) > 1:
            self._say(f"segmentation: black is learnt as a class, color_0_0_0, though it is often void: {_VOID}")
        return {"files": pattern, "colors": named}

    def _add_depth(self, pattern: str, files: list[Path]) -> dict[str, Any] | None:
        measured = []
        whole = True
        for file in files[:: max(1, len(files) // _SAMPLED)]:
            stored = read_depth(file)
            if stored.ndim != 2:
                return None
            whole = whole and stored.dtype.kind == "u"
            values = stored[np.isfinite(stored) & (stored > 0)].astype(np.float64)
            measured.append(values)
        values = np.concatenate(measured)
        if not len(values):
            return None
        middle = float(np.median(values))
        if whole and middle < _LEAST_MM:
            self._say(
                f"depth: {pattern} holds whole numbers around {middle:.4g}, neither millimetres nor fine metres; left "
                "out: add depth: {files: ..., metres_per_unit: ...} with the unit that you know"
            )
            return None
        unit = 0.001 if middle >= _LEAST_MM else 1.0
        low, high = (float(x) for x in np.quantile(values * unit, (0.01, 0.99)))
        self.layout.depth_m = low, high
        name = "millimetres" if unit == 0.001 else "metres"
        self._say(
            f"depth: {pattern}, taken for {name} (the middle of the measured values is {middle:.4g}, "
            f"{middle * unit:.3g} m); "
            "correct depth.metres_per_unit if that cannot be"
        )
        return {"files": pattern, "metres_per_unit": unit}

    def _listed_names(self, least: int) -> list[str]:
        for file in sorted(self._files):
            if re.search(r"(^|/)(classes|labels|class_names)\.txt$", file):
                try:
                    names = read_names(self._root / file)
                except ValueError:  # a text of another kind
                    continue
                if least <= len(names) <= 255 and len(set(names)) == len(names):
                    return [*names]
        return []

    # ---- what is for all images together ----

    def finish(self) -> Layout:
        """The layout; raises ValueError where no label was found."""
        settings, layout = self.layout.settings, self.layout
        if "boxes" not in settings or settings["boxes"]["format"] == "instances":
            self._find_coco()
        if "segmentation" not in settings and (pattern := self._instances):
            values = {0: "background", "1-254": self._object}
            settings["segmentation"] = {"files": pattern, "classes": ["background", self._object], "values": values}
            if (missing := settings["boxes"].get("missing")) is not None:
                settings["segmentation"]["missing"] = missing
            self._say(f"segmentation: the same PNGs, background and {self._object}")
        if "segmentation" not in settings and self._outlined is not None:
            missing = settings["boxes"].get("missing")  # an image without a file shows no object, or nobody looked
            of_boxes = {key: value for key, value in settings["boxes"].items() if key in ("format", "files", "classes")}
            settings["segmentation"] = {**of_boxes, **self._outlined, "outside": "background"}
            named = settings["segmentation"]["classes"]
            if isinstance(named, list) and "background" not in named:
                settings["segmentation"]["classes"] = [*named, "background"]
            settings["segmentation"] |= {"missing": "unlabelled"} if missing else {}
            self._say("segmentation: the same polygons; what lies in none is background")
        if not settings and self._pattern.count("*/") == 1:
            self._refuse_maps_among_photos()
            names = sorted({photo.split("/")[-2] for photo in self._photos})
            settings["image_labels"] = {"classes": names}
            self._say(f"image_labels: the folder of an image is its class: {shortened(names)}")
        if not settings:
            raise ValueError(
                f"{self._root} holds {len(self._photos)} images ({self._pattern}), but no labels that match them by "
                "name were found: COCO json, YOLO txt, VOC xml, LabelMe json, label, instance or depth maps, or "
                "folders of classes; name the folder above both, or write the YAML by hand (datasets/README.md, folder)"
            )
        self._choose_split()
        images = self._pattern
        if not self._list and (amiss := self._amiss(images)):
            raise ValueError(
                f"{self._root} holds {len(self._photos)} photographs, and no pattern matches these alone: {images} is "
                f"wrong about {_count(len(amiss), 'picture')}, the first is {amiss[0]}; photographs need a "
                "folder (no link), an ending or an end of their names that no other picture has; move the others out "
                "of that folder, or write the YAML by hand (docs/own_data.md)"
            )
        layout.settings = {
            "images": images,
            **self._channels,
            **({"list_file": self._list} if self._list else {}),
            **settings,
        }
        sampled = self._photos[:: max(1, len(self._photos) // _SCANNED)]
        sizes = [
            read_channels(self._root / photo).shape[:2]
            if self._channels
            else image_size(self._root / photo, upright=True)
            for photo in sampled[: _SAMPLED if self._channels else None]
        ]
        height, width = (int(np.median(sides)) for sides in zip(*sizes, strict=True))
        layout.size, layout.num_images = (height, width), len(self._photos)
        layout.said.insert(0, f"images: {len(self._photos)} at {images}, about {height}x{width} px")
        unused = sorted(self._files - self._used)
        left = Counter(file.rpartition("/")[0] or "." for file in unused if file.lower().endswith(_MAPS))
        if left:
            places = [f"{_count(count, 'file')} in {name}" for name, count in left.most_common()]
            self._say(f"not used: {shortened(places, 4)}")
        return layout

    def _refuse_maps_among_photos(self) -> None:
        """Masks saved as JPEG look like photographs: their folder would become a class of images."""
        stems: dict[str, set[str]] = defaultdict(set)
        for photo in self._photos:
            folder, _, name = without_ending(photo).rpartition("/")
            stems[folder].add(name)
        for folder, names in stems.items():
            twin = next((other for other in stems if other != folder and names <= stems[other]), None)
            if twin and _MAP_FOLDER.search(folder.rpartition("/")[2]):
                raise ValueError(
                    f"{self._root / folder} is called as label maps are, and its files as the images in {twin}, but "
                    "they look like photographs; label maps are PNGs of classes or of few colours, which JPEG blurs; "
                    "export them again as PNG, or rename the folder if its name is a class of images"
                )

    def _find_coco(self) -> None:
        names = {photo.rpartition("/")[2] for photo in self._photos}
        templates: dict[str, list[str]] = defaultdict(list)
        for file in self._files:
            if file.endswith(".json"):
                templates[_SPLIT.sub("{split}", file)].append(file)
        best: tuple[int, str, list[str]] | None = None
        for template, files in templates.items():
            content = read_json(self._root / min(files))
            keys = ("images", "annotations", "categories")
            lists: list[Any] = [content.get(key) for key in keys] if isinstance(content, dict) else [None]
            if not all(isinstance(one, list) for one in lists) or not all(
                isinstance(one, dict) and (of is not lists[1] or "bbox" in one) for of in lists for one in of
            ):
                continue
            hits = sum(str(image.get("file_name")).rpartition("/")[2] in names for image in lists[0])
            hits += "instances" in template
            if hits > 1 and (best is None or hits > best[0]):
                best = hits, template, [str(one.get("name")) for one in lists[2]]
        if best:
            _, template, classes = best
            self._used.update(templates[template])
            self.layout.settings["boxes"] = {"file": template}
            self._say(f"boxes: COCO json at {template}; {len(classes)} classes: {shortened(classes)}")

    def _choose_split(self) -> None:
        """Which tokens stand for training and validation; from folders, or from lists of images."""
        layout = self.layout
        text = f"{self._pattern} {layout.settings}"
        in_folders = "{split}" in self._pattern
        tokens = self._tokens() if in_folders else Counter()
        if "{split}" in text and not tokens:  # the labels of all images by split, as COCO's json
            tokens = Counter(m[0] for file in self._used if (m := _SPLIT.search(file)))
        if not tokens:
            tokens = self._lists()
        train, val = _of_training(tokens), _of_validation(tokens)
        if train is None or val is None:
            if "{split}" in text and (only := train or val):
                layout.settings.update(_filled(layout.settings, only))
                self._pattern = self._pattern.replace("{split}", only)
                if in_folders:
                    self._used.difference_update(self._photos)
                    self._photos = [photo for photo in self._photos if self._token(photo) == only]
                    self._used.update(self._photos)
            if round(_HELD_OUT * len(self._photos)) == 0:
                raise ValueError(
                    f"{self._root} has no split for validation, and of its images ({len(self._photos)}) a fifth is "
                    "none; three images or more are needed, or folders train and val; add images"
                )
            self._list = None
            layout.num_train = len(self._photos) - round(_HELD_OUT * len(self._photos))
            self._say(
                "splits: none for validation; a fifth of the images, by a hash of their names, is held out (subset)"
            )
            return
        layout.train, layout.val = train, val
        counted = in_folders or self._list  # else COCO's json says which images are whose
        layout.num_train = tokens[train] if counted else round((1 - _HELD_OUT) * len(self._photos))
        by = f" (lists {self._list})" if self._list else ""
        self._say(f"splits: {train} to train, {val} to validate{by}")

    def _lists(self) -> Counter[str]:
        stems = {_stem(photo) for photo in self._photos}
        lists: dict[str, Counter[str]] = defaultdict(Counter)
        for file in sorted(self._files - self._used):
            match = _SPLIT.search(file)
            if file.endswith(".txt") and match:
                lines = [line for line in read_lines(self._root / file) if line]
                hits = sum(without_ending(line.rpartition("/")[2]) in stems or line in stems for line in lines)
                if lines and hits == len(lines):
                    lists[_SPLIT.sub("{split}", file)][match[0]] = len(lines)
        usable = {template: counts for template, counts in lists.items() if any(_begins(t, "train") for t in counts)}
        if not usable:
            return Counter()
        self._list = best = max(usable, key=lambda template: (len(usable[template]), sum(usable[template].values())))
        return usable[best]


def _begins(token: str, split: str) -> bool:
    return token.lower().startswith(split)


def _stem(file: str) -> str:
    return without_ending(file).rpartition("/")[2]


def _of_training(tokens: Iterable[str]) -> str | None:
    return next((token for token in sorted(tokens) if _begins(token, "train")), None)


def _of_validation(tokens: Iterable[str]) -> str | None:
    ordered = sorted(tokens)
    return next((token for start in ("val", "dev", "test") for token in ordered if _begins(token, start)), None)


def _one_of(signs: Iterable[str]) -> str:
    """A glob pattern of one sign: "g", "[0-9]", "[eg]"."""
    text = "".join(sorted(set(signs)))
    return text if len(text) == 1 else "[0-9]" if text.isdigit() else f"[{text}]"


def _value_list(values: Sequence[int]) -> str:
    """ "values 0 to 13", "values 0, 7"."""
    if len(values) > 2 and values[-1] - values[0] == len(values) - 1:
        return f"values {values[0]} to {values[-1]}"
    return f"value{'' if len(values) == 1 else 's'} {shortened([str(value) for value in values])}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _filled(value: Any, token: str) -> Any:
    if isinstance(value, dict):
        return {key: _filled(inner, token) for key, inner in value.items()}
    return value.replace("{split}", token) if isinstance(value, str) else value


def _list(root: Path) -> list[str]:
    """All files below, without hidden ones, as paths with /; folders that are links are not followed."""
    paths = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        inside = Path(folder).relative_to(root).as_posix()
        prefix = "" if inside == "." else f"{inside}/"
        paths += [prefix + name for name in sorted(files) if not is_hidden(name) and is_unicode(prefix + name)]
    return paths


def _class_folders(files: Sequence[str]) -> set[str]:
    """Folders of a class that is called like a split: the only such name among folders with files of one ending."""
    endings: dict[str, set[str]] = defaultdict(set)
    for file in files:
        folder = file.rpartition("/")[0]
        endings[folder].add(Path(file).suffix.lower())
        while folder := folder.rpartition("/")[0]:
            endings[folder] |= set()  # those that hold folders alone are splits, too
    beside: dict[str, list[str]] = defaultdict(list)
    for folder in endings:
        beside[folder.rpartition("/")[0]].append(folder)
    found = set()
    for folders in beside.values():
        named = [folder for folder in folders if _SPLIT.fullmatch(folder.rpartition("/")[2])]
        others = [folder for folder in folders if not _SPLIT.search(folder.rpartition("/")[2])]
        if len(named) == 1 and any(endings[named[0]] & endings[other] for other in others):
            found.add(named[0])
    return found


def _template(file: str, class_folders: Set[str]) -> tuple[str, str | None]:
    """The path with {split} in place of its folders' parts that name its split, and that split.

    A folder of several splits (VOC2012_train_val), or of another than the folders above, is none.
    """
    *folders, name = file.split("/")
    token, filled = None, []
    for depth, folder in enumerate(folders, start=1):
        found = set() if "/".join(folders[:depth]) in class_folders else set(_SPLIT.findall(folder))
        if len(found) == 1 and (token is None or token in found):
            (token,) = found
            folder = _SPLIT.sub("{split}", folder)
        filled.append(folder)
    return "/".join([*filled, name]), token


def _groups(files: Iterable[str], class_folders: Set[str]) -> list[_Group]:
    by_place: dict[tuple[str, str], list[str]] = defaultdict(list)
    for file in files:
        ending = Path(file).suffix
        if ending.lower() in _MAPS or ending.lower() in _TEXTS:
            by_place[_template(file, class_folders)[0].rpartition("/")[0], ending].append(file)
    groups = []
    for (folder, ending), inside in by_place.items():
        by_suffix: dict[str, list[str]] = defaultdict(list)
        for file in inside:
            match = _SUFFIX.search(without_ending(file).rpartition("/")[2])
            by_suffix[match[0] if match else ""].append(file)
        if len(by_suffix) > 4 or (len(by_suffix) > 1 and min(map(len, by_suffix.values())) < 2):
            by_suffix = {"": inside}
        prefix = f"{folder}/" if folder else ""
        groups += [_Group(prefix, suffix, ending, some) for suffix, some in by_suffix.items()]
    return groups


def _kind(root: Path, group: _Group) -> Kind | None:
    ending = group.ending.lower()
    if ending in _TEXTS:
        return _TEXTS[ending]
    if ending in (".jpg", ".jpeg"):
        return "photo"
    if ending == ".exr":
        return "depth"
    chosen = [root / file for file in group.files[:: max(1, len(group.files) // _SAMPLED)][:_SAMPLED]]
    maps = [values for file in chosen if (values := _stored(file)) is not None]
    if not maps:
        return None
    hint = f"{group.folder}{group.suffix}".lower()
    first = maps[0]
    bands = ending in (".npy", ".tif", ".tiff")  # where a fourth channel is seldom transparency
    if first.ndim == 3 and first.shape[2] not in ((3,) if bands else (3, 4)):
        return "channels"
    if first.ndim == 3:
        few = all(len(np.unique(_codes(one))) <= _MOST_COLORS for one in maps if one.ndim == 3)
        return "colors" if few and ending == ".png" else "photo"
    if "disp" in hint:  # disparity is no depth
        return None
    if first.dtype.kind == "f" or "depth" in hint:
        return "depth"
    counts = [np.unique(one) for one in maps]
    if max(map(len, counts)) > _MAX_GREYS:
        many = first.dtype == np.uint16 and max(map(len, counts)) > _LEAST_DEPTHS
        return "depth" if many else "photo" if first.dtype == np.uint8 else None
    if ending != ".png":
        return "photo"
    if _number_objects(maps, counts) or "inst" in hint:
        return "instances"
    return "classes" if first.dtype == np.uint8 else None


def _number_objects(maps: Sequence[NDArray], values: Sequence[NDArray]) -> bool:
    """Whether maps number the objects of each image: 1 to n, where n differs, each in one piece nearly always."""
    counts, whole = set(), []
    for one, seen in zip(maps, values, strict=True):
        ids = [value for value in seen.tolist() if value not in (0, 255)]
        if ids != list(range(1, len(ids) + 1)) or 0 not in seen:
            return False
        counts.add(len(ids))
        for number in ids:
            mask = (one == number).astype(np.uint8)
            areas = cv2.connectedComponentsWithStats(mask)[2][1:, cv2.CC_STAT_AREA]
            whole.append(areas.max() / areas.sum())
    return len(counts) > 1 and bool(whole) and float(np.mean(whole)) >= 0.8


def _stored(file: Path) -> NDArray | None:
    """The values of a file as its labels would be read; None where it cannot be."""
    ending = file.suffix.lower()
    if ending in (".npy", ".tif", ".tiff"):
        try:
            values = read_channels(file)
            return values[..., 0] if values.shape[2] == 1 else values
        except ValueError:  # also where TIFFs of many bands need a package; OpenCV reads the usual ones
            if ending == ".npy":
                return None
    try:
        return read_png(file, palette_indices=True) if ending == ".png" else read_stored(file)
    except ValueError:
        return None


def _values(file: Path) -> NDArray:
    return read_png(file, palette_indices=True)


def _codes(pixels: NDArray) -> NDArray[np.int32]:
    """[H, W] r * 65536 + g * 256 + b of [H, W, 3 or 4] BGR."""
    wide = pixels.astype(np.int32)
    return (wide[..., 2] << 16) + (wide[..., 1] << 8) + wide[..., 0]


def _is_number(words: Sequence[str]) -> bool:
    try:
        return all(math.isfinite(float(word)) for word in words)
    except ValueError:
        return False


# ---- the config ----


def config_text(layout: Layout) -> str:
    """A config on `configs/folder.yaml`."""
    lines = ["base: folder.yaml"]
    augment = ""
    if layout.channels is not None:
        mean, std = layout.channels
        lines += ["model:", f"  encoder: {_flow({'in_chans': len(mean), 'mean': mean, 'std': std})}"]
        augment = "  augment: {brightness: 0, contrast: 0, saturation: 0, hue_turns: 0}"
    if gone := [f"tasks.{task}" for task in ("detection", "segmentation", "depth") if task not in layout.tasks]:
        lines.append(f"remove: [{', '.join(gone)}]")
    one = {"type": "folder", "root": "${data.root}", **_literal(layout.settings)}
    lines += ["data:", f"  root: {_flow(_literal(str(layout.root.resolve())))}", "  train:"]
    if layout.train is not None:
        lines += ["    - &mine", *_data_block({**one, "split": layout.train}, 6)]
        lines += ["  val:", f"    - {{<<: *mine, split: {_flow(layout.val)}}}"]
    else:
        lines += ["    - type: subset", f"      part: [{_HELD_OUT}, 1.0]", "      of: &mine", *_data_block(one, 8)]
        lines += ["  val:", f"    - {{type: subset, part: [0.0, {_HELD_OUT}], of: *mine}}"]
    lines += [f"  size: {_flow(list(network_size(layout.size)))}", *([augment] if augment else [])]
    tasks: dict[str, Any] = {}
    if layout.depth_m is not None:
        low, high = layout.depth_m
        tasks["depth"] = {"min_depth_m": _rounded(low / 2), "max_depth_m": _rounded(high * 1.25)}
    if "image_class" in layout.tasks:
        tasks["image_class"] = {"type": "classification"}
    if tasks:
        lines += ["tasks:", *_block(tasks, 2)]
    batch = 8 if layout.num_images >= 40 else 2
    steps_per_epoch = max(1, layout.num_train // batch)
    epochs = min(max(round(_STEPS / steps_per_epoch), 8), 200)
    # no longer than an epoch: a trial of train.epochs=1 ends behind it
    lines.append(f"optim: {{warmup_steps: {min(100, steps_per_epoch, max(1, epochs * steps_per_epoch // 10))}}}")
    lines.append(f"train: {{epochs: {epochs}, batch_size: {batch}, eval_every_epochs: {max(1, epochs // 10)}}}")
    return "\n".join(lines) + "\n"


def _literal(value: Any) -> Any:
    """Settings in which `${` of a name is no reference to another setting."""
    if isinstance(value, dict):
        return {key: _literal(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_literal(inner) for inner in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value


def _block(settings: dict[str, Any], indent: int) -> list[str]:
    """A line a setting, inner ones in braces."""
    return [f"{' ' * indent}{key}: {_flow(value)}" for key, value in settings.items()]


def _data_block(settings: dict[str, Any], indent: int) -> list[str]:
    """As `_block`; where a value without a name may be void, also the line that ignores it."""
    lines = _block(settings, indent)
    if void := _without_void(settings.get("segmentation", {})):
        at = [*settings].index("segmentation") + 1
        start = f"{' ' * indent}# "
        lines[at:at] = [f"{start}where {void[0]} is void, in place of the line above:"]
        lines[at + 1 : at + 1] = [f"{start}segmentation: {_flow(void[1])}"]
    return lines


def _without_void(segmentation: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """What may be void, and the settings that ignore it; None where names are known or nothing else is a class."""
    values, colors = segmentation.get("values", {}), segmentation.get("colors", {})
    if values.get(0) == "class_0" and len(values) > 1:
        rest = {value: name for value, name in values.items() if value != 0}
        return "0", {**segmentation, "classes": [*rest.values()], "values": rest, "ignore": [0, 255]}
    if isinstance(colors, dict) and "color_0_0_0" in colors and len(colors) > 1:
        rest = {name: color for name, color in colors.items() if name != "color_0_0_0"}
        return "black", {**segmentation, "colors": rest, "ignore_colors": [[0, 0, 0]]}
    return None


def _flow(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=math.inf)
    return text.removesuffix("...\n").strip()


def network_size(size: tuple[int, int]) -> tuple[int, int]:
    """(H, W) of the network's input for images of a size: their proportions, about 384x512 px, multiples of 32."""
    scale = min(1.0, math.sqrt(_TARGET_PX / (size[0] * size[1])))
    height, width = (max(64, round(side * scale / 32) * 32) for side in size)
    return height, width


def _rounded(value: float) -> float:
    return float(f"{value:.2g}")
