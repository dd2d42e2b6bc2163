"""ONNX, by torch's exporter over torch.export; run by onnxruntime."""

import json
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from numpy.typing import NDArray
from pydantic import Field

from visionmtl.export.base import Format, Runner, Tensors, no_description, parse_description, unreadable
from visionmtl.export.graph import Description, Graph
from visionmtl.io.atomic import atomic_write
from visionmtl.modeling.weights import quiet_logger
from visionmtl.ops.boxes import suppression_as_operator

KEY = "visionmtl"
"""Of the description among a model's metadata."""


class Onnx(Format):
    """One `.onnx` file, weights inside."""

    type: Literal["onnx"] = "onnx"
    suffix: ClassVar[str] = ".onnx"
    modules: ClassVar[tuple[str, ...]] = ("onnx", "onnxscript", "onnxruntime")
    quantizes: ClassVar[bool] = True

    opset: int = Field(20, ge=18, le=23, description="version of ONNX's operators")

    @property
    def stated(self) -> str:
        return f"opset {self.opset}"

    def write(self, graph: Graph, path: Path) -> None:
        with quiet_logger("torch.onnx"), quiet_logger("onnxscript"), suppression_as_operator():
            program = torch.onnx.export(
                graph.program(),
                dynamo=True,
                custom_translation_table={torch.ops.visionmtl.nms_mask.default: _nms_mask()},
                opset_version=self.opset,
                input_names=list(graph.inputs),
                output_names=list(graph.outputs),
                verbose=False,
            )
        assert program is not None
        save(program.model_proto, graph.description, path)

    def write_from_onnx(self, onnx_file: Path, description: Description, path: Path) -> None:
        import onnx

        save(onnx.load(str(onnx_file)), description, path)

    def read_description(self, path: Path) -> Description:
        import onnxruntime

        metadata = _session(onnxruntime, path, 1).get_modelmeta().custom_metadata_map
        if KEY not in metadata:
            raise no_description(path)
        return parse_description(metadata[KEY], path)

    def open(self, path: Path, threads: int | None) -> Runner:
        import onnxruntime

        session = _session(onnxruntime, path, threads)
        names = [output.name for output in session.get_outputs()]

        def run(inputs: Tensors) -> dict[str, NDArray[Any]]:
            outputs: list[NDArray[Any]] = session.run(None, dict(inputs))
            return dict(zip(names, outputs, strict=True))

        return run


def _nms_mask() -> Any:
    """`ops.boxes.nms_mask` as NonMaxSuppression, whose list of boxes becomes a mask over all of them."""
    from onnxscript import opset18

    op: Any = opset18  # its types know no value that is computed

    def nms_mask(boxes: Any, scores: Any, max_iou: float, min_score: float) -> Any:
        count = op.Shape(boxes, start=1, end=2)
        selected = op.NonMaxSuppression(
            boxes,
            scores,
            op.Squeeze(count),
            op.Constant(value_float=max_iou),
            op.Constant(value_float=min_score),
        )  # [S, 3]: image, class, box
        places = op.Gather(selected, op.Constant(value_ints=[0, 2]), axis=1)
        nothing = op.Expand(op.Constant(value_float=0.0), op.Shape(boxes, start=0, end=2))
        ones = op.Expand(op.Constant(value_float=1.0), op.Shape(places, start=0, end=1))
        return op.Greater(op.ScatterND(nothing, places, ones), op.Constant(value_float=0.5))

    return nms_mask


def save(model: Any, description: Description, path: Path) -> None:
    """Write an ONNX model with its description, and without the places in source files that made its nodes."""
    for graph in (model.graph, *(a.g for node in model.graph.node for a in node.attribute if a.HasField("g"))):
        for node in graph.node:
            del node.metadata_props[:]
        for value in (*graph.value_info, *graph.input, *graph.output, *graph.initializer):
            del value.metadata_props[:]
        del graph.metadata_props[:]
    del model.metadata_props[:]
    entry = model.metadata_props.add()
    entry.key, entry.value = KEY, json.dumps(description)
    with atomic_write(path) as file:
        file.write(model.SerializeToString())


def _session(onnxruntime: Any, path: Path, threads: int | None) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors alone
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    errors = onnxruntime.capi.onnxruntime_pybind11_state
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except (errors.InvalidProtobuf, errors.InvalidArgument, errors.InvalidGraph, errors.Fail) as error:
        raise unreadable(path, error) from error
