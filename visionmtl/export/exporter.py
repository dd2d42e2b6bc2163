"""From a checkpoint to a file of another runtime that was compared with it: what `tools/export.py` does."""

import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from visionmtl.config.paths import check_new, home_path
from visionmtl.data.label_spaces import align, eval_names, task_of
from visionmtl.datasets import NamedDataset, first_samples, open_datasets
from visionmtl.engine.checkpoint import Opened, open_model
from visionmtl.engine.evaluator import evaluate_files
from visionmtl.export.base import Format
from visionmtl.export.exported import ExportedModel, Pixels
from visionmtl.export.formats.onnx import Onnx
from visionmtl.export.graph import Preprocessing, make_graph
from visionmtl.export.int8 import quantize
from visionmtl.export.parity import Parity, compare
from visionmtl.inference.predictor import choose_tasks, predict
from visionmtl.io.images import list_images, read_image
from visionmtl.metrics.base import Results
from visionmtl.structures import Sample


@dataclass(frozen=True)
class Loss:
    """What a metric loses by INT8."""

    name: str
    """task/metric, or task@dataset/metric"""
    before: float
    after: float

    @property
    def change(self) -> float:
        return self.after - self.before


@dataclass(frozen=True)
class Exported:
    """What came of an export."""

    path: Path
    parity: list[Parity] = field(default_factory=list)
    num_images: int = 0
    """On which it was compared."""
    losses: list[Loss] = field(default_factory=list)
    float_layers: int = 0
    """Layers that stay in float32 in an INT8 file."""


def open_network(checkpoint: str | Path, overrides: Sequence[str], tasks: Sequence[str] | None) -> Opened:
    """The network on the CPU, in evaluation mode, with these tasks alone; None: all."""
    opened = open_model(checkpoint, "cpu", overrides)
    opened.net.keep(list(choose_tasks(opened.net.tasks, tasks)))
    return opened


def export(
    opened: Opened,
    path: str | Path,
    file_format: Format,
    *,
    batch: int | None = 1,
    decoded: bool = True,
    preprocessing: Preprocessing = "inside",
    images: Sequence[Path] | None = None,
    num_images: int = 50,
) -> Exported:
    """Write a network in a format and compare the file with it; decoded and preprocessing: see `graph.ExportNet`.

    batch: images at once; None: any number
    images: files to compare on; None: the first of the run's validation data, in turn where they are several
    num_images: so many of them; 0: no comparison
    """
    path = check_target(path, file_format, batch)
    chosen = list(itertools.islice(_images(opened, images), num_images))  # before the long work, which needs them
    graph = make_graph(opened.net, opened.run, batch=batch, decoded=decoded, preprocessing=preprocessing)
    file_format.write(graph, path)
    parity = compare(opened.net, ExportedModel(path, file_format=file_format), chosen) if chosen else []
    return Exported(path, parity, len(chosen))


def export_int8(
    opened: Opened,
    path: str | Path,
    file_format: Format,
    *,
    batch: int | None = 1,
    decoded: bool = True,
    preprocessing: Preprocessing = "inside",
    calibration_images: int = 100,
    score_images: int | None = None,
) -> Exported:
    """Write a network with 8-bit weights and activations, and measure what each metric loses on the validation data.

    calibration_images: drawn from the training data, the same at each call
    score_images: the first so many of each validation data set; None: all; 0: no measurement
    """
    path = check_target(path, file_format, batch)
    if not file_format.quantizes:
        able = ", ".join(sorted(name for name, kind in Format.members().items() if kind.quantizes))
        raise ValueError(
            f"format {file_format.type} is not written in INT8; {able} are; choose one of them, or leave out --int8"
        )
    training = calibration(opened, calibration_images)
    ways_out = f"or score no images (--score-images 0), {opened.run.data.elsewhere('val')}"
    validation = open_datasets(opened.run.data.val, ways_out) if score_images != 0 else []
    graph = make_graph(opened.net, opened.run, batch=batch, decoded=decoded, preprocessing=preprocessing)
    with tempfile.TemporaryDirectory() as folder:
        plain, quantized = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        onnx_format = file_format if isinstance(file_format, Onnx) else Onnx()
        onnx_format.write(graph, plain)
        float_model = ExportedModel(plain)
        kept = quantize(plain, _batches(float_model, training), quantized)
        file_format.write_from_onnx(quantized, {**graph.description, "precision": "int8"}, path)
    losses = (
        []
        if not validation
        else metric_losses(opened, ExportedModel(path, file_format=file_format), validation, score_images)
    )
    return Exported(path, losses=losses, float_layers=len(kept))


