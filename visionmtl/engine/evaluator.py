"""Every task's meter over one split, merged over ranks."""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from visionmtl.config.text_files import check_object, read_object
from visionmtl.data.label_spaces import Spaces, supervises, tasks_of
from visionmtl.data.prefetch import Prefetcher
from visionmtl.datasets import NamedDataset
from visionmtl.engine.distributed import gather_objects
from visionmtl.io.atomic import plain_json, write_json
from visionmtl.metrics.base import Meter, Results
from visionmtl.network import MultiTaskNet
from visionmtl.ops.precision import Precision, autocast
from visionmtl.structures import Batch, ImageMeta, Sample
from visionmtl.tasks.base import Raw, Task


def forward(
    net: Callable[..., Any], image: Tensor, precision: Precision, tasks: Sequence[str] | None = None
) -> dict[str, Raw]:
    """Raw outputs of padded images [B, C, H, W] in a run's precision: what `evaluate` scores and `Predictor` shows.

    net: a `MultiTaskNet`, or its compiled `forward`; tasks: the decoders that run, None = all
    """
    with autocast(image.device, precision):
        raw: dict[str, Raw] = net(image) if tasks is None else net(image, tasks)
    return raw


def evaluate(
    net: MultiTaskNet,
    loader: Iterable[Batch],
    device: torch.device | str,
    *,
    precision: Precision = "fp32",
    meters: Mapping[str, Meter] | None = None,
    flip: bool = False,
    on_image: Callable[[Sample, dict[str, Any], Sequence[str]], None] | None = None,
) -> Results:
    """Measure a split at original resolution. All ranks return the same numbers; the mode of `net` is left as it was.

    loader: each image once over all ranks; `labelled` decides whether a task's meter sees it.
    meters: fresh, by task or by "task@data set" (see `label_spaces.eval_names`); only these are measured. None: every
    task with its own meter, over all data sets. A meter named "task+task" gets the predictions of both as a tuple, of
    images that are labelled for both.
    flip: predict from each image and its mirror image together; the protocol says so.
    on_image: called with each sample of this rank, its predictions by task (of the tasks measured), and the names of
    the tasks that it is labelled for.
    """
    device = torch.device(device)
    pooled = not meters
    meters = meters or {name: task.meter(net.spaces[name]) for name, task in net.tasks.items()}
    measured = {task: net.tasks[task] for name in meters for task in tasks_of(name)}
    counts = dict.fromkeys(meters, 0)
    prefetcher = Prefetcher(device, _image_to)

    with _evaluating(net), torch.inference_mode():
        for (batch,) in prefetcher.groups(loader):
            image = batch.image.to(device)  # there already, unless the prefetcher copies nothing
            raw = forward(net, image, precision)
            mirrored = forward(net, mirror_contents(image, batch.metas), precision) if flip else None
            prefetcher.prefetch()

            labelled = {name: batch.labelled[name].tolist() for name in measured}
            predictions = {
                name: _predict(
                    task, batch, labelled[name], raw[name], mirrored and mirrored[name], as_arrays=on_image is not None
                )
                for name, task in measured.items()
                if on_image is not None or any(labelled[name])
            }
            for i, sample in enumerate(batch.samples):
                dataset = batch.datasets[i] if batch.datasets else ""
                # two data sets may call an image alike
                known = replace(sample, image_id=f"{dataset}/{sample.image_id}") if pooled and dataset else sample
                for name, meter in meters.items():
                    tasks, evaluated_on = tasks_of(name), name.partition("@")[2]
                    if evaluated_on in ("", dataset) and all(labelled[task][i] for task in tasks):
                        of_tasks = tuple(predictions[task][i] for task in tasks)
                        meter.update(of_tasks if len(tasks) > 1 else of_tasks[0], known)
                        counts[name] += 1
                if on_image is not None:
                    evaluated = [name for name in measured if labelled[name][i]]
                    on_image(sample, {name: of_batch[i] for name, of_batch in predictions.items()}, evaluated)
    return joined(meters, counts, note="mean of each image and its mirror image" if flip else "")


def _predict(
    task: Task, batch: Batch, labelled: Sequence[bool], raw: Raw, mirrored: Raw | None, as_arrays: bool
) -> list[Any]:
    """One prediction per image. A meter also takes what stays on the device, so that nothing waits for it."""
    size = batch.image.shape[2], batch.image.shape[3]
    # where an image is not labelled for the task, what is annotated in it is said of another task's classes
    pairs = zip(batch.metas, labelled, strict=True)
    metas = [meta if evaluated else replace(meta, annotated={}) for meta, evaluated in pairs]
    if mirrored is not None:
        return task.predict_mirrored(raw, mirrored, metas, size)
    return (task.predict if as_arrays else task.predict_for_meter)(raw, metas, size)


