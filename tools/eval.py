"""Evaluate a checkpoint, or predictions in files: every task under its named protocol, as tables, JSON and a report."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

if (Path(__file__).resolve().parents[1] / "visionmtl").is_dir():  # a plain checkout works without installing
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from visionmtl import run as config
from visionmtl.coco_files import score_results
from visionmtl.config.loader import ConfigError, Tree, dotted
from visionmtl.config.registry import did_you_mean
from visionmtl.data.label_spaces import Spaces, judged, resolve_spaces, supervises, task_of
from visionmtl.data.loader import val_loader
from visionmtl.datasets import NamedDataset, open_datasets
from visionmtl.engine import checkpoint, distributed
from visionmtl.engine.checkpoint import Opened, open_model
from visionmtl.engine.distributed import LostProcess, Ranks
from visionmtl.engine.evaluator import Results, evaluate, evaluate_files, save_json
from visionmtl.engine.logging import results_table
from visionmtl.engine.protocols import find_protocol
from visionmtl.eval_options import check, parser
from visionmtl.inference.predictor import picture, predict
from visionmtl.inference.results_io import KITTI_UNITS, SubmissionWriter, check_empty, open_predictions, paths_by_task
from visionmtl.metrics.detection import DetectionMeter
from visionmtl.ops.coco_ap import official_lines
from visionmtl.report import Titled, write_report
from visionmtl.run import Run
from visionmtl.tasks.base import Meter, Task

NUM_PICTURES = 8


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns 0, 1 when an expectation is not met, 2 for an error."""
    args = parser(__doc__).parse_intermixed_args(argv)
    try:
        check(args)
        if args.truth:
            return _score_coco_files(args)
        with distributed.group(args.device) as ranks:
            return _score_files(args, ranks) if args.from_predictions else _score_network(args, ranks)
    except (ValueError, LostProcess) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _score_network(args: argparse.Namespace, ranks: Ranks) -> int:
    opened = _open(args, ranks)
    run, spaces = opened.run, opened.net.spaces
    meters, sources = _rules(args, run.tasks, spaces, _sources(args, run, ranks))
    tasks = {name: run.tasks[name] for name in map(task_of, meters)}
    loader = val_loader(
        run.data, tasks, spaces, sources, args.batch_size or run.train.batch_size,
        ranks.rank, ranks.world, limit=args.limit_batches,
    )  # fmt: skip
    writer = None
    if args.save_predictions:
        check_empty(args.save_predictions)
        distributed.barrier()  # before any rank fills it
        writer = SubmissionWriter(args.save_predictions, tasks, spaces, args.depth_units or KITTI_UNITS)
    results = evaluate(
        opened.net, loader, ranks.device, precision=run.train.precision, meters=meters, flip=args.tta == "flip",
        on_image=writer.add if writer else None,
    )  # fmt: skip
    if writer:
        writer.close()
    if not ranks.first:
        return _unmet(args, results, show=False)

    split = args.split or "val"
    words = [split, args.protocol, args.tta, args.limit_batches and f"first{args.limit_batches}"]
    path = Path(args.checkpoint)
    # a checkpoint that was moved out of its run has no run folder: write beside it
    folder = opened.folder if path.resolve().parent.name == "checkpoints" else path.resolve().parent
    file = args.json or folder / "eval" / f"{'-'.join([path.stem, *(word for word in words if word)])}.json"
    header = {
        "checkpoint": args.checkpoint, "step": opened.step, "epoch": opened.epoch, "split": split,
        "overrides": args.overrides, "limit_batches": args.limit_batches, "size": run.data.input_size,
        "protocol": args.protocol, "tta": args.tta,
        "precision": run.train.precision, "device": ranks.device.type, "torch": torch.__version__,
    }  # fmt: skip
    title = f"{args.checkpoint}: step {opened.step}, {split}, input {run.data.input_size}, {run.train.precision}"
    _print(title, args, results, header, file)
    if args.save_predictions:
        print(f"written: {args.save_predictions}")
    if args.report:
        write_report(args.report, folder, results, _pictures(opened, tasks, sources))
        print(f"written: {args.report}")
    return _unmet(args, results)


def _score_files(args: argparse.Namespace, ranks: Ranks) -> int:
    if args.checkpoint.endswith(".pt"):
        opened = _open(args, ranks)
        run, known = opened.run, opened.net.spaces
    else:
        run, known = _load(args), None
    paths = paths_by_task(args.from_predictions, run.tasks)
    tasks = {name: run.tasks[name] for name in paths}
    sources = _sources(args, run, ranks)
    spaces = known or resolve_spaces(tasks, sources)
    meters, sources = _rules(args, tasks, spaces, sources)

    scored = dict.fromkeys(map(task_of, meters))
    files = {name: open_predictions(paths[name], tasks[name], spaces[name], args.depth_units) for name in scored}
    reads = {name: of_task.read for name, of_task in files.items()}
    results = evaluate_files(reads, meters, tasks, spaces, sources, ranks.rank, ranks.world)
    if ranks.first:
        split, left_out = args.split or "val", [name for name in run.tasks if name not in scored]
        header = {"predictions": args.from_predictions, "split": split, "protocol": args.protocol}
        _print(f"files of {', '.join(meters)} against {args.checkpoint}, {split}", args, results, header, args.json)
        if left_out:
            print(f"not scored: {', '.join(left_out)} (no files, or not in the protocol)")
        for name, of_task in files.items():
            if of_task.ignored:
                print(f"{name}: ignored {of_task.ignored} boxes of categories that {paths[name]} should not have")
    return _unmet(args, results, show=ranks.first)


