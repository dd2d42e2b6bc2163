"""Compare ways to train a network, over several seeds, against single-task references."""

import argparse
import os
import signal
import sys
from os.path import expanduser
from pathlib import Path
from typing import Any

from visionmtl.cli import ERROR, ToolParser, add_device, positive, run_tool, tried_folder

MANUAL = """
Stopping loses nothing: the same command goes on where it is. DIR/report.md and report.html are written anew after
each run.

examples:
  visionmtl compare configs/compare/scenes.yaml --output runs/compare --jobs 2
  visionmtl compare configs/compare/scenes.yaml --output runs/compare --only upgrad tuned
  visionmtl compare configs/compare/nyuv2.yaml --output runs/nyuv2 data.root=/data/nyuv2
  visionmtl compare runs/compare/runs --output runs/compared        runs that are trained already
"""


def parser() -> ToolParser:
    """The command line."""
    p = ToolParser("compare", __doc__, MANUAL)
    p.add_argument("comparison", type=expanduser, help="YAML file (see configs/compare), or a folder of finished runs")
    p.add_overrides("settings of all runs that replace those of the file's config")
    p.add_argument(
        "--output", type=expanduser, metavar="DIR", required=True, help="runs and report; goes on where it is"
    )
    p.add_argument("--jobs", type=positive, metavar="N", help="runs that are trained at a time; default: 1")
    p.add_argument(
        "--threads", type=positive, metavar="N", help="of each run; default: the machine's cores / --jobs"
    )  # fmt: skip
    p.add_argument("--only", nargs="+", default=[], metavar="RUN", help="only these runs and their references")
    p.add_argument("--no-train", action="store_true", help="report what is finished")
    p.add_argument("--no-costs", action="store_true", help="do not time steps at the end, which wants an idle machine")
    add_device(p)
    p.add_imports()
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns 0, or 2 for an error, also where a run failed."""
    return run_tool(_compare, parser().parse_intermixed_args(argv))


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _compare(args: argparse.Namespace) -> int:
    if Path(args.comparison).is_dir():
        return _report_existing(args)
    from visionmtl.study.comparison import read

    plan = read(args.comparison, args.overrides, args.only)

    from visionmtl.data.workers import num_cores
    from visionmtl.study.compare import compare
    from visionmtl.study.report import check_folder
    from visionmtl.study.runner import Runner

    folder, jobs = Path(args.output), args.jobs or 1
    check_folder(folder, plan)
    threads = args.threads or max(1, num_cores() // jobs)
    before = signal.signal(signal.SIGTERM, _interrupt)  # as Ctrl-C: the runs write their checkpoints
    with tried_folder(folder):
        runner = Runner(folder, jobs, threads, args.device, plan.comparison.cache, _tell)
        failed = compare(
            plan, folder, runner, train=not args.no_train, with_costs=not (args.no_costs or args.no_train), tell=_tell
        )
    signal.signal(signal.SIGTERM, before)
    _show(folder)
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return ERROR if failed else 0


def _report_existing(args: argparse.Namespace) -> int:
    """Write the report of runs that lie in a folder."""
    of_training = ("only", "jobs", "threads", "no_train", "no_costs")
    idle = [f"--{name.replace('_', '-')}" for name in of_training if getattr(args, name)]
    idle += ["--device"] if args.device != "auto" else []
    if idle or args.overrides:
        raise ValueError(
            f"{args.comparison} is a folder of finished runs, so {' '.join([*args.overrides, *idle])} would have no "
            "effect; leave it out, or name a comparison file"
        )
    from visionmtl.study.existing import read_existing
    from visionmtl.study.report import check_folder, write_report

    plan, measured = read_existing(Path(args.comparison))
    check_folder(Path(args.output), plan)
    with tried_folder(Path(args.output)):
        write_report(Path(args.output), plan, measured, {})
    _show(Path(args.output))
    return 0


def _show(folder: Path) -> None:
    print((folder / "report.md").read_text(encoding="utf-8"))
    charts = ", *.png" if any(folder.glob("*.png")) else ""
    names = f"report.md, results.csv, runs.csv, comparison.json{charts}"
    print(f"written: {os.path.join(folder, 'report.html')}, {names}")


def _tell(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
