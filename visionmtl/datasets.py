"""The data set contract, and the finder that makes the top-level `datasets/` importable as `visionmtl.datasets`."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
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

    @property
    def provides(self) -> Mapping[str, LabelSpace | None]:
        """The label fields of `Sample` that some image may carry, with their label space (None for depth, normals)."""
        ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> Sample:
        """The sample at full size. The same index gives the same values in every process."""
        ...


class Dataset(Kind, home="visionmtl.datasets"):
    """Settings of one data set and split: where its files lie, which labels to read."""

    @abstractmethod
    def build(self) -> Reader:
        """Check that the files are there and index them. Raises ValueError naming what is missing and how to get it."""


@dataclass(frozen=True)
class Repeated:
    """The first `count` samples of a reader, over and over up to `length`."""

    reader: Reader
    count: int
    length: int

    @property
    def provides(self) -> Mapping[str, LabelSpace | None]:
        """Those of the reader."""
        return self.reader.provides

    def __len__(self) -> int:
        return self.length

    def read(self, index: int) -> Sample:
        """Sample `index` modulo `count`."""
        return self.reader.read(index % self.count)
