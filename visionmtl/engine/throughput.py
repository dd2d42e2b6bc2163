"""How fast a run goes, how much of the time it waits for data, and what to do about that."""

import math
import time
from collections.abc import Callable

from visionmtl.data.loader import Data

MUCH = 0.05
"""Share of the time from which waiting for data is worth a word."""
WARMUP_STEPS = 10  # loader processes start, kernels are chosen or compiled
CHANGED = 0.15  # of the share, before it is said again


class ThroughputMeter:
    """Images a second, share of time waiting for data, time to go; since the last reading."""

    def __init__(self, images_per_step: int, data_time: Callable[[], float]) -> None:
        """data_time: seconds waited for data since its last call."""
        self.images_per_step = images_per_step
        self._data_time = data_time
        self.restart()

    def restart(self) -> None:
        """Forget the time since the last reading (evaluation)."""
        self._data_time()
        self._since, self._steps = time.perf_counter(), 0

    def step(self) -> None:
        """One optimiser step is done."""
        self._steps += 1

    def read(self, steps_left: int) -> dict[str, float]:
        """Figures since the last reading."""
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        figures = {
            "images_per_s": self._steps * self.images_per_step / elapsed,
            "data_time": self._data_time() / elapsed,
            "eta_s": steps_left * elapsed / max(self._steps, 1),
        }
        self.restart()
        return figures


class DataTimeAdvice:
    """A line on what to try when the run waits for data: said once after warming up, and when it became much worse."""

    def __init__(self, data: Data, workers: int, cores: int, processes: int) -> None:
        """workers: loader processes of each of the `processes` that train here; cores: those of the machine."""
        self._data, self._workers, self._cores, self._processes = data, workers, cores, processes
        self._steps, self._said = 0, 0.0

    def line(self, share: float, steps: int) -> str | None:
        """For a reading over `steps` steps, `share` of it waiting."""
        warm, self._steps = self._steps >= WARMUP_STEPS, self._steps + steps
        if not warm or share <= MUCH or (self._said and share < self._said + CHANGED):
            return None
        self._said = share
        tries = "; ".join(f"{number}. {what}" for number, what in enumerate(self._tries(share), 1))
        return f"advice    waiting for data {share:.0%} of the time, more than {MUCH:.0%}; try in this order: {tries}"

    def _tries(self, share: float) -> list[str]:
        data, found = self._data, []
        room = max(self._cores // self._processes - 1, 0)  # workers a process, beside itself
        if self._workers < room:
            # so many would feed the device at their present pace
            wanted = math.ceil(max(self._workers, 1) / (1 - min(share, 0.99)))
            found.append(f"data.workers={min(wanted, room)} instead of {self._workers} ({self._cores} cores)")
        if data.cache is None:
            found.append("data.cache=FOLDER, so that images are decoded once")
        found.append(f"a data.size below {data.size[0]}x{data.size[1]}")
        if data.augment.zoom[1] > 1 and data.cache is None:
            found.append(f"a data.augment.zoom up to less than {data.augment.zoom[1]:g}: what it crops was decoded too")
        if data.augment.pipeline:
            found.append("no data.augment.pipeline, which runs in the workers")
        if self._workers >= room:
            found.append(f"more cores: {self._workers} workers a process take the {self._cores} there are")
        return found
