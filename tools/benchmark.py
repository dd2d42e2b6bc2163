"""Measure speed and memory: a step, loading, balancing, ways of sharing, predictions, or all a GPU can be asked."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from visionmtl.cli import ToolParser, above_zero, positive, run_tool, tried
from visionmtl.config.paths import home_path

if TYPE_CHECKING:  # each verb imports what it needs: torch and its company take seconds, --help should not
    from visionmtl.benchmark.figures import Figure
    from visionmtl.benchmark.measure import Timing
    from visionmtl.benchmark.workload import Workload

MANUAL = """
Ratios compare what took turns in one run; --clock cpu tells what the process itself computed, where the machine is
busy with other work.

examples:
  visionmtl benchmark step --encoder resnet50 --batch 8 --size 512 512 --peers
  visionmtl benchmark infer --size 480 640 --batches 1 8
  visionmtl benchmark infer --config configs/nyuv2_mobilenetv2.yaml
  visionmtl benchmark infer --config configs/nyuv2_mobilenetv2.yaml --runtimes eager onnx openvino openvino_int8
  visionmtl benchmark balance --rounds 5 --clock cpu
  visionmtl benchmark roofline --batch 16 --size 512 512            the least a GPU step can take; needs no GPU
  visionmtl benchmark gpu --json gpu.json --markdown gpu.md         everything, in at most eight minutes
"""


COCO_IMAGES, COCO_BOXES = 118_287, 860_001


def parser() -> ToolParser:
    """The command line; every verb is a function below."""
    p = ToolParser("benchmark", __doc__, MANUAL)
    verbs = p.add_subparsers(dest="verb", required=True, parser_class=argparse.ArgumentParser)
    made = {}
    for measure in (step, gpu, data, balance, sharing, infer, roofline):
        verb = made[measure] = verbs.add_parser(measure.__name__, help=measure.__doc__, description=measure.__doc__)
        verb.set_defaults(measure=measure)
        verb.add_argument("--json", type=home_path, metavar="FILE", help="write the figures there too")
        verb.add_argument("--markdown", type=home_path, metavar="FILE", help="write what is printed there too")

    for measure, rounds in ((step, 7), (gpu, 7), (balance, 5), (sharing, 10), (infer, 40), (roofline, 0)):
        add = made[measure].add_argument
        add("--encoder", metavar="NAME", help="timm's name; default: resnet50")
        add("--size", type=positive, nargs=2, metavar=("H", "W"), help="default: 512 512")
        add("--set", nargs="+", default=(), metavar="a.b=c", help="settings of the run, as for train.py")
        if measure in (step, infer, roofline):
            add("--config", type=home_path, metavar="FILE", help="network, losses, size and batch of a config instead")
        if measure != infer:
            add("--batch", type=positive, metavar="N", help="images; default: 16")
            add("--boxes", type=positive, default=30, metavar="N", help="boxes an image on average; default: 30")
        if measure == roofline:
            continue
        add("--precision", choices=("fp32", "bf16"), help="default: bf16 on CUDA devices, else fp32")
        add("--device", default="auto", help="auto, cpu, cuda, cuda:1")
        add("--rounds", type=positive, default=rounds, metavar="N", help=f"of each; default: {rounds}")
        add("--seconds", type=above_zero, default=0.25, help="of a round, one step at least; default: 0.25")
        if measure != gpu:
            add("--clock", choices=("wall", "cpu"), default="wall", help="cpu: this process's, for a busy machine")

    add, modes = made[step].add_argument, ("eager", "compiled", "cuda_graph")
    add("--modes", nargs="+", choices=modes, default=["eager"], help="default: eager")
    add("--without", action="store_true", help="each task's share: the step without it, too")
    add("--peers", action="store_true", help="torchvision's FCOS and two FPNs of smp, too")
    add("--compare-boxes", type=positive, nargs="+", default=(), metavar="N", help="e.g. 1 100")
    made[gpu].add_argument("--budget", type=above_zero, default=480, metavar="SECONDS", help="default: 480")
    add = made[balance].add_argument
    add("--methods", nargs="+", default=(), metavar="NAME", help="default: all")
    add("--tasks", type=int, nargs="+", choices=(3, 5), default=(3, 5), help="how many; default: 3 5")
    add(
        "--peers",
        action="store_true",
        help="TorchJD's ways, a backward through the trunk for each task, and ours on parameters, too",
    )
    ways = made[sharing].add_argument
    ways("--ways", nargs="+", default=(), metavar="TYPE", help="of sharing; branching:AT sets where; default: all")
    batches = made[infer].add_argument
    batches("--batches", type=positive, nargs="+", metavar="N", help="default: 1 8 32")
    batches(
        "--runtimes", nargs="+", default=(), metavar="NAME",
        help="latency on the CPU in each of these instead: eager, aotinductor, onnx, onnx_int8, openvino, "
        "openvino_int8; in float32 or 8 bits; onnx and openvino need the extra export, aotinductor a C++ compiler",
    )  # fmt: skip
    batches("--threads", type=positive, nargs="+", metavar="N", help="with --runtimes; default: 1 2, on one core 1")
    batches(
        "--beside", nargs="+", metavar="NAME=FILE", help="with --runtimes: ONNX files of other networks, fixed shapes"
    )

    add = made[roofline].add_argument
    add("--precision", choices=("fp32", "bf16"), default="bf16", help="default: bf16")
    for name, number, text in (
        ("--tflops", 750, "TFLOP/s of matrix products in bf16"),
        ("--tbytes", 4.2, "TB/s of memory"),
        ("--launch-us", 2, "least microseconds of a kernel"),
    ):
        add(name, type=above_zero, default=number, metavar="X", help=f"{text}; default: {number}, of an H200")

    add = made[data].add_argument
    add("--only", choices=("memory", "loading"), help="one part; default: both")
    add("--config", type=home_path, help="whose training data to load (nyuv2, or coco with boxes)")
    add("overrides", nargs="*", metavar="a.b=c", help="settings that replace those of the config")
    add("--clock", choices=("wall", "cpu"), help="of loading; default: cpu")
    for name, number in (("--images", COCO_IMAGES), ("--boxes", COCO_BOXES)):
        add(name, type=positive, metavar="N", help=f"of memory; default: COCO's {number}")
    p.add_imports()
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns 0, 1 when a limit is missed, 2 for an error."""
    return run_tool(_measure, parser().parse_args(argv))


