"""How far a check has come: a bar on a terminal, a line now and then elsewhere."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from typing_extensions import Self

EVERY_S = 20.0


class Reading:
    """Shows how many of `total` images were read, and how fast."""

    def __init__(self, console: Console, total: int) -> None:
        self._console, self._total = console, total
        self._done, self._begin = 0, time.monotonic()
        self._told = self._begin
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn("reading"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
            self._task = self._bar.add_task("", total=total, rate="")

    def advance(self, images: int) -> None:
        """So many more were read."""
        self._done += images
        if self._bar:
            self._bar.update(self._task, completed=self._done, rate=self._rate())
        elif time.monotonic() - self._told >= EVERY_S:
            self._told = time.monotonic()
            self._console.print(f"read {self._done} of {self._total} images, {self._rate()}")

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        if kind is None:
            seconds = time.monotonic() - self._begin
            self._console.print(f"read {self._done} images in {seconds:.1f} s, {self._rate()}", highlight=False)

    def _rate(self) -> str:
        return f"{self._done / max(time.monotonic() - self._begin, 1e-9):.0f} images/s"
