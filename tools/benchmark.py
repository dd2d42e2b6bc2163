"""Measure speed and memory: a training step, loading, balancing, predictions, evaluation, or all a GPU can be asked."""

import argparse
import sys
from collections.abc import Callable, Iterator

from pydantic import ValidationError

from visionmtl.benchmark.balance import Methods
from visionmtl.benchmark.base import Figure, Note
from visionmtl.benchmark.environment import header
from visionmtl.benchmark.evaluation import Evaluation
from visionmtl.benchmark.gpu import Gpu
from visionmtl.benchmark.infer import Infer
from visionmtl.benchmark.loading import Loading
from visionmtl.benchmark.memory import Memory
from visionmtl.benchmark.report import Report
from visionmtl.benchmark.step import Step
from visionmtl.benchmark.workload import Workload
from visionmtl.io.paths import home_path

Arguments = argparse.ArgumentParser
Measure = Callable[[argparse.Namespace], Iterator[Figure]]


def parser() -> Arguments:
    """The command line; every verb is a function below with its own arguments."""
    p = argparse.ArgumentParser(prog="benchmark", description=__doc__)
    verbs = p.add_subparsers(dest="verb", required=True)
    for name, (measure, add_arguments) in VERBS.items():
        verb = verbs.add_parser(name, help=measure.__doc__, description=measure.__doc__)
        verb.add_argument("--json", type=home_path, metavar="FILE", help="write the figures there too")
        verb.add_argument("--markdown", type=home_path, metavar="FILE", help="write what is printed there too")
        add_arguments(verb)
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns 0, 1 when a limit is missed, 2 for an error."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    settings = {name: str(value) for name, value in vars(args).items() if name not in ("verb", "json", "markdown")}
    report = Report(header(f"benchmark.py {' '.join(argv)}", args.verb, settings), args.json, args.markdown)
    try:
        for figure in VERBS[args.verb][0](args):
            report.add(figure)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
        print("error: " + "; ".join(problems), file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if report.kept else 1


# ---- what several verbs take ----


def _workload_arguments(verb: Arguments, batch: bool = True) -> None:
    verb.add_argument("--encoder", default="resnet50", metavar="NAME", help="timm's name; default: resnet50")
    verb.add_argument("--size", type=int, nargs=2, default=(512, 512), metavar=("H", "W"), help="default: 512 512")
    verb.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 on CUDA devices, else fp32")
    verb.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    verb.add_argument("--set", nargs="+", default=(), metavar="a.b=c", help="settings of the run, as for train.py")
    if batch:
        verb.add_argument("--batch", type=int, default=16, metavar="N", help="images; default: 16")
        verb.add_argument("--boxes", type=int, default=30, metavar="N", help="boxes an image on average; default: 30")


def _timing_arguments(verb: Arguments, rounds: int, clock: bool = True) -> None:
    verb.add_argument("--rounds", type=int, default=rounds, metavar="N", help=f"turns of each; default: {rounds}")
    verb.add_argument("--seconds", type=float, default=0.25, help="of a turn, one step at least; default: 0.25")
    if not clock:
        return
    verb.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: of this process alone, for a busy machine"
    )


def _workload(args: argparse.Namespace) -> Workload:
    of_batch = {"batch": args.batch, "boxes": args.boxes} if hasattr(args, "batch") else {"batch": 1}
    return Workload(
        encoder=args.encoder, size=tuple(args.size), precision=args.precision, device=args.device,
        overrides=tuple(args.set), **of_batch,
    )  # fmt: skip


# ---- the verbs ----


def step(args: argparse.Namespace) -> Iterator[Figure]:
    """A training step: the encoder alone, the joint step, each task's share, and the networks it replaces."""
    return Step(
        workload=_workload(args), modes=tuple(args.modes), without=args.without, peers=args.peers,
        compare_boxes=tuple(args.compare_boxes), rounds=args.rounds, seconds=args.seconds, clock=args.clock,
    ).measure()  # fmt: skip


def _step_arguments(verb: Arguments) -> None:
    _workload_arguments(verb)
    _timing_arguments(verb, rounds=7)
    verb.add_argument(
        "--modes", nargs="+", choices=("eager", "compiled", "cuda_graph"), default=["eager"], help="default: eager"
    )
    verb.add_argument("--without", action="store_true", help="each task's share: the step without it, too")
    verb.add_argument(
        "--peers", action="store_true", help="torchvision FCOS and RetinaNet and two FPNs of smp, in turns with ours"
    )
    verb.add_argument("--compare-boxes", type=int, nargs="+", default=(), metavar="N", help="e.g. 1 100")


