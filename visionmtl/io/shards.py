"""Shards: tar files in WebDataset's naming, each with an index of its samples; written here, and read by index.

    index.json     the label spaces, and of every shard its number of samples, length and SHA-256
    000000.tar     of each sample: KEY.jpg (any image format, as it was, or KEY.image.npy), KEY.json,
                   KEY.segmentation.png, KEY.depth.png with KEY.depth.npy, KEY.normals.npy
    000000.json    of each sample its place in the tar, its CRC-32, and the places of its members

KEY is the sample's number in the data set. KEY.json holds what is no array of pixels: `image_id`, boxes in pixels
[x1, y1, x2, y2] with class numbers, crowds and areas, labels of the whole image, the camera. A label that is not there
was not labelled. Segmentation has class numbers, 255 where nobody labelled. Depth in metres is TABLE[CODE], with the
codes in KEY.depth.png and the table in KEY.depth.npy; with more than 65,536 values it is KEY.depth.npy, [H, W]. All
comes back as it was, bit for bit.
"""

import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from visionmtl.config.text_files import MAX_TEXT_BYTES, check_object, parse_json, read_object
from visionmtl.io.atomic import atomic_write, write_text
from visionmtl.io.depth_maps import decode_array, from_codes, to_codes
from visionmtl.io.download import sha256
from visionmtl.io.images import decode_photo, decode_png
from visionmtl.structures import IGNORE, LABEL_FIELDS, Boxes, LabelSpace, ReadRequest, Sample, at_full_size

INDEX = "index.json"
FORMAT, VERSION = "visionmtl shards", 1
MAX_INDEX_BYTES = MAX_TEXT_BYTES
_KEY_DIGITS = 9
_BLOCK = 512  # bytes of a tar's header; what follows is padded to as many
_END = 2 * _BLOCK  # of zeros
_BOX_TYPES = {"xyxy": np.float32, "labels": np.int64, "crowd": np.bool_, "area": np.float32}
_WITH_CLASSES = ("boxes", "segmentation", "image_labels")
_REWRITE = "write the data set again with `visionmtl prepare shards`"

Members = dict[str, bytes]
"""The files of a sample by what follows KEY and a dot, in the order of the tar."""


@dataclass(frozen=True)
class StoredImage:
    """The bytes of an image, and how they become the pixels of the sample."""

    ending: str  # of an image format; or "image.npy", an array uint8 [H, W, C]
    content: bytes
    upright: bool = False  # see `images.read_photo`
    reduces: bool = True  # whether the source decodes it at a fraction of its size, where that is asked for


# ---- one sample ----


def lossless(image: NDArray[np.uint8]) -> StoredImage:
    """Pixels that no file holds: as PNG, or as an array where they are no RGB."""
    if image.shape[2] == 3:
        return StoredImage("png", _png(np.ascontiguousarray(image[..., ::-1])))
    return StoredImage("image.npy", _npy(image))


def to_members(sample: Sample, image: StoredImage) -> Members:
    """The files of a sample at full size."""
    told: dict[str, Any] = {
        "image_id": sample.image_id,
        "image": {"upright": image.upright, "reduces": image.reduces},
    }
    if sample.boxes is not None:
        told["boxes"] = {name: getattr(sample.boxes, name).tolist() for name in _BOX_TYPES}
    if sample.image_labels is not None:
        told["image_labels"] = sample.image_labels.tolist()
    if sample.disparity_px_metre is not None:
        told["disparity_px_metre"] = float(sample.disparity_px_metre)
    if sample.intrinsics is not None:
        told["intrinsics"] = [float(value) for value in sample.intrinsics]
    members = {image.ending: image.content, "json": json.dumps(told).encode()}
    if sample.segmentation is not None:
        members["segmentation.png"] = _png(sample.segmentation)
    if sample.depth_m is not None:
        coded = to_codes(sample.depth_m)
        if coded is not None:
            members["depth.png"] = _png(coded[0])
        members["depth.npy"] = _npy(sample.depth_m if coded is None else coded[1])
    if sample.normals is not None:
        members["normals.npy"] = _npy(sample.normals)
    return members


