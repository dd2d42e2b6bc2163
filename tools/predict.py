"""Write what a network predicts: in official formats, or as labels of a new data set."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import chain, islice
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING

from visionmtl.cli import (
    CHECKPOINT,
    ERROR,
    ToolParser,
    add_device,
    add_tasks,
    is_config,
    positive,
    run_tool,
    tried_folder,
)
from visionmtl.config.paths import check_outside, home_path

if TYPE_CHECKING:
    from visionmtl.inference.predictor import Predictor
    from visionmtl.inference.pseudo_labels import ImageRef

MANUAL = """
examples:
  visionmtl predict runs/nyuv2 photos/ --output predictions/
  visionmtl predict runs/nyuv2 photos/ --output predictions/ --intrinsics 518.9,519.5,325.1,253.2
  visionmtl predict runs/nyuv2 photos/ --as-labels labelled/ --confidence detection=0.6 --confidence segmentation=0.9
  visionmtl predict runs/nyuv2 configs/coco.yaml --as-labels labelled/ --fill --tasks depth"""


def intrinsics(text: str) -> tuple[float, ...]:
    """Four numbers with commas; what they may be, the predictor checks."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != 4:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no camera; FX,FY,CX,CY in pixels of the image are needed, as 518.9,519.5,325.1,253.2"
        )
    return values


def parser() -> ToolParser:
    """The command line."""
    p = ToolParser("predict", __doc__, MANUAL)
    p.add_argument("checkpoint", type=home_path, help=CHECKPOINT)
    p.add_argument(
        "input", type=expanduser, metavar="INPUT", help="an image, a folder with all it holds, or a config's data sets"
    )
    p.add_overrides("settings of the run; if INPUT is a config, data.root, data.train and data.val are that config's")
    p.add_argument("--output", type=home_path, metavar="DIR", help="a new folder for official submission files")
    p.add_argument(
        "--as-labels", type=home_path, metavar="DIR",
        help="a new folder for a data set of type folder, with data.yaml to train on it",
    )  # fmt: skip
    add_tasks(p)
    p.add_argument("--part", choices=["train", "val"], help="of a config's data; default: train")
    p.add_argument(
        "--fill", action="store_true", help="keep the labels of a config's data sets, and predict what they lack"
    )
    p.add_argument(
        "--confidence", action="append", default=[], metavar="TASK=X",
        help="what is less sure, from 0 to 1, is not labelled: boxes by score (default 0.5), pixels by the share of "
        "their class, depth by the ratio of its values in an image and in its mirror image (default 0: all)",
    )  # fmt: skip
    p.add_argument(
        "--unsure", type=float, metavar="X",
        help="boxes from this score up to their confidence are marked as crowds: neither right nor wrong",
    )  # fmt: skip
    p.add_argument(
        "--images", choices=["link", "copy", "refer"],
        help="a link to each image (default), copies, or one link to the folder of them all",
    )  # fmt: skip
    p.add_argument(
        "--intrinsics", type=intrinsics, metavar="FX,FY,CX,CY",
        help="with --output: of the camera in pixels, for position_m of boxes; default: a data set's own, if known",
    )  # fmt: skip
    p.add_argument("--tta", choices=["flip"], help="predict labels from each image and its mirror image together")
    p.add_argument("--depth-units", type=positive, metavar="N", help="with --output: units per metre; default: 256")
    add_device(p)
    p.add_argument("--batch-size", type=positive, metavar="N", help="default: the run's train.batch_size")
    p.add_argument("--num", type=positive, metavar="N", help="only the first N images")
    p.add_imports()
    return p


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for what would have no effect."""
    if (args.output is None) == (args.as_labels is None):
        raise ValueError(
            "predictions go to --output DIR in official formats, or to --as-labels DIR as a data set; one of them is "
            "needed; give it"
        )
    idle = [name for name in ("fill", "confidence", "unsure", "images", "tta") if args.output and getattr(args, name)]
    idle += [name for name in ("depth_units", "intrinsics") if args.as_labels and getattr(args, name)]
    if idle:
        where = "--output" if args.output else "--as-labels"
        names = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
        raise ValueError(f"{names} would have no effect with {where}; leave it out, or choose the other one")
    if not is_config(args.input):
        if idle := [name for name in ("fill", "part") if getattr(args, name)]:
            raise ValueError(
                f"--{idle[0]} is for the data sets of a config, and {args.input} is none; give a YAML file as "
                "INPUT, or leave it out"
            )
        check_outside(args.output or args.as_labels, args.input)
    elif args.images == "refer":
        raise ValueError("--images refer links to one folder of images; a config's data sets are several; use link")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns 0, or 2 for an error."""
    return run_tool(_predict, parser().parse_intermixed_args(argv))


def _predict(args: argparse.Namespace) -> int:
    check(args)
    from visionmtl.engine import distributed
    from visionmtl.engine.checkpoint import open_model
    from visionmtl.inference.predictor import Predictor
    from visionmtl.inference.results_io import check_empty

    folder = args.output or args.as_labels
    check_empty(folder)
    of_input = _of_input(args)
    sources = _sources(args, of_input)[: args.num]
    with ExitStack() as targets:
        targets.enter_context(tried_folder(folder))
        of_run = [override for override in args.overrides if override not in of_input]
        opened = open_model(args.checkpoint, distributed.choose_device(args.device), of_run, reads_data=False)
        predictor = Predictor(opened, args.tasks)
        predictor.batch_size = args.batch_size or predictor.batch_size
        if args.output:
            return _write_submission(args, predictor, sources)
        return _write_labels(args, predictor, sources, str(opened.path))


