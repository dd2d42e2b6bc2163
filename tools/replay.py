"""Compute a captured training step again, and show where the first value that is not finite appears."""

import argparse
import sys

from visionmtl.cli import ToolParser, add_device, run_tool
from visionmtl.config.paths import home_path

MANUAL = """
With train.not_finite.policy=capture a training keeps the first step whose loss, gradient or update is not finite:
batch, state before it, seeds and settings, as plain data. No data set is read here, and nothing is written. The report
goes through inputs, forward by module, losses by part, backward by part (with torch's anomaly detection) and update.
The step is computed without compiling. The exit status is 0 where something that is not finite was found, 1 where all
is finite.

examples:
  visionmtl replay runs/quickstart/captured/step-0000012.pt
  visionmtl replay runs/quickstart/captured/step-0000012.pt --device cpu    rule the device out
"""


def parser() -> ToolParser:
    """The command line."""
    p = ToolParser("replay", __doc__, MANUAL)
    p.add_argument("step", type=home_path, metavar="FILE", help="RUN/captured/step-N.pt")
    p.add_imports()
    add_device(p)
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns 0, 1 where everything is finite, 2 for an error."""
    return run_tool(_replay, parser().parse_args(argv))


def _replay(args: argparse.Namespace) -> int:
    from visionmtl.engine.replay import replay

    report = replay(args.step, args.device)
    print("\n".join(report.lines))
    if report.first is None:
        print("first     nowhere: all is finite here; another device, compiling or another process may have differed")
        return 1
    print(f"first     {report.first}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
