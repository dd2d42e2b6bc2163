"""The numbers of MATLAB 5 files. Every length is checked, and a compressed variable has a checksum that must be right.

scipy's reader ends the whole process on some damaged files (SIGSEGV in 78 of 3,000), so it cannot be used in a
training. Format: MathWorks, "MAT-File Format", section 1. Files of MATLAB 7.3 are HDF5, and others' to read.
"""

import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from visionmtl.io.paths import regular_file

Variable = NDArray | dict[str, NDArray]

_STORED = {
    1: "i1",
    2: "u1",
    3: "i2",
    4: "u2",
    5: "i4",
    6: "u4",
    7: "f4",
    9: "f8",
    12: "i8",
    13: "u8",
    16: "u1",
}  # data types
_CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8"}
_STRUCT = 2  # another class of array
_MATRIX, _COMPRESSED = 14, 15  # data types
_COMPLEX = 0x800
_HEADER = 128
_MAX_BYTES = 2**26  # of a variable; those of NYUv2 have 50 kB


def read_numbers(file: Path) -> dict[str, Variable]:
    """By name the arrays of numbers, of their shape, and the structs of such arrays; what is neither is left out.

    Raises ValueError naming a file that is missing, damaged, or of another format.
    """
    try:
        if regular_file(file).stat().st_size > _MAX_BYTES:
            raise EOFError(f"it has more than {_MAX_BYTES >> 20} MB")
        content = file.read_bytes()
        order = {b"IM": "<", b"MI": ">"}.get(content[126:_HEADER], "")
        if not order or struct.unpack(f"{order}H", content[124:126])[0] != 0x0100:
            raise EOFError("it does not begin as one")
        variables = {}
        for kind, data in _elements(content[_HEADER:], order):
            if kind == _COMPRESSED:
                kind, data = next(_elements(_inflated(data), order), (0, b""))
            if kind != _MATRIX:
                raise EOFError(f"it has an element of type {kind} where a variable is expected")
            name, value = _variable(data, order)
            if value is not None:
                variables[name] = value
        return variables
    except (OSError, EOFError, UnicodeDecodeError, struct.error, zlib.error) as error:
        raise ValueError(f"{file} cannot be read: {error}; a complete MATLAB 5 file is needed; get it again") from error


def _elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """Each (data type, content). Short ones have type and length in four bytes, and four bytes of content."""
    at = 0
    while at < len(data):
        kind, length = struct.unpack_from(f"{order}II", data, at)
        start, step = at + 8, 8 + length + (0 if kind == _COMPRESSED else -length % 8)
        if kind >> 16:
            kind, length, start, step = kind & 0xFFFF, min(kind >> 16, 5), at + 4, 8
        if start + length > at + step or start + length > len(data):
            raise EOFError(f"an element at byte {at} promises more bytes than there are")
        yield kind, data[start : start + length]
        at += step


def _inflated(data: bytes) -> bytes:
    stream = zlib.decompressobj()
    inner = stream.decompress(data, _MAX_BYTES)
    if not stream.eof or stream.unused_data:  # with its end comes its checksum
        raise EOFError("a compressed variable is cut short, or too large")
    return inner


def _variable(data: bytes, order: str, inside: bool = False) -> tuple[str, Variable | None]:
    """Name and value; None for what is no array of real numbers. inside: of a struct, where no struct is read."""
    parts = _elements(data, order)
    flags, dims, name = (_numbers(next(parts, (0, b"")), order) for _ in range(3))
    if len(flags) != 2 or not 2 <= len(dims) <= 32 or dims.min() < 0:
        raise EOFError("a variable has no sound header")
    array_class, shape = int(flags[0]) & 0xFF, [int(side) for side in dims]
    value: Variable | None = None
    if array_class in _CLASSES and not int(flags[0]) & _COMPLEX:
        stored, target = _numbers(next(parts, (0, b"")), order), np.dtype(_CLASSES[array_class])
        if len(stored) != math.prod(shape):
            raise EOFError(f"a variable of {shape} has {len(stored)} values")
        if next(parts, None) is not None:
            raise EOFError("a variable has more than its values")
        with np.errstate(invalid="ignore", over="ignore"):
            converted = stored.astype(target)
        if target.kind != "f" and (converted != stored).any():
            raise EOFError(f"a variable has values beyond its {target}")
        value = converted.reshape(shape, order="F")
    elif array_class == _STRUCT and math.prod(shape) == 1 and not inside:
        width, names = _numbers(next(parts, (0, b"")), order), next(parts, (0, b""))[1]
        step = int(width[0]) if len(width) == 1 and width[0] > 0 else len(names) + 1
        fields = [names[at : at + step].partition(b"\0")[0].decode() for at in range(0, len(names), step)]
        values = {field: _variable(next(parts, (0, b""))[1], order, inside=True)[1] for field in fields}
        value = {field: inner for field, inner in values.items() if isinstance(inner, np.ndarray)}
    return name.astype(np.uint8).tobytes().decode(), value


def _numbers(element: tuple[int, bytes], order: str) -> NDArray:
    kind, data = element
    if kind not in _STORED:
        raise EOFError(f"an element has the type {kind}, where numbers are expected")
    dtype = np.dtype(order + _STORED[kind])
    if len(data) % dtype.itemsize:
        raise EOFError(f"{len(data)} bytes are no whole number of {dtype}")
    return np.frombuffer(data, dtype)
