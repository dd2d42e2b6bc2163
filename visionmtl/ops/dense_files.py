"""Dense predictions as PNG values, coded and decoded: class ids, depth and normals."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visionmtl.structures import IGNORE, LabelSpace

_Code = Callable[[NDArray[Any], LabelSpace | None, float], NDArray[Any]]
_Decode = Callable[[Path, NDArray[Any], LabelSpace | None, float], NDArray[Any]]

_NORMALS_RANGE = 65535


def _code_classes(classes: NDArray[Any], space: LabelSpace | None, units: float) -> NDArray[Any]:
    return _official_ids(space)[classes]


def _decode_classes(file: Path, values: NDArray[Any], space: LabelSpace | None, units: float) -> NDArray[Any]:
    _check(file, values, np.uint8, channels=1)
    assert space is not None
    table = np.full(256, IGNORE, np.uint8)
    table[_official_ids(space)[: len(space.classes)]] = np.arange(len(space.classes))
    return table[values]


def _official_ids(space: LabelSpace | None) -> NDArray[np.uint8]:
    """uint8 [256]: value in the file by class id; no class is 0 in official files, and IGNORE where ids are our own."""
    assert space is not None
    table = np.full(256, 0 if space.ids else IGNORE, np.uint8)
    table[: len(space.classes)] = space.ids or range(len(space.classes))
    return table


def _code_depth(depth_m: NDArray[Any], space: LabelSpace | None, units: float) -> NDArray[Any]:
    # 0 means "no prediction": what is nearer than a step becomes the first step
    return np.clip(np.rint(depth_m.astype(np.float64) * units), 1, 65535).astype(np.uint16)


def _decode_depth(file: Path, values: NDArray[Any], space: LabelSpace | None, units: float) -> NDArray[Any]:
    _check(file, values, np.uint16, channels=1)
    return (values / np.float64(units)).astype(np.float32)


def _code_normals(normals: NDArray[Any], space: LabelSpace | None, units: float) -> NDArray[Any]:
    codes = np.rint((normals.astype(np.float64).clip(-1, 1) + 1) / 2 * _NORMALS_RANGE).astype(np.uint16)
    return np.ascontiguousarray(codes[..., ::-1])  # OpenCV writes BGR


def _decode_normals(file: Path, values: NDArray[Any], space: LabelSpace | None, units: float) -> NDArray[Any]:
    _check(file, values, np.uint16, channels=3)
    return (values[..., ::-1] / _NORMALS_RANGE * 2 - 1).astype(np.float32)


def _check(file: Path, values: NDArray[Any], dtype: type, channels: int) -> None:
    found = 1 if values.ndim == 2 else values.shape[2]
    if values.dtype != dtype or found != channels:
        bits = np.dtype(dtype).itemsize * 8
        raise ValueError(
            f"{file} has {found} channel(s) of {values.dtype.itemsize * 8} bits; {channels} of {bits} bits are needed "
            "here; convert it"
        )


CODES: dict[str, tuple[_Code, _Decode]] = {
    "segmentation": (_code_classes, _decode_classes),
    "depth_m": (_code_depth, _decode_depth),
    "normals": (_code_normals, _decode_normals),
}
"""By field of `Sample`: code(prediction, space, units per metre) -> values as OpenCV writes them, and the way back
from values as OpenCV reads them (the file is for errors)."""
