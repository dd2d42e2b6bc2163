"""What predictions cost in each runtime on a CPU: the joint network beside one a task, and files of other makers."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from visionmtl.benchmark.figures import Cell, Figure, Note, Row, Table
from visionmtl.benchmark.measure import Timing, Work, alternate, median, ratio
from visionmtl.benchmark.workload import Workload
from visionmtl.data.workers import num_cores
from visionmtl.export.base import Format
from visionmtl.export.formats.onnx import Onnx
from visionmtl.export.formats.torch_export import torch_runner
from visionmtl.export.graph import CONTENT, IMAGE, Graph, make_graph
from visionmtl.export.int8 import quantize

EAGER, INT8 = "eager", "_int8"
RUNTIMES = (EAGER, "aotinductor", "onnx", "onnx_int8", "openvino", "openvino_int8")
"""torch as it is, the formats that have boxes inside, and those in 8 bits."""
RUNS_OTHERS = ("onnx", "openvino")
"""Those that run the files beside, too."""
JOINT = "joint"
GOAL_ALONE, GOAL_BESIDE, GOAL_EAGER = 0.45, 0.35, 2.5
"""Most that the joint network may take of one network a task, and of the files beside it; how much faster than eager
the fastest runtime is to be: for WITH_GOALS, encoder and size."""
WITH_GOALS = ("mobilenetv2_100", (480, 640))


def measure_runtimes(
    workload: Workload, timing: Timing, runtimes: Sequence[str], threads: Sequence[int], beside: Mapping[str, Path]
) -> Iterator[Figure]:
    """Latency of one image, from uint8 [1, H, W, 3] to boxes after suppression, class ids and metres at that size.

    runtimes: of RUNTIMES. All of them take turns, for each number of threads.
    beside: ONNX files of other networks by name, which get random values in the shapes that they declare; they run in
    each of RUNS_OTHERS that is measured
    """
    _check(runtimes, threads, [JOINT, *workload.tasks], beside)
    goals = (workload.encoder, workload.size) == WITH_GOALS
    goal_alone, goal_beside, goal_eager = (GOAL_ALONE, GOAL_BESIDE, GOAL_EAGER) if goals else (None, None, None)
    yield Note(
        f"Networks with random weights, {workload.encoder}, {workload.size[0]}x{workload.size[1]}, batch 1, decoded "
        f"with suppression; {timing.rounds} rounds, in alternation; 8 bits where it says int8, else float32."
    )
    formats = {runtime: Format.find(runtime.removesuffix(INT8))() for runtime in runtimes if runtime != EAGER}
    for file_format in formats.values():
        file_format.check_installed()
    with tempfile.TemporaryDirectory() as folder:
        graphs = {
            JOINT: _graph(workload, workload.tasks),
            **{task: _graph(workload, [task]) for task in workload.tasks},
        }
        files = {name: _write(graph, formats, Path(folder) / name) for name, graph in graphs.items()}
        for count in threads:
            works: dict[tuple[str, str], Work] = {}
            for runtime in runtimes:
                for name, graph in graphs.items():
                    if runtime == EAGER:
                        run = torch_runner(graph.module, list(graph.outputs), count)
                    else:
                        run = formats[runtime].open(files[name][runtime], count)
                    works[runtime, name] = partial(run, _inputs(graph))
                if runtime in RUNS_OTHERS:
                    for name, file in beside.items():
                        works[runtime, name] = partial(formats[runtime].open(file, count), _declared_inputs(file))
            times = alternate(works, torch.device("cpu"), timing)
            where = f"{count} thread{'s' * (count > 1)}"
            columns = ("runtime", "network", "median ms", "95th percentile ms", "fastest ms")
            rows: list[Sequence[Cell]] = [
                (*key, median(ms), float(np.percentile(ms, 95)), min(ms)) for key, ms in times.items()
            ]
            yield Table(f"Latency, {where}", columns, rows)
            for runtime in runtimes:
                alone = ratio(times[runtime, JOINT], *(times[runtime, task] for task in workload.tasks))
                yield Row(f"joint / sum of one network a task, {runtime}, {where}", alone, "", limit=goal_alone)
                if beside and runtime in RUNS_OTHERS:
                    others = ratio(times[runtime, JOINT], *(times[runtime, name] for name in beside))
                    text = f"joint / sum of {', '.join(beside)}, {runtime}, {where}"
                    yield Row(text, others, "", limit=goal_beside)
            if EAGER in runtimes and len(runtimes) > 1:
                best = min((name for name in runtimes if name != EAGER), key=lambda name: median(times[name, JOINT]))
                faster = ratio(times[EAGER, JOINT], times[best, JOINT])
                yield Row(f"joint, {EAGER} / {best}, {where}", faster, "", least=goal_eager)


def _check(runtimes: Sequence[str], threads: Sequence[int], ours: Sequence[str], beside: Mapping[str, Path]) -> None:
    """Raises ValueError for a runtime that there is not, too many threads, and files that none runs or of our names."""
    for runtime in runtimes:
        if runtime not in RUNTIMES:
            raise ValueError(f"--runtimes names {runtime!r}; allowed are {', '.join(RUNTIMES)}; correct it")
    if max(threads) > num_cores():
        raise ValueError(
            f"--threads names {max(threads)}, and this process may use {num_cores()} of the cores; more threads only "
            "wait for each other; lower it"
        )
    if taken := [name for name in ours if name in beside]:
        raise ValueError(
            f"--beside names a file {taken[0]!r}; {', '.join(ours)} are our own networks; choose another name"
        )
    if beside and not set(RUNS_OTHERS).intersection(runtimes):
        raise ValueError(
            f"--beside, and --runtimes is {' '.join(runtimes)}; ONNX files run in {' and '.join(RUNS_OTHERS)}; add one "
            "of them, or leave --beside out"
        )


def _graph(workload: Workload, tasks: Sequence[str]) -> Graph:
    return make_graph(workload.net(tasks), workload.run(tasks))


def _write(graph: Graph, formats: Mapping[str, Format], folder: Path) -> dict[str, Path]:
    """A file for each runtime but torch itself. ONNX, which most of them read, is traced once and quantized once."""
    folder.mkdir()
    plain, quantized = folder / "float32.onnx", folder / "int8.onnx"
    if any(file_format.quantizes for file_format in formats.values()):
        Onnx().write(graph, plain)
    if any(runtime.endswith(INT8) for runtime in formats):
        quantize(plain, [_inputs(graph, seed) for seed in range(4)], quantized)
    files = {}
    for runtime, file_format in formats.items():
        files[runtime] = folder / f"{runtime}{file_format.suffix}"
        if file_format.quantizes:
            source = quantized if runtime.endswith(INT8) else plain
            file_format.write_from_onnx(source, graph.description, files[runtime])
        else:
            file_format.write(graph, files[runtime])
    return files


def _inputs(graph: Graph, seed: int = 0) -> dict[str, NDArray]:
    rng, (height, width) = np.random.default_rng(seed), graph.module.size
    return {
        IMAGE: rng.integers(0, 256, (1, height, width, 3), dtype=np.uint8),
        CONTENT: np.array([(height, width)], np.int64),
    }


def _declared_inputs(file: Path) -> dict[str, NDArray]:
    """Random values in the shapes that an ONNX file, which may come from anywhere, declares."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    return {one.name: rng.random(one.shape, dtype=np.float32) for one in session.get_inputs()}
