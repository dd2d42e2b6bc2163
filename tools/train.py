"""Train a multi-task network from a config file."""

import argparse
import re
import sys
from os.path import expanduser
from pathlib import Path

from visionmtl.engine.distributed import LostProcess
from visionmtl.engine.options import TrainOptions
from visionmtl.engine.trainer import NotFinite, train
from visionmtl.run import Run, print_config, read


def duration_s(text: str) -> float:
    """'90s', '45m', '2h' or plain seconds -> seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration; allowed are e.g. 90s, 45m, 2h; correct it")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="train", description=__doc__)
    p.add_argument("config", type=expanduser, help="YAML file; names of shipped configs work from anywhere")
    p.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that replace those of the file")
    p.add_argument(
        "--resume", type=expanduser, nargs="?", const="auto", metavar="PATH",
        help="continue the run's last or a given checkpoint",
    )  # fmt: skip
    p.add_argument(
        "--init-from", type=expanduser, metavar="PATH", help="start from a checkpoint's weights, as a new run"
    )
    p.add_argument(
        "--output", type=expanduser, metavar="DIR", help="run directory; default: the config's, else runs/NAME"
    )
    p.add_argument("--dry-run", action="store_true", help="one step and one validation batch; writes nothing")
    p.add_argument(
        "--overfit", type=positive, metavar="N", help="learn each data set's first N images only, and evaluate on them"
    )
    p.add_argument("--print-config", action="store_true", help="print every setting with its origin, and stop")
    p.add_argument("--limit-train-batches", type=positive, metavar="N", help="batches per epoch")
    p.add_argument("--limit-val-batches", type=positive, metavar="N")
    p.add_argument("--max-time", type=duration_s, metavar="2h", help="stop with a checkpoint after this time")
    p.add_argument("--max-steps", type=positive, metavar="N", help="stop with a checkpoint after N optimiser steps")
    p.add_argument("--profile", type=positive, metavar="N", help="write a profiler trace of N steps, and stop")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = parser().parse_intermixed_args(argv)
    try:
        loaded = read(args.config, args.overrides)
        if args.print_config:
            print(print_config(loaded), end="")
            return 0
        options = TrainOptions(
            args.resume, args.init_from, args.overfit, args.limit_train_batches, args.limit_val_batches,
            args.max_time, args.max_steps, args.profile, args.dry_run, args.device,
        )  # fmt: skip
        train(_placed(loaded.run, args), options)
    except (ValueError, NotFinite, LostProcess) as error:  # what the user can cure; anything else keeps its traceback
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _placed(run: Run, args: argparse.Namespace) -> Run:
    """The run with its output folder decided."""
    folder = (run.output or f"runs/{Path(args.config).stem}") + (f"-overfit{args.overfit}" if args.overfit else "")
    return run.model_copy(update={"output": args.output or folder})


if __name__ == "__main__":
    sys.exit(main())
