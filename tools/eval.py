"""Evaluate a checkpoint, or predictions in files: every task under its named protocol, as tables, JSON and a report."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visionmtl.cli import CHECKPOINT, ToolParser, add_device, is_config, positive, run_tool, tried, tried_folder
from visionmtl.config.paths import home_path
from visionmtl.config.text_files import printable, read_object
from visionmtl.engine.verify_results import Expectation

if TYPE_CHECKING:  # what needs torch is imported where it is used: --help and a wrong command line are answered at once
    from visionmtl.engine.checkpoint import Opened
    from visionmtl.engine.distributed import Ranks
    from visionmtl.metrics.base import Meter, Results
    from visionmtl.structures import Sample

MANUAL = """
examples:
  visionmtl eval runs/NAME                                                  a run's best checkpoint on its data.val
  visionmtl eval best.pt --protocol nyu13_288x384 --tta flip                under a benchmark's rules
  visionmtl eval best.pt --all-protocols                                    mIoU and depth by all definitions in use
  visionmtl eval best.pt --save-predictions DIR                             and keep the predictions as files
  visionmtl eval best.pt --from-predictions DIR                             those files; a config serves as well
  visionmtl eval CONFIG.yaml --from-predictions segmentation=DIR            files of one task, wherever they lie
  visionmtl eval --from-predictions results.json --truth instances.json     COCO's own files, no images needed