def evaluate_files(
    reads: Mapping[str, Callable[[Sample], tuple[str, Any]]],
    meters: Mapping[str, Meter],
    tasks: Mapping[str, Task],
    spaces: Spaces,
    datasets: Sequence[NamedDataset],
    rank: int = 0,
    world: int = 1,
) -> Results:
    """Measure predictions that were made elsewhere, as `evaluate` does those of a network.

    reads: by task, the place of the prediction for a sample, and the prediction; meters: for these tasks, fresh, named
    as in `evaluate`.
    Raises ValueError, on all ranks, where two images would be measured by one prediction.
    """
    counts = dict.fromkeys(meters, 0)
    places: list[tuple[str, str, str]] = []  # task, place of the prediction, image
    for dataset in datasets:
        names = {task: task if task in meters else f"{task}@{dataset.name}" for task in reads}
        scored = {t: n for t, n in names.items() if n in meters and supervises(dataset, tasks[t], spaces[t])}
        for index in range(rank, len(dataset) if scored else 0, world):
            sample = dataset.read(index)
            for task, name in scored.items():
                if getattr(sample, tasks[task].field) is not None:
                    place, prediction = reads[task](sample)
                    meters[name].update(prediction, sample)
                    counts[name] += 1
                    places.append((task, place, f"{sample.image_id!r} of {dataset.name}"))
    _check_distinct(places)
    return joined(meters, counts)


def _check_distinct(places: list[tuple[str, str, str]]) -> None:
    """Each image has a prediction of its own, over all ranks."""
    images: dict[tuple[str, str], str] = {}
    for task, place, image in sorted(itertools.chain.from_iterable(gather_objects(places))):
        if (task, place) in images:
            raise ValueError(
                f"images {images[task, place]} and {image} are both evaluated by the prediction {place} of {task!r}; "
                "each needs its own; score one data set at a time with --data NAME, or give the images unlike ids"
            )
        images[task, place] = image


def _image_to(batch: Batch, device: torch.device) -> Batch:
    """The image alone on the device: the host asks who is labelled."""
    return replace(batch, image=batch.image.to(device, non_blocking=True))


def mirror_contents(image: Tensor, metas: Sequence[ImageMeta]) -> Tensor:
    """The contents of padded images [B, C, H, W] turned left to right where they lie; the padding stays behind them."""
    mirrored = image.clone()
    for one, meta in zip(mirrored, metas, strict=True):
        height, width = meta.content_size
        one[:, :height, :width] = one[:, :height, :width].flip(-1)
    return mirrored


def joined(meters: Mapping[str, Meter], counts: Mapping[str, int], note: str = "") -> Results:
    """The results over all ranks, each of which has measured `counts` labelled images a task.

    note: what every protocol says besides.
    """
    results: Results = {}
    for name, meter in meters.items():
        count = counts[name]
        if dist.is_initialized():
            states = gather_objects((count, meter.state()))
            count = sum(of_rank for of_rank, _ in states)
            for _, state in states[: dist.get_rank()] + states[dist.get_rank() + 1 :]:
                meter.merge(state)
        results[name] = {"images": count, **(meter.compute() if count else {})}
        if count and note:
            results[name]["protocol"] += f"; {note}"
    return results


@contextmanager
def _evaluating(net: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards each module in the mode it had (frozen parts of a training net stay so)."""
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def save_json(results: Mapping[str, Any], path: Path, header: Mapping[str, Any]) -> None:
    """The file of an evaluation: {"header": ..., "results": ...}."""
    write_json(path, {"header": header, "results": results})


_KINDS = {"protocol": str, "per_class": dict, "pr_curves": dict, "absent": list, "absent_but_predicted": list,
          "not_annotated": list}  # fmt: skip
"""What the results of a task hold beside numbers; a plug-in's may hold more."""


def read_results(path: Path) -> Results:
    """The results in a file that `save_json` wrote. Raises ValueError for another."""
    results: Results = read_object(path, {"results": dict})["results"]
    for name, of_task in results.items():
        where = f"{path}: results.{name}"
        check_object(of_task, where)
        check_object(of_task, where, {key: kind for key, kind in _KINDS.items() if key in of_task})
        for of_class, values in of_task.get("per_class", {}).items():
            check_object(values, f"{where}.per_class.{of_class}")
    return results


def choose_json(path: Path, header: Mapping[str, Any], free_name: bool) -> Path:
    """Where `save_json` may write without losing other results: a file of this very header is replaced, no other.

    free_name: where `path` is taken, the first free one of path-2, path-3, ...; else that raises ValueError
    """
    header = json.loads(json.dumps(plain_json(header)))
    names = [path.name, *(f"{path.stem}-{number}{path.suffix}" for number in range(2, 10_000) if free_name)]
    for candidate in map(path.with_name, names):
        if not candidate.exists() or _header_of(candidate) == header:
            return candidate
    raise ValueError(
        f"{path} exists and holds something else than the results of this evaluation; nothing is written over; choose "
        "another name, or move it away"
    )


def _header_of(path: Path) -> Any:
    try:
        return read_object(path).get("header")
    except ValueError:  # a file of another kind
        return None
