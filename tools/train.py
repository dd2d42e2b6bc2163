"""Train a multi-task network from a config file."""

import argparse
import json
import sys
from contextlib import nullcontext
from os.path import expanduser
from pathlib import Path

from visionmtl.cli import ToolParser, add_device, is_setting, positive, run_tool, tried_folder
from visionmtl.config.durations import seconds

MANUAL = """
A run folder that exists is refused, never written over; it holds config.yaml, metrics.jsonl, TensorBoard files and
checkpoints/. Any setting of the config is replaced by a.b=c, and removed by ~a.b.

SIGTERM, SIGUSR1 and Ctrl-C save after the step at work (in an evaluation: after the batch; --resume repeats it) and
leave with exit status 128 + the signal's number; a second Ctrl-C stops at once. Every train.checkpoint_every (10m)
the state is saved within an epoch, too. The same command with --resume goes on; another number of processes or
another batch size are fine, and the log says what changes.

examples:
  visionmtl train configs/quickstart.yaml --output runs/first
  visionmtl train configs/nyuv2_resnet50.yaml data.root=/data/nyuv2 train.batch_size=16 optim.lr=8e-4
  visionmtl train configs/quickstart.yaml --print-config            every setting, and where it came from
  visionmtl train configs/quickstart.yaml --dry-run                 fits it? how long will it take?
  visionmtl train configs/quickstart.yaml --overfit 8               can it learn eight images by heart?
  visionmtl train configs/quickstart.yaml --resume                  go on exactly where it stopped
  visionmtl train --resume runs/first train.epochs=60               the run in a folder, by its own config, for longer
  visionmtl train mine.yaml --init-from runs/first                  weights of another run, as far as they fit
  visionmtl train more_tasks.yaml --extend runs/first               more tasks for a trained network
"""


def duration_s(text: str) -> float:
    """'90s', '45m', '2h' or plain seconds -> seconds."""
    try:
        return seconds(text if text[-1:].isalpha() else f"{text}s")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parser() -> ToolParser:
    """The command line."""
    p = ToolParser("train", __doc__, MANUAL)
    p.add_argument(
        "config", type=expanduser, nargs="?",
        help="YAML file; names of shipped configs work from anywhere; not needed with --resume RUN",
    )  # fmt: skip
    p.add_overrides()
    p.add_argument(
        "--resume", type=expanduser, nargs="?", const="auto", metavar="PATH",
        help="continue the run's last or a given checkpoint; without a config, the run in this folder",
    )  # fmt: skip
    p.add_argument(
        "--init-from", type=expanduser, metavar="PATH",
        help="a new run that starts from what fits of a network (nyuv2-small, a run) or an encoder; says what is taken",
    )  # fmt: skip
    p.add_argument(
        "--extend", type=expanduser, metavar="CHECKPOINT",
        help="add the config's tasks to a trained network, as its `extend:` says; without one, old parts stay frozen",
    )  # fmt: skip
    p.add_argument(
        "--output", type=expanduser, metavar="DIR", help="run directory; default: the config's, else runs/NAME"
    )
    p.add_argument(
        "--dry-run", action="store_true",
        help="a step and a validation batch, then the largest of both: memory, time of the run; writes nothing",
    )  # fmt: skip
    p.add_argument(
        "--overfit", type=positive, metavar="N", help="learn each data set's first N images only, and evaluate on them"
    )
    p.add_argument("--print-config", action="store_true", help="print every setting with its origin, and stop")
    p.add_argument("--limit-train-batches", type=positive, metavar="N", help="batches per epoch")
    p.add_argument("--limit-val-batches", type=positive, metavar="N", help="batches per evaluation")
    p.add_argument(
        "--max-time", type=duration_s, dest="max_time_s", metavar="2h", help="stop with a checkpoint after this time"
    )
    p.add_argument("--max-steps", type=positive, metavar="N", help="stop with a checkpoint after N optimiser steps")
    p.add_argument("--profile", type=positive, metavar="N", help="write a profiler trace of N steps, and stop")
    add_device(p)
    p.add_imports()
    return p


def extension_overrides(config: str, overrides: list[str], checkpoint: str) -> list[str]:
    """The settings that --extend stands for."""
    from visionmtl.config import loader

    chosen = loader.read(config, overrides).values.get("extend") is not None
    return [*([] if chosen else ["extend={type: frozen}"]), f"extend.checkpoint={json.dumps(checkpoint)}"]


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns 0, or 2 for an error."""
    line = parser()
    args = line.parse_intermixed_args(argv)
    if args.config and is_setting(args.config):
        args.config, args.overrides = None, [args.config, *args.overrides]
    if args.config is None and args.resume in (None, "auto"):
        line.error("the following arguments are required: config")
    return run_tool(_train, args)


def _train(args: argparse.Namespace) -> int:
    from visionmtl.run import print_config, read, read_recorded

    recorded = Path(args.resume) if args.config is None else None  # it may have been moved since
    if recorded:
        if args.overfit is not None:
            raise ValueError(
                f"--overfit trains a run of its own, and --resume {recorded} alone goes on with that one; give "
                f"{recorded / 'config.yaml'} as the config, without --resume"
            )
        moves = args.output is not None and Path(args.output).resolve() != recorded.resolve()
        args.config, args.output = str(recorded / "config.yaml"), args.output or str(recorded)
        args.resume = str(recorded / "checkpoints" / "last.pt") if moves else "auto"
        if not Path(args.config).is_file():
            raise ValueError(
                f"there is no {args.config}, and no config was given; --resume alone takes the folder of a run; name "
                "one, or put a config before the settings"
            )
    if args.extend:
        args.overrides += extension_overrides(args.config, args.overrides, args.extend)
    loaded = read_recorded(recorded, args.overrides) if recorded else read(args.config, args.overrides)
    if args.print_config:
        print(print_config(loaded), end="")
        return 0

    from visionmtl.api import place
    from visionmtl.engine.options import TrainOptions
    from visionmtl.engine.trainer import train

    names = set(TrainOptions.__dataclass_fields__)
    options = TrainOptions(**{name: value for name, value in vars(args).items() if name in names})
    run = place(loaded.run, Path(args.config).stem, args.output, args.overfit)
    with nullcontext() if args.dry_run else tried_folder(Path(str(run.output))):
        train(run, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
