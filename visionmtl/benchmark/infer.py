"""What predictions cost: latency and images a second, joint and task by task; decoders in turn and at once."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch

from visionmtl.benchmark.figures import Cell, Figure, Note, Row, Table
from visionmtl.benchmark.measure import Timing, Work, alternate, count_flops, median, ratio
from visionmtl.benchmark.workload import Workload
from visionmtl.network import MultiTaskNet
from visionmtl.structures import ImageMeta, Maps
from visionmtl.tasks.base import Raw
from visionmtl.tasks.detection import Detection

RAW, UNSUPPRESSED, PREDICTIONS = STAGES = ("raw outputs", "without suppression", "predictions")


def measure_predictions(workload: Workload, timing: Timing, batches: Sequence[int]) -> Iterator[Figure]:
    """Latency at batch 1 of the joint network and of one network a task; images a second at each of `batches`.

    From uint8 images in memory to predictions in user units. timing: of images a second at most 5 of its rounds; of
    latency one call a round.
    """
    timing.check(workload.on)
    nets = {"joint": workload.net().eval()} | {task: workload.net([task]).eval() for task in workload.tasks}
    yield Note(
        f"Predictions with random weights on {workload.text}; from uint8 images in memory to arrays at their size. "
        f"Clock: {timing.clock}."
    )
    works = {(name, stage): work for name, net in nets.items() for stage, work in _works(workload, net, 1).items()}
    times = alternate(works, workload.on, replace(timing, seconds=1e-3))
    rows: list[Sequence[Cell]] = [
        (*key, median(times_ms), float(np.percentile(times_ms, 95)), 1e3 / median(times_ms))
        for key, times_ms in times.items()
    ]
    yield Table("Latency, batch 1", ("network", "until", "median ms", "95th percentile ms", "1/s"), rows)
    joint, *singles = (times[name, PREDICTIONS] for name in nets)
    yield Row("joint / sum of one network a task, latency", ratio(joint, *singles), "")

    yield from _task_parallelism(workload, replace(timing, seconds=1e-3), nets)
    timing, speeds = replace(timing, rounds=min(timing.rounds, 5)), []
    for batch in batches:
        times_of_batch = alternate(_works(workload, nets["joint"], batch), workload.on, timing)
        speeds.append([batch * 1e3 / median(times_of_batch[stage]) for stage in STAGES])
    rows = [(str(batch), *of_batch) for batch, of_batch in zip(batches, speeds, strict=True)]
    yield Table("Images a second, joint", ("batch", *STAGES), rows)
    for stage, of_stage in zip(STAGES, zip(*speeds, strict=True), strict=True):
        best = max(of_stage)
        yield Row(f"best throughput, {stage}, batch {batches[of_stage.index(best)]}", best, "images/s")


def _task_parallelism(workload: Workload, timing: Timing, nets: Mapping[str, MultiTaskNet]) -> Iterator[Figure]:
    """What a task costs that is left out, and decoders that run at the same time instead of one after the other."""
    rows: list[Sequence[Cell]] = []
    for task in workload.tasks:
        kept = workload.net().eval()
        kept.keep([task])
        works = [_works(workload, net, 1)[RAW] for net in (kept, nets[task])]
        flops = [count_flops(work) / 1e9 for work in works]
        times = alternate(dict(zip(("kept", "alone"), works, strict=True)), workload.on, timing)
        rows.append((task, *flops, median(times["kept"]), ratio(times["kept"], times["alone"])))
    columns = ("task", "GFLOP", "GFLOP of its own network", "ms", "x its own network")
    yield Table("One task kept of the joint network, raw outputs at batch 1", columns, rows)

    if timing.clock == "cpu":
        yield Note("SKIPPED: decoders at the same time; the clock adds up the threads; use --clock wall")
        return
    how = "in CUDA streams" if workload.on.type == "cuda" else f"in {len(workload.tasks)} threads"
    in_turn = _works(workload, nets["joint"], 1)[RAW]
    times = alternate({"in turn": in_turn, how: _at_once(workload, nets["joint"])}, workload.on, timing)
    serial, parallel = times.values()
    yield Row(f"decoders {how} / one after the other, latency of raw outputs", ratio(parallel, serial), "")


def _at_once(workload: Workload, net: MultiTaskNet) -> Work:
    """As raw outputs, but each decoder in a stream of its own, or in a thread with its share of the cores."""
    image = replace(workload, batch=1).batch_of(replace(workload, batch=1).samples()).image
    device, autocast = workload.on, workload.autocast()

    @torch.inference_mode()
    def decode(name: str, maps: Maps) -> Raw:
        with autocast():
            return net.decoders[name](maps)

    if device.type == "cuda":
        streams = {name: torch.cuda.Stream(device) for name in net.decoders}

        @torch.inference_mode()
        def in_streams() -> None:
            current = torch.cuda.current_stream(device)
            with autocast():
                maps = net.trunk.split(net.shared(image.to(device, non_blocking=True)))
            for name, stream in streams.items():
                stream.wait_stream(current)
                with torch.cuda.stream(stream):
                    decode(name, maps[name])
            for stream in streams.values():
                current.wait_stream(stream)

        return in_streams

    num_threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(
        len(net.decoders), initializer=torch.set_num_threads, initargs=(max(1, num_threads // len(net.decoders)),)
    )

    @torch.inference_mode()
    def in_threads() -> None:
        with autocast():
            maps = net.trunk.split(net.shared(image))
        list(pool.map(decode, maps, maps.values()))
        torch.set_num_threads(num_threads)  # the threads' setting reaches parts of this one, too

    return in_threads


def _works(workload: Workload, net: MultiTaskNet, batch: int) -> dict[str, Work]:
    """The network's prediction up to each stage."""
    workload = replace(workload, batch=batch)
    image = workload.batch_of(workload.samples()).image
    metas = [ImageMeta(workload.size, workload.size)] * batch
    device, autocast = workload.on, workload.autocast()

    @torch.inference_mode()
    def raw() -> dict[str, object]:
        on_device = image.to(device, non_blocking=True)
        with autocast():
            return net(on_device)

    @torch.inference_mode()
    def predictions(with_nms: bool = True) -> list[object]:
        outputs = raw()
        return [
            task.head.decode(outputs[name])  # type: ignore[arg-type]
            if isinstance(task, Detection) and not with_nms
            else task.predict(outputs[name], metas, workload.size)
            for name, task in net.tasks.items()
        ]

    detects = any(isinstance(task, Detection) for task in net.tasks.values())
    unsuppressed: dict[str, Work] = {UNSUPPRESSED: lambda: predictions(with_nms=False)} if detects else {}
    return {RAW: raw, **unsuppressed, PREDICTIONS: predictions}
