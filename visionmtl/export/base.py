"""The format contract: how a graph becomes a file of another runtime, and how that file is run again."""

import importlib.util
from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from numpy.typing import NDArray

from visionmtl.config.registry import Configurable
from visionmtl.config.text_files import parse_line
from visionmtl.export.graph import Description, Graph

Tensors = Mapping[str, NDArray[Any]]
"""Arrays by name of an input or output."""
Runner = Callable[[Tensors], dict[str, NDArray[Any]]]
"""An opened file: inputs by name -> outputs by name."""


class Format(Configurable, package="visionmtl.export.formats"):
    """Frozen settings of one file format."""

    suffix: ClassVar[str]
    """How its files end."""
    companion: ClassVar[str | None] = None
    """Ending of a second file that is written beside."""
    modules: ClassVar[tuple[str, ...]] = ()
    """What it imports beyond the package's own requirements; the extra `export` brings them."""
    free_batch: ClassVar[bool] = True
    """Whether one file takes any number of images."""
    quantizes: ClassVar[bool] = False
    """Whether it is written from a quantized ONNX file, too, see `write_from_onnx`."""

    @property
    def stated(self) -> str:
        """What of the settings a user should read, such as the opset."""
        return ""

    @abstractmethod
    def write(self, graph: Graph, path: Path) -> None:
        """Write the graph with its description."""

    def write_from_onnx(self, onnx_file: Path, description: Description, path: Path) -> None:
        """Write what is in an ONNX file, such as a quantized one, in this format."""
        raise NotImplementedError

    @abstractmethod
    def read_description(self, path: Path) -> Description:
        """The description in a file. Raises ValueError where there is none."""

    @abstractmethod
    def open(self, path: Path, threads: int | None) -> Runner:
        """Ready to run on the CPU. threads: None = as many as the runtime likes."""

    def check_installed(self) -> None:
        """Raises ValueError naming the extra where a package is missing."""
        missing = [name for name in self.modules if importlib.util.find_spec(name) is None]
        if missing:
            raise ValueError(
                f"format {self.type} needs {', '.join(missing)}, which is not installed; the extra `export` brings it; "
                'run pip install "visionmtl[export]"'
            )


def format_of(path: Path) -> Format:
    """The format whose ending a file has, with default settings. Raises ValueError for another ending."""
    kinds = sorted(Format.members().values(), key=lambda kind: -len(kind.suffix))
    for kind in kinds:
        if path.name.endswith(kind.suffix):
            return kind()
    raise ValueError(
        f"{path} has no ending of an exported file; they end in {', '.join(sorted(kind.suffix for kind in kinds))}; "
        "give a file that visionmtl export wrote"
    )


def parse_description(text: str, path: Path) -> Description:
    """The description that an exported file carries as JSON. Raises ValueError for another text."""
    return parse_line(text, f"the description in {path}")


def unreadable(path: Path, reason: object) -> ValueError:
    """The error for a file that the runtime cannot open."""
    first = str(reason).strip().partition("\n")[0]
    return ValueError(
        f"{path} cannot be opened: {first}; a whole file that visionmtl export wrote is needed; export the network "
        "again"
    )


def no_description(path: Path) -> ValueError:
    """The error for a file that was written by something else."""
    return ValueError(
        f"{path} has no description of visionmtl; exported files carry input, outputs and classes with them; give a "
        "file that visionmtl export wrote"
    )
