"""From results of runs to the figures of a comparison: metrics over seeds, changes against references, delta_m."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from visionmtl.data.label_spaces import task_of
from visionmtl.metrics.base import Direction, Results, numbers
from visionmtl.study.statistics import (
    Interval,
    delta_m_over_metrics,
    delta_m_per_task,
    relative_change,
    student_interval,
)

Metrics = Mapping[str, Mapping[str, Direction]]
"""By task: what is compared, and which way it is better."""


def changes(results: Results, references: Mapping[str, Results], metrics: Metrics) -> dict[str, dict[str, float]]:
    """Relative changes of one run by task, then by metric (`DATASET/metric` where several data sets judge the task).

    references: by task, the results of the run that it is compared with. What either lacks, or is 0 there, is left out.
    """
    found: dict[str, dict[str, float]] = {}
    for name, of_name in results.items():
        task, _, dataset = name.partition("@")
        if task not in references or task not in metrics:
            continue
        reached, to_beat = dict(numbers(of_name)), dict(numbers(references[task].get(name, {})))
        for metric, direction in metrics[task].items():
            value, reference = reached.get(metric), to_beat.get(metric)
            if value is None or reference is None:
                continue
            change = relative_change(value, reference, direction)
            if change is not None:
                found.setdefault(task, {})[f"{dataset}/{metric}" if dataset else metric] = change
    return found


def _in_all(seeds: Sequence[Mapping[str, Mapping[str, float]]]) -> list[dict[str, dict[str, float]]]:
    """The changes by task and metric that every seed has: a mean over others would be of something else."""
    first, *others = seeds or [{}]
    common = {
        task: [metric for metric in of_task if all(metric in other.get(task, ()) for other in others)]
        for task, of_task in first.items()
    }
    return [{task: {m: one[task][m] for m in metrics} for task, metrics in common.items() if metrics} for one in seeds]


@dataclass(frozen=True)
class Figures:
    """What a table says of one variant."""

    metrics: Mapping[tuple[str, str], Interval]  # by name of results and metric
    transfer: Mapping[str, Interval]  # by task: its mean relative change over its metrics
    per_task: Interval | None  # delta_m, tasks first; None: not every task has a reference
    over_metrics: Interval | None  # delta_m over all metrics


def figures(
    results: Sequence[Results], references: Sequence[Mapping[str, Results]], metrics: Metrics, confidence: float
) -> Figures:
    """Of one variant, a value a seed. Each seed's run is compared with the references of the same seed.

    references: for each of the results, by task; {} where the variant is compared with nothing
    """
    values: dict[tuple[str, str], list[float]] = {}
    for one in results:
        for name, of_name in one.items():
            known = dict(numbers(of_name))
            for metric in metrics.get(task_of(name), ()):
                value = known.get(metric)
                if value is not None:
                    values.setdefault((name, metric), []).append(value)

    compared = [changes(*pair, metrics) for pair in zip(results, references, strict=True)]
    compared = _in_all([one for one in compared if one])
    tasks = list(compared[0]) if compared else []
    transfer = {
        task: student_interval([sum(one[task].values()) / len(one[task]) for one in compared], confidence)
        for task in tasks
    }
    learnt = {task_of(name) for one in results for name in one} & set(metrics)
    complete = bool(tasks) and set(tasks) == learnt
    return Figures(
        {key: student_interval(of, confidence) for key, of in values.items()},
        transfer,
        student_interval([delta_m_per_task(one) for one in compared], confidence) if complete else None,
        student_interval([delta_m_over_metrics(one) for one in compared], confidence) if complete else None,
    )
