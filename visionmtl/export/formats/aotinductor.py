"""AOTInductor: the graph compiled ahead of time to a library for this kind of processor; needs a C++ compiler."""

import json
from pathlib import Path
from typing import ClassVar, Literal
from zipfile import is_zipfile

import torch

from visionmtl.export.base import Format, Runner, no_description, parse_description, unreadable
from visionmtl.export.formats.torch_export import output_names, torch_runner
from visionmtl.export.graph import Description, Graph
from visionmtl.io.atomic import atomic_path

KEY = "visionmtl"


class AOTInductor(Format):
    """One `.aoti.pt2` file, which Python and C++ load without tracing or compiling."""

    type: Literal["aotinductor"] = "aotinductor"
    suffix: ClassVar[str] = ".aoti.pt2"

    def write(self, graph: Graph, path: Path) -> None:
        settings = {"aot_inductor.metadata": {KEY: json.dumps(graph.description)}}
        with atomic_path(path) as file:
            torch._inductor.aoti_compile_and_package(graph.program(), package_path=str(file), inductor_configs=settings)

    def read_description(self, path: Path) -> Description:
        if not is_zipfile(path):
            raise unreadable(path, "it is no zip archive")
        metadata = torch._inductor.aoti_load_package(str(path)).get_metadata()
        if KEY not in metadata:
            raise no_description(path)
        return parse_description(metadata[KEY], path)

    def open(self, path: Path, threads: int | None) -> Runner:
        model = torch._inductor.aoti_load_package(str(path))
        return torch_runner(model, output_names(parse_description(model.get_metadata()[KEY], path)), threads)
