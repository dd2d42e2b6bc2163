"""The data set contract, and the finder that makes the top-level folder `datasets/` importable as `visionmtl.datasets`."""

from abc import abstractmethod
from pathlib import Path
from typing import Protocol

from visionmtl.spec import Kind
from visionmtl.types import LabelSpace, Sample

_here = Path(__file__).resolve().parent
# a checkout or editable install has the folder beside the package; a wheel carries a copy inside it.
# A top-level package called `datasets` would shadow Hugging Face's.
_folder = _here / "_datasets" if (_here / "_datasets").is_dir() else _here.parent / "datasets"
if not (_folder / "scenes.py").is_file():
    raise ImportError(
        f"found no data set adapters in {_folder}; they lie beside the package in a checkout and in "
        "visionmtl/_datasets in a wheel; reinstall visionmtl"
    )
__path__ = [str(_folder)]


class Reader(Protocol):
    """An opened data set: cheap to hold, safe to send to worker processes."""

    provides: dict[str, LabelSpace | None]
    """The label fields of `Sample` that some image may carry, with their label space (None for depth and normals)."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Sample:
        """The sample at full size. The same index gives the same values in every process."""
        ...


class Dataset(Kind, home="visionmtl.datasets"):
    """Settings of one data set and split: where its files lie, which labels to read."""

    @abstractmethod
    def build(self) -> Reader:
        """Check that the files are there and index them. Raises ValueError naming what is missing and how to get it."""
