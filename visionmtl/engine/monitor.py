"""Which evaluation of a run is the best: the metric that `train.best` names, turned so that higher is better."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from visionmtl.config.registry import did_you_mean
from visionmtl.data.label_spaces import Spaces, supervises, task_of
from visionmtl.datasets import NamedDataset
from visionmtl.metrics.base import Direction, declared, numbers
from visionmtl.tasks.base import Task


class Monitor:
    """`train.best`, checked against what the validation data can tell.

    "mean": the mean over tasks of the primary metric where more is better (these lie in 0..1), and of 1 / (1 + value)
    where less is better; a task evaluated on several data sets counts with their mean, one without labels is left out.
    "TASK/METRIC" or "TASK@DATASET/METRIC": that metric, negated where less is better.
    """

    def __init__(self, best: str, tasks: Mapping[str, Task], eval_names: Mapping[str, str]) -> None:
        """eval_names: see `label_spaces.eval_names`.

        Raises ValueError for a name that is not evaluated, and for a metric that is unknown or has no direction.
        """
        self.best, self.eval_names = best, tuple(eval_names)
        self._tasks = {name: tasks[task] for name, task in eval_names.items()}
        self._metrics = {name: task.primary_metric for name, task in self._tasks.items()}
        if best != "mean":
            name, _, metric = best.partition("/")
            if name not in eval_names:
                raise ValueError(
                    f"train.best is {best!r}{did_you_mean(name, eval_names)}, but the validation data judge "
                    f"{', '.join(eval_names)}; allowed are mean and NAME/METRIC with such a name; correct it"
                )
            self._metrics = {name: metric}
        self._directions = {name: self._direction(name, metric) for name, metric in self._metrics.items()}

    def _direction(self, name: str, metric: str) -> Direction:
        metrics = self._tasks[name].meter_type.metrics
        pattern = declared(metrics, metric)
        direction = metrics[pattern] if pattern else None
        if direction is None:
            known = [one for one, way in metrics.items() if way]
            what = "is a count, neither better nor worse" if pattern else "is no metric of this task"
            raise ValueError(
                f"train.best is {self.best!r}, but {metric!r}{did_you_mean(metric, known)} {what}; allowed after "
                f"{name}/ are {', '.join(known)}; choose one of them, or mean"
            )
        return direction

    def value(self, results: Mapping[str, Mapping[str, Any]]) -> float:
        """The number of one evaluation, higher is better. Raises ValueError where the results lack it."""
        found = {name: dict(numbers(results[name])).get(metric) for name, metric in self._metrics.items()}
        known = {name: value for name, value in found.items() if value is not None}
        if not known:
            raise ValueError(self._untold())
        if self.best != "mean":
            ((name, value),) = known.items()
            return value if self._directions[name] == "max" else -value
        of_task: dict[str, list[float]] = {}
        for name, value in known.items():
            share = value if self._directions[name] == "max" else 1 / (1 + value)
            of_task.setdefault(task_of(name), []).append(share)
        return sum(sum(shares) / len(shares) for shares in of_task.values()) / len(of_task)

    def comparable(self, saved_best: str, saved_value: float) -> bool:
        """Whether the best value in a checkpoint was found by this rule, and in this direction.

        Older versions gave every metric of a task the direction of its primary one. What is better when less is stored
        negated, and no such metric is below 0.
        """
        return saved_best == self.best and not (
            saved_value > 0 and self.best != "mean" and "min" in self._directions.values()
        )

    def check(self, spaces: Spaces, sources: Sequence[NamedDataset], limit_images: int | None = None) -> None:
        """Raise ValueError, before the first step, where no evaluation of this split can tell the value.

        The labels are measured as if they were predictions, until the value is there: one image is usually enough.
        limit_images: only so many are evaluated, of all data sets in turn.
        """
        if not any(self._told(name, metric, spaces, sources, limit_images) for name, metric in self._metrics.items()):
            raise ValueError(self._untold())

    def _told(
        self, name: str, metric: str, spaces: Spaces, sources: Sequence[NamedDataset], limit_images: int | None
    ) -> bool:
        task, space = self._tasks[name], spaces[task_of(name)]
        dataset = name.partition("@")[2]
        teaches = [dataset in ("", one.name) and supervises(one, task, space) for one in sources]
        meter, measured = task.meter(space), 0
        for source, index in _in_turn(sources, limit_images):
            if not teaches[source]:
                continue
            sample = sources[source].read(index)
            if (truth := task.truth(sample)) is None:
                continue
            meter.update(truth, sample)
            measured += 1
            # computing costs more with every image: after the 1st, 2nd, 4th, 8th, ...
            if measured & (measured - 1) == 0 and dict(numbers(meter.compute())).get(metric) is not None:
                return True
        return measured > 0 and dict(numbers(meter.compute())).get(metric) is not None

    def _untold(self) -> str:
        wanted = ", ".join(f"{name}/{metric}" for name, metric in self._metrics.items())
        return (
            f"train.best is {self.best!r}, but the validation images have no labels that tell {wanted}; the best "
            "checkpoint needs one number; choose another metric, or add validation data with such labels"
        )


def _in_turn(sources: Sequence[NamedDataset], limit: int | None) -> Iterator[tuple[int, int]]:
    """(source, index) of all data sets in turn, as a limited evaluation takes them."""
    lengths = [len(source) for source in sources]
    turns = ((s, i) for i in range(max(lengths, default=0)) for s, length in enumerate(lengths) if i < length)
    for count, turn in enumerate(turns):
        if count == limit:
            return
        yield turn
