"""OpenVINO's intermediate representation, converted from the ONNX file."""

import json
import tempfile
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from visionmtl.export.base import Format, Runner, Tensors, no_description, parse_description, unreadable
from visionmtl.export.formats.onnx import KEY, Onnx
from visionmtl.export.graph import Description, Graph
from visionmtl.io.atomic import atomic_path


class OpenVINO(Format):
    """An `.xml` file with the graph, and a `.bin` file with the weights beside it."""

    type: Literal["openvino"] = "openvino"
    suffix: ClassVar[str] = ".xml"
    companion: ClassVar[str | None] = ".bin"
    modules: ClassVar[tuple[str, ...]] = (*Onnx.modules, "openvino")
    quantizes: ClassVar[bool] = True

    def write(self, graph: Graph, path: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "network.onnx"
            Onnx().write(graph, file)
            self._convert(file, graph.description, path)

    def write_from_onnx(self, onnx_file: Path, description: Description, path: Path) -> None:
        self._convert(onnx_file, description, path)

    def _convert(self, onnx_file: Path, description: Description, path: Path) -> None:
        import openvino

        model = openvino.convert_model(str(onnx_file))
        _largest_without_sorting(model)
        model.set_rt_info(json.dumps(description), [KEY])
        with atomic_path(path) as file:  # and .bin beside it
            openvino.save_model(model, str(file), compress_to_fp16=False)

    def read_description(self, path: Path) -> Description:
        import openvino

        try:
            model = openvino.Core().read_model(str(path))
        except RuntimeError as error:
            raise unreadable(path, str(error).strip().rpartition("\n")[2]) from error
        if not model.has_rt_info([KEY]):
            raise no_description(path)
        return parse_description(model.get_rt_info([KEY]).astype(str), path)

    def open(self, path: Path, threads: int | None) -> Runner:
        import openvino

        # bfloat16 is the default on some processors; parity is wanted
        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        model = openvino.Core().compile_model(str(path), "CPU", settings)
        names = [output.any_name for output in model.outputs]

        def run(inputs: Tensors) -> dict[str, NDArray[Any]]:
            outputs = model(dict(inputs))
            return {name: outputs[name] for name in names}

        return run


def _largest_without_sorting(model: Any) -> None:
    """Rewrite each index of a largest value, which OpenVINO (2026.4) sorts for, as the least index that reaches it.

    Half of the time for a class map, a tenth of a small network's in 8 bits.
    """
    from openvino import opset13

    for node in model.get_ordered_ops():
        if node.get_type_name() != "TopK" or node.get_attributes()["mode"] != "max":
            continue
        wanted = node.input_value(1).get_node()
        alone = wanted.get_type_name() == "Constant" and wanted.get_data().item() == 1
        if not alone or node.output(0).get_target_inputs():
            continue
        values, axis = node.input_value(0), node.get_attributes()["axis"]
        shape = values.get_partial_shape()
        if shape[axis].is_dynamic:
            continue
        count, beside = shape[axis].get_length(), [1] * len(shape)
        beside[axis] = count
        index = np.arange(count, dtype=np.float32).reshape(beside)
        largest = opset13.reduce_max(values, [axis], keep_dims=True)
        reached = opset13.select(opset13.less(values, largest), np.float32(count), index)
        least = opset13.reduce_min(reached, [axis], keep_dims=True)
        found = opset13.convert(least, node.get_output_element_type(1).get_type_name())
        for reader in node.output(1).get_target_inputs():
            reader.replace_source_output(found.output(0))
    model.validate_nodes_and_infer_types()
