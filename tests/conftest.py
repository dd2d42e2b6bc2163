"""What every test runs under: one thread a process, no network, and the real data where it is present."""

import os
import sys
from pathlib import Path

import pytest

# before torch, OpenCV and the hub clients are imported; processes that tests start inherit it
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OPENCV_FOR_THREADS_NUM"):
    os.environ.setdefault(variable, "1")  # pytest-xdist already runs one process a core
for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "NO_ALBUMENTATIONS_UPDATE"):
    os.environ.setdefault(variable, "1")


@pytest.fixture(autouse=True)
def _no_device_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a test names no device it gets the CPU, whatever there is: numbers are compared with those of one."""
    from visionmtl.engine import distributed

    chosen = distributed.choose_device
    for name in ("visionmtl.engine.distributed", "visionmtl.benchmark.workload"):
        if name in sys.modules:
            monkeypatch.setattr(f"{name}.choose_device", lambda device: chosen("cpu" if device == "auto" else device))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real images that VISIONMTL_DATA names; a test that asks for it is skipped where it is unset."""
    folder = os.environ.get("VISIONMTL_DATA")
    if not folder:
        pytest.skip("VISIONMTL_DATA is unset; point it to a folder with nyuv2/, coco/ and cityscapes/")
    return Path(folder)
