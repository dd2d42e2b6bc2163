"""Evaluate a checkpoint: every task under its named protocol, as tables, JSON and a report."""

import argparse
import operator
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if (Path(__file__).resolve().parents[1] / "visionmtl").is_dir():  # a plain checkout works without installing
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from visionmtl import checkpoint, distributed
from visionmtl.checkpoint import Opened, open_model
from visionmtl.data import open_readers, val_loader
from visionmtl.datasets import Reader
from visionmtl.distributed import Ranks
from visionmtl.evaluate import evaluate, save_json
from visionmtl.log import results_table
from visionmtl.overlay import ConfigError, Tree, dotted
from visionmtl.predict import picture, predict
from visionmtl.report import Titled, write_report
from visionmtl.spec import did_you_mean

NUM_PICTURES = 8


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
        if not match or (match[2] == "=") != bool(match[4]):
            raise argparse.ArgumentTypeError(
                f"{text!r} is no expectation; allowed are TASK/METRIC>=X, TASK/METRIC<=X and TASK/METRIC=X+-Y; "
                "write for instance segmentation/miou>=0.7"
            )
        return Expectation(text, tuple(match[1].split("/")), match[2], float(match[3]), float(match[4] or 0))

    def met(self, results: Mapping[str, Any]) -> tuple[bool, float | None]:
        """Whether it holds, and the value found. Raises ValueError when there is no such metric."""
        here: Any = results
        for depth, key in enumerate(self.path):
            if not isinstance(here, Mapping) or key not in here:
                known = list(here) if isinstance(here, Mapping) else []
                raise ValueError(
                    f"--expect {self.text}: {'/'.join(self.path[:depth]) or 'the results'} has no {key!r}"
                    f"{did_you_mean(key, known)}; it has {', '.join(known) or 'no parts'}; correct --expect"
                )
            here = here[key]
        if not isinstance(here, int | float):
            return False, None
        if self.relation == "=":
            return abs(here - self.value) <= self.tolerance, here
        return {">=": operator.ge, "<=": operator.le}[self.relation](here, self.value), here


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("checkpoint", type=Path, help="a .pt file of a run, e.g. runs/NAME/checkpoints/best.pt")
    p.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that replace those of the run")
    p.add_argument("--split", help="read this split of the run's data.val; default: as configured")
    p.add_argument("--json", type=Path, metavar="FILE", help="default: eval/CHECKPOINT-SPLIT.json in the run's folder")
    p.add_argument("--report", type=Path, metavar="FILE.html", help="write a page with numbers, curves and pictures")
    p.add_argument(
        "--expect", type=Expectation.parse, action="append", default=[], metavar="TASK/METRIC>=X",
        help="also <=X and =X+-Y; may be repeated; the exit status is 1 when one is not met",
    )  # fmt: skip
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    p.add_argument("--batch-size", type=int, metavar="N", help="default: the run's train.batch_size")
    p.add_argument("--limit-batches", type=int, metavar="N", help="only the first N batches of each process")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns 0, 1 when an expectation is not met, 2 for an error."""
    args = parser().parse_intermixed_args(argv)
    try:
        ranks = distributed.start(args.device)
        try:
            return _run(args, ranks)
        finally:
            distributed.stop()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace, ranks: Ranks) -> int:
    opened = _open(args, ranks)
    run = opened.run
    for expectation in args.expect:  # a misspelt task is better found before the evaluation than after
        if expectation.path[0] not in run.tasks:
            raise ValueError(
                f"--expect {expectation.text}: the checkpoint has no task {expectation.path[0]!r}"
                f"{did_you_mean(expectation.path[0], run.tasks)}; it has {', '.join(run.tasks)}; correct --expect"
            )
    readers = open_readers(run.data.val)
    loader = val_loader(
        run.data, run.tasks, opened.net.spaces, readers, args.batch_size or run.train.batch_size,
        ranks.rank, ranks.world, limit=args.limit_batches,
    )  # fmt: skip
    results = evaluate(opened.net, loader, ranks.device, precision=run.train.precision)
    failed = [expectation for expectation in args.expect if not expectation.met(results)[0]]
    if not ranks.first:
        return int(bool(failed))

    split = args.split or "val"
    partial = f"-first{args.limit_batches}" if args.limit_batches else ""
    # a checkpoint that was moved out of its run has no run folder: write beside it
    folder = (
        opened.folder if args.checkpoint.resolve().parent.name == "checkpoints" else args.checkpoint.resolve().parent
    )
    file = args.json or folder / "eval" / f"{args.checkpoint.stem}-{split}{partial}.json"
    header = {
        "checkpoint": str(args.checkpoint), "step": opened.step, "epoch": opened.epoch, "split": split,
        "overrides": args.overrides, "limit_batches": args.limit_batches, "size": run.data.size,
        "precision": run.train.precision, "device": ranks.device.type, "torch": torch.__version__,
    }  # fmt: skip
    save_json(results, file, header)

    print(f"{args.checkpoint}: step {opened.step}, {split}, input {run.data.size}, {run.train.precision}")
    print(results_table(results))
    for name, result in results.items():
        _show_classes(name, result)
    print(f"written: {file}")
    if args.report:
        write_report(args.report, folder, results, _pictures(opened, readers))
        print(f"written: {args.report}")
    for expectation in args.expect:
        met, value = expectation.met(results)
        print(f"{'met' if met else 'NOT MET'}: {expectation.text} (found {'none' if value is None else value})")
    return int(bool(failed))


def _open(args: argparse.Namespace, ranks: Ranks) -> Opened:
    """The network, with the overrides laid over the run's own settings."""
    settings = Tree(checkpoint.load(args.checkpoint)["run"], {(): f"checkpoint {args.checkpoint}"})
    try:
        for override in args.overrides:
            settings.override(override)
        if args.split:
            for position in range(len(settings.values["data"]["val"])):
                settings.override(f"data.val.{position}.split={args.split}")
        return open_model(args.checkpoint, ranks.device, settings.resolved())
    except ValidationError as error:
        problems = "; ".join(f"{dotted(problem['loc'])}: {problem['msg']}" for problem in error.errors())
        raise ConfigError(f"settings do not fit: {problems}; correct the overrides or --split") from None


def _show_classes(name: str, result: Mapping[str, Any]) -> None:
    if result.get("per_class"):
        columns = list(next(iter(result["per_class"].values())))
        classes = Table(name, *columns)
        for label, row in result["per_class"].items():
            classes.add_row(label, *(_text(row[column]) for column in columns))
        Console(markup=False).print(classes)
    for key in ("absent", "absent_but_predicted"):
        if result.get(key):
            print(f"{name}, {key.replace('_', ' ')}: {', '.join(result[key])}")


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _pictures(opened: Opened, readers: Sequence[Reader]) -> list[Titled]:
    """The first images, predictions above the truth."""
    run, net = opened.run, opened.net
    first = val_loader(run.data, run.tasks, net.spaces, readers, NUM_PICTURES, workers=0, limit=1)
    pictures: list[Titled] = []
    for batch in first:
        predictions = predict(net, [sample.image for sample in batch.samples], run.data.size)
        for i, (sample, prediction) in enumerate(zip(batch.samples, predictions, strict=True)):
            truth = {name: task.truth(sample) for name, task in run.tasks.items() if batch.labelled[name][i]}
            rows = {"prediction": prediction, "truth": truth}
            pictures.append((sample.image_id, picture(run.tasks, net.spaces, sample.image, rows)))
    return pictures


if __name__ == "__main__":
    sys.exit(main())