def check_target(path: str | Path, file_format: Format, batch: int | None) -> Path:
    """The path of the file to write. Raises ValueError where it exists or the format cannot do what is asked."""
    path = home_path(path)
    file_format.check_installed()
    if not path.name.endswith(file_format.suffix):
        raise ValueError(
            f"{path} does not end in {file_format.suffix}, as files of format {file_format.type} do; correct the name"
        )
    check_new(path, *([path.with_suffix(file_format.companion)] if file_format.companion else []))
    if batch is None and not file_format.free_batch:
        raise ValueError(
            f"format {file_format.type} has one number of images a file; any number is not offered; give --batch 1"
        )
    return path


def calibration(opened: Opened, count: int) -> Iterator[Pixels]:
    """Images of the training data sets, drawn at random without repetition, the same at each call."""
    datasets = open_datasets(opened.run.data.train, opened.run.data.elsewhere("train"))
    places = [(dataset, index) for dataset in datasets for index in range(len(dataset))]
    order = np.random.default_rng(0).permutation(len(places))[:count]
    return (places[i][0].read(places[i][1]).image for i in order)


def _batches(model: ExportedModel, images: Iterator[Pixels]) -> Iterator[dict[str, Any]]:
    from visionmtl.data.transforms.augment import fit

    size = model.batch or 1
    while chunk := [fit(image, model.size)[0] for image in itertools.islice(images, size)]:
        yield model.inputs_of([*chunk, *chunk[-1:] * (size - len(chunk))])


def _images(opened: Opened, files: Sequence[Path] | None) -> Iterator[Pixels]:
    if files is not None:
        yield from map(read_image, files)
        return
    data = opened.run.data
    ways_out = f"or compare on images of yours (--images DIR) or on none (--num-images 0), {data.elsewhere('val')}"
    datasets = open_datasets(data.val, ways_out)
    for index in range(max(map(len, datasets))):
        for dataset in datasets:
            if index < len(dataset):
                yield dataset.read(index).image


def image_files(folder: Path) -> list[Path]:
    """The images of a folder, one or more."""
    files = list_images(folder)
    if not files:
        raise ValueError(f"{folder} has no images; one or more are needed to compare on; correct the path")
    return files


def metric_losses(
    opened: Opened, exported: ExportedModel, datasets: Sequence[NamedDataset], limit: int | None
) -> list[Loss]:
    """The primary metric and its like of each task, of the network in float32 and of the file."""
    net, run = opened.net, opened.run
    if limit is not None:
        datasets = [first_samples(dataset, limit) for dataset in datasets]
    datasets = align(datasets, net.tasks, net.spaces)
    before = _measure(lambda image: predict(net, [image], run.data.input_size, "fp32", 1)[0], opened, datasets)
    after = _measure(lambda image: exported.predict([image])[0], opened, datasets)
    losses = []
    for name, result in before.items():
        task = net.tasks[task_of(name)]
        for metric in task.meter_type.metrics:
            if isinstance(result.get(metric), float) and isinstance(after[name].get(metric), float):
                losses.append(Loss(f"{name}/{metric}", result[metric], after[name][metric]))
    return losses


def _measure(
    predict_one: Callable[[Pixels], Mapping[str, Any]], opened: Opened, datasets: Sequence[NamedDataset]
) -> Results:
    net = opened.net
    names = eval_names(net.tasks, net.spaces, datasets)
    meters = {name: net.tasks[task_of(name)].meter(net.spaces[task_of(name)]) for name in names}
    counter = itertools.count()
    last: tuple[Sample | None, Mapping[str, Any]] = None, {}

    def read(task: str, sample: Sample) -> tuple[str, Any]:
        nonlocal last
        if last[0] is not sample:  # the tasks of one sample come one after the other
            last = sample, predict_one(sample.image)
        return str(next(counter)), last[1][task]

    reads = {name: (lambda sample, task=name: read(task, sample)) for name in net.tasks}
    return evaluate_files(reads, meters, net.tasks, net.spaces, datasets)
