"""How one start of a run differs from a plain one."""

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

PROFILE_WARMUP = 2  # steps before a trace, so that it shows a warmed loop


def check_counts(**given: Any) -> None:
    """Raise ValueError for a count that is no whole number of at least 1."""
    for name, value in given.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < 1):
            raise ValueError(f"{name} is {value!r}; a whole number of at least 1, or None, is needed; correct it")


def check_texts(**given: Any) -> None:
    """Raise ValueError for what is neither a text nor None."""
    for name, value in given.items():
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{name} is {value!r}; a text, or None, is needed; correct it")


def check_paths(**given: Any) -> None:
    """Raise ValueError for what is neither a path nor None; an empty text is no path."""
    for name, value in given.items():
        if value is not None and (not isinstance(value, str | Path) or not str(value)):
            raise ValueError(f"{name} is {value!r}; a path, as text or pathlib.Path, or None, is needed; correct it")


@dataclass(frozen=True)
class TrainOptions:
    """How this start differs from a plain one; none of it changes what a whole run computes."""

    resume: str | Path | None = None  # "auto" = this run's last checkpoint if there is one; or a path
    init_from: str | Path | None = None  # weights to start from, nothing else
    overfit: int | None = None  # learn the first N images of each data set only, and evaluate on them
    limit_train_batches: int | None = None  # per epoch
    limit_val_batches: int | None = None
    max_time_s: float | None = None  # stop with a checkpoint
    max_steps: int | None = None  # stop with a checkpoint
    stop: Callable[[], bool] | None = None  # asked after every step; stop with a checkpoint where it says so
    profile: int | None = None  # write a trace of so many steps, and stop
    dry_run: bool = False  # one step, one validation batch, then the largest of both, measured; nothing written
    device: str = "auto"

    def __post_init__(self) -> None:
        check_counts(
            overfit=self.overfit, limit_train_batches=self.limit_train_batches, max_steps=self.max_steps,
            limit_val_batches=self.limit_val_batches, profile=self.profile,
        )  # fmt: skip
        check_paths(resume=self.resume, init_from=self.init_from)
        if self.init_from and self.resume not in (None, "auto"):
            raise ValueError(
                f"init_from is {self.init_from}, and resume {self.resume}; the checkpoint that a run goes on from has "
                "all weights; leave one of them out"
            )
        time_s, stop, dry_run = map(vars(self).get, ("max_time_s", "stop", "dry_run"))
        if time_s is not None and (isinstance(time_s, bool) or not isinstance(time_s, int | float) or not time_s >= 0):
            raise ValueError(f"max_time_s is {time_s!r}; seconds from 0 on, or None, are needed; correct it")
        if stop is not None and not callable(stop):
            raise ValueError(f"stop is {stop!r}; a function that returns whether to stop is needed; give one")
        if not isinstance(dry_run, bool):
            raise ValueError(f"dry_run is {dry_run!r}; True or False is needed; correct it")
