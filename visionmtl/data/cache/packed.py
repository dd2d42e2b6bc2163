"""Samples as plain bytes in one file that is mapped into memory, each with a checksum; nothing is decoded on reading.

    FOLDER/samples.bin    the arrays of one sample after the other
    FOLDER/*.npy          where they lie: what `_Index` names; written last, so a folder that has them is whole

Everything comes back as it was, bit for bit. Depth of at most 65,536 different values, which measured depth has, is
stored as codes of 8 or 16 bits with a table of the values.
"""

import zlib
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from visionmtl.io.index import open_arrays, save_arrays
from visionmtl.structures import LABEL_FIELDS, Boxes, Sample

_PARTS = ("image_id", "image", "segmentation", "depth_table", "depth_m", "normals", "xyxy", "labels", "crowd", "area")
_DTYPES = tuple(np.dtype(name) for name in ("uint8", "uint16", "float32", "int64", "bool"))
_ALIGN = 64  # bytes; an array that starts elsewhere is slower to read
_SAMPLES = "samples.bin"

Parts = dict[str, NDArray]
"""One sample as named arrays."""


def to_parts(sample: Sample, fields: Collection[str] = LABEL_FIELDS) -> Parts:
    """The arrays that `Packed` gives back as this sample with these of its labels."""
    parts: Parts = {"image_id": np.frombuffer(sample.image_id.encode(), np.uint8), "image": sample.image}
    for name in ("segmentation", "depth_m", "normals"):
        if name in fields and getattr(sample, name) is not None:
            parts[name] = getattr(sample, name)
    if "depth_m" in parts:
        bits, codes = np.unique(parts["depth_m"].view(np.uint32), return_inverse=True)
        if len(bits) <= 65_536:
            small = len(bits) <= 256
            values = np.zeros(256 if small else len(bits), np.uint32)  # cv2.LUT takes 256
            values[: len(bits)] = bits
            parts["depth_table"] = values.view(np.float32)
            parts["depth_m"] = codes.reshape(parts["depth_m"].shape).astype(np.uint8 if small else np.uint16)
    if "boxes" in fields and sample.boxes is not None:
        parts |= {name: getattr(sample.boxes, name) for name in ("xyxy", "labels", "crowd", "area")}
    if strange := [name for name, array in parts.items() if array.dtype not in _DTYPES]:
        raise ValueError(
            f"sample {sample.image_id} has {parts[strange[0]].dtype} as {strange[0]}, which cannot be packed; allowed "
            f"are {', '.join(map(str, _DTYPES))}; give the reader's arrays the types that `types.Sample` names"
        )
    return parts


def checksum(parts: Parts) -> int:
    """What `Packed.checksum` gives of the sample."""
    value = 0
    for name in _PARTS:
        if name in parts:
            value = zlib.crc32(_content(parts[name]), value)
    return value


def num_bytes(parts: Parts) -> int:
    """What a sample takes in the file."""
    return sum(_padded(array.nbytes) for array in parts.values())


def pack(folder: Path, samples: Iterable[tuple[Parts, tuple[int, int], int]], extra: dict[str, NDArray]) -> None:
    """Write every sample, given as (parts, full size, divisor of the image), into a new folder.

    extra: arrays to keep beside them, see `Packed.extra`
    """
    rows: list[tuple[Any, ...]] = []
    with (folder / _SAMPLES).open("wb") as file:
        for parts, full_size, jpeg_scale in samples:
            offsets, shapes, dtypes = np.full(len(_PARTS), -1), np.zeros((len(_PARTS), 3), int), np.zeros(len(_PARTS))
            for place, name in enumerate(_PARTS):
                if name not in parts:
                    continue
                array = parts[name]
                offsets[place], dtypes[place] = file.tell(), _DTYPES.index(array.dtype)
                shapes[place, : array.ndim] = array.shape
                file.write(_content(array))
            rows.append((offsets, shapes, dtypes, checksum(parts), (*full_size, jpeg_scale), file.tell()))
    columns = (
        *(("offsets", np.int64), ("shapes", np.int32), ("dtypes", np.uint8)),
        *(("checksums", np.uint32), ("sizes", np.int32), ("ends", np.int64)),
    )
    values = zip(*rows, strict=True)
    stacked = {name: np.array(column, kind) for (name, kind), column in zip(columns, values, strict=True)}
    save_arrays(folder / "index", {**stacked, **{f"extra_{name}": array for name, array in extra.items()}})


