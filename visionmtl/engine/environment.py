"""What a run runs on: versions, devices and the project's commit."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "opencv-python-headless",
    "albumentations",
    "pycocotools",
    "torchjd",
)


def environment() -> dict[str, Any]:
    """What a run runs on: versions, devices and the project's commit; no host or user names, no paths."""
    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "packages": {name: version for name in PACKAGES if (version := package_version(name))},
        "visionmtl": package_version("visionmtl"),
        "commit": _commit(Path(__file__).resolve().parents[2]),
    }


def package_version(package: str) -> str | None:
    """The installed version; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit(root: Path) -> str | None:
    """The commit of the checkout, "+changes" behind it if files differ; None when `root` is no checkout of ours."""
    git = ("git", "-C", str(root))
    try:
        found = subprocess.run([*git, "rev-parse", "--show-toplevel", "HEAD"], capture_output=True, text=True)
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    except FileNotFoundError:  # no git on this machine
        return None
    if found.returncode != 0 or Path(found.stdout.splitlines()[0]).resolve() != root:
        return None  # an installed copy, perhaps inside somebody else's repository
    return found.stdout.splitlines()[1] + ("+changes" if changes.stdout.strip() else "")