def _measure(args: argparse.Namespace) -> int:
    from visionmtl.benchmark.figures import Report

    _check_each_once(args)
    hidden = ("verb", "measure", "json", "markdown")
    settings = {name: str(value) for name, value in vars(args).items() if name not in hidden}
    with tried(args.json, args.markdown):
        command = " ".join(["visionmtl benchmark", *sys.argv[1:]])
        report = Report(command, args.verb, settings, args.json, args.markdown)
        for figure in args.measure(args):
            report.add(figure)
    return 0 if report.kept else 1


def _check_each_once(args: argparse.Namespace) -> None:
    for name in ("modes", "compare_boxes", "methods", "tasks", "ways", "batches", "runtimes", "threads", "beside"):
        values = [str(value).partition("=")[0] for value in getattr(args, name, None) or ()]
        if repeated := [value for value in values if values.count(value) > 1]:
            raise ValueError(
                f"--{name.replace('_', '-')} names {repeated[0]} {values.count(repeated[0])} times; each is measured "
                "once; remove the repeated one"
            )


def _check_idle(args: argparse.Namespace, names: Sequence[str], why: str) -> None:
    for name in names:
        if getattr(args, name):
            option = args.overrides[0] if name == "overrides" else f"--{name}"
            raise ValueError(f"{option} would have no effect {why}")


def _instead(args: argparse.Namespace) -> dict[str, str]:
    """The settings that a verb chooses itself, with what to do instead of giving them by --set."""
    away, infers = "leave it out", args.verb == "infer"
    in_runtimes = infers and args.runtimes
    instead = {
        "balance": "use --methods" if args.verb == "balance" else f"{away}, or compare methods by the verb balance",
        "train.precision": away if in_runtimes else "use --precision",
        "train.compile": "use --modes" if args.verb == "step" else away,
    }
    if args.verb not in ("gpu", "roofline") and not {"compiled", "cuda_graph"}.intersection(getattr(args, "modes", ())):
        instead["train.activation_memory"] = "name compiled in --modes" if args.verb == "step" else away
    if args.verb == "sharing":
        instead["model.sharing"] = "use --ways"
    if infers or not getattr(args, "config", None):
        batches = away if in_runtimes else "use --batches"
        instead["train.batch_size"] = batches if infers else "use --batch"
    if not getattr(args, "config", None):
        instead["model.encoder.name"], instead["data.size"] = "use --encoder", "use --size"
        instead["data"] = f"{away}, for images and labels are drawn at random"
    return instead


def _setting(args: argparse.Namespace) -> "tuple[Workload, Timing]":
    from visionmtl.benchmark.measure import Timing
    from visionmtl.benchmark.workload import Workload, check_counts

    check_counts(args.set, _instead(args))
    timing = Timing(args.rounds, args.seconds, getattr(args, "clock", "wall"))
    boxes = getattr(args, "boxes", 30)
    shape = {name: value for name in ("encoder", "batch", "size") if (value := getattr(args, name, None))}
    if config := getattr(args, "config", None):
        if shape:
            name = next(iter(shape))
            raise ValueError(
                f"--{name} would have no effect beside --config, which names encoder, size and batch; change them by "
                "--set, or leave one of the two out"
            )
        workload = Workload.of_config(config, boxes, args.precision, args.device, args.set)
        return workload if hasattr(args, "batch") else replace(workload, batch=1), timing
    shape = {"encoder": "resnet50", "batch": 16 if hasattr(args, "batch") else 1, "size": (512, 512), **shape}
    size = tuple(shape["size"])
    return Workload(shape["encoder"], shape["batch"], size, boxes, args.precision, args.device, args.set), timing


