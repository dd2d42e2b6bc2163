"""MATLAB 5 files are read as scipy reads them where it survives; damaged ones are named, and end nothing."""

import io
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import scipy.io

from visionmtl.io.mat_files import read_numbers

VARIABLES = {
    "column": np.arange(1, 800, dtype=np.uint16)[:, None],
    "floats": np.array([[0.5, -1e300, np.inf], [np.nan, 3, 4]]),
    "small": np.array([[-3]], np.int8),
    "empty": np.zeros((0, 3), np.int32),
    "cube": np.arange(24, dtype=np.int64).reshape(2, 3, 4),
    "struct": {"numbers": np.arange(5.0)[None], "names": np.array(["a", "b"], object), "inner": {"a": 1}},
    "cells": np.array(["wall", "floor"], object),
    "text": "abc",
    "complex": np.array([1j]),
}
NUMBERS = ["column", "floats", "small", "empty", "cube", "struct"]


def written(file: Path, compressed: bool) -> bytes:
    scipy.io.savemat(file, VARIABLES, do_compression=compressed)
    return file.read_bytes()


@pytest.mark.parametrize("compressed", [False, True])
def test_numbers_are_those_that_scipy_reads(tmp_path, compressed):
    written(tmp_path / "a.mat", compressed)
    ours, theirs = read_numbers(tmp_path / "a.mat"), scipy.io.loadmat(tmp_path / "a.mat")
    assert list(ours) == NUMBERS and list(ours["struct"]) == ["numbers"]
    np.testing.assert_array_equal(ours.pop("struct")["numbers"], theirs["struct"]["numbers"][0, 0])
    for name, values in ours.items():
        np.testing.assert_array_equal(values, theirs[name], strict=True)


def test_numbers_of_real_files_are_those_that_scipy_reads(real_data):
    files = sorted((real_data / "nyuv2" / "meta").glob("*.mat"))
    assert len(files) == 3
    for file in files:
        ours, theirs = read_numbers(file), scipy.io.loadmat(file)
        for name, values in ours.items():
            if isinstance(values, dict):
                values, theirs[name] = values["labels13"], theirs[name]["labels13"][0, 0]
            np.testing.assert_array_equal(values, theirs[name])


def test_big_endian_files_and_numbers_stored_narrower_than_their_class(tmp_path):
    """By hand: a double [2, 1] stored as two bytes, in the order of bytes that a SPARC writes."""

    def element(kind: int, content: bytes) -> bytes:
        return struct.pack(">II", kind, len(content)) + content + bytes(-len(content) % 8)

    name_and_values = struct.pack(">HH", 1, 1) + b"a\0\0\0" + struct.pack(">HH", 2, 2) + bytes([7, 200, 0, 0])
    body = element(6, struct.pack(">II", 6, 0)) + element(5, struct.pack(">ii", 2, 1)) + name_and_values
    (tmp_path / "a.mat").write_bytes(b"MATLAB".ljust(124) + struct.pack(">H", 0x0100) + b"MI" + element(14, body))
    values = read_numbers(tmp_path / "a.mat")["a"]
    assert values.dtype == np.float64 and values.tolist() == [[7.0], [200.0]]
    np.testing.assert_array_equal(values, scipy.io.loadmat(tmp_path / "a.mat")["a"])


@pytest.mark.parametrize("compressed", [False, True])
def test_damaged_files_are_refused_by_name_or_read(tmp_path, compressed):
    """No error but ours; of a compressed file, whose variables have checksums, no other number."""
    sound, rng = written(tmp_path / "a.mat", compressed), random.Random(0)
    expected, refused = read_numbers(tmp_path / "a.mat"), 0
    for number in range(400):
        content = bytearray(sound)
        at = rng.randrange(128, len(content))
        if number % 4 == 0:
            del content[at:]
        elif number % 4 == 1:
            del content[at : at + rng.choice([1, 4, 8])]
        else:
            content[at : at + 4] = struct.pack("<I", rng.choice([0, 2**31, 2**32 - 1, rng.randrange(2**32)]))
        (tmp_path / "b.mat").write_bytes(content)
        try:
            found = read_numbers(tmp_path / "b.mat")
        except ValueError as error:
            refused, told = refused + 1, str(error)
        else:
            told = ""
        assert not told or ("b.mat cannot be read: " in told and told.count(";") >= 2)
        if compressed and not told:
            assert all(np.array_equal(found[name], expected[name], equal_nan=True) for name in set(found) - {"struct"})
    assert refused > 200


def test_a_variable_that_inflates_without_end_is_refused(tmp_path):
    file = io.BytesIO()
    scipy.io.savemat(file, {"a": np.zeros((1, 9_000_000))}, do_compression=True)
    (tmp_path / "a.mat").write_bytes(file.getvalue())
    assert len(file.getvalue()) < 100_000
    with pytest.raises(ValueError, match=r"a\.mat cannot be read: a compressed variable is cut short, or too large"):
        read_numbers(tmp_path / "a.mat")
