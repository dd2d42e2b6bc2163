"""ExecuTorch, for phones and microcontrollers: XNNPACK where it has kernels, portable kernels elsewhere."""

import json
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from numpy.typing import NDArray

from visionmtl.export.base import Format, Runner, Tensors, no_description, parse_description
from visionmtl.export.formats.torch_export import output_names
from visionmtl.export.graph import Description, Graph
from visionmtl.io.atomic import atomic_write

KEY = "visionmtl"
"""The method that returns the description."""


class ExecuTorch(Format):
    """One `.pte` file."""

    type: Literal["executorch"] = "executorch"
    suffix: ClassVar[str] = ".pte"
    modules: ClassVar[tuple[str, ...]] = ("executorch",)
    free_batch: ClassVar[bool] = False

    def write(self, graph: Graph, path: Path) -> None:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        program = graph.program()
        if loops := [node.name for node in program.graph.nodes if node.target is torch.ops.higher_order.while_loop]:
            raise ValueError(
                f"the graph has a loop ({', '.join(loops)}), the suppression of boxes, which ExecuTorch does not run; "
                "raw outputs and heads without boxes are offered; add --outputs raw, or choose heads with --tasks"
            )
        description = {KEY: json.dumps(graph.description)}
        edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()], constant_methods=description)
        with atomic_write(path) as file:
            file.write(edge.to_executorch().buffer)

    def read_description(self, path: Path) -> Description:
        program = _program(path)
        if KEY not in program.method_names:
            raise no_description(path)
        return parse_description(program.load_method(KEY).execute([])[0], path)

    def open(self, path: Path, threads: int | None) -> Runner:
        if threads is not None:
            raise ValueError(
                f"threads is {threads}, but ExecuTorch's Python runtime decides itself how many it takes; None is "
                "allowed; leave it out"
            )
        program = _program(path)
        method, names = program.load_method("forward"), output_names(self.read_description(path))

        def run(inputs: Tensors) -> dict[str, NDArray[Any]]:
            outputs = method.execute([torch.from_numpy(x) for x in inputs.values()])
            return {name: x.numpy().copy() for name, x in zip(names, outputs, strict=True)}

        return run


def _program(path: Path) -> Any:
    from executorch.runtime import Runtime, Verification

    return Runtime.get().load_program(path, verification=Verification.Minimal)