def step(args: argparse.Namespace) -> "Iterator[Figure]":
    """A training step: the encoder alone, the joint step, each task's share, and the networks it replaces."""
    from visionmtl.benchmark.step import Step

    return Step(*_setting(args), args.modes, args.without, args.peers, args.compare_boxes).measure()


def gpu(args: argparse.Namespace) -> "Iterator[Figure]":
    """Everything a GPU can be asked, in one go and within a budget; what does not fit is named."""
    from visionmtl.benchmark.gpu import measure_gpu

    return measure_gpu(*_setting(args), args.budget)


def data(args: argparse.Namespace) -> "Iterator[Figure]":
    """Loading: start-up and worker memory of a data set of COCO's size; images a second of one core on real files."""
    from visionmtl.benchmark.figures import Note
    from visionmtl.benchmark.loading import measure_loading
    from visionmtl.benchmark.memory import measure_memory
    from visionmtl.run import load

    if args.only == "memory":
        idle = ("config", "overrides", "clock")
        _check_idle(args, idle, "beside --only memory, which draws its data set; leave it out, or --only")
    elif args.config is None:
        if args.only == "loading":
            raise ValueError(
                "--only loading is given without --config; loading needs real files; name them by --config CONFIG "
                "data.root=DIR"
            )
        _check_idle(args, ("overrides", "clock"), "without --config, whose data it is for; name one, or leave it out")
    if args.only == "loading":
        _check_idle(args, ("images", "boxes"), "beside --only loading, which reads a config's files; leave it out")
    if args.config:  # a wrong setting should not wait for what comes before
        load(args.config, args.overrides)
    if args.only != "loading":
        yield from measure_memory(args.images or COCO_IMAGES, args.boxes or COCO_BOXES)
    if args.only != "memory" and args.config is None:
        yield Note("loading is not measured: it needs real files, named by --config CONFIG data.root=DIR")
    elif args.only != "memory":
        yield from measure_loading(args.config, args.overrides, args.clock or "cpu")


def balance(args: argparse.Namespace) -> "Iterator[Figure]":
    """Each balancing method's step against that of fixed weights."""
    from visionmtl.benchmark.balance import measure_methods

    workload, timing = _setting(args)
    return measure_methods(workload, args.methods, args.peers, timing, args.tasks)


def sharing(args: argparse.Namespace) -> "Iterator[Figure]":
    """Each way of sharing: parameters, arithmetic, latency, memory, beside one network a task."""
    from visionmtl.benchmark.sharing import measure_sharing

    workload, timing = _setting(args)
    return measure_sharing(workload, args.ways, timing)


def infer(args: argparse.Namespace) -> "Iterator[Figure]":
    """Predictions: latency at batch 1 and images a second, joint and by task, with suppression and without."""
    from visionmtl.benchmark.infer import measure_predictions

    if args.runtimes:
        from visionmtl.benchmark.runtimes import measure_runtimes
        from visionmtl.data.workers import num_cores

        one_image = "beside --runtimes, which time one image in float32 or 8 bits; leave it out"
        _check_idle(args, ("batches", "precision"), one_image)
        beside = dict(_named_file(text) for text in args.beside or ())
        threads = args.threads or range(1, min(2, num_cores()) + 1)
        return measure_runtimes(*_setting(args), args.runtimes, threads, beside)
    _check_idle(args, ("threads", "beside"), "without --runtimes, which it is for; name some, or leave it out")
    return measure_predictions(*_setting(args), args.batches or (1, 8, 32))


def roofline(args: argparse.Namespace) -> "Iterator[Figure]":
    """The least that a training step can take on a GPU, kernel by kernel of the compiled graphs; needs no GPU."""
    from visionmtl.benchmark.roofline import Roof, measure_roofline

    args.device, args.rounds, args.seconds = "cpu", 1, 0.0  # nothing is timed
    roof = Roof(args.tflops, args.tbytes, args.launch_us, half=args.precision == "bf16")
    return measure_roofline(_setting(args)[0], roof)


def _named_file(text: str) -> tuple[str, Path]:
    name, _, place = text.partition("=")
    file = home_path(place)
    if not name or not file.is_file():
        raise ValueError(f"--beside is given {text!r}; NAME=FILE of an ONNX file that is there is needed; correct it")
    return name, file


if __name__ == "__main__":
    sys.exit(main())
