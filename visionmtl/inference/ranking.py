"""Which images a network does best and worst on, by any metric of a task."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from visionmtl.config.suggest import did_you_mean
from visionmtl.metrics.base import Meter, declared, numbers
from visionmtl.structures import Sample
from visionmtl.tasks.base import Task


def choose_metric(tasks: Mapping[str, Task], text: str | None) -> tuple[str, str]:
    """(task, metric) of "TASK" or "TASK/METRIC"; None = the first task with its primary metric.

    Raises ValueError for names that the run does not have, and for numbers that are no better or worse.
    """
    name, _, metric = (text or next(iter(tasks))).partition("/")
    if name not in tasks:
        raise ValueError(
            f"there is no task {name!r}{did_you_mean(name, tasks)}; the tasks are {', '.join(tasks)}; correct it"
        )
    task = tasks[name]
    metric = metric or task.primary_metric
    directions = task.meter_type.metrics
    pattern = declared(directions, metric)
    if pattern is None or directions[pattern] is None:
        known = [known for known, direction in directions.items() if direction and "*" not in known]
        raise ValueError(
            f"{metric!r} is no metric of {name} that is better or worse{did_you_mean(metric, known)}; allowed are "
            f"{', '.join(known)}; choose one"
        )
    return name, metric


def image_metric(fresh: Meter, sample: Sample, prediction: Any, metric: str) -> float | None:
    """The metric as a split of this one image has it; None where the image cannot tell it.

    fresh: a meter that has seen nothing, and is left so
    """
    meter = deepcopy(fresh)
    meter.update(prediction, sample)
    return dict(numbers(meter.compute())).get(metric)


def ranked(values: Sequence[float | None], task: Task, metric: str | None = None) -> list[int]:
    """Positions of the values, worst first; those that are None are left out."""
    metric = metric or task.primary_metric
    directions = task.meter_type.metrics
    sign = 1 if directions[declared(directions, metric) or metric] == "max" else -1
    known = [(sign * value, at) for at, value in enumerate(values) if value is not None]
    return [at for _, at in sorted(known)]