def _sources(args: argparse.Namespace, overrides: Sequence[str]) -> list[ImageRef]:
    from visionmtl.datasets import open_datasets
    from visionmtl.inference.pseudo_labels import dataset_sources, folder_sources
    from visionmtl.run import load_data

    if not is_config(args.input):
        return folder_sources(Path(args.input))
    datasets = open_datasets(getattr(load_data(args.input, overrides), args.part or "train"))
    return dataset_sources(datasets, folders=args.as_labels is not None)  # a submission has the data sets' own ids


def _of_input(args: argparse.Namespace) -> list[str]:
    """The overrides that say where the data of a config as INPUT lie."""
    if not is_config(args.input):
        return []
    paths = [(text, text.removeprefix("~").partition("=")[0].split(".")) for text in args.overrides]
    return [text for text, path in paths if path[0] == "data" and path[1:2] in (["root"], ["train"], ["val"])]


def _write_submission(args: argparse.Namespace, predictor: Predictor, sources: Sequence[ImageRef]) -> int:
    """Returns the exit status."""
    from visionmtl.data.label_spaces import numbered
    from visionmtl.inference.predictor import checked_intrinsics
    from visionmtl.inference.pseudo_labels import datasets_of, read_all
    from visionmtl.inference.results_io import KITTI_UNITS, SubmissionWriter, check_ids
    from visionmtl.structures import Sample

    net = predictor.net
    if args.intrinsics:  # before the folder holds anything, or the next try would find it taken
        checked_intrinsics(args.intrinsics, net.tasks)
    check_ids(source.path for source in sources if source.dataset is None)
    datasets = datasets_of(sources)
    spaces, notes = numbered(net.spaces, net.tasks, datasets)
    failed: list[str] = []
    waiting = read_all(sources, False, failed)
    batches = iter(lambda: list(islice(waiting, predictor.batch_size)), [])
    first = next(batches, None)
    if first is None:  # nothing is written
        return _status(failed)
    units = args.depth_units or KITTI_UNITS
    writer = SubmissionWriter(args.output, net.tasks, spaces, units, distances=True, datasets=datasets)
    for batch in chain([first], batches):
        results = predictor([one.image for one in batch], intrinsics=args.intrinsics)
        for one, result in zip(batch, results, strict=True):
            camera = args.intrinsics or one.intrinsics
            writer.add(Sample(image=one.image, image_id=one.path, intrinsics=camera), result.predictions)
    writer.close()
    print(f"written: {args.output}, predictions of {', '.join(net.tasks)} on {len(sources) - len(failed)} images")
    for note in notes:
        print(f"note: {note}")
    return _status(failed)


def _status(failed: Sequence[str]) -> int:
    """The exit status, once images that could not be read are listed."""
    if failed:
        print("\n  ".join([f"no predictions for {len(failed)} of the images:", *failed]), file=sys.stderr)
    return ERROR if failed else 0


def _write_labels(args: argparse.Namespace, predictor: Predictor, sources: Sequence[ImageRef], checkpoint: str) -> int:
    """Returns the exit status."""
    from visionmtl.inference.pseudo_labels import Labeller, LabelWriter, label, parse_confidence, read_by_name
    from visionmtl.io.download import sha256

    net = predictor.net
    if net.in_chans != 3:
        raise ValueError(
            f"the network reads images of {net.in_chans} channels, and --as-labels writes photographs of 3 beside the "
            "labels; use --output, whose files hold predictions alone"
        )
    confidence = parse_confidence(args.confidence, net.tasks)
    if args.unsure is not None:
        limits = [confidence[name] for name, task in net.tasks.items() if task.field == "boxes"]
        if not limits or not 0 <= args.unsure < limits[0]:
            raise ValueError(
                f"--unsure {args.unsure:g} is for boxes, whose confidence is {limits or 'not asked for'}; a score from "
                "0 to below that is needed; correct it, or leave it out"
            )
    labeller = Labeller(
        net, predictor.run.data.input_size, predictor.precision, confidence=confidence, unsure=args.unsure,
        flip=args.tta == "flip",
    )  # fmt: skip
    source = Path(args.input)
    if args.fill:
        sources = read_by_name(sources, net.tasks, net.spaces)
    writer = LabelWriter(
        args.as_labels, sources, net.tasks, net.spaces, images=args.images or "link", fill=args.fill,
        common=source if source.is_dir() else None,
    )  # fmt: skip
    failed: list[str] = []
    for one in label(labeller, sources, predictor.batch_size, args.fill, failed):
        writer.add(one)
    record = {
        "checkpoint": checkpoint, "sha256": sha256(Path(checkpoint)), "tasks": list(net.tasks),
        "confidence": confidence, "unsure": args.unsure, "tta": args.tta, "fill": args.fill, "input": args.input,
    }  # fmt: skip
    file = writer.close(record)
    print(f"written: {args.as_labels}, {len(sources) - len(failed)} images")
    for line in _summary(writer.counts):
        print(line)
    if writer.left_out:
        print(f"  left out, as data sets of type folder do not have them: {', '.join(writer.left_out)}")
    print(f"train on it: the data block is {file}")
    return _status(failed)


def _summary(counts: dict[str, dict[str, int]]) -> Iterator[str]:
    for name, of_field in counts.items():
        yield f"  {name}: {of_field['predicted']} images predicted, {of_field['kept']} kept"


if __name__ == "__main__":
    sys.exit(main())
