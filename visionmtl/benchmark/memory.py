"""Start-up of a data set of COCO's size, and the memory that a loader worker takes for itself."""

import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from visionmtl.benchmark.figures import Figure, Row
from visionmtl.datasets.coco import COCO, COCO80

MEMORY = Path("/proc/self/smaps_rollup")


def measure_memory(num_images: int, num_boxes: int) -> Iterator[Figure]:
    """How long a drawn data set takes to start, and what a worker's own memory grows by over an epoch of look-ups."""
    if not MEMORY.is_file():
        raise ValueError(f"there is no {MEMORY}; memory is measured on Linux 4.14 or newer; run it there")
    with tempfile.TemporaryDirectory() as folder:
        file = _write_annotations(Path(folder), num_images, num_boxes)
        yield Row("annotation file", file.stat().st_size / 1e6, "MB")
        with mock.patch.dict(os.environ, VISIONMTL_CACHE=f"{folder}/cache"):  # empty: the first start parses
            for name, limit in (("first start (parses)", None), ("start from the cache", 3.0)):
                begin = time.perf_counter()
                reader = COCO(root=folder).build()
                yield Row(name, time.perf_counter() - begin, "s", limit)

        # a worker owns this before its first look-up, so growth does not include it
        yield Row("reader, as sent to a worker", len(ForkingPickler.dumps(reader)) / 1e6, "MB", 5.0)
        _look_up_all(reader)  # this process maps every page too: a single worker then shares them, as several would
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        with ProcessPoolExecutor(1, multiprocessing.get_context(method)) as pool:
            grown_mb, per_s = pool.submit(_look_up_all, reader).result()
        yield Row("look-ups per second of a worker", per_s, "images")
        yield Row("growth of a worker, Uss", grown_mb, "MB", 5.0)


def _look_up_all(reader: Any) -> tuple[float, float]:
    """MB by which this process's own memory grows, and look-ups a second, in a scattered order that needs no memory."""
    reader.boxes_of(0)
    length, before, begin = len(reader), _own_mb(), time.perf_counter()
    stride = next(stride for stride in range(length * 5 // 8 + 1, 2 * length + 2) if np.gcd(stride, length) == 1)
    for number in range(length):
        reader.boxes_of(number * stride % length)
    per_s = length / (time.perf_counter() - begin)
    return _own_mb() - before, per_s


def _own_mb() -> float:
    """What no other process shares: pages that were written, and pages that were read here alone (unique set size)."""
    kb = dict(line.split()[:2] for line in MEMORY.read_text().splitlines()[1:])
    return (int(kb["Private_Dirty:"]) + int(kb["Private_Clean:"])) / 1024


def _write_annotations(root: Path, num_images: int, num_boxes: int) -> Path:
    """COCO's layout with empty photographs: random boxes, and polygons that make the file as large as the real one."""
    rng, photos, file = np.random.default_rng(0), root / "train2017", root / "annotations" / "instances_train2017.json"
    photos.mkdir()
    file.parent.mkdir()
    ids = [5 * number + 9 for number in range(num_images)]
    images = [{"id": id_, "file_name": f"{id_:012d}.jpg", "height": 480, "width": 640} for id_ in ids]
    for image in images:
        (photos / str(image["file_name"])).touch()

    polygons = [[np.round(rng.uniform(0, 480, 44), 2).tolist()] for _ in range(256)]
    xywh = np.round(rng.uniform([0, 0, 1, 1], [300, 300, 170, 170], (num_boxes, 4)), 2).tolist()
    where, labels = rng.integers(num_images, size=num_boxes).tolist(), rng.integers(80, size=num_boxes).tolist()
    annotations = [
        {"id": k + 1, "image_id": ids[where[k]], "category_id": COCO80.ids[labels[k]], "bbox": xywh[k], "iscrowd": 0,
         "area": round(xywh[k][2] * xywh[k][3] / 2, 4), "segmentation": polygons[k % 256]}
        for k in range(num_boxes)
    ]  # fmt: skip
    categories = [{"id": id_, "name": name} for id_, name in zip(COCO80.ids, COCO80.classes, strict=True)]
    file.write_text(json.dumps({"images": images, "categories": categories, "annotations": annotations}))
    return file
