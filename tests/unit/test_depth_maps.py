"""Stored depth becomes metres, and a unit that cannot be meant is noticed."""

from pathlib import Path

import numpy as np
import pytest

from visionmtl.io.depth_maps import check_positions, histogram, range_complaint, read_array, to_metres

FILE = Path("depth/a.npy")


def test_what_is_no_measurement_is_zero_in_any_number_type():
    stored = np.array([[np.nan, np.inf, -np.inf, -1, 0, 7, 2.5]])
    assert to_metres(stored, 2, FILE, invalid=(7,)).tolist() == [[0, 0, 0, 0, 0, 0, 5]]
    assert to_metres(np.array([[0, 65535, 1500]], np.uint16), 0.001, FILE, (0, 65535)).tolist() == [[0, 0, 1.5]]
    assert to_metres(stored, 2, FILE).dtype == np.float32


@pytest.mark.parametrize(
    "stored", [np.zeros((2, 3, 1)), np.zeros(4), np.zeros((2, 2), complex), np.zeros((2, 2), bool)]
)
def test_one_number_a_pixel_is_needed(stored):
    with pytest.raises(ValueError, match=r"depth/a\.npy is .*one number a pixel"):
        to_metres(stored, 1, FILE)


def test_an_array_that_would_run_code_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], object))
    with pytest.raises(ValueError, match=r"a\.npy cannot be read as an array"):
        read_array(tmp_path / "a.npy")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x93NUMPY\x01\x00\x0a\x00{'descr': (\n", None])
def test_what_is_no_array_is_named(tmp_path, content):
    np.savez(tmp_path / "a.npz", a=np.zeros(3))
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npz").read_bytes() if content is None else content)
    with pytest.raises(ValueError, match=r"a\.npy cannot be read as an array: .*; a file of numpy.save is expected;"):
        read_array(tmp_path / "a.npy")


def test_an_array_that_promises_more_than_memory_holds_is_named(tmp_path):
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (9999999999, 9999999), }\n"
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(ValueError, match=r"a\.npy cannot be read as an array"):
        read_array(tmp_path / "a.npy")


def test_what_is_beyond_float32_in_metres_is_not_measured():
    assert to_metres(np.array([[1e300, 1e38, 2]]), 1000, FILE).tolist() == [[0, 0, 2000]]


def test_files_to_look_at_are_spread_evenly_and_come_once():
    assert [check_positions(total).tolist() for total in (1, 2, 4, 100)] == [[0], [0, 1], [0, 1, 2, 3], [0, 33, 66, 99]]


def test_usual_depths_raise_no_complaint_and_none_measured_does():
    assert range_complaint([np.full((2, 2), 3, np.float32), np.zeros((2, 2), np.float32)], "unit") == ""
    assert "hold no measured pixel" in range_complaint([np.zeros((2, 2), np.float32)], "unit")


def test_the_histogram_counts_every_pixel_once():
    text = histogram(np.array([0.0001, 1, 1, 9.99, 10, 1e7], np.float32))
    shares = [line.split()[-1] for line in text.splitlines()]
    assert [share for share in shares if share != "0.0%"] == ["16.7%", "50.0%", "16.7%", "16.7%"]
