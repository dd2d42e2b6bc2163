"""INT8 after training: an ONNX file quantized over training images; last layers and decoding stay in float32."""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from visionmtl.modeling.weights import quiet_logger

QUANTIZED = ("Conv", "MatMul", "Gemm")
"""Everything else stays in float32: decoding, top-k, suppression, the exponential of depth."""
ACTIVATIONS = ("Relu", "Clip")
"""Behind a layer: its values are rounded after them, so that none of the 256 steps is spent on what they cut off."""
Inputs = dict[str, NDArray[Any]]


def quantize(float_file: Path, batches: Iterable[Inputs], int8_file: Path) -> list[str]:
    """Quantize an ONNX file statically: weights a channel at a time, activations by the least and largest value seen.

    batches: inputs to calibrate on. Returns the layers that stay in float32, see `last_layers`.
    """
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder, quiet_logger("root"):
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(str(float_file), str(prepared), skip_symbolic_shape=True)
        kept = last_layers(onnx.load(str(prepared)))
        quantize_static(
            str(prepared),
            str(int8_file),
            _Reader(batches),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=[*QUANTIZED, *ACTIVATIONS],
            nodes_to_exclude=kept,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    return kept


def last_layers(model: Any) -> list[str]:
    """Names of the layers nearest to each output: their values are distances, logarithms of metres and logits.

    256 steps would be too few for these. A layer is a node of the kinds in QUANTIZED, or one that reads a weight.
    """
    maker = {name: node for node in model.graph.node for name in node.output}
    weights = {one.name for one in model.graph.initializer if one.name.endswith(".weight")}
    waiting, seen, kept = [output.name for output in model.graph.output], set(), []
    while waiting:
        node = maker.get(waiting.pop())
        if node is None or node.output[0] in seen:
            continue
        seen.add(node.output[0])  # its name may be empty
        if node.op_type in QUANTIZED:
            kept.append(node.name)
        elif not weights.intersection(node.input):
            waiting += node.input
    return kept


class _Reader:
    """What onnxruntime's calibration asks for its inputs."""

    def __init__(self, batches: Iterable[Inputs]) -> None:
        self._batches = iter(batches)

    def get_next(self) -> Inputs | None:
        return next(self._batches, None)
