"""How a run goes on where a checkpoint left off: its state, and what the evaluation at that step had found."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from visionmtl.engine import checkpoint
from visionmtl.engine.monitor import Monitor
from visionmtl.metrics.base import Results

if TYPE_CHECKING:  # the trainer resumes by this module
    from visionmtl.engine.trainer import Trainer


def results_file(folder: Path, step: int) -> Path:
    """Where a run directory keeps the results at a step; the file is written when the evaluation is finished."""
    return folder / "eval" / f"step-{step:07d}.json"


def find(folder: Path, which: str | None, dry_run: bool = False) -> Path | None:
    """The checkpoint to go on from, or None for a start from nothing. An existing run is never overwritten silently.

    which: None = a start from nothing; "auto" = the last checkpoint in `folder` if there is one; or a path.
    dry_run: nothing will be written, so that a run that lies there is in no danger.
    """
    last = folder / "checkpoints" / "last.pt"
    if which is None:
        if not dry_run and (folder / "metrics.jsonl").exists():
            raise ValueError(
                f"{folder} already holds a run; one folder holds one run; continue it with --resume, "
                "choose another with --output DIR, or delete it"
            )
        return None
    if which == "auto":
        return last if last.exists() else None
    if "=" in which and not Path(which).exists():
        raise ValueError(
            f"--resume is given {which!r}, which is no file but looks like a setting; a path or nothing may follow "
            f"it; write settings before it ({which} --resume), or --resume=auto"
        )
    return Path(which)


def go_on(trainer: "Trainer", path: Path, monitor: Monitor) -> Results | None:
    """Restore a run from a checkpoint; returns the results at its step, None where that was not evaluated to the end.

    A checkpoint is written before the evaluation at its step, so the best value of that one is added here.
    Results under other names than the monitor's were found on other data and do not count.
    """
    saved = checkpoint.load(path)
    trainer.load_state_dict(saved, path)
    if not monitor.comparable(saved["run"]["train"]["best"], trainer.state.best):
        trainer.state.best = -math.inf
    file = results_file(path.parent.parent, trainer.state.step)
    if not file.exists():
        return None
    results: Results = json.loads(file.read_text(encoding="utf-8"))["results"]
    if set(results) != set(monitor.eval_names):
        return None
    trainer.state.best = max(trainer.state.best, monitor.value(results))
    return results
