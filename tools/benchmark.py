"""Measure speed and memory: a training step, loading, balancing, predictions, or all a GPU can be asked."""

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from visionmtl.cli import ToolParser, positive, run_tool, tried
from visionmtl.config.paths import home_path

if TYPE_CHECKING:  # each verb imports what it needs itself: torch and its company take seconds, --help should not
    from visionmtl.benchmark.figures import Figure
    from visionmtl.benchmark.measure import Timing
    from visionmtl.benchmark.workload import Workload

Arguments = argparse.ArgumentParser


def parser() -> ToolParser:
    """The command line; every verb is a function below with its own arguments."""
    p = ToolParser("benchmark", __doc__)
    verbs = p.add_subparsers(dest="verb", required=True, parser_class=Arguments)
    for name, (measure, add_arguments) in VERBS.items():
        verb = verbs.add_parser(name, help=measure.__doc__, description=measure.__doc__)
        verb.add_argument("--json", type=home_path, metavar="FILE", help="write the figures there too")
        verb.add_argument("--markdown", type=home_path, metavar="FILE", help="write what is printed there too")
        add_arguments(verb)
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns 0, 1 when a limit is missed, 2 for an error."""
    return run_tool(_measure, parser().parse_args(argv))


def _measure(args: argparse.Namespace) -> int:
    from pydantic import ValidationError

    from visionmtl.benchmark.figures import Report

    settings = {name: str(value) for name, value in vars(args).items() if name not in ("verb", "json", "markdown")}
    with tried(args.json, args.markdown):
        try:
            report = Report(
                " ".join(["visionmtl benchmark", *sys.argv[1:]]), args.verb, settings, args.json, args.markdown
            )
            for figure in VERBS[args.verb][0](args):
                report.add(figure)
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
            raise ValueError("; ".join(problems)) from None
    return 0 if report.kept else 1


# ---- what several verbs take ----


def _workload_arguments(verb: Arguments, batch: bool = True) -> None:
    verb.add_argument("--encoder", default="resnet50", metavar="NAME", help="timm's name; default: resnet50")
    verb.add_argument("--size", type=positive, nargs=2, default=(512, 512), metavar=("H", "W"), help="default: 512 512")
    verb.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 on CUDA devices, else fp32")
    verb.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    verb.add_argument("--set", nargs="+", default=(), metavar="a.b=c", help="settings of the run, as for train.py")
    if batch:
        verb.add_argument("--batch", type=positive, default=16, metavar="N", help="images; default: 16")
        verb.add_argument(
            "--boxes", type=positive, default=30, metavar="N", help="boxes an image on average; default: 30"
        )


def _timing_arguments(verb: Arguments, rounds: int, clock: bool = True) -> None:
    verb.add_argument("--rounds", type=positive, default=rounds, metavar="N", help=f"turns of each; default: {rounds}")
    verb.add_argument("--seconds", type=float, default=0.25, help="of a turn, one step at least; default: 0.25")
    if clock:
        text = "cpu: of this process alone, for a busy machine"
        verb.add_argument("--clock", choices=("wall", "cpu"), default="wall", help=text)


def _workload(args: argparse.Namespace) -> "Workload":
    from visionmtl.benchmark.workload import Workload

    of_batch = {"batch": args.batch, "boxes": args.boxes} if hasattr(args, "batch") else {"batch": 1}
    return Workload(
        encoder=args.encoder, size=tuple(args.size), precision=args.precision, device=args.device, overrides=args.set,
        **of_batch,
    )  # fmt: skip


def _timing(args: argparse.Namespace) -> "Timing":
    from visionmtl.benchmark.measure import Timing

    return Timing(args.rounds, args.seconds, getattr(args, "clock", "wall"))


# ---- the verbs ----


def step(args: argparse.Namespace) -> "Iterator[Figure]":
    """A training step: the encoder alone, the joint step, each task's share, and the networks it replaces."""
    from visionmtl.benchmark.step import Step

    return Step(_workload(args), _timing(args), args.modes, args.without, args.peers, args.compare_boxes).measure()


