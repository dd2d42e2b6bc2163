"""OpenVINO's intermediate representation, converted from the ONNX file."""

import json
import tempfile
from pathlib import Path
from typing import Any, ClassVar, Literal

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
