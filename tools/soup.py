"""Average the weights of several checkpoints of one architecture into a new one."""

import argparse
import sys
from os.path import expanduser

from visionmtl.cli import CHECKPOINT, ToolParser, run_tool, tried
from visionmtl.config.paths import home_path

MANUAL = """
A uniform soup: the mean of all weights and of BatchNorm's statistics. It pays for checkpoints that lie in one valley:
runs that began with the same weights, or late steps of one run (train.keep). The new file serves predictions and
evaluations; no training can go on from it, but one can begin with it (--init-from).

examples:
  visionmtl soup runs/seed0 runs/seed1 runs/seed2 --output soup.pt          each run's best checkpoint
  visionmtl soup runs/a/checkpoints/step-*.pt --output soup.pt              the last steps of one run"""


def parser() -> ToolParser:
    """The command line."""
    p = ToolParser("soup", __doc__, MANUAL)
    p.add_argument("checkpoints", nargs="+", type=expanduser, metavar="CHECKPOINT", help=f"{CHECKPOINT}; two or more")
    p.add_argument("--output", type=home_path, required=True, metavar="FILE.pt", help="the new checkpoint")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns 0, or 2 for an error."""
    return run_tool(_soup, parser().parse_args(argv))


def _soup(args: argparse.Namespace) -> int:
    with tried(args.output):
        from visionmtl.engine.soup import make_soup

        for path in make_soup(args.checkpoints, args.output):
            print(f"averaged: {path}")
        print(f"written: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