def to_sample(
    members: Mapping[str, bytes], request: ReadRequest, provides: Mapping[str, LabelSpace | None], place: str
) -> Sample:
    """Undo `to_members`, as far as is requested. place: names the sample, for messages.

    Raises ValueError for what is damaged, of another shape than the image, or of no class of its label space.
    """
    told = parse_json(members["json"], place)
    check_object(told, place, {"image_id": str, "image.upright": bool, "image.reduces": bool})
    ending = next(iter(members))
    if ending == "image.npy":
        pixels, jpeg_scale = _shaped(decode_array(place, members[ending]), np.uint8, (None, None, None), place), 1
        size = pixels.shape[0], pixels.shape[1]
    else:
        choose_scale = request.choose_scale if told["image"]["reduces"] else at_full_size
        pixels, size, jpeg_scale = decode_photo(place, members[ending], choose_scale, told["image"]["upright"])
    labels: dict[str, Any] = {}
    if "boxes" in told and "boxes" in request.fields:
        labels["boxes"] = _boxes(told["boxes"], place)
        _check_classes(labels["boxes"].labels, provides.get("boxes"), place)
    if "image_labels" in told and "image_labels" in request.fields:
        labels["image_labels"] = _numbers(told["image_labels"], np.int64, (-1,), place)
        _check_classes(labels["image_labels"], provides.get("image_labels"), place)
    if "segmentation.png" in members and "segmentation" in request.fields:
        classes = _shaped(decode_png(place, members["segmentation.png"]), np.uint8, size, place)
        _check_map(classes, provides.get("segmentation"), place)
        labels["segmentation"] = classes
    if "depth.npy" in members and "depth_m" in request.fields:
        labels["depth_m"] = _depth(members, size, place)
    if "normals.npy" in members and "normals" in request.fields:
        labels["normals"] = _shaped(decode_array(place, members["normals.npy"]), np.float32, (*size, 3), place)
    if "intrinsics" in told:
        fx, fy, cx, cy = _numbers(told["intrinsics"], np.float64, (4,), place).tolist()
        labels["intrinsics"] = fx, fy, cx, cy
    if "disparity_px_metre" in told:
        labels["disparity_px_metre"] = float(_numbers(told["disparity_px_metre"], np.float64, (), place))
    return Sample(image=pixels, image_id=told["image_id"], full_size=size, jpeg_scale=jpeg_scale, **labels)


def _depth(members: Mapping[str, bytes], size: tuple[int, int], place: str) -> NDArray[np.float32]:
    values = decode_array(place, members["depth.npy"])
    if "depth.png" not in members:
        return _shaped(values, np.float32, size, place)
    table = _shaped(values, np.float32, (None,), place)
    codes = decode_png(place, members["depth.png"])
    codes = _shaped(codes, np.uint8 if codes.dtype == np.uint8 else np.uint16, size, place)
    # OpenCV takes no table of another length, and numpy no code beyond it
    if len(table) != 256 if codes.dtype == np.uint8 else int(codes.max()) >= len(table):
        raise _wrong(place, f"a depth code of {int(codes.max())} for a table of {len(table)} values")
    return from_codes(codes, table)


def _boxes(told: Any, place: str) -> Boxes:
    if not isinstance(told, dict) or told.keys() != _BOX_TYPES.keys():
        raise _wrong(place, "boxes without their four lists")
    count = len(told["labels"]) if isinstance(told["labels"], list) else 0
    shapes = {name: (count, 4) if name == "xyxy" else (count,) for name in _BOX_TYPES}
    return Boxes(**{name: _numbers(told[name], dtype, shapes[name], place) for name, dtype in _BOX_TYPES.items()})