"""
_NEEDS_NETWORK = ("save_predictions", "tta", "report", "batch_size", "limit_batches")
_NEEDS_DATA = ("checkpoint", "overrides", "split", "data", "protocol", "all_protocols", "depth_units")


def parser() -> ToolParser:
    """The command line."""
    p = ToolParser("eval", __doc__, MANUAL)
    p.add_argument(
        "checkpoint", nargs="?", type=expanduser, metavar="CHECKPOINT",
        help=f"{CHECKPOINT}; with --from-predictions also a config",
    )  # fmt: skip
    p.add_overrides("settings that replace those of the run")
    p.add_argument("--split", help="read this split of the run's data.val; default: as configured")
    p.add_argument(
        "--data", nargs="+", default=[], metavar="NAME", help="only these of the run's data.val, and what they judge"
    )
    p.add_argument("--protocol", metavar="NAME", help="a benchmark's rules, e.g. coco; an unknown name lists them all")
    p.add_argument(
        "--all-protocols", action="store_true",
        help="besides, these predictions under every definition of mIoU and depth errors that papers use",
    )  # fmt: skip
    p.add_argument("--tta", choices=["flip"], help="predict from each image and its mirror image together")
    p.add_argument("--save-predictions", type=home_path, metavar="DIR", help="write official submission files there")
    p.add_argument(
        "--from-predictions", action="append", default=[], metavar="[TASK=]PATH",
        help="score these files instead of a network: a folder as --save-predictions writes it, or each task's own",
    )  # fmt: skip
    p.add_argument("--truth", type=home_path, metavar="FILE", help="COCO annotations for one COCO results file")
    p.add_argument(
        "--iou-type", choices=["bbox", "segm"],
        help="with --truth: score the boxes or the masks; default: boxes where every result has one",
    )  # fmt: skip
    p.add_argument(
        "--depth-units", type=positive, metavar="N",
        help="units per metre in depth files: 256 as KITTI, 1000 for millimetres; default: 256, or as saved",
    )  # fmt: skip
    p.add_argument(
        "--ap-backend", choices=["pycocotools", "faster_coco_eval"],
        help="what computes AP; both give the same numbers; default: the run's setting, of files pycocotools",
    )  # fmt: skip
    p.add_argument(
        "--json", type=home_path, metavar="FILE",
        help="default: eval/CHECKPOINT-SPLIT.json in the run's folder, numbered where other results lie there",
    )  # fmt: skip
    p.add_argument(
        "--report", type=home_path, metavar="FILE.html", help="write a page with numbers, curves and pictures"
    )
    p.add_argument(
        "--expect", type=Expectation.parse, action="append", default=[], metavar="TASK/METRIC>=X",
        help="also <=X and =X+-Y; may be repeated; the exit status is 1 when one is not met",
    )  # fmt: skip
    add_device(p)
    p.add_argument("--batch-size", type=positive, metavar="N", help="default: the run's train.batch_size")
    p.add_argument("--limit-batches", type=positive, metavar="N", help="only the first N batches of each process")
    p.add_imports()
    return p


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for what would have no effect."""
    if args.truth and len(args.from_predictions) != 1:
        raise ValueError(
            f"--truth goes with one --from-predictions FILE, and there are {len(args.from_predictions)}; give the COCO "
            "results file, or leave out --truth"
        )
    if not args.truth and not args.checkpoint:
        raise ValueError(
            "there is nothing to evaluate; a checkpoint, or --from-predictions with a config or --truth, is needed; "
            "see visionmtl eval --help for examples"
        )
    idle = [name for name in (*_NEEDS_NETWORK, *_NEEDS_DATA) if args.truth and getattr(args, name)]
    idle += [name for name in _NEEDS_NETWORK if args.from_predictions and not args.truth and getattr(args, name)]
    if args.all_protocols and (args.protocol or args.report):
        raise ValueError(
            f"--all-protocols and --{'protocol' if args.protocol else 'report'} do not go together: it has the rules "
            "of all, in its own table; leave one of them out"
        )
    if args.from_predictions and args.device not in ("auto", "cpu"):  # files are scored on the CPU
        idle.append("device")
    if args.iou_type and not args.truth:
        idle.append("iou_type")
    if args.depth_units and not (args.from_predictions or args.save_predictions):
        idle.append("depth_units")
    if idle:
        given = "--truth" if args.truth else "--from-predictions" if args.from_predictions else "neither files nor DIR"
        names = ", ".join(dict.fromkeys(name.replace("_", "-") for name in idle))
        raise ValueError(f"{names} would have no effect with {given}; give what is used; leave it out")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns 0, 1 when an expectation is not met, 2 for an error."""
    args = parser().parse_intermixed_args(argv)
    args.command = sys.argv[1:] if argv is None else argv
    return run_tool(_evaluate, args)


def _evaluate(args: argparse.Namespace) -> int:
    check(args)
    if args.truth:
        return _score_coco_files(args)
    from visionmtl.engine import distributed

    with distributed.group("cpu" if args.from_predictions else args.device) as ranks:
        return _score_files(args, ranks) if args.from_predictions else _score_network(args, ranks)


def _score_network(args: argparse.Namespace, ranks: Ranks) -> int:
    from visionmtl.api import Evaluation
    from visionmtl.data.label_spaces import numbered
    from visionmtl.engine import distributed
    from visionmtl.engine.checkpoint import open_model
    from visionmtl.engine.evaluator import choose_json
    from visionmtl.inference.results_io import KITTI_UNITS, SubmissionWriter, check_empty
    from visionmtl.metrics.definitions import with_definitions
    from visionmtl.ops.precision import chosen_precision
    from visionmtl.report.evidence import Evidence, confusions
    from visionmtl.report.report import write_report

    opened = open_model(args.checkpoint, ranks.device, args.overrides, args.split)
    run, spaces = opened.run, opened.net.spaces
    evaluation = Evaluation(opened, ranks, args.data, args.protocol)
    _check_results(args, evaluation.meters)
    if args.all_protocols:
        evaluation.meters = {name: with_definitions(meter) for name, meter in evaluation.meters.items()}

    split, precision = args.split or "val", chosen_precision(ranks.device, run.train.precision)
    header = _header(args, opened, evaluation.meters, split, precision)
    words = [args.protocol, args.all_protocols and "definitions", args.tta]
    words += [args.limit_batches and f"first{args.limit_batches}"]
    name = "-".join([opened.path.stem, split, *(word for word in words if word)])
    with ExitStack() as targets:
        if ranks.is_main_process:
            file = choose_json(args.json or opened.folder / "eval" / f"{name}.json", header, free_name=not args.json)
            targets.enter_context(tried(args.report, replace=file))
        writer = None
        if args.save_predictions:
            check_empty(args.save_predictions)
            distributed.barrier()  # before any rank fills it
            targets.enter_context(tried_folder(args.save_predictions))
            written, notes = numbered(spaces, opened.net.tasks, evaluation.sources)
            evaluation.notes += notes
            units = args.depth_units or KITTI_UNITS
            writer = SubmissionWriter(
                args.save_predictions, evaluation.tasks, written, units, datasets=evaluation.sources
            )
        evidence = None
        if args.report and ranks.is_main_process:
            fresh = {name.partition("@")[0]: deepcopy(meter) for name, meter in evaluation.meters.items()}
            evidence = Evidence(evaluation.tasks, spaces, fresh)

        def on_image(sample: Sample, predictions: dict[str, Any], evaluated: Sequence[str]) -> None:
            if writer:
                writer.add(sample, predictions)
            if evidence:
                evidence.add(sample, predictions, evaluated)

        looked_at = on_image if writer or evidence else None
        results = evaluation.measure(args.tta, args.batch_size, args.limit_batches, looked_at)
        if writer:
            writer.close()
        if not ranks.is_main_process:
            return _unmet(args, results, show=False)

        title = f"{opened.path}: step {opened.step}, {split}, input {run.data.input_size}, {precision}"
        _save_and_print(title, args, results, header, file, evaluation.notes)
        if args.save_predictions:
            print(f"written: {args.save_predictions}")
        if args.report:
            facts = _facts(args, opened, split, precision)
            found = confusions(evaluation.meters)
            write_report(args.report, opened.folder, results, run=run, evidence=evidence, confusions=found, facts=facts)
            print(f"written: {args.report}")
    return _unmet(args, results)


def _header(
    args: argparse.Namespace, opened: Opened, meters: Mapping[str, Meter], split: str, precision: str
) -> dict[str, Any]:
    """What decides the results, for their JSON file."""
    import torch

    from visionmtl.metrics.detection import DetectionMeter

    backends = [meter.backend for meter in meters.values() if isinstance(meter, DetectionMeter)]
    return {
        "checkpoint": str(opened.path), "step": opened.step, "epoch": opened.epoch, "split": split,
        "data": args.data, "overrides": args.overrides, "limit_batches": args.limit_batches,
        "size": opened.run.data.input_size, "protocol": args.protocol, "tta": args.tta,
        "ap_backend": backends[0] if backends else None, "all_protocols": args.all_protocols,
        "precision": precision, "device": next(opened.net.parameters()).device.type, "torch": torch.__version__,
    }  # fmt: skip


def _facts(args: argparse.Namespace, opened: Opened, split: str, precision: str) -> dict[str, str]:
    """What stands at the head of a report."""
    device = next(opened.net.parameters()).device
    config = opened.folder / "config.yaml"
    again = ["visionmtl", "train", str(config), "output=runs/again"]
    machine = opened.folder / "env.json"
    if origin := (read_object(machine) if machine.is_file() else {}).get("init_from"):
        again += ["--init-from", str(origin)]
    return {
        "checkpoint": f"{opened.path}, step {opened.step:,}",
        "parameters": f"{sum(p.numel() for p in opened.net.parameters()) / 1e6:.2f} million",
        "evaluated on": f"{split}, {device}, {precision}",
        "command of this page": shlex.join(["visionmtl", "eval", *args.command]),
        **({"command of the training": shlex.join(again)} if config.is_file() else {}),
    }


def _score_files(args: argparse.Namespace, ranks: Ranks) -> int:
    from visionmtl import run as config
    from visionmtl.api import choose_datasets, choose_meters
    from visionmtl.data.label_spaces import numbered, resolve_spaces, task_of
    from visionmtl.datasets import open_datasets
    from visionmtl.engine.checkpoint import open_model
    from visionmtl.engine.evaluator import choose_json, evaluate_files
    from visionmtl.engine.protocols import find_protocol
    from visionmtl.inference.results_io import check_images, open_predictions, paths_by_task, with_declared
    from visionmtl.metrics.definitions import with_definitions

    if is_config(args.checkpoint):
        run, known = config.load(args.checkpoint, args.overrides, args.split), None
    else:
        opened = open_model(args.checkpoint, ranks.device, args.overrides, args.split)
        run, known = opened.run, opened.net.spaces
    paths = paths_by_task(args.from_predictions, run.tasks)
    tasks = {name: run.tasks[name] for name in paths}
    datasets = choose_datasets(run, args.data)
    candidates = choose_datasets(run, ()) if args.data else datasets  # the files may be of all
    notes = [f"{dataset.name}: {note}" for dataset in datasets for note in dataset.notes]
    if known is None and any(getattr(task, "classes", None) or task.learns_from for task in tasks.values()):
        known = resolve_spaces(tasks, open_datasets(run.data.train), candidates)  # they speak of the training data
    spaces = known or with_declared(resolve_spaces(tasks, datasets), paths)
    in_files, _ = numbered(spaces, tasks, datasets)
    meters, datasets = choose_meters(tasks, spaces, datasets, args.protocol, only_evaluated=bool(args.data))
    _check_results(args, meters)
    if args.all_protocols:
        meters = {name: with_definitions(meter) for name, meter in meters.items()}

    scored = dict.fromkeys(map(task_of, meters))
    files = {name: open_predictions(paths[name], tasks[name], in_files[name], args.depth_units) for name in scored}
    reads = {name: of_task.read for name, of_task in files.items()}
    split, left_out = args.split or "val", [name for name in run.tasks if name not in scored]
    header = {
        "predictions": args.from_predictions, "split": split, "data": args.data, "overrides": args.overrides,
        "protocol": args.protocol, "all_protocols": args.all_protocols,
    }  # fmt: skip
    with ExitStack() as targets:
        if ranks.is_main_process and args.json:
            targets.enter_context(tried(replace=choose_json(args.json, header, free_name=False)))
        results = evaluate_files(reads, meters, tasks, spaces, datasets, ranks.rank, ranks.world)
        for name, predictions in files.items():
            check_images(paths[name], predictions, candidates)
        left = [f"{name}: {note}" for name, one in files.items() for note in one.notes(paths[name])]
        results = find_protocol(args.protocol).named(results) if args.protocol else results
        if ranks.is_main_process:
            title = f"files of {', '.join(meters)} against {args.checkpoint}, {split}"
            _save_and_print(title, args, results, header, args.json, notes)
            if left_out:
                print(f"not scored: {', '.join(left_out)} (no files, or not in the protocol)")
            for line in left:
                print(line)
    return _unmet(args, results, show=ranks.is_main_process)


def _score_coco_files(args: argparse.Namespace) -> int:
    from visionmtl.engine.evaluator import choose_json
    from visionmtl.inference.results_io import declared_by_name, declared_space
    from visionmtl.metrics.coco_ap import Backend, score_files

    file = home_path(args.from_predictions[0])
    backend: Backend = args.ap_backend or "pycocotools"
    header = {"predictions": str(file), "truth": str(args.truth), "kind": args.iou_type, "backend": backend}
    with ExitStack() as targets:
        if args.json:
            targets.enter_context(tried(replace=choose_json(args.json, header, free_name=False)))
        declared = declared_space(file), declared_by_name(file)
        kind, result, notes = score_files(file, args.truth, backend, args.iou_type, *declared)
        for expectation in args.expect:
            expectation.check_task([kind])
        title = f"protocol coco, {kind}: {file} against {args.truth}, {result['images']} images"
        _save_and_print(title, args, {kind: result}, header, args.json, notes)
    for counted, why in (("ignored", "their category is not in the annotations"), ("dropped", "they are not finite")):
        if result[counted]:
            print(f"{counted} {result[counted]} results: {why}")
    return _unmet(args, {kind: result})


def _check_results(args: argparse.Namespace, meters: Mapping[str, Meter]) -> None:
    """What concerns the numbers to come: better found before the evaluation than after it."""
    from visionmtl.metrics.detection import DetectionMeter

    if args.ap_backend:
        boxes = [meter for meter in meters.values() if isinstance(meter, DetectionMeter)]
        if not boxes:
            raise ValueError("--ap-backend would have no effect; it counts boxes, and none are scored; leave it out")
        for meter in boxes:
            meter.backend = args.ap_backend
    for expectation in args.expect:
        expectation.check(meters)


def _save_and_print(
    title: str,
    args: argparse.Namespace,
    results: Results,
    header: Mapping[str, Any],
    file: Path | None,
    notes: Iterable[str],
) -> None:
    """The file first: a terminal may be closed."""
    from visionmtl.engine.evaluator import save_json
    from visionmtl.engine.logging import results_table
    from visionmtl.metrics.coco_ap import official_lines

    if file:
        save_json(results, file, header)
    for note in notes:
        print(f"note: {printable(note)}")
    print(printable(title))
    print(results_table(results))
    for name, result in results.items():
        _show_classes(name, result)
        if result.get("definitions"):
            _show_rows(f"{name} as", result["definitions"])
        if result.get("protocol", "").startswith("coco") and "ar100" in result and (args.truth or args.protocol):
            print("\n".join(official_lines(result)))
    if file:
        print(f"written: {file}")


def _unmet(args: argparse.Namespace, results: Results, show: bool = True) -> int:
    """1 when an expectation is not met."""
    checked = [(expectation, *expectation.met(results)) for expectation in args.expect]
    for expectation, met, value in checked if show else ():
        print(f"{'met' if met else 'NOT MET'}: {expectation.text} (found {'none' if value is None else value})")
    return int(not all(met for _, met, _ in checked))


def _show_classes(name: str, result: Mapping[str, Any]) -> None:
    if result.get("per_class"):
        _show_rows(name, result["per_class"])
    for key in ("absent", "absent_but_predicted", "not_annotated"):
        if result.get(key):
            print(f"{name}, {key.replace('_', ' ')}: {', '.join(result[key])}")


def _show_rows(title: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    from rich.table import Table

    from visionmtl.config.console import Console

    columns = list(next(iter(rows.values())))
    table = Table(title, *columns)
    for label, row in rows.items():
        table.add_row(label, *(_text(row[column]) for column in columns))
    Console(markup=False).print(table)


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


if __name__ == "__main__":
    sys.exit(main())
