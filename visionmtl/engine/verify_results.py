"""Numbers that must come out of an evaluation, as a command line states them."""

import argparse
import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from visionmtl.config.suggest import did_you_mean

if TYPE_CHECKING:  # it needs torch, and --help is answered at once
    from visionmtl.metrics.base import Meter


@dataclass(frozen=True)
class Expectation:
    """A number that must come out: TASK/METRIC>=X, <=X or =X+-Y; deeper ones as depth/per_class/NAME/METRIC."""

    text: str
    path: tuple[str, ...]
    relation: str
    value: float
    tolerance: float

    @staticmethod
    def parse(text: str) -> "Expectation":
        """Raises ArgumentTypeError with the grammar."""
        number = r"[-+]?\d+\.?\d*(?:e[-+]?\d+)?"
        match = re.fullmatch(rf"([^<>=]+/[^<>=]+?)\s*(>=|<=|=)\s*({number})(?:\+-({number}))?", text)
        if not match or match[1].endswith("/") or (match[2] == "=") != bool(match[4]):
            raise argparse.ArgumentTypeError(
                f"{text!r} is no expectation; allowed are TASK/METRIC>=X, TASK/METRIC<=X and TASK/METRIC=X+-Y; "
                "write for instance segmentation/miou>=0.7"
            )
        return Expectation(text, tuple(match[1].split("/")), match[2], float(match[3]), float(match[4] or 0))

    def check_task(self, tasks: Iterable[str]) -> None:
        """Raises ValueError when its task is not among those that will be measured."""
        if self.path[0] not in tasks:
            raise ValueError(
                f"--expect {self.text}: there is no task {self.path[0]!r}{did_you_mean(self.path[0], tasks)}; "
                f"measured are {', '.join(tasks)}; correct --expect"
            )

    def check(self, meters: "Mapping[str, Meter]") -> None:
        """Raises ValueError when its task will not be measured, or the task's meter has no such number."""
        from visionmtl.metrics.base import declared

        self.check_task(meters)
        task, metric = self.path[0], "/".join(self.path[1:])
        known = {"images": None, **meters[task].metrics}
        if declared(known, metric) is None:
            raise ValueError(
                f"--expect {self.text}: {task} has no {metric!r}{did_you_mean(metric, known)}; it has "
                f"{', '.join(known)}; correct --expect"
            )

    def met(self, results: Mapping[str, Any]) -> tuple[bool, float | None]:
        """Whether it holds, and the value found. Raises ValueError when there is no such metric."""
        here: Any = results
        done, left = "", "/".join(self.path)
        while left:
            known = list(here) if isinstance(here, Mapping) else []
            # class names may hold a slash, too
            key = max((name for name in known if f"{left}/".startswith(f"{name}/")), key=len, default=None)
            if key is None:
                first = left.partition("/")[0]
                raise ValueError(
                    f"--expect {self.text}: {done or 'the results'} has no {first!r}"
                    f"{did_you_mean(first, known)}; it has {', '.join(known) or 'no parts'}; correct --expect"
                )
            here, done, left = here[key], f"{done}/{key}".strip("/"), left[len(key) + 1 :]
        if not isinstance(here, int | float):
            return False, None
        if self.relation == "=":
            return abs(here - self.value) <= self.tolerance, here
        return {">=": operator.ge, "<=": operator.le}[self.relation](here, self.value), here
