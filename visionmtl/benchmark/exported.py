"""What exported networks cost on a CPU: the joint one beside one network a task, and beside files of other makers."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from visionmtl.benchmark.figures import Cell, Figure, Note, Row, Table
from visionmtl.benchmark.measure import Timing, Work, alternate, median, ratio
from visionmtl.benchmark.workload import TASKS, Workload
from visionmtl.export.base import Format
from visionmtl.export.formats.onnx import Onnx
from visionmtl.export.graph import CONTENT, IMAGE, make_graph

JOINT = "joint"
GOAL = 0.35
"""Most that the joint network may take of what the files beside it take one after the other."""


def measure_exported(
    workload: Workload, timing: Timing, formats: Sequence[str], threads: Sequence[int], beside: Mapping[str, Path]
) -> Iterator[Figure]:
    """Latency of one image, from uint8 [1, H, W, 3] to boxes after suppression, class ids and metres at that size.

    beside: ONNX files of other networks by name, which get random values in the shapes that they declare
    """
    yield Note(
        f"Exported networks with random weights, {workload.encoder}, {workload.size[0]}x{workload.size[1]}, float32, "
        f"batch 1, decoded with suppression; {timing.rounds} rounds, in alternation."
    )
    with tempfile.TemporaryDirectory() as folder:
        files = _write(workload, Path(folder))
        ratios: list[Row] = []
        for name in formats:
            file_format = Format.find(name)()
            file_format.check_installed()
            for count in threads:
                works = {key: _of_ours(workload, file_format, file, count) for key, file in files.items()}
                works |= {key: _of_file(name, file, count) for key, file in beside.items()}
                times = alternate(works, torch.device("cpu"), timing)
                rows: list[Sequence[Cell]] = [
                    (key, median(ms), float(np.percentile(ms, 95)), min(ms)) for key, ms in times.items()
                ]
                where = f"{name}, {count} thread{'s' * (count > 1)}"
                columns = ("network", "median ms", "95th percentile ms", "fastest ms")
                yield Table(f"Latency, {where}", columns, rows)
                alone = ratio(times[JOINT], *(times[task] for task in TASKS))
                ratios.append(Row(f"joint / sum of one network a task, {where}", alone, ""))
                if beside:
                    others = ratio(times[JOINT], *(times[key] for key in beside))
                    ratios.append(Row(f"joint / sum of {', '.join(beside)}, {where}", others, "", limit=GOAL))
    yield from ratios


def _write(workload: Workload, folder: Path) -> dict[str, Path]:
    """An ONNX file, which OpenVINO reads too, of the joint network and of one for each task alone."""
    onnx, files = Onnx(), {}
    onnx.check_installed()
    for name, tasks in {JOINT: TASKS, **{task: (task,) for task in TASKS}}.items():
        files[name] = folder / f"{name}{onnx.suffix}"
        onnx.write(make_graph(workload.net(tasks), workload.run(tasks)), files[name])
    return files


def _of_ours(workload: Workload, file_format: Format, file: Path, threads: int) -> Work:
    run = file_format.open(file, threads)
    rng = np.random.default_rng(0)
    inputs: dict[str, NDArray] = {
        IMAGE: rng.integers(0, 256, (1, *workload.size, 3), dtype=np.uint8),
        CONTENT: np.array([workload.size], np.int64),
    }
    return lambda: run(inputs)


def _of_file(name: str, file: Path, threads: int) -> Work:
    """Of an ONNX file that may come from anywhere, in the runtime of a format."""
    rng = np.random.default_rng(0)
    if name == "openvino":
        import openvino

        settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        model = openvino.Core().compile_model(str(file), "CPU", settings)
        shapes = {x.any_name: [int(side) for side in x.shape] for x in model.inputs}
        inputs = {key: rng.random(shape, dtype=np.float32) for key, shape in shapes.items()}
        return lambda: model(inputs)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    feeds = {x.name: rng.random(x.shape, dtype=np.float32) for x in session.get_inputs()}
    return lambda: session.run(None, feeds)
