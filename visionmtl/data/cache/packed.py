"""Samples as plain bytes in one file that is mapped into memory, each with a checksum; nothing is decoded on reading.

    FOLDER/samples.bin    one block a sample: a JSON header with the types and shapes of its arrays, then the arrays
    FOLDER/index/*.npy    where each block ends, its checksum, and sizes; written last, so a folder with them is whole

Everything comes back as it was, bit for bit. Depth of at most 65,536 different values, which measured depth has, is
stored as codes of 8 or 16 bits with a table of the values.
"""

import json
import zlib
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visionmtl.io.depth_maps import from_codes, to_codes
from visionmtl.io.index import CacheError, open_arrays, save_arrays
from visionmtl.structures import LABEL_FIELDS, Boxes, Sample

_DTYPES = ("uint8", "uint16", "float32", "float64", "int64", "bool")
_ARRAYS = ("segmentation", "depth_m", "normals", "image_labels")  # fields of a sample that are one array
_BOXES = ("xyxy", "labels", "crowd", "area")
_ALIGN = 64  # bytes; an array that starts elsewhere is slower to read
_SAMPLES = "samples.bin"

Parts = dict[str, NDArray]
"""One sample as named arrays."""


def to_parts(sample: Sample, fields: Collection[str] = LABEL_FIELDS) -> Parts:
    """The arrays of the sample, with these of its labels."""
    parts: Parts = {"image_id": np.frombuffer(sample.image_id.encode(), np.uint8), "image": sample.image}
    for name in _ARRAYS:
        if name in fields and getattr(sample, name) is not None:
            parts[name] = getattr(sample, name)
    if "boxes" in fields and sample.boxes is not None:
        parts |= {name: getattr(sample.boxes, name) for name in _BOXES}
    if sample.intrinsics is not None:
        parts["intrinsics"] = np.array(sample.intrinsics, np.float64)
    if sample.disparity_px_metre is not None:
        parts["disparity_px_metre"] = np.array([sample.disparity_px_metre], np.float64)
    for name, array in parts.items():
        if array.dtype.name not in _DTYPES:
            raise ValueError(
                f"sample {sample.image_id} has {array.dtype} as {name}, which cannot be packed; allowed are "
                f"{', '.join(_DTYPES)}; give the reader's arrays the types that `structures.Sample` names"
            )
    if "depth_m" in parts:
        coded = to_codes(parts["depth_m"])
        if coded is not None:
            parts["depth_m"], parts["depth_table"] = coded
    return parts


def to_block(parts: Parts) -> bytes:
    """The bytes of one sample in the file."""
    header = json.dumps({name: [array.dtype.name, array.shape] for name, array in parts.items()}).encode()
    pieces = [len(header).to_bytes(8, "little") + header, *(array.tobytes() for array in parts.values())]
    return b"".join(piece.ljust(_padded(len(piece)), b"\0") for piece in pieces)


def _to_arrays(block: NDArray[np.uint8]) -> Parts:
    """The arrays of one sample, as views."""
    length = int.from_bytes(block[:8].tobytes(), "little")
    parts, start = {}, _padded(8 + length)
    for name, (dtype, shape) in json.loads(block[8 : 8 + length].tobytes()).items():
        num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        parts[name] = block[start : start + num_bytes].view(dtype).reshape(shape)
        start += _padded(num_bytes)
    return parts


def _padded(length: int) -> int:
    return -(-length // _ALIGN) * _ALIGN


def pack(folder: Path, samples: Iterable[tuple[Parts, tuple[int, int], int]], extra: dict[str, NDArray]) -> None:
    """Write every sample, given as (parts, full size, divisor of the image), into a new folder.

    extra: arrays to keep beside them, see `SampleStore.extra`
    """
    ends, checksums, sizes = [], [], []
    with (folder / _SAMPLES).open("wb") as file:
        for parts, full_size, jpeg_scale in samples:
            block = to_block(parts)
            file.write(block)
            ends.append(file.tell())
            checksums.append(zlib.crc32(block))
            sizes.append((*full_size, jpeg_scale))
    index = {"ends": np.array(ends), "checksums": np.array(checksums, np.uint32), "sizes": np.array(sizes, np.int32)}
    save_arrays(folder / "index", index | {f"extra_{name}": array for name, array in extra.items()})


class SampleStore:
    """A folder that `pack` has written. Cheap to send to other processes: they map the same pages."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._index = open_arrays(folder / "index")
        file, size = folder / _SAMPLES, int(self._index["ends"][-1])
        if not file.is_file() or file.stat().st_size != size:
            raise CacheError(
                f"{file} is missing or has another size than the {size} bytes its index tells; it must be as it was "
                f"written; delete {folder} and start again"
            )
        self._bytes: NDArray[np.uint8] = np.asarray(np.memmap(file, np.uint8, mode="r"))
        self._checked = np.zeros(len(self), np.bool_)

    def __reduce__(self) -> tuple[Any, ...]:
        return (SampleStore, (self.folder,))

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
        """Of the sample's block, as it was written."""
        return int(self._index["checksums"][index])

    def read(self, index: int, fields: frozenset[str]) -> Sample:
        """The sample with these of its labels; arrays are read-only. A process checks each sample once.

        Raises CacheError when the bytes are not those that were written.
        """
        start, end = int(self._index["ends"][index - 1]) if index else 0, int(self._index["ends"][index])
        block = self._bytes[start:end]
        if not self._checked[index]:
            if zlib.crc32(block.data) != self.checksum(index):
                raise CacheError(
                    f"{self.folder / _SAMPLES} is damaged: sample {index} (bytes {start} to {end}) has another "
                    f"checksum than when it was written; every byte must be as written; delete {self.folder} and "
                    "start again"
                )
            self._checked[index] = True
        return self.sample(index, block, fields)

    def sample(self, index: int, block: NDArray[np.uint8], fields: frozenset[str]) -> Sample:
        """Sample `index`, whose bytes these are, with these of its labels."""
        parts = _to_arrays(block)
        labels: dict[str, Any] = {name: parts[name] for name in _ARRAYS if name in fields & set(parts)}
        if "depth_m" in labels and "depth_table" in parts:
            labels["depth_m"] = from_codes(labels["depth_m"], parts["depth_table"])
        height, width, jpeg_scale = self.sizes[index].tolist()
        return Sample(
            image=parts["image"],
            image_id=parts["image_id"].tobytes().decode(),
            boxes=Boxes(*(parts[name] for name in _BOXES)) if "boxes" in fields and "xyxy" in parts else None,
            disparity_px_metre=float(parts["disparity_px_metre"][0]) if "disparity_px_metre" in parts else None,
            intrinsics=tuple(parts["intrinsics"].tolist()) if "intrinsics" in parts else None,
            full_size=(height, width),
            jpeg_scale=jpeg_scale,
            **labels,
        )
