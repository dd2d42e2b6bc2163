"""Calibrate a network's depth on its training images by a straight line in log depth, into a new checkpoint."""

import argparse
import sys
from os.path import expanduser

from visionmtl.cli import CHECKPOINT, ToolParser, add_device, positive, run_tool, tried
from visionmtl.config.paths import home_path

MANUAL = """
Least squares of ln(truth) on ln(prediction) over whole training images without augmentation, every image weighing the
same; the line becomes part of the last layer. It mends a bias and a range that is too narrow. Evaluate before and
after (log_bias, rmse_m, delta1): of images that are learnt by heart, the error says little about others.

examples:
  visionmtl calibrate runs/nyuv2 --output calibrated.pt
  visionmtl calibrate runs/nyuv2 --output calibrated.pt --limit-batches 20 data.root=/data/nyuv2"""


def parser() -> ToolParser:
    """The command line."""
    p = ToolParser("calibrate", __doc__, MANUAL)
    p.add_argument("checkpoint", type=expanduser, metavar="CHECKPOINT", help=CHECKPOINT)
    p.add_overrides("settings that replace those of the run, for reading the data")
    p.add_argument("--output", type=home_path, required=True, metavar="FILE.pt", help="the new checkpoint")
    p.add_argument("--limit-batches", type=positive, metavar="N", help="only the first N batches; default: all images")
    p.add_imports()
    add_device(p)
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns 0, or 2 for an error."""
    return run_tool(_calibrate, parser().parse_intermixed_args(argv))


def _calibrate(args: argparse.Namespace) -> int:
    with tried(args.output):
        from visionmtl.engine.calibration import calibrate
        from visionmtl.engine.checkpoint import find
        from visionmtl.engine.distributed import choose_device

        device, path = choose_device(args.device), find(args.checkpoint)
        for name, fit in calibrate(path, args.output, device, tuple(args.overrides), args.limit_batches).items():
            print(
                f"{name}: ln d becomes {fit.slope:.4f} * ln d {fit.offset:+.4f}; log error on {fit.images} training "
                f"images {fit.rms_before:.4f} -> {fit.rms_after:.4f}"
            )
        print(f"written: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
