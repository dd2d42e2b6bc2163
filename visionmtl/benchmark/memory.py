"""Start-up of a data set of COCO's size, and the memory that its loader workers take for themselves."""

import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from visionmtl.benchmark.base import Figure, Row
from visionmtl.config.registry import Spec
from visionmtl.datasets.coco import COCO, COCO80

MEMORY = Path("/proc/self/smaps_rollup")


class Memory(Spec):
    """A drawn data set of COCO's size and layout; its photographs are empty files that nobody opens."""

    images: int = 118_287  # COCO's
    boxes: int = 860_001
    workers: int = Field(2, description="processes; each looks up every image")
    folder: Path | None = Field(None, description="keep the drawn data set there, and use it again")

    def measure(self) -> Iterator[Figure]:
        """How long it takes to start, and what a worker's own memory grows by over an epoch of look-ups."""
        if not MEMORY.is_file():
            raise ValueError(f"there is no {MEMORY}; memory is measured on Linux 4.14 or newer; run it there")
        if min(self.images, self.boxes, self.workers) < 1:
            raise ValueError("--images, --boxes and --workers must be at least 1; correct them")
        with tempfile.TemporaryDirectory() as folder:
            root = self.folder or Path(folder)
            file = _write_annotations(root, self.images, self.boxes)
            yield Row("annotation file", file.stat().st_size / 1e6, "MB")
            yield from _measure_data(root, self.workers)


def _measure_data(root: Path, workers: int) -> Iterator[Row]:
    spec, own = COCO(root=str(root)), os.environ.get("VISIONMTL_CACHE")
    os.environ["VISIONMTL_CACHE"] = str(root / "cache" / str(time.time_ns()))  # empty: the first start parses
    try:
        for name, limit in (("first start (parses)", None), ("start from the cache", 3.0)):
            begin = time.perf_counter()
            reader = spec.build()
            yield Row(name, time.perf_counter() - begin, "s", limit)
    finally:
        del os.environ["VISIONMTL_CACHE"]
        if own is not None:
            os.environ["VISIONMTL_CACHE"] = own

    # what is sent is the worker's own before the first look-up, so it counts apart
    yield Row("reader, as sent to a worker", len(ForkingPickler.dumps(reader)) / 1e6, "MB", 5.0)
    num_boxes = _visit(reader)  # this process maps every page too: a single worker then shares them as several do
    grown = _memory_of_workers(reader, workers, num_boxes)
    yield Row("look-ups per second of a worker", min(one["rate"] for one in grown), "images")
    for kind in ("Private_Dirty", "Private_Clean", "Uss"):
        yield Row(f"growth of a worker, {kind}", max(one[kind] for one in grown), "MB", 5.0)


def _memory_of_workers(reader: Any, workers: int, num_boxes: int) -> list[dict[str, float]]:
    """What every worker's own memory grew by, MB, when all of them had visited every image."""
    methods = multiprocessing.get_all_start_methods()
    forkserver = "forkserver" in methods
    context = multiprocessing.get_context("forkserver") if forkserver else multiprocessing.get_context("spawn")
    barrier, ends, processes = context.Barrier(workers), [], []
    for number in range(workers):
        end, far_end = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(reader, number, far_end, barrier))
        process.start()
        far_end.close()
        ends.append(end)
        processes.append(process)
    try:
        grown = [end.recv() for end in ends]
    except EOFError:
        raise ValueError("a worker ended early; its own message is above; free memory or lower --workers") from None
    finally:
        for process in processes:
            process.join()
    for one in grown:
        assert one.pop("boxes") == num_boxes  # all of them looked at everything
    return grown


def _work(reader: Any, number: int, end: Connection, barrier: Barrier) -> None:
    reader.boxes_of(0)
    before, begin = _private_mb(), time.perf_counter()
    num_boxes = _visit(reader, number)
    seconds = time.perf_counter() - begin
    barrier.wait()  # as long as another process maps a page, it is nobody's own
    grown = {kind: value - before[kind] for kind, value in _private_mb().items()}
    barrier.wait()
    end.send({**grown, "boxes": num_boxes, "rate": len(reader) / seconds})


def _visit(reader: Any, start: int = 0) -> int:
    """Look up all boxes in a scattered order that takes no memory; returns their number."""
    length = len(reader)
    step = next(step for step in range(length * 5 // 8 + 1, 2 * length + 2) if np.gcd(step, length) == 1)
    return sum(len(reader.boxes_of((start + number * step) % length).labels) for number in range(length))


def _private_mb() -> dict[str, float]:
    """This process's own memory: written pages, read pages nobody else maps, and both (the unique set size)."""
    lines = [line.split() for line in MEMORY.read_text().splitlines()[1:]]
    kb = {line[0].rstrip(":"): int(line[1]) for line in lines}
    own = {kind: kb[kind] / 1024 for kind in ("Private_Dirty", "Private_Clean")}
    return {**own, "Uss": sum(own.values())}


def _write_annotations(root: Path, num_images: int, num_boxes: int) -> Path:
    """COCO's layout with empty photographs: random boxes, and polygons that make the file as large as the real one."""
    file = root / "annotations" / "instances_train2017.json"
    if file.is_file():
        return file
    rng, photos = np.random.default_rng(0), root / "train2017"
    photos.mkdir(parents=True, exist_ok=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    names = [f"{5 * number + 9:012d}.jpg" for number in range(num_images)]
    for name in names:
        (photos / name).touch()

    outlines = [json.dumps([np.round(rng.uniform(0, 480, 44), 2).tolist()]) for _ in range(256)]
    low, extent = np.round(rng.uniform(0, 300, (num_boxes, 2)), 2), np.round(rng.uniform(1, 170, (num_boxes, 2)), 2)
    xywh = np.concatenate([low, extent], axis=1).tolist()
    places, labels = rng.integers(num_images, size=num_boxes), rng.integers(80, size=num_boxes)
    unfinished = file.with_suffix(".unfinished")
    with unfinished.open("w") as out:
        images = [{"id": int(name[:12]), "file_name": name, "height": 480, "width": 640} for name in names]
        categories = [{"id": i, "name": name} for i, name in zip(COCO80.ids, COCO80.classes, strict=True)]
        out.write(f'{{"images": {json.dumps(images)}, "categories": {json.dumps(categories)}, "annotations": [')
        for number, (box, place, label) in enumerate(zip(xywh, places.tolist(), labels.tolist(), strict=True)):
            outline, area, category = outlines[number % 256], round(box[2] * box[3] / 2, 4), COCO80.ids[label]
            out.write(
                f'{"," if number else ""}\n{{"segmentation": {outline}, "area": {area}, "iscrowd": 0, '
                f'"image_id": {5 * place + 9}, "bbox": {box}, "category_id": {category}, "id": {number + 1}}}'
            )
        out.write("]}\n")
    unfinished.rename(file)
    return file
