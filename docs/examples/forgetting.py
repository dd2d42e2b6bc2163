"""What trained networks forget when a task is added to them: every way of `extend`, side by side, over several seeds.

    python docs/examples/forgetting.py OUT [--seeds 0 1 2] [SETTING=VALUE ...]

Two additions on drawn rooms of 64x96: depth to a network of boxes and classes, and the kind of floor to one of all
three. The old network learns 1,600 rooms; the new task is learnt on 800 others, whose labels of the old tasks only
`joint` reads. All are judged on the same 256 rooms. `alone` learns the new task there from random weights, in as many
steps. OUT/forgetting.md is written anew after each run; the same command goes on where an earlier one was stopped.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import visionmtl
from visionmtl.benchmark.figures import Table, markdown
from visionmtl.metrics.base import numbers
from visionmtl.study.statistics import student_interval

METHODS = ("frozen", "lora", "lwf", "ewc", "lwp", "joint")
HEAD = {"type": "aligned", "levels": [3, 4, 5], "num_convs": 1, "norm": "batch"}
DENSE = {"type": "semantic_fpn", "channels": 48, "reduce": False}
TASKS: dict[str, dict[str, Any]] = {
    "detection": {"type": "detection", "head": HEAD},
    "segmentation": {"type": "segmentation", "dropout": 0.0, "decoder": DENSE},
    "depth": {"type": "depth", "min_depth_m": 0.3, "max_depth_m": 12.0, "decoder": DENSE},
    "floor": {"type": "classification"},
}
METRICS = {"detection": "ap50", "segmentation": "miou", "depth": "rmse_m", "floor": "accuracy"}
ADDITIONS = {"depth": ("detection", "segmentation"), "floor": ("detection", "segmentation", "depth")}
"""By new task the old ones."""
Scores = dict[str, float | None]  # by task, in its metric of METRICS


def config(tasks: Sequence[str], rooms: Mapping[str, Any], extend: Mapping[str, Any] | None) -> dict[str, Any]:
    """Settings of one run that learns some tasks from drawn rooms."""
    size = [64, 96]
    return {
        "model": {"encoder": {"name": "resnet10t"}, "pyramid": {"type": "fpn", "channels": 64, "smooth_from": 2}},
        "tasks": {name: TASKS[name] for name in tasks},
        "extend": extend and dict(extend),
        "data": {
            "train": [{"type": "scenes", "size": size, **rooms}],
            "val": [{"type": "scenes", "size": size, "split": "val", "num_images": 256}],
            "size": size, "augment": {"flip": 0.5}, "workers": 0,
        },
        "optim": {"lr": 2e-3, "weight_decay": 0.02, "clip_norm": 10.0, "schedule": "cosine", "warmup_steps": 20,
                  "ema_decay": 0.98},
        "train": {"epochs": 2, "batch_size": 16, "precision": "fp32", "eval_every_epochs": 2, "sample_pictures": 0},
    }  # fmt: skip


class Study:
    """The runs of a folder. A run whose scores.json is there is finished; others begin or go on."""

    def __init__(self, folder: Path, overrides: Sequence[str]) -> None:
        self.folder, self.overrides = folder, overrides

    def addition(self, new: str, seed: int) -> Iterator[None]:
        """Train the old network, every way of adding a task, and the task alone; stops after each run."""
        old, rooms = ADDITIONS[new], {"num_images": 800, "seed": 1}
        self._train(new, "before", seed, old, {"num_images": 1600, "seed": 0}, None)
        before = self._run_folder(new, "before", seed)
        yield
        for method in METHODS:
            extend = {"type": method, "checkpoint": str(before)}
            self._train(new, method, seed, (new,), rooms, extend)
            yield
        self._train(new, "alone", seed, (new,), rooms, None)
        yield

    def _run_folder(self, new: str, way: str, seed: int) -> Path:
        return self.folder / "runs" / f"add_{new}" / way / str(seed)

    def scores(self, new: str, way: str, seed: int) -> Scores | None:
        """Of a finished run; None: it is not finished."""
        file = self._run_folder(new, way, seed) / "scores.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def _train(
        self, new: str, way: str, seed: int, tasks: Sequence[str], rooms: Mapping[str, Any],
        extend: Mapping[str, Any] | None,
    ) -> None:  # fmt: skip
        if self.scores(new, way, seed) is not None:
            return
        folder = self._run_folder(new, way, seed)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder.with_suffix(".yaml")  # JSON is YAML
        file.write_text(json.dumps({**config(tasks, rooms, extend), "seed": seed}, indent=1), encoding="utf-8")
        print(f"adding {new}, {way}, seed {seed}", flush=True)
        results = visionmtl.train(file, *self.overrides, output=folder, resume="auto", device="cpu")
        primary = {task: dict(numbers(of)).get(METRICS[task]) for task, of in results.items()}
        (folder / "scores.json").write_text(json.dumps(primary), encoding="utf-8")

    def write_report(self, seeds: Sequence[int]) -> None:
        """forgetting.md of the finished runs."""
        tables = [markdown(self._table(new, seeds)) for new in ADDITIONS]
        text = "\n\n".join(["# What is forgotten when a task is added", _NOTE, *tables])
        (self.folder / "forgetting.md").write_text(text + "\n", encoding="utf-8")

    def _table(self, new: str, seeds: Sequence[int]) -> Table:
        shown = (*ADDITIONS[new], new)
        rows = []
        for way in ("before", *METHODS, "alone"):
            of_seeds = {seed: one for seed in seeds if (one := self.scores(new, way, seed)) is not None}
            before = {seed: self.scores(new, "before", seed) or {} for seed in of_seeds}
            row = [way, str(len(of_seeds))]
            for task in shown:
                row.append(_cell([one.get(task) for one in of_seeds.values()]))
                if task != new:
                    changed = way not in ("before", "alone")
                    row.append(_cell([_change(one, before[seed], task) for seed, one in of_seeds.items()], signed=True)
                               if changed else "")  # fmt: skip
            rows.append(row)
        heads = [text for task in shown for text in (f"{task} {METRICS[task]}", "change")][:-1]
        return Table(f"{new} added to {', '.join(ADDITIONS[new])}", ("way", "seeds", *heads), rows)


_NOTE = (
    "Mean over seeds ± half of the 95 % Student-t interval; changes are those of the same seed's network before the "
    "task was added. RMSE: less is better; all others: more."
)


def _change(after: Scores, before: Scores, task: str) -> float | None:
    one, other = after.get(task), before.get(task)
    return None if one is None or other is None else one - other


def _cell(values: Sequence[float | None], signed: bool = False) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    interval = student_interval(known, 0.95)
    width = f" ± {interval.half_width:.3f}" if len(known) > 1 else ""
    return (f"{interval.mean:+.3f}" if signed else f"{interval.mean:.3f}") + width


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is missing, seed by seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, metavar="OUT")
    parser.add_argument("overrides", nargs="*", metavar="SETTING=VALUE", help="of every run, as of train.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_intermixed_args(argv)
    study = Study(args.output, args.overrides)
    for seed in args.seeds:
        for new in ADDITIONS:
            for _ in study.addition(new, seed):
                study.write_report(args.seeds)
    print((args.output / "forgetting.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