def _step_arguments(verb: Arguments) -> None:
    _workload_arguments(verb)
    _timing_arguments(verb, rounds=7)
    modes = ("eager", "compiled", "cuda_graph")
    verb.add_argument("--modes", nargs="+", choices=modes, default=["eager"], help="default: eager")
    verb.add_argument("--without", action="store_true", help="each task's share: the step without it, too")
    text = "torchvision FCOS and RetinaNet and two FPNs of smp, in turns with ours"
    verb.add_argument("--peers", action="store_true", help=text)
    verb.add_argument("--compare-boxes", type=positive, nargs="+", default=(), metavar="N", help="e.g. 1 100")


def gpu(args: argparse.Namespace) -> "Iterator[Figure]":
    """Everything a GPU can be asked, in one go and within a budget; what does not fit is named."""
    from visionmtl.benchmark.gpu import Gpu

    return Gpu(_workload(args), _timing(args), args.budget).measure()


def _gpu_arguments(verb: Arguments) -> None:
    _workload_arguments(verb)
    _timing_arguments(verb, rounds=7, clock=False)
    verb.add_argument("--budget", type=float, default=480, metavar="SECONDS", help="default: 480")


def data(args: argparse.Namespace) -> "Iterator[Figure]":
    """Loading: start-up and worker memory of a data set of COCO's size; images a second of one core on real files."""
    from visionmtl.benchmark.figures import Note
    from visionmtl.benchmark.loading import measure_loading
    from visionmtl.benchmark.memory import measure_memory

    if args.only != "loading":
        yield from measure_memory(args.images, args.boxes)
    if args.only != "memory" and args.config is None:
        yield Note("loading is not measured: it needs real files, named by --config CONFIG data.root=DIR")
    elif args.only != "memory":
        yield from measure_loading(args.config, args.overrides, args.clock)


def _data_arguments(verb: Arguments) -> None:
    verb.add_argument("--only", choices=("memory", "loading"), help="one part; default: both")
    verb.add_argument("--config", type=home_path, help="whose training data to load (nyuv2, or coco with boxes)")
    verb.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that replace those of the config")
    verb.add_argument("--clock", choices=("wall", "cpu"), default="cpu", help="of loading; default: cpu")
    verb.add_argument("--images", type=positive, default=118_287, metavar="N", help="of memory; default: COCO's 118287")
    verb.add_argument("--boxes", type=positive, default=860_001, metavar="N", help="of memory; default: COCO's 860001")


def balance(args: argparse.Namespace) -> "Iterator[Figure]":
    """Each balancing method's step against that of fixed weights."""
    from visionmtl.benchmark.balance import measure_methods

    return measure_methods(_workload(args), args.methods, args.peers, _timing(args))


def _balance_arguments(verb: Arguments) -> None:
    _workload_arguments(verb)
    _timing_arguments(verb, rounds=5)
    verb.add_argument("--methods", nargs="+", default=(), metavar="NAME", help="default: all")
    text = "TorchJD's MGDA, a backward through the trunk for each task, too"
    verb.add_argument("--peers", action="store_true", help=text)


def infer(args: argparse.Namespace) -> "Iterator[Figure]":
    """Predictions: latency at batch 1 and images a second, joint and by task, with suppression and without."""
    from visionmtl.benchmark.infer import Infer

    return Infer(_workload(args), _timing(args), args.batches).measure()


def _infer_arguments(verb: Arguments) -> None:
    _workload_arguments(verb, batch=False)
    _timing_arguments(verb, rounds=40)
    verb.add_argument("--batches", type=positive, nargs="+", default=(1, 8, 32), metavar="N", help="default: 1 8 32")


VERBS: "dict[str, tuple[Callable[[argparse.Namespace], Iterator[Figure]], Callable[[Arguments], None]]]" = {
    "step": (step, _step_arguments),
    "gpu": (gpu, _gpu_arguments),
    "data": (data, _data_arguments),
    "balance": (balance, _balance_arguments),
    "infer": (infer, _infer_arguments),
}

if __name__ == "__main__":
    sys.exit(main())
