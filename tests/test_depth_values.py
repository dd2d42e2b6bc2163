"""Stored depth becomes metres, and a unit that cannot be meant is noticed."""

from pathlib import Path

import numpy as np
import pytest

from visionmtl.ops.depth_values import histogram, range_complaint, read_array, to_metres

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


def test_usual_depths_raise_no_complaint_and_none_measured_does():
    assert range_complaint([np.full((2, 2), 3, np.float32), np.zeros((2, 2), np.float32)], 1) == ""
    assert "hold no measured pixel" in range_complaint([np.zeros((2, 2), np.float32)], 1)


def test_the_histogram_counts_every_pixel_once():
    text = histogram(np.array([0.0001, 1, 1, 9.99, 10, 1e7], np.float32))
    shares = [line.split()[-1] for line in text.splitlines()]
    assert [share for share in shares if share != "0.0%"] == ["16.7%", "50.0%", "16.7%", "16.7%"]
