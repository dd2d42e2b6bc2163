"""The meter contract, and the direction in which each metric gets better."""

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal, Protocol

from visionmtl.structures import Sample

Direction = Literal["max", "min"]

Results = dict[str, dict[str, Any]]
"""By task ("depth"), or by task and data set ("depth@nyuv2") where several judge it: what its meter computed, and
"images" counted; only {"images": 0} where the split has no label for it."""


class Meter(Protocol):
    """Accumulates one split's predictions against the truth at original resolution."""

    metrics: ClassVar[Mapping[str, Direction | None]]
    """Which way each number of `compute` is better; None: neither, it is a count, or best near 0.
    Numbers in tables are named by their path, in which a star stands for any class: `per_class/*/iou`."""

    def update(self, prediction: Any, sample: Sample) -> None:
        """Count one image; a sample without this task's label is not counted."""
        ...

    def state(self) -> Any:
        """What was counted, as plain data and arrays, for merging ranks."""
        ...

    def merge(self, state: Any) -> None:
        """Add another rank's `state`."""
        ...

    def compute(self) -> dict[str, Any]:
        """Metric name -> number, or None where the split cannot tell it.

        Also "per_class" tables (dict class name -> dict) and "protocol" (str).
        """
        ...


def declared(metrics: Mapping[str, Direction | None], name: str) -> str | None:
    """The name or pattern of `Meter.metrics` that covers a number of `compute`, or None."""
    return next((pattern for pattern in metrics if fnmatchcase(name, pattern)), None)


def numbers(result: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, float | None]]:
    """Every number of `compute` by its path ("miou", "per_class/chair/iou"); None where the split cannot tell it."""
    for name, value in result.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{path}{name}/")
        elif value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            yield path + name, value
