"""torch.export's archive: the traced graph with its weights, for torch alone."""

import json
from pathlib import Path
from typing import Any, ClassVar, Literal
from zipfile import is_zipfile

import torch
from numpy.typing import NDArray

from visionmtl.export.base import Format, Runner, Tensors, no_description, parse_description, unreadable
from visionmtl.export.graph import Description, Graph
from visionmtl.io.atomic import atomic_write

DESCRIPTION = "visionmtl.json"
"""The description's file inside the archive."""


class TorchExport(Format):
    """One `.pt2` file."""

    type: Literal["torch_export"] = "torch_export"
    suffix: ClassVar[str] = ".pt2"

    def write(self, graph: Graph, path: Path) -> None:
        with atomic_write(path) as file:
            torch.export.save(graph.program(), file, extra_files={DESCRIPTION: json.dumps(graph.description)})

    def read_description(self, path: Path) -> Description:
        if not is_zipfile(path):  # torch prints pages about it
            raise unreadable(path, "it is no zip archive")
        files = {DESCRIPTION: ""}
        torch.export.load(str(path), extra_files=files)
        if not files[DESCRIPTION]:
            raise no_description(path)
        return parse_description(files[DESCRIPTION], path)

    def open(self, path: Path, threads: int | None) -> Runner:
        files = {DESCRIPTION: ""}
        module = torch.export.load(str(path), extra_files=files).module()
        return torch_runner(module, output_names(parse_description(files[DESCRIPTION], path)), threads)


def output_names(description: Description) -> list[str]:
    """In the order of what the graph returns."""
    return [name for task in description["tasks"].values() for name in task["outputs"]]


def torch_runner(module: Any, names: list[str], threads: int | None) -> Runner:
    """Of a callable over tensors. torch counts threads for the whole process; its number is put back after a call."""

    def run(inputs: Tensors) -> dict[str, NDArray[Any]]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads or before)
        try:
            with torch.inference_mode():
                outputs = module(*(torch.from_numpy(x) for x in inputs.values()))
        finally:
            torch.set_num_threads(before)
        return {name: x.numpy() for name, x in zip(names, outputs, strict=True)}

    return run
