"""What predictions cost in each runtime on a CPU: the joint network beside one a task, and files of other makers."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from visionmtl.benchmark.figures import Cell, Figure, Note, Row, Table
from visionmtl.benchmark.measure import Timing, Work, alternate, median, ratio
from visionmtl.benchmark.workload import Workload
from visionmtl.export.base import Format, Runner
from visionmtl.export.formats.onnx import Onnx
from visionmtl.export.formats.torch_export import torch_runner
from visionmtl.export.graph import CONTENT, IMAGE, Graph, make_graph
from visionmtl.export.int8 import quantize

EAGER, INT8 = "eager", "_int8"
RUNTIMES = (EAGER, "aotinductor", "onnx", "onnx_int8", "openvino", "openvino_int8")
"""torch as it is, the formats that have boxes inside, and those in 8 bits."""
JOINT = "joint"
GOAL_ALONE, GOAL_BESIDE, GOAL_EAGER = 0.45, 0.35, 2.5
"""Most that the joint network may take of one network a task, and of the files beside it; how much faster than eager
the fastest runtime is to be."""


def measure_runtimes(
    workload: Workload, timing: Timing, runtimes: Sequence[str], threads: Sequence[int], beside: Mapping[str, Path]
) -> Iterator[Figure]:
    """Latency of one image, from uint8 [1, H, W, 3] to boxes after suppression, class ids and metres at that size.

    runtimes: of RUNTIMES. All of them take turns, for each number of threads.
    beside: ONNX files of other networks by name, which get random values in the shapes that they declare; they run in
    each of `onnx` and `openvino` that is measured
    """
    _check(runtimes, beside)
    yield Note(
        f"Networks with random weights, {workload.encoder}, {workload.size[0]}x{workload.size[1]}, batch 1, decoded "
        f"with suppression; {timing.rounds} rounds, in alternation; 8 bits where it says int8, else float32."
    )
    names = (JOINT, *workload.tasks)
    with tempfile.TemporaryDirectory() as folder:
        graphs = {
            JOINT: _graph(workload, workload.tasks),
            **{task: _graph(workload, [task]) for task in workload.tasks},
        }
        files = {
            (runtime, name): _write(runtime, graphs[name], Path(folder) / f"{name}_{runtime}")
            for runtime in runtimes
            for name in names
        }
        for count in threads:
            works = {key: _of_ours(key[0], file, graphs[key[1]], count) for key, file in files.items()}
            for runtime in ("onnx", "openvino"):
                if runtime in runtimes:
                    works |= {(runtime, name): _of_file(runtime, file, count) for name, file in beside.items()}
            times = alternate(works, torch.device("cpu"), timing)
            where = f"{count} thread{'s' * (count > 1)}"
            columns = ("runtime", "network", "median ms", "95th percentile ms", "fastest ms")
            rows: list[Sequence[Cell]] = [
                (*key, median(ms), float(np.percentile(ms, 95)), min(ms)) for key, ms in times.items()
            ]
            yield Table(f"Latency, {where}", columns, rows)
            for runtime in runtimes:
                alone = ratio(times[runtime, JOINT], *(times[runtime, task] for task in workload.tasks))
                yield Row(f"joint / sum of one network a task, {runtime}, {where}", alone, "", limit=GOAL_ALONE)
                if beside and (runtime, next(iter(beside))) in times:
                    others = ratio(times[runtime, JOINT], *(times[runtime, name] for name in beside))
                    text = f"joint / sum of {', '.join(beside)}, {runtime}, {where}"
                    yield Row(text, others, "", limit=GOAL_BESIDE)
            if EAGER in runtimes and len(runtimes) > 1:
                best = min((name for name in runtimes if name != EAGER), key=lambda name: median(times[name, JOINT]))
                faster = ratio(times[EAGER, JOINT], times[best, JOINT])
                yield Row(f"joint, {EAGER} / {best}, {where}", faster, "", least=GOAL_EAGER)


def _check(runtimes: Sequence[str], beside: Mapping[str, Path]) -> None:
    """Raises ValueError for a runtime that there is not, and for files beside that none would run."""
    for runtime in runtimes:
        if runtime not in RUNTIMES:
            raise ValueError(f"--runtimes names {runtime!r}; allowed are {', '.join(RUNTIMES)}; correct it")
    if beside and not {"onnx", "openvino"}.intersection(runtimes):
        raise ValueError(
            f"--beside, and --runtimes is {' '.join(runtimes)}; ONNX files run in onnx and openvino; add one of them, "
            "or leave --beside out"
        )


def _graph(workload: Workload, tasks: Sequence[str]) -> Graph:
    return make_graph(workload.net(tasks), workload.run(tasks))


def _write(runtime: str, graph: Graph, path: Path) -> Path:
    """The graph as the runtime's file; torch itself needs none."""
    if runtime == EAGER:
        return path
    file_format = _format(runtime)
    file = path.with_name(path.name + file_format.suffix)
    if not runtime.endswith(INT8):
        file_format.write(graph, file)
        return file
    plain, quantized = (path.with_name(f"{path.name}_{kind}.onnx") for kind in ("plain", "quantized"))
    Onnx().write(graph, plain)
    quantize(plain, [_inputs(graph, seed) for seed in range(4)], quantized)
    file_format.write_from_onnx(quantized, graph.description, file)
    return file


def _format(runtime: str) -> Format:
    file_format = Format.find(runtime.removesuffix(INT8))()
    file_format.check_installed()
    return file_format


def _inputs(graph: Graph, seed: int) -> dict[str, NDArray]:
    rng, (height, width) = np.random.default_rng(seed), graph.module.size
    return {
        IMAGE: rng.integers(0, 256, (1, height, width, 3), dtype=np.uint8),
        CONTENT: np.array([(height, width)], np.int64),
    }


def _of_ours(runtime: str, file: Path, graph: Graph, threads: int) -> Work:
    inputs = _inputs(graph, 0)
    run: Runner
    if runtime == EAGER:
        run = torch_runner(graph.module, list(graph.outputs), threads)
    else:
        run = _format(runtime).open(file, threads)
    return lambda: run(inputs)


def _of_file(runtime: str, file: Path, threads: int) -> Work:
    """Of an ONNX file that may come from anywhere, in the runtime of a format."""
    rng = np.random.default_rng(0)
    if runtime == "openvino":
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
