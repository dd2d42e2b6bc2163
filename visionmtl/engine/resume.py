"""How a run goes on where a checkpoint left off: its state, and what the evaluation at that step had found."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from visionmtl.data.label_spaces import Spaces, supervises
from visionmtl.datasets import NamedDataset
from visionmtl.engine import checkpoint
from visionmtl.engine.evaluator import Results, score
from visionmtl.engine.state import RunState
from visionmtl.run import Run


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


def go_on(state: RunState, path: Path, judged: set[str]) -> Results | None:
    """Restore a run from a checkpoint; returns the results at its step, None where that was not evaluated to the end.

    A checkpoint is written before the evaluation at its step, so the best value of that one is added here.
    judged: names of this run's results; a file with others was found on other data and does not count.
    """
    saved = checkpoint.load(path)
    state.restore(saved, path)
    rule = state.run.train.best
    if saved["run"]["train"]["best"] != rule:
        state.best = -math.inf  # values by different rules cannot be compared
    file = results_file(path.parent.parent, state.step)
    if not file.exists():
        return None
    results: Results = json.loads(file.read_text(encoding="utf-8"))["results"]
    if set(results) != judged:
        return None
    state.best = max(state.best, score(results, state.run.tasks, rule))
    return results


def check_best(run: Run, spaces: Spaces, judged: Mapping[str, str], sources: Sequence[NamedDataset]) -> None:
    """Refuse a `train.best` that no evaluation of this run can answer, before the first step and not after an epoch.

    judged: names of results and their tasks (see `spaces.judged`). Which metrics there are is known after evaluating.
    """
    names = [
        name
        for name, task in judged.items()
        if any(supervises(source, run.tasks[task], spaces[task]) for source in sources)
    ]
    rule = run.train.best
    if not names or (rule != "mean" and rule.partition("/")[0] not in names):
        raise ValueError(
            f"train.best is {rule!r}, but the validation data judge {', '.join(names) or 'no task of this run'}; mean "
            "needs one of them, and anything else is NAME/METRIC with such a name; correct it, or add data with labels"
        )