def _numbers(value: Any, dtype: type, shape: tuple[int, ...], place: str) -> NDArray[Any]:
    """An array of a shape, of a list in JSON; -1 is any length."""
    try:
        array: NDArray[Any] = np.array(value, dtype)
        return array.reshape(shape)
    except (ValueError, TypeError, OverflowError) as error:
        raise _wrong(place, f"numbers of another kind: {error}") from error


def _shaped(array: NDArray, dtype: type, shape: tuple[int | None, ...], place: str) -> NDArray[Any]:
    """The array, once it is known to have this type and shape; None is any length."""
    fits = len(array.shape) == len(shape) and all(b in (None, a) for a, b in zip(array.shape, shape, strict=True))
    if array.dtype != dtype or not fits:
        raise _wrong(place, f"an array {array.dtype} {list(array.shape)} where {np.dtype(dtype)} {list(shape)} belongs")
    return array


def _check_classes(labels: NDArray[np.int64], space: LabelSpace | None, place: str) -> None:
    if space is None:
        raise _wrong(place, f"class numbers where {INDEX} provides no classes")
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(space.classes):
        raise _wrong(place, f"the class number {labels.max()} of {space.name}, which has {len(space.classes)} classes")


def _check_map(classes: NDArray[np.uint8], space: LabelSpace | None, place: str) -> None:
    if space is None:
        raise _wrong(place, f"class numbers where {INDEX} provides no classes")
    num_classes = np.uint8(len(space.classes))
    if (classes - num_classes).min(initial=255) < IGNORE - num_classes:  # below num_classes the difference wraps round
        odd = classes[(classes >= num_classes) & (classes != IGNORE)][0]
        raise _wrong(place, f"the class number {odd} of {space.name}, which has {num_classes} classes")


def _wrong(place: str, found: str) -> ValueError:
    return ValueError(f"{place} holds {found}; a sample as visionmtl writes it is needed; {_REWRITE}")


def _png(values: NDArray) -> bytes:
    written, content = cv2.imencode(".png", values, [cv2.IMWRITE_PNG_COMPRESSION, 6])
    assert written
    return content.tobytes()


def _npy(array: NDArray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.ascontiguousarray(array), allow_pickle=False)
    return stream.getvalue()


# ---- shards and their index ----


@dataclass(frozen=True)
class FileEntry:
    """Length and SHA-256 of a file."""

    num_bytes: int
    sha256: str

    @staticmethod
    def of(file: Path) -> "FileEntry":
        """Of a file on disk."""
        return FileEntry(file.stat().st_size, sha256(file))

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"bytes": self.num_bytes, "sha256": self.sha256}

    @staticmethod
    def from_plain(plain: Any, where: str) -> "FileEntry":
        """Undo `plain`. Raises ValueError."""
        check_object(plain, where, {"bytes": int, "sha256": str})
        if plain["bytes"] < 0 or len(plain["sha256"]) != 64 or set(plain["sha256"]) - set("0123456789abcdef"):
            raise ValueError(f"{where} has no length and SHA-256 of a file; both are needed; {_REWRITE}")
        return FileEntry(plain["bytes"], plain["sha256"])


@dataclass(frozen=True)
class ShardEntry:
    """What the index knows of a shard."""

    num_samples: int
    tar: FileEntry
    index: FileEntry


@dataclass(frozen=True)
class ShardIndex:
    """What `index.json` holds."""

    provides: dict[str, LabelSpace | None]
    channels: int
    most_boxes: int | None
    notes: tuple[str, ...]
    shards: tuple[ShardEntry, ...]
    made_of: str
    """A digest of the settings that the shards were made from."""


def shard_name(number: int) -> str:
    """Of a shard's files, without ending."""
    return f"{number:06d}"


def key(number: int) -> str:
    """Of a sample."""
    return f"{number:0{_KEY_DIGITS}d}"