def _score_coco_files(args: argparse.Namespace) -> int:
    file = Path(args.from_predictions[0])
    kind, result = score_results(file, args.truth, args.ap_backend)
    for expectation in args.expect:
        expectation.check_task([kind])
    header = {"predictions": str(file), "truth": str(args.truth), "kind": kind, "backend": args.ap_backend}
    title = f"protocol coco, {kind}: {file} against {args.truth}, {result['images']} images"
    _print(title, args, {kind: result}, header, args.json)
    for counted, why in (("ignored", "their category is not in the annotations"), ("dropped", "they are not finite")):
        if result[counted]:
            print(f"{counted} {result[counted]} results: {why}")
    return _unmet(args, {kind: result})


def _rules(
    args: argparse.Namespace, tasks: Mapping[str, Task], spaces: Spaces, sources: list[NamedDataset]
) -> tuple[dict[str, Meter], list[NamedDataset]]:
    """The meters by name of their results, and the data as they want it."""
    if args.data:  # tasks that these data sets do not judge are left out
        tasks = {
            name: task for name, task in tasks.items() if any(supervises(one, task, spaces[name]) for one in sources)
        }
        if not tasks:
            raise ValueError(f"--data {' '.join(args.data)} judges no task; one is needed; choose a data set that does")
    makers: Mapping[str, Callable[[], Meter]] = {name: partial(one.meter, spaces[name]) for name, one in tasks.items()}
    if args.protocol:
        protocol = find_protocol(args.protocol)
        makers, sources = protocol.makers(tasks, spaces), protocol.sources(sources)
    names = judged({name: tasks[name] for name in makers}, spaces, sources)
    meters = {name: makers[task]() for name, task in names.items()}
    if args.ap_backend != "pycocotools":
        counters = [getattr(meter, "meter", meter) for meter in meters.values()]
        boxes = [meter for meter in counters if isinstance(meter, DetectionMeter)]
        if not boxes:
            raise ValueError("--ap-backend would have no effect; it counts boxes, and none are scored; leave it out")
        for meter in boxes:
            meter.backend = args.ap_backend
    for expectation in args.expect:  # a misspelt task is better found before the evaluation than after
        expectation.check_task(meters)
    return meters, sources


def _sources(args: argparse.Namespace, run: Run, ranks: Ranks) -> list[NamedDataset]:
    """The validation data sets, or those of --data; what their readers found worth telling is printed."""
    sources = open_datasets(run.data.val)
    names = [source.name for source in sources]
    if strange := [name for name in args.data if name not in names]:
        raise ValueError(
            f"--data {strange[0]}{did_you_mean(strange[0], names)}: the validation data sets are {', '.join(names)}; "
            "choose among them, or add one as data.val.N"
        )
    chosen = [source for source in sources if not args.data or source.name in args.data]
    for source in chosen if ranks.first else ():
        for note in source.notes:
            print(f"note: {source.name}: {note}")
    return chosen


def _print(
    title: str, args: argparse.Namespace, results: Results, header: Mapping[str, Any], file: Path | None
) -> None:
    print(title)
    print(results_table(results))
    for name, result in results.items():
        _show_classes(name, result)
        if result.get("protocol", "").startswith("coco") and "ar100" in result and (args.truth or args.protocol):
            print("\n".join(official_lines(result)))
    if file:
        save_json(results, file, header)
        print(f"written: {file}")


def _unmet(args: argparse.Namespace, results: Results, show: bool = True) -> int:
    """1 when an expectation is not met."""
    found = [(expectation, *expectation.met(results)) for expectation in args.expect]
    for expectation, met, value in found if show else ():
        print(f"{'met' if met else 'NOT MET'}: {expectation.text} (found {'none' if value is None else value})")
    return int(not all(met for _, met, _ in found))


def _open(args: argparse.Namespace, ranks: Ranks) -> Opened:
    """The network, with the overrides laid over the run's own settings."""
    settings = Tree(checkpoint.load(Path(args.checkpoint))["run"], {(): f"checkpoint {args.checkpoint}"})
    try:
        for override in [*args.overrides, *_splits(args, len(settings.values["data"]["val"]))]:
            settings.override(override)
        return open_model(args.checkpoint, ranks.device, settings.resolved())
    except ValidationError as error:
        problems = "; ".join(f"{dotted(problem['loc'])}: {problem['msg']}" for problem in error.errors())
        raise ConfigError(f"settings do not fit: {problems}; correct the overrides or --split") from None


def _load(args: argparse.Namespace) -> Run:
    """The run of a config."""
    run = config.load(args.checkpoint, args.overrides)
    return config.load(args.checkpoint, [*args.overrides, *_splits(args, len(run.data.val))]) if args.split else run


def _splits(args: argparse.Namespace, num_datasets: int) -> list[str]:
    return [f"data.val.{number}.split={args.split}" for number in range(num_datasets) if args.split]


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


def _pictures(opened: Opened, tasks: Mapping[str, Task], sources: Sequence[NamedDataset]) -> list[Titled]:
    """The first images, predictions above the truth."""
    run, net = opened.run, opened.net
    first = val_loader(run.data, tasks, net.spaces, sources, NUM_PICTURES, workers=0, limit=1)
    pictures: list[Titled] = []
    for batch in first:
        predictions = predict(net, [sample.image for sample in batch.samples], run.data.input_size)
        for i, (sample, prediction) in enumerate(zip(batch.samples, predictions, strict=True)):
            truth = {name: task.truth(sample) for name, task in tasks.items() if batch.labelled[name][i]}
            rows = {"prediction": prediction, "truth": truth}
            pictures.append((sample.image_id, picture(run.tasks, net.spaces, sample.image, rows)))
    return pictures


if __name__ == "__main__":
    sys.exit(main())
