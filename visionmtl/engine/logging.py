"""Where a run's rows, messages and pictures go: metrics.jsonl, train.log, TensorBoard and the terminal."""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text
from typing_extensions import Self

from visionmtl.config.console import Console
from visionmtl.config.durations import clock
from visionmtl.config.text_files import check_object, parse_line, printable, read_object
from visionmtl.engine.environment import environment
from visionmtl.engine.loggers import check_loggers, open_loggers
from visionmtl.io.atomic import atomic_write, write_text
from visionmtl.run import LoggerName

logger = logging.getLogger("visionmtl")
"""Messages for people. A `RunLog` sends them to train.log and the terminal."""


class RunLog(logging.Handler):
    """The log of one run. Rank 0 opens it for writing; on the other ranks the same calls do nothing."""

    def __init__(self, screen: "_Screen | None", files: "_Files | None") -> None:
        super().__init__(logging.INFO)
        self._screen = screen
        self._files = files
        logger.addHandler(self)
        logger.setLevel(logging.INFO)

    @classmethod
    def open(
        cls,
        folder: Path,
        write: bool = True,
        resume_step: int | None = None,
        show: bool | None = None,
        evaluated: bool = True,
        loggers: Sequence[LoggerName] = ("tensorboard",),
    ) -> Self:
        """The log in a run directory.

        resume_step: continue existing files; what was logged after this step is dropped, since it will come again;
        so is the row of an evaluation at this step unless it was finished (`evaluated`). None: files begin anew.
        loggers: what else is told, see `engine.loggers`
        write: whether files are written; show: whether the terminal is (None: as `write`).
        """
        screen = _Screen() if (write if show is None else show) else None
        files = _Files(folder, resume_step, evaluated, loggers) if write else None
        log = cls(screen, files)
        if files and files.note:
            logger.info(f"note      {files.note}")
        return log

    def config(self, text: str, init_from: str | Path | None = None) -> None:
        """Keep the resolved config, and what the run runs on.

        init_from: where its first weights came from; None: where the files say so already, that is kept
        """
        if self._files:
            write_text(self._files.folder / "config.yaml", text)
            for one in self._files.loggers:
                one.config(yaml.safe_load(text))
            file = self._files.folder / "env.json"
            origin = init_from or (read_object(file).get("init_from") if file.is_file() else None)
            found = environment() | ({"init_from": str(origin)} if origin else {})
            write_text(file, json.dumps(found, indent=1) + "\n")

    def emit(self, record: logging.LogRecord) -> None:
        """Write a message of `logger`."""
        text = printable(record.getMessage())
        if self._files:
            self._files.line(text)
        if self._screen:
            self._screen.line(text)

    def train(
        self,
        *,
        step: int,
        epoch: int,
        total_steps: int,
        losses: Mapping[str, Mapping[str, float]],
        weights: Mapping[str, float],
        lr: float,
        grad_norm: float,
        images_per_s: float,
        data_time: float,
        eta_s: float,
        gradients: Mapping[str, Mapping[str, float]] | None = None,
        skipped_steps: int | None = None,
    ) -> None:
        """Figures of training: loss parts and weight by task, and how fast it goes.

        gradients: by figure and pair of tasks, how their gradients lie to each other, see `balance.conflict`
        data_time: share of the time, 0..1, in which the loop waited for data.
        skipped_steps: of the run so far, because something was not finite; None: such steps end the run
        """
        row = {
            "kind": "train", "step": step, "epoch": epoch, "losses": losses, "weights": weights, "lr": lr,
            "grad_norm": grad_norm, "images_per_s": images_per_s, "data_time": data_time,
            "memory_mb": peak_memory_mb(), "eta_s": eta_s,
        }  # fmt: skip
        if gradients:
            row["gradients"] = gradients
        if skipped_steps is not None:
            row["skipped_steps"] = skipped_steps
        if self._files:
            self._files.row(row)
            self._files.line(f"step {step}/{total_steps} epoch {epoch}  {_figures(row)}")
        if self._screen:
            self._screen.progress(step, epoch, total_steps, _figures(row))

    def val(self, *, step: int, epoch: int, results: Mapping[str, Mapping[str, Any]]) -> None:
        """Results of an evaluation by task; tables per class belong to the evaluation's own file."""
        numbers = {task: {name: v for name, v in of_task.items() if _is_number(v)} for task, of_task in results.items()}
        if self._files:
            self._files.row({"kind": "val", "step": step, "epoch": epoch, "results": numbers})
        logger.info(f"evaluated at step {step}, epoch {epoch}\n{results_table(results)}")

    def picture(self, tag: str, image: NDArray[np.uint8], step: int) -> None:
        """A picture [H, W, 3] RGB for the loggers."""
        for one in self._files.loggers if self._files else ():
            one.picture(tag, image, step)

    def sync(self) -> None:
        """Make rows and lines survive a loss of power."""
        for file in (self._files.rows, self._files.lines) if self._files else ():
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """Write out what is pending and give the terminal back."""
        logger.removeHandler(self)
        if self._files:
            self._files.close()
        if self._screen:
            self._screen.close()
        self._files = self._screen = None
        super().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self._files:
            self._files.line(f"ended by {type(error).__name__}: {error}")
        self.close()