class Packed:
    """A folder that `pack` has written. Cheap to send to other processes: they map the same pages."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._index = open_arrays(folder / "index")
        file, size = folder / _SAMPLES, int(self._index["ends"][-1])
        if not file.is_file() or file.stat().st_size != size:
            raise ValueError(
                f"{file} is missing or has another size than the {size} bytes its index tells; it must be as it was "
                f"written; delete {folder} and start again"
            )
        self._bytes: NDArray[np.uint8] = np.asarray(np.memmap(file, np.uint8, mode="r"))
        self._checked = np.zeros(len(self), np.bool_)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Packed, (self.folder,))

    def __len__(self) -> int:
        return len(self._index["ends"])

    @property
    def extra(self) -> dict[str, NDArray]:
        """The arrays that were kept beside the samples."""
        return {name.removeprefix("extra_"): self._index[name] for name in self._index if name.startswith("extra_")}

    @property
    def sizes(self) -> NDArray[np.int32]:
        """[N, 3] full height and width of each image, and the divisor by which it was reduced."""
        return self._index["sizes"]

    def checksum(self, index: int) -> int:
        """Of the sample, as it was written."""
        return int(self._index["checksums"][index])

    def check(self, index: int) -> None:
        """Raises ValueError when the bytes of a sample are not those that were written."""
        start, end = int(self._index["ends"][index - 1]) if index else 0, int(self._index["ends"][index])
        if zlib.crc32(self._bytes[start:end].data) != self.checksum(index):
            raise ValueError(
                f"{self.folder / _SAMPLES} is damaged: sample {index} (bytes {start} to {end}) has another checksum "
                f"than when it was written; every byte must be as written; delete {self.folder} and start again"
            )
        self._checked[index] = True

    def read(self, index: int, fields: frozenset[str]) -> Sample:
        """The sample with these of its labels; arrays are read-only. A process checks each sample once."""
        if not self._checked[index]:
            self.check(index)
        wanted = {"image_id", "image", *fields, *(("depth_table",) if "depth_m" in fields else ())}
        if "boxes" in fields:
            wanted |= {"xyxy", "labels", "crowd", "area"}
        parts = dict(self._parts(index, wanted))
        height, width, jpeg_scale = self.sizes[index].tolist()
        depth = parts.get("depth_m")
        if "depth_table" in parts and depth is not None:
            table = parts["depth_table"]
            depth = cv2.LUT(depth, table) if depth.dtype == np.uint8 else table[depth]
        return Sample(
            image=parts["image"],
            image_id=parts["image_id"].tobytes().decode(),
            boxes=Boxes(parts["xyxy"], parts["labels"], parts["crowd"], parts["area"]) if "xyxy" in parts else None,
            segmentation=parts.get("segmentation"),
            depth_m=depth,
            normals=parts.get("normals"),
            full_size=(height, width),
            jpeg_scale=jpeg_scale,
        )

    def _parts(self, index: int, wanted: set[str]) -> Iterator[tuple[str, NDArray]]:
        offsets, shapes = self._index["offsets"][index].tolist(), self._index["shapes"][index].tolist()
        dtypes = self._index["dtypes"][index].tolist()
        for place, name in enumerate(_PARTS):
            if name in wanted and offsets[place] >= 0:
                dtype, shape = _DTYPES[dtypes[place]], shapes[place][: _NDIM.get(name, 1)]
                start, length = offsets[place], int(np.prod(shape)) * dtype.itemsize
                yield name, self._bytes[start : start + length].view(dtype).reshape(shape)


_NDIM = {"image": 3, "segmentation": 2, "depth_m": 2, "normals": 3, "xyxy": 2}


def _content(array: NDArray) -> bytes:
    return array.tobytes().ljust(_padded(array.nbytes), b"\0")


def _padded(length: int) -> int:
    return -(-length // _ALIGN) * _ALIGN
