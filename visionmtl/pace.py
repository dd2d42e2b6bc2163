"""How fast a run goes, and how much of the time it waits for data."""

import time
from collections.abc import Iterator

from visionmtl.types import Batch


class Pace:
    """Images a second, share of time waiting for data, time to go; since the last reading."""

    def __init__(self, images_per_step: int) -> None:
        self.images_per_step = images_per_step
        self.restart()

    def restart(self) -> None:
        """Forget the time since the last reading (evaluation)."""
        self.since, self.waited_s, self.steps = time.perf_counter(), 0.0, 0

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; time spent in getting them is counted as waiting."""
        while True:
            before = time.perf_counter()
            batch = next(batches, None)
            self.waited_s += time.perf_counter() - before
            if batch is None:
                return
            yield batch

    def step(self) -> None:
        """One optimiser step is done."""
        self.steps += 1

    def read(self, steps_left: int) -> dict[str, float]:
        """Figures since the last reading."""
        elapsed = max(time.perf_counter() - self.since, 1e-9)
        figures = {
            "images_per_s": self.steps * self.images_per_step / elapsed,
            "data_wait_share": self.waited_s / elapsed,
            "eta_s": steps_left * elapsed / max(self.steps, 1),
        }
        self.restart()
        return figures
