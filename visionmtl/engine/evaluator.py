"""Every task's meter over one split, merged over ranks."""

import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from visionmtl.data.label_spaces import Spaces, supervises, task_of
from visionmtl.data.prefetch import Prefetcher
from visionmtl.datasets import NamedDataset
from visionmtl.metrics.base import Meter, Results
from visionmtl.network import MultiTaskNet
from visionmtl.structures import Batch, ImageMeta, Sample
from visionmtl.tasks.base import Raw, Task

Value = TypeVar("Value")

Precision = Literal["fp32", "bf16", "fp16"]
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def forward(net: MultiTaskNet, image: Tensor, precision: Precision) -> dict[str, Raw]:
    """Raw outputs of padded images [B, 3, H, W] in a run's precision: what `evaluate` scores and `Predictor` shows."""
    with torch.autocast(image.device.type, _DTYPES.get(precision), enabled=precision != "fp32"):
        raw: dict[str, Raw] = net(image)
    return raw


def evaluate(
    net: MultiTaskNet,
    loader: Iterable[Batch],
    device: torch.device | str,
    *,
    precision: Precision = "fp32",
    meters: Mapping[str, Meter] | None = None,
    flip: bool = False,
    on_image: Callable[[Sample, dict[str, Any]], None] | None = None,
) -> Results:
    """Measure a split at original resolution. All ranks return the same numbers; the mode of `net` is left as it was.

    loader: each image once over all ranks; `labelled` decides whether a task's meter sees it.
    meters: fresh, by task or by "task@data set" (see `label_spaces.eval_names`); only these are measured. None: every
    task with its own meter, over all data sets.
    flip: predict from each image and its mirror image together; the protocol says so.
    on_image: called with each sample of this rank and its predictions by task (of the tasks measured), labelled or not.
    """
    device = torch.device(device)
    pooled = not meters
    meters = meters or {name: task.meter(net.spaces[name]) for name, task in net.tasks.items()}
    counts = dict.fromkeys(meters, 0)
    feed = Prefetcher(device, _with_image_there)

    with _evaluating(net), torch.inference_mode():
        for (batch,) in feed.groups(loader):
            image = batch.image.to(device)  # there already, unless the feed copies nothing
            raw = forward(net, image, precision)
            mirrored = forward(net, mirror_contents(image, batch.metas), precision) if flip else None
            feed.prefetch()

            size = batch.image.shape[2], batch.image.shape[3]
            predictions: dict[str, list[Any]] = {}
            for name in dict.fromkeys(map(task_of, meters)):
                task, labelled = net.tasks[name], batch.labelled[name].tolist()
                if not any(labelled) and on_image is None:
                    continue
                if mirrored is not None:
                    predictions[name] = task.predict_mirrored(raw[name], mirrored[name], batch.metas, size)
                else:  # whoever else looks at the predictions wants arrays; a meter need not wait for them
                    predict = task.predict_for_meter if on_image is None else task.predict
                    predictions[name] = predict(raw[name], batch.metas, size)
                for i, (prediction, sample) in enumerate(zip(predictions[name], batch.samples, strict=True)):
                    judge = name if name in meters else f"{name}@{batch.datasets[i]}"
                    if labelled[i] and judge in meters:
                        if pooled and batch.datasets:  # two data sets may call an image alike
                            sample = replace(sample, image_id=f"{batch.datasets[i]}/{sample.image_id}")
                        meters[judge].update(prediction, sample)
                        counts[judge] += 1

            if on_image is not None:
                for i, sample in enumerate(batch.samples):
                    on_image(sample, {name: of_batch[i] for name, of_batch in predictions.items()})
    return joined(meters, counts, note="mean of each image and its mirror image" if flip else "")


def evaluate_files(
    reads: Mapping[str, Callable[[Sample], tuple[str, Any]]],
    meters: Mapping[str, Meter],
    tasks: Mapping[str, Task],
    spaces: Spaces,
    sources: Sequence[NamedDataset],
    rank: int = 0,
    world: int = 1,
) -> Results:
    """Measure predictions that were made elsewhere, as `evaluate` does those of a network.

    reads: by task, where the prediction for a sample is found, and it; meters: for these tasks, fresh, named as in
    `evaluate`.
    Raises ValueError, on all ranks, where two images would be judged by one prediction.
    """
    counts = dict.fromkeys(meters, 0)
    read: list[tuple[str, str, str]] = []  # task, place of the prediction, image
    for source in sources:
        judges = {name: name if name in meters else f"{name}@{source.name}" for name in reads}
        taught = [name for name in reads if judges[name] in meters and supervises(source, tasks[name], spaces[name])]
        for index in range(rank, len(source) if taught else 0, world):
            sample = source.read(index)
            for name in taught:
                if getattr(sample, tasks[name].field) is not None:
                    place, prediction = reads[name](sample)
                    meters[judges[name]].update(prediction, sample)
                    counts[judges[name]] += 1
                    read.append((name, place, f"{sample.image_id!r} of {source.name}"))
    _check_own(read)
    return joined(meters, counts)


def _check_own(read: list[tuple[str, str, str]]) -> None:
    """Each image has a prediction of its own, over all ranks."""
    images: dict[tuple[str, str], str] = {}
    for name, place, image in sorted(itertools.chain.from_iterable(_of_all_ranks(read))):
        if (name, place) in images:
            raise ValueError(
                f"images {images[name, place]} and {image} are both judged by the one prediction {place} of {name!r}; "
                "each needs its own; score one data set at a time with --data NAME, or give the images unlike ids"
            )
        images[name, place] = image


def _with_image_there(batch: Batch, device: torch.device) -> Batch:
    """Who is labelled is asked on the host."""
    return replace(batch, image=batch.image.to(device, non_blocking=True))


def mirror_contents(image: Tensor, metas: Sequence[ImageMeta]) -> Tensor:
    """The contents of padded images [B, 3, H, W] turned left to right where they lie; the padding stays behind them."""
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
            states = _of_all_ranks((count, meter.state()))
            count = sum(of_rank for of_rank, _ in states)
            for _, state in states[: dist.get_rank()] + states[dist.get_rank() + 1 :]:
                meter.merge(state)
        results[name] = {"images": count, **(meter.compute() if count else {})}
        if count and note:
            results[name]["protocol"] += f"; {note}"
    return results


def _of_all_ranks(value: Value) -> list[Value]:
    """What each rank has, in their order."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


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
    """Write {"header": ..., "results": ...}, readable by any JSON reader: what is not finite becomes null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = _plain({"header": header, "results": results})
    temporary = path.with_name(path.name + ".writing")  # where the file lies, it is whole
    temporary.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def choose_json(path: Path, header: Mapping[str, Any], free_name: bool) -> Path:
    """Where `save_json` may write without losing other results: a file of this very header is replaced, no other.

    free_name: where `path` is taken, the first free one of path-2, path-3, ...; else that raises ValueError
    """
    header = json.loads(json.dumps(_plain(header)))
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
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return document.get("header") if isinstance(document, dict) else None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