def write_index(folder: Path, index: ShardIndex) -> None:
    """Write `index.json`, which makes a data set of the shards in a folder."""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "made_of": index.made_of,
        "provides": {field: space and space.plain() for field, space in index.provides.items()},
        "channels": index.channels,
        "most_boxes": index.most_boxes,
        "notes": list(index.notes),
        "shards": [
            {"samples": entry.num_samples, "tar": entry.tar.plain(), "index": entry.index.plain()}
            for entry in index.shards
        ],
    }
    write_text(folder / INDEX, json.dumps(content, indent=1) + "\n")


def read_index(file: Path, place: str | None = None) -> ShardIndex:
    """What `write_index` wrote. place: see `read_object`. Raises ValueError naming file, or place, and field."""
    nothing, place = type(None), place or str(file)
    content = read_object(
        file,
        {"format": str, "version": int, "made_of": str, "provides": dict, "channels": int,
         "most_boxes": (int, nothing), "notes": list, "shards": list},
        place,
    )  # fmt: skip
    if (content["format"], content["version"]) != (FORMAT, VERSION):
        raise ValueError(
            f"{place} is of format {content['format']!r}, version {content['version']}; {FORMAT!r}, version {VERSION} "
            f"is read; {_REWRITE}"
        )
    provides: dict[str, LabelSpace | None] = {}
    for field, plain in content["provides"].items():
        if field not in LABEL_FIELDS or (plain is None) == (field in _WITH_CLASSES):
            raise ValueError(
                f"{place}: provides.{field} is no label of samples, or has not the classes it needs; allowed are "
                f"{', '.join(LABEL_FIELDS)}; {_REWRITE}"
            )
        provides[field] = None if plain is None else _space(plain, f"{place}: provides.{field}")
    shards = []
    for number, entry in enumerate(content["shards"]):
        where = f"{place}: shards[{number}]"
        check_object(entry, where, {"samples": int, "tar": dict, "index": dict})
        parts = [FileEntry.from_plain(entry[name], f"{where}.{name}") for name in ("tar", "index")]
        most = parts[0].num_bytes // _BLOCK
        if not 1 <= entry["samples"] <= most:
            raise ValueError(
                f"{where} has {entry['samples']} samples; 1 to {most} are possible in so many bytes; {_REWRITE}"
            )
        shards.append(ShardEntry(entry["samples"], *parts))
    if not shards:
        raise ValueError(f"{place} lists no shard; one or more are needed; {_REWRITE}")
    if not 1 <= content["channels"] <= 64:
        raise ValueError(f"{place}: channels is {content['channels']}; 1 to 64 are allowed; {_REWRITE}")
    notes = tuple(str(note) for note in content["notes"])
    return ShardIndex(
        provides, content["channels"], content["most_boxes"], notes, tuple(shards), content["made_of"]
    )  # fmt: skip


def _space(plain: Any, where: str) -> LabelSpace:
    check_object(plain, where, {"name": str, "classes": list, "colours": list, "ids": list})
    rgb = all(
        isinstance(colour, list) and len(colour) == 3 and all(type(x) is int and 0 <= x <= 255 for x in colour)
        for colour in plain["colours"]
    )
    named = all(isinstance(name, str) for name in plain["classes"]) and all(type(x) is int for x in plain["ids"])
    if not rgb or not named:
        raise ValueError(
            f"{where} has classes, colours or ids of the wrong kind; names, [r, g, b] and ids are needed; {_REWRITE}"
        )
    try:
        return LabelSpace.from_plain(plain)
    except ValueError as error:
        raise ValueError(f"{where}: {str(error).rpartition(';')[0]}; {_REWRITE}") from error


@dataclass(frozen=True)
class Place:
    """Where a sample lies in its tar."""

    start: int
    length: int
    crc32: int
    members: tuple[tuple[str, int, int], ...]
    """Of each file: what follows KEY and a dot, where it begins, counted from `start`, and its length."""


@dataclass(frozen=True)
class ShardPlaces:
    """What the index of one shard holds."""

    first: int
    """The number of its first sample."""
    most_boxes: int
    made_of: str
    samples: tuple[Place, ...]


