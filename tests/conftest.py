"""What every test runs under: one thread a process, no network, and the real data where it is present."""

import os
from pathlib import Path

import pytest

# before torch, OpenCV and the hub clients are imported; processes that tests start inherit it
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OPENCV_FOR_THREADS_NUM"):
    os.environ.setdefault(variable, "1")  # pytest-xdist already runs one process a core
for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "NO_ALBUMENTATIONS_UPDATE"):
    os.environ.setdefault(variable, "1")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real images that VISIONMTL_DATA names; a test that asks for it is skipped where it is unset."""
    folder = os.environ.get("VISIONMTL_DATA")
    if not folder:
        pytest.skip("VISIONMTL_DATA is unset; point it to a folder with nyuv2/, coco/ and cityscapes/")
    return Path(folder)
