"""What `tools/eval.py` can be asked, and which of it contradicts itself."""

import argparse
from os.path import expanduser

from visionmtl.config.paths import home_path
from visionmtl.engine.protocols import PROTOCOLS
from visionmtl.engine.verify_results import Expectation
from visionmtl.inference.results_io import KITTI_UNITS

_EXAMPLES = """
  eval.py runs/NAME/checkpoints/best.pt                                 a network on the run's data.val
  eval.py best.pt --protocol nyu13_288x384 --tta flip                   under a benchmark's rules
  eval.py best.pt --save-predictions DIR                                and keep the predictions as files
  eval.py best.pt|CONFIG.yaml --from-predictions DIR                    files in the layout of --save-predictions
  eval.py CONFIG.yaml --from-predictions segmentation=DIR               files of one task, wherever they lie
  eval.py --from-predictions results.json --truth instances.json        COCO's own files, no images needed
"""
_NEEDS_NETWORK = ("save_predictions", "tta", "report", "batch_size", "limit_batches")
_NEEDS_DATA = ("checkpoint", "overrides", "split", "data", "protocol", "depth_units")


def parser(description: str | None) -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        description=description, epilog=f"examples:{_EXAMPLES}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "checkpoint", nargs="?", type=expanduser, metavar="CHECKPOINT",
        help="a .pt file of a run, e.g. runs/NAME/checkpoints/best.pt; with --from-predictions also a config",
    )  # fmt: skip
    p.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that replace those of the run")
    p.add_argument("--split", help="read this split of the run's data.val; default: as configured")
    p.add_argument(
        "--data", nargs="+", default=[], metavar="NAME", help="only these of the run's data.val, and what they judge"
    )
    p.add_argument("--protocol", metavar="NAME", help=f"a benchmark's rules: {', '.join(PROTOCOLS)}")
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
        "--depth-units", type=int, metavar="N",
        help=f"units per metre in depth files: 256 as KITTI, 1000 for millimetres; default: {KITTI_UNITS}, or as saved",
    )  # fmt: skip
    p.add_argument("--ap-backend", choices=["pycocotools", "faster_coco_eval"], default="pycocotools")
    p.add_argument(
        "--json", type=home_path, metavar="FILE", help="default: eval/CHECKPOINT-SPLIT.json in the run's folder"
    )
    p.add_argument(
        "--report", type=home_path, metavar="FILE.html", help="write a page with numbers, curves and pictures"
    )
    p.add_argument(
        "--expect", type=Expectation.parse, action="append", default=[], metavar="TASK/METRIC>=X",
        help="also <=X and =X+-Y; may be repeated; the exit status is 1 when one is not met",
    )  # fmt: skip
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    p.add_argument("--batch-size", type=int, metavar="N", help="default: the run's train.batch_size")
    p.add_argument("--limit-batches", type=int, metavar="N", help="only the first N batches of each process")
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
            "see eval.py --help for examples"
        )
    idle = [name for name in (*_NEEDS_NETWORK, *_NEEDS_DATA) if args.truth and getattr(args, name)]
    idle += [name for name in _NEEDS_NETWORK if args.from_predictions and not args.truth and getattr(args, name)]
    if args.iou_type and not args.truth:
        idle.append("iou_type")
    if args.depth_units and not (args.from_predictions or args.save_predictions):
        idle.append("depth_units")
    if idle:
        given = "--truth" if args.truth else "--from-predictions" if args.from_predictions else "neither files nor DIR"
        names = ", ".join(dict.fromkeys(name.replace("_", "-") for name in idle))
        raise ValueError(f"{names} would have no effect with {given}; give what is used; leave it out")
