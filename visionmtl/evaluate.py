"""Every task's meter over one split, merged over ranks, and the few numbers that a run is judged by."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from visionmtl.model import MultiTaskNet
from visionmtl.tasks.base import Task
from visionmtl.types import Batch, Sample

Results = dict[str, dict[str, Any]]
"""By task: what its meter computed, and "images" counted; only {"images": 0} where the split has no label for it."""

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def evaluate(
    net: MultiTaskNet,
    loader: Iterable[Batch],
    device: torch.device | str,
    *,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    on_image: Callable[[Sample, dict[str, Any]], None] | None = None,
) -> Results:
    """Measure a split at original resolution. All ranks return the same numbers; the mode of `net` is left as it was.

    loader: each image once over all ranks; `labelled` decides whether a task's meter sees it.
    on_image: called with each sample of this rank and its predictions by task, labelled or not.
    """
    device = torch.device(device)
    meters = {name: task.meter(net.spaces[name]) for name, task in net.tasks.items()}
    counts = dict.fromkeys(meters, 0)

    with _evaluating(net), torch.inference_mode():
        for batch in loader:
            with torch.autocast(device.type, _DTYPES.get(precision), enabled=precision != "fp32"):
                raw = net(batch.image.to(device, non_blocking=True))

            size = batch.image.shape[2], batch.image.shape[3]
            predictions: dict[str, list[Any]] = {}
            for name, task in net.tasks.items():
                labelled = batch.labelled[name].tolist()
                if not any(labelled) and on_image is None:
                    continue
                predictions[name] = task.predict(raw[name], batch.frames, size)
                for known, prediction, sample in zip(labelled, predictions[name], batch.samples, strict=True):
                    if known:
                        meters[name].update(prediction, sample)
                counts[name] += sum(labelled)

            if on_image is not None:
                for i, sample in enumerate(batch.samples):
                    on_image(sample, {name: of_batch[i] for name, of_batch in predictions.items()})

    results: Results = {}
    for name, meter in meters.items():
        if dist.is_initialized():
            states: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(states, (counts[name], meter.state()))
            counts[name] = sum(count for count, _ in states)
            for _, state in states[: dist.get_rank()] + states[dist.get_rank() + 1 :]:
                meter.merge(state)
        results[name] = {"images": counts[name], **(meter.compute() if counts[name] else {})}
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


def headline(
    results: Mapping[str, Mapping[str, Any]], tasks: Mapping[str, Task]
) -> dict[str, tuple[str, float | None]]:
    """By task: its headline metric's name and value; None where the split could not tell."""
    return {name: (task.headline[0], results[name].get(task.headline[0])) for name, task in tasks.items()}


def score(results: Mapping[str, Mapping[str, Any]], tasks: Mapping[str, Task], rule: str = "mean") -> float:
    """One number, higher is better, by which the best checkpoint is chosen.

    rule "mean": the mean over tasks of the headline value where more is better (these lie in 0..1), and of
    1 / (1 + value) where less is better; tasks that the split cannot judge are left out. "task/metric": that metric,
    turned round as the task's headline says.
    Raises ValueError when the rule names nothing that was measured.
    """
    if rule == "mean":
        values = {name: value for name, (_, value) in headline(results, tasks).items() if value is not None}
        if not values:
            raise ValueError(
                f"none of the tasks {', '.join(tasks)} has labels in this split; at least one is needed to choose the "
                "best checkpoint; add a validation data set with labels"
            )
        turned = [value if tasks[name].headline[1] == "max" else 1 / (1 + value) for name, value in values.items()]
        return sum(turned) / len(turned)

    name, _, metric = rule.partition("/")
    found = results.get(name, {}).get(metric)
    if not isinstance(found, int | float):
        known = [f"{task}/{key}" for task in tasks for key, value in results[task].items() if isinstance(value, float)]
        raise ValueError(f"{rule!r} is {found}; the best checkpoint needs a number; choose mean or {', '.join(known)}")
    return float(found) if tasks[name].headline[1] == "max" else -float(found)


def save_json(results: Mapping[str, Any], path: Path, header: Mapping[str, Any]) -> None:
    """Write {"header": ..., "results": ...}, readable by any JSON reader: what is not finite becomes null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = _plain({"header": header, "results": results})
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
