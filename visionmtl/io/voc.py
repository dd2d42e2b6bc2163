"""Pascal VOC's annotation files: XML with the objects of one image."""

import math
from collections.abc import Iterable
from pathlib import Path
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from visionmtl.config.text_files import read_bytes
from visionmtl.io.objects import ImageObjects, LabelledObject, bad_entry
from visionmtl.io.paths import composed
from visionmtl.structures import has_controls

_DIFFICULT = "objects are `difficult`: neither hit nor miss, as in VOC's own evaluation"
_NO_SIZE = "files do not give the size of their image (it is not compared)"
_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_FLAGS = {"": False, "0": False, "false": False, "unspecified": False, "1": True, "true": True}

_MAX_BYTES = 64_000_000


class _DocumentTypeError(ValueError):
    """A file declares a document type."""


def read_objects(file: Path, first_pixel: int) -> ImageObjects:
    """The objects of one file (Everingham et al., "The PASCAL VOC Challenge", IJCV 2010, development kit, section 8).

    first_pixel: the number of the first column and row. In the standard they are counted from 1 and the last pixel is
    named, so that x1 = xmin - 1 and x2 = xmax; with 0, corners are taken as they are.
    """
    root = parse(file)
    if root.tag != "annotation":
        raise bad_entry(
            file, "its root", root.tag, "Pascal VOC's is `annotation`", "name the folder of the annotations"
        )
    size = root.find("size")
    sides = [size.findtext(side) if size is not None else None for side in ("height", "width")]
    height, width = (0 if side in (None, "", "0") else _number(file, "size", side) for side in sides)
    if height % 1 or width % 1 or min(height, width) < 0:
        raise bad_entry(file, "size", f"{height:g}x{width:g}", "height and width are whole pixels")
    objects = []
    for number, entry in enumerate(root.findall("object")):
        place = f"object[{number}]"
        name, box = composed((entry.findtext("name") or "").strip()), entry.find("bndbox")
        if not name or has_controls(name):
            found = f"named {name!r}" if name else "without name"
            raise bad_entry(
                file, place, found, "each object has the name of its class, without control characters", "correct it"
            )
        if box is None:
            raise bad_entry(file, place, "without bndbox", "each object has a box", "add it, or remove the object")
        x1, y1, x2, y2 = (_number(file, f"{place}.{key}", box.findtext(key)) for key in _CORNERS)
        difficult = _FLAGS.get(flag := (entry.findtext("difficult") or "0").strip().lower())
        if difficult is None:
            raise bad_entry(file, f"{place}.difficult", flag, "0 or 1 is needed")
        objects.append(LabelledObject(name, (x1 - first_pixel, y1 - first_pixel, x2, y2), crowd=difficult))
    counts = {_DIFFICULT: sum(one.crowd for one in objects), _NO_SIZE: int(not height or not width)}
    known = (int(height), int(width)) if height and width else (0, 0)
    return ImageObjects(known, objects, {what: count for what, count in counts.items() if count})


def counts_from(files: Iterable[Path]) -> int:
    """0 where some box of these files begins before column or row 1, which the standard's first is; else 1.

    Files that cannot be read are passed over: `read_objects` tells of them.
    """
    for file in files:
        try:
            boxes = parse(file).findall("object/bndbox")  # a part of an object has one, too, which is not read
            if any(_number(file, key, box.findtext(key, "1")) < 1 for box in boxes for key in ("xmin", "ymin")):
                return 0
        except ValueError:
            continue
    return 1


def parse(file: Path) -> Element:
    """The root of an XML file. Document types are refused before anything is expanded, so no entity can be declared."""
    builder = TreeBuilder()
    parser = expat.ParserCreate()
    parser.buffer_text = True

    def refuse(name: str, *_: object) -> None:
        raise _DocumentTypeError(
            f"{file} declares a document type ({name}), which can hold entities; plain XML is read; remove <!DOCTYPE "
            "...>"
        )

    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    content = read_bytes(file, _MAX_BYTES, "an annotation of Pascal VOC")
    try:
        parser.Parse(content, True)
    except _DocumentTypeError:
        raise
    # LookupError, ValueError: of an encoding that Python does not know, or that takes several bytes a sign
    except (expat.ExpatError, LookupError, ValueError) as error:
        raise ValueError(
            f"{file} is no complete XML: {error}; an annotation of Pascal VOC is needed; write or fetch it again"
        ) from error
    return builder.close()


def _number(file: Path, place: str, text: str | None) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise bad_entry(file, place, text or "missing", "a number of pixels is needed")
    return value