def gpu(args: argparse.Namespace) -> Iterator[Figure]:
    """Everything a GPU can be asked, in one go and within a budget; what does not fit is named."""
    return Gpu(workload=_workload(args), budget_s=args.budget, rounds=args.rounds, seconds=args.seconds).measure()


def _gpu_arguments(verb: Arguments) -> None:
    _workload_arguments(verb)
    _timing_arguments(verb, rounds=7, clock=False)
    verb.add_argument("--budget", type=float, default=480, metavar="SECONDS", help="default: 480")


def data(args: argparse.Namespace) -> Iterator[Figure]:
    """Loading: start-up and worker memory of a data set of COCO's size; images a second of one core on real files."""
    for part in [args.only] if args.only else DATA_PARTS:
        yield from DATA_PARTS[part](args)


def _memory(args: argparse.Namespace) -> Iterator[Figure]:
    return Memory(images=args.images, boxes=args.boxes, workers=args.workers, folder=args.folder).measure()


def _loading(args: argparse.Namespace) -> Iterator[Figure]:
    if args.config is None:
        yield Note("loading is not measured: it needs real files, named by --config CONFIG data.root=DIR")
        return
    yield from Loading(config=args.config, overrides=tuple(args.overrides), clock=args.clock).measure()


DATA_PARTS: dict[str, Measure] = {"memory": _memory, "loading": _loading}


def _data_arguments(verb: Arguments) -> None:
    verb.add_argument("--only", choices=DATA_PARTS, help="one part; default: all")
    verb.add_argument("--config", type=home_path, help="whose training data to load (nyuv2, or coco with boxes)")
    verb.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that replace those of the config")
    verb.add_argument("--clock", choices=("wall", "cpu"), default="cpu", help="of loading; default: cpu")
    verb.add_argument("--images", type=int, default=118_287, metavar="N", help="default: COCO's 118287")
    verb.add_argument("--boxes", type=int, default=860_001, metavar="N", help="default: COCO's 860001")
    verb.add_argument("--workers", type=int, default=2, metavar="N", help="processes; each looks up every image")
    verb.add_argument("--folder", type=home_path, metavar="DIR", help="keep the drawn data set there, and use it again")


def balance(args: argparse.Namespace) -> Iterator[Figure]:
    """Each balancing method's step against that of fixed weights."""
    return Methods(
        workload=_workload(args), methods=tuple(args.methods), peers=args.peers, rounds=args.rounds,
        seconds=args.seconds, clock=args.clock,
    ).measure()  # fmt: skip


def _balance_arguments(verb: Arguments) -> None:
    _workload_arguments(verb)
    _timing_arguments(verb, rounds=5)
    verb.add_argument("--methods", nargs="+", default=(), metavar="NAME", help="default: all")
    verb.add_argument(
        "--peers", action="store_true", help="TorchJD's MGDA, a backward through the trunk for each task, too"
    )


def infer(args: argparse.Namespace) -> Iterator[Figure]:
    """Predictions: latency at batch 1 and images a second, joint and by task, with suppression and without."""
    batches = tuple(args.batches)
    return Infer(
        workload=_workload(args), batches=batches, rounds=args.rounds, seconds=args.seconds, clock=args.clock
    ).measure()


def _infer_arguments(verb: Arguments) -> None:
    _workload_arguments(verb, batch=False)
    _timing_arguments(verb, rounds=40)
    verb.add_argument("--batches", type=int, nargs="+", default=(1, 8, 32), metavar="N", help="default: 1 8 32")


def evaluation(args: argparse.Namespace) -> Iterator[Figure]:
    """Evaluation by stage: network, predictions, meters."""
    return Evaluation(workload=_workload(args), batches=args.batches).measure()


def _evaluation_arguments(verb: Arguments) -> None:
    _workload_arguments(verb)
    verb.add_argument("--batches", type=int, default=4, metavar="N", help="default: 4")


VERBS: dict[str, tuple[Measure, Callable[[Arguments], None]]] = {
    "step": (step, _step_arguments),
    "gpu": (gpu, _gpu_arguments),
    "data": (data, _data_arguments),
    "balance": (balance, _balance_arguments),
    "infer": (infer, _infer_arguments),
    "eval": (evaluation, _evaluation_arguments),
}

if __name__ == "__main__":
    sys.exit(main())