def write_shard(
    folder: Path, number: int, first: int, samples: Sequence[Members], most_boxes: int, made_of: str
) -> ShardEntry:
    """Write one shard after its index, so that a shard is whole, and one without an index is not ours."""
    tar, index = (folder / f"{shard_name(number)}.{ending}" for ending in ("tar", "json"))
    places, at = [], 0
    with atomic_write(tar) as file:
        for position, members in enumerate(samples):
            block, at_member, listed = [], 0, []
            for ending, content in members.items():
                entry = tarfile.TarInfo(f"{key(first + position)}.{ending}")
                entry.size = len(content)  # everything else is constant, so that the same samples give the same bytes
                header = entry.tobuf(tarfile.USTAR_FORMAT)
                listed.append([ending, at_member + len(header), len(content)])
                block += [header, content, bytes(-len(content) % _BLOCK)]
                at_member += len(header) + len(content) + -len(content) % _BLOCK
            content = b"".join(block)
            file.write(content)
            places.append([at, len(content), zlib.crc32(content), listed])
            at += len(content)
        file.write(bytes(_END))
        told = {"first": first, "most_boxes": most_boxes, "made_of": made_of, "samples": places}
        write_text(index, json.dumps(told) + "\n")
    return ShardEntry(len(places), FileEntry.of(tar), FileEntry.of(index))


def read_places(file: Path, tar_bytes: int, place: str | None = None) -> ShardPlaces:
    """The index of one shard.

    tar_bytes: the length of its tar, within which all places lie; place: see `read_object`
    Raises ValueError.
    """
    place = place or str(file)
    content = read_object(file, {"first": int, "most_boxes": int, "made_of": str, "samples": list}, place)
    return ShardPlaces(
        content["first"],
        content["most_boxes"],
        content["made_of"],
        tuple(_place(sample, tar_bytes, f"{place}: samples[{i}]") for i, sample in enumerate(content["samples"])),
    )


def _place(plain: Any, tar_bytes: int, where: str) -> Place:
    try:
        start, length, crc32, listed = plain
        members = tuple((ending, begin, size) for ending, begin, size in listed)
    except (ValueError, TypeError):
        start, length, crc32, members = -1, 0, 0, ()
    numbers = [start, length, crc32, *(number for _, *both in members for number in both)]
    whole = all(type(number) is int and number >= 0 for number in numbers) and len(members) >= 2
    endings = [ending for ending, _, _ in members]
    if (
        not whole
        or start + length > tar_bytes
        or any(begin + size > length for _, begin, size in members)
        or not all(isinstance(ending, str) for ending in endings)
        or "json" not in endings[1:]
        or len(set(endings)) < len(endings)
    ):
        raise ValueError(f"{where} is no place within its shard; an image and a json are needed there; {_REWRITE}")
    return Place(start, length, crc32, members)


def read_members(tar: Path, place: Place) -> Members | None:
    """The files of a sample; None where the bytes are not those that were written. Raises OSError."""
    with tar.open("rb") as file:
        file.seek(place.start)
        content = file.read(place.length)
    if len(content) != place.length or zlib.crc32(content) != place.crc32:
        return None
    return {ending: content[begin : begin + size] for ending, begin, size in place.members}


def read_whole(tar: Path) -> ShardPlaces | None:
    """The index of a shard in a folder; None where it is damaged or the bytes of the tar are not those written.

    Raises OSError.
    """
    try:
        places = read_places(tar.with_suffix(".json"), tar.stat().st_size)
    except ValueError:
        return None
    with tar.open("rb") as file:
        for place in places.samples:
            if file.tell() != place.start or zlib.crc32(file.read(place.length)) != place.crc32:
                return None
        return places if places.samples and file.read(_END + 1) == bytes(_END) else None


def digest(settings: Iterable[Any]) -> str:
    """Of what shards are made from, to find out whether some were made from the same."""
    text = json.dumps([VERSION, *settings], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