class _Files:
    def __init__(self, folder: Path, resume_step: int | None, evaluated: bool, loggers: Sequence[LoggerName]) -> None:
        check_loggers(loggers)
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        rows = folder / "metrics.jsonl"
        damaged = _drop_rows_after(rows, resume_step, evaluated) if resume_step is not None and rows.exists() else None
        mode = "w" if resume_step is None else "a"
        self.rows: IO[str] = rows.open(mode, encoding="utf-8")
        self.lines: IO[str] = (folder / "train.log").open(mode, encoding="utf-8")
        self.loggers = open_loggers(loggers, folder, resume_step)
        self.note = damaged

    def row(self, row: Mapping[str, Any]) -> None:
        plain = _finite(row)
        self.rows.write(json.dumps(plain, allow_nan=False) + "\n")
        self.rows.flush()
        numbers = _leaves({key: plain[key] for key in plain if key not in ("kind", "step")})
        scalars = {f"{row['kind']}/{name}": value for name, value in numbers}
        for one in self.loggers:
            one.scalars(scalars, row["step"])
            if row["kind"] == "val":
                one.flush()

    def line(self, text: str) -> None:
        self.lines.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n")
        self.lines.flush()

    def close(self) -> None:
        with ExitStack() as closing:  # all of them, also where one fails
            closing.callback(self.rows.close)
            closing.callback(self.lines.close)
            for logger in self.loggers:
                closing.callback(logger.close)


class _Screen:
    """A progress bar over a line of figures on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        self.console = Console(highlight=False)
        self.bar = Progress(
            TextColumn("epoch {task.fields[epoch]}"), BarColumn(None), MofNCompleteColumn(), expand=True
        )
        self.live: Live | None = None

    def line(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def progress(self, step: int, epoch: int, total_steps: int, figures: str) -> None:
        if not self.console.is_terminal:
            self.line(f"step {step}/{total_steps} epoch {epoch}  {figures}")
            return
        if self.live is None:
            self.bar.add_task("", total=total_steps, epoch=epoch)
            self.live = Live(console=self.console)
            self.live.start()
        self.bar.update(self.bar.task_ids[0], completed=step, epoch=epoch)
        self.live.update(Group(self.bar, Text(figures)))

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()


def _figures(row: Mapping[str, Any]) -> str:
    losses = [f"{task} {sum(parts.values()):.4g}" for task, parts in row["losses"].items()]
    return "  ".join(
        [
            *losses,
            f"lr {row['lr']:.2e}",
            f"{row['images_per_s']:.1f} images/s",
            f"waiting for data {row['data_time']:.0%}",
            f"{row['memory_mb']:,.0f} MB",
            f"eta {clock(row['eta_s'])}",
        ]
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _finite(value: Any) -> Any:
    """The same with null for what JSON has no number for."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _leaves(value: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, float]]:
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _leaves(inner, f"{path}{key}/")
        elif inner is not None:
            yield f"{path}{key}", inner


def parse_row(line: str, where: str) -> dict[str, Any]:
    """One row of a metrics.jsonl. Raises ValueError; where: file and line."""
    row = parse_line(line, where)
    check_object(row, where, {"step": int, "kind": str})
    return row


def _drop_rows_after(path: Path, step: int, evaluated: bool) -> str | None:
    """Keep the rows up to a step, with its evaluation or without; a last line cut off by a crash goes too.

    Returns a note where other lines are damaged: they are left out, and the file as it was stays beside it.
    """
    last = (step, "val" if evaluated else "train")  # in the order of the alphabet, and of the loop
    content = path.read_bytes()
    *whole, _ = content.split(b"\n")
    kept, damaged = [], []
    for number, line in enumerate(whole, 1):
        place = row_place(line, path)
        if place is None:
            damaged.append(number)
        elif place <= last:
            kept.append(line)
    note = None
    if damaged:
        old = path.with_name(path.name + ".damaged")
        with atomic_write(old) as file:
            file.write(content)
        lines = ", ".join(map(str, damaged[:10])) + (", ..." if len(damaged) > 10 else "")
        note = (
            f"{path}: {len(damaged)} damaged line(s) ({lines}); each holds one row as JSON; they are left out, and "
            f"the file as it was is {old.name}"
        )
    with atomic_write(path) as file:
        file.writelines(line + b"\n" for line in kept)
    return note


def row_place(line: bytes, path: Path) -> tuple[int, str] | None:
    """Step and kind of a row of a metrics.jsonl; None where it is none."""
    try:
        row = parse_row(line.decode(), str(path))
    except ValueError:
        return None
    return row["step"], row["kind"]


def results_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Every number of an evaluation with its task and protocol, as plain text."""
    rows: list[tuple[str, str, str]] = []
    for task, of_task in results.items():
        shown = [(name, v) for name, v in of_task.items() if v is None or _is_number(v) or name == "protocol"]
        for at, (name, value) in enumerate(shown):
            missing = "nothing matched" if of_task.get("boxes") else "no labels"
            text = missing if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
            rows.append((task if at == 0 else "", name, text))
    widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
    return "\n".join(f"{task:<{widths[0]}}  {name:<{widths[1]}}  {text}" for task, name, text in rows)


def peak_memory_mb() -> float:
    """The most memory used so far, MiB: of this process's CUDA device where it has one, else of the process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    if sys.platform == "win32":
        return math.nan  # the standard library does not know it there
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
