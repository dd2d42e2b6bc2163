"""Differences between runs over seeds: relative changes, delta_m in its two conventions, Student-t intervals."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.special import stdtrit

from visionmtl.metrics.base import Direction

Changes = Mapping[str, Mapping[str, float]]
"""By task and metric: relative change against the task's reference; positive is better."""


@dataclass(frozen=True)
class Interval:
    """The mean of one value a seed, and where the mean of all seeds lies with a confidence."""

    values: tuple[float, ...]
    mean: float
    low: float  # -inf with a single value, which tells nothing of the others
    high: float  # inf likewise

    @property
    def half_width(self) -> float:
        """Infinite with a single value."""
        return self.high - self.mean

    @property
    def verdict(self) -> str:
        """Of a difference: `positive` or `negative` only where the interval excludes zero."""
        return "positive" if self.low > 0 else "negative" if self.high < 0 else "not shown"


def student_interval(values: Sequence[float], confidence: float) -> Interval:
    """mean +- t(1 - (1 - confidence) / 2; n - 1) s / sqrt(n) of n values, s their standard deviation (Student 1908)."""
    mean = fmean(values)
    if len(values) == 1:
        return Interval(tuple(values), mean, -math.inf, math.inf)
    quantile = float(stdtrit(len(values) - 1, 1 - (1 - confidence) / 2))
    half_width = quantile * stdev(values) / math.sqrt(len(values))
    return Interval(tuple(values), mean, mean - half_width, mean + half_width)


def relative_change(value: float, reference: float, direction: Direction) -> float | None:
    """(value - reference) / reference, negated where less is better; None where the reference is 0."""
    if reference == 0:
        return None
    change = (value - reference) / abs(reference)
    return change if direction == "max" else -change


def delta_m_per_task(changes: Changes) -> float:
    """delta_m, tasks first: the mean over tasks of each task's mean over its metrics.

    Every task counts the same, however many metrics it has (Vandenhende et al. 2022, arXiv:2004.13379, eq. 13, where
    each task has one metric).
    """
    return fmean(fmean(of_task.values()) for of_task in changes.values())


def delta_m_over_metrics(changes: Changes) -> float:
    """delta_m, all metrics in one mean, as in Nash-MTL (Navon et al. 2022, arXiv:2202.01017, sec. 6) and later papers.

    A task with more metrics counts more, which can reorder methods.
    """
    return fmean(change for of_task in changes.values() for change in of_task.values())
