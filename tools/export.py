"""Write a trained network for other runtimes, compare the file with it, quantize it to INT8."""

from __future__ import annotations

import argparse
import sys
from os.path import expanduser
from typing import TYPE_CHECKING

from visionmtl.cli import CHECKPOINT, ToolParser, add_tasks, at_least, positive, run_tool, tried
from visionmtl.config.paths import home_path

if TYPE_CHECKING:
    from visionmtl.export.base import Format
    from visionmtl.export.exporter import Exported

WEIGHTS = "safetensors"
FORMATS = ("onnx", "torch_export", "aotinductor", "openvino", "executorch", WEIGHTS)
ANY = "any"
MANUAL = """
The file holds the network with everything it needs: images of 0..255 go in, boxes after suppression, classes and
metres come out, at the input's size. Names, colours, sizes, normalisation and the range of depth are in its metadata
(docs/export.md says how to read them). After each export the file is run and compared with the network in float32.

safetensors is the network for visionmtl itself: weights, settings, classes and a digest in one file that cannot run
code. visionmtl.load and all commands take it wherever they take a checkpoint; a training cannot be resumed from it.

exit status: 0, 1 where the file differs from the network by more than the tolerances, 2 for an error

examples:
  visionmtl export runs/nyuv2 --format onnx
  visionmtl export runs/nyuv2 --format onnx --batch any --outputs raw --tasks depth
  visionmtl export runs/nyuv2 --format openvino --int8
  visionmtl export runs/nyuv2 --format safetensors --half
  visionmtl export runs/nyuv2 --format onnx --preprocessing outside --images photos/ --output net.onnx"""


def parser() -> ToolParser:
    """The command line."""
    p = ToolParser("export", __doc__, MANUAL)
    p.add_argument("checkpoint", type=expanduser, metavar="CHECKPOINT", help=CHECKPOINT)
    p.add_overrides("settings that replace those of the run, e.g. data.root=DIR or data.eval_size=[480,640]")
    p.add_argument("--format", choices=FORMATS, required=True, help="of the file")
    p.add_argument(
        "--output", type=home_path, metavar="FILE", help="default: export/CHECKPOINT[-raw][-int8] in the run's folder"
    )
    add_tasks(p, "only these heads; default: all")
    p.add_argument("--batch", type=batch_size, default=1, metavar="N|any", help="images at once; any: free; default: 1")
    p.add_argument(
        "--outputs", choices=["decoded", "raw"], default="decoded",
        help="decoded: boxes after top-k and suppression, class ids, metres; raw: what the decoders give",
    )  # fmt: skip
    p.add_argument(
        "--preprocessing", choices=["inside", "outside"], default="inside",
        help="inside: takes uint8 [B, H, W, 3]; outside: normalised float32 [B, 3, H, W], as the metadata describes",
    )  # fmt: skip
    p.add_argument("--opset", type=positive, metavar="N", help="of ONNX's operators; default: 20")
    p.add_argument(
        "--int8", action="store_true",
        help="onnx, openvino: 8-bit weights and activations; decoding and the last layers stay in float32",
    )  # fmt: skip
    p.add_argument("--half", action="store_true", help="safetensors: weights as float16, in half the bytes")
    p.add_argument(
        "--calibration-images", type=positive, metavar="N", help="with --int8: training images; default: 100"
    )
    p.add_argument(
        "--score-images", type=at_least(0), metavar="N",
        help="with --int8: validation images of each data set on which the loss of each metric is measured; 0: none; "
        "default: all",
    )  # fmt: skip
    p.add_argument(
        "--images", type=home_path, metavar="DIR", help="compare on these; default: the run's validation images"
    )
    p.add_argument(
        "--num-images", type=at_least(0), metavar="N", help="compare on so many; 0: do not compare; default: 50"
    )
    p.add_imports()
    return p


def batch_size(text: str) -> int | None:
    """A number, or None for any."""
    return None if text == ANY else positive(text)


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for what would have no effect."""
    idle = [] if args.int8 else [name for name in ("calibration_images", "score_images") if is_set(args, name)]
    idle += [name for name in ("images", "num_images") if args.int8 and is_set(args, name)]
    if idle:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
        with_what = "with --int8, whose losses of metrics are measured instead" if args.int8 else "without --int8"
        raise ValueError(f"{names} would have no effect {with_what}; give what is used; leave it out")
    if args.half:
        raise ValueError(f"--half is for safetensors, and the format is {args.format}; leave it out, or use --int8")
    if args.opset and args.format != "onnx":
        raise ValueError(f"--opset is for onnx, and the format is {args.format}; leave it out, or choose onnx")
    if args.num_images == 0 and args.images:
        raise ValueError("--images would have no effect with --num-images 0; leave one of them out")


def is_set(args: argparse.Namespace, name: str) -> bool:
    """Whether an option without a default is on the command line."""
    return getattr(args, name) is not None


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns 0, 1 where the file differs from the network, 2 for an error."""
    return run_tool(_export, parser().parse_intermixed_args(argv))


def _export(args: argparse.Namespace) -> int:
    if args.format == WEIGHTS:
        return _export_weights(args)
    check(args)
    from pydantic import ValidationError

    from visionmtl.export import exporter
    from visionmtl.export.base import Format

    kind = Format.find(args.format)
    try:
        file_format: Format = kind.model_validate({"opset": args.opset} if args.opset else {})
    except ValidationError as error:
        raise ValueError(f"--opset {args.opset}: {error.errors()[0]['msg']}; correct it, or leave it out") from None
    opened = exporter.open_network(args.checkpoint, args.overrides, args.tasks)
    decoded = args.outputs == "decoded"
    name = "".join([opened.path.stem, "" if decoded else "-raw", "-int8" if args.int8 else "", kind.suffix])
    path = args.output or opened.folder / "export" / name
    common = {"batch": args.batch, "decoded": decoded, "preprocessing": args.preprocessing}
    with tried(path):
        if args.int8:
            options = {n: getattr(args, n) for n in ("calibration_images", "score_images") if is_set(args, n)}
            exported = exporter.export_int8(opened, path, file_format, **common, **options)
        else:
            images = exporter.image_files(args.images) if args.images else None
            number = {"num_images": args.num_images} if is_set(args, "num_images") else {}
            exported = exporter.export(opened, path, file_format, **common, images=images, **number)
    return _show(exported, file_format, args.batch)


def _export_weights(args: argparse.Namespace) -> int:
    defaults = parser().parse_args([args.checkpoint, "--format", WEIGHTS, *(["--output", "-"] if args.output else [])])
    idle = [
        name for name, value in vars(defaults).items() if name not in ("output", "overrides", "half", "allow_import")
    ]
    idle = [f"--{name.replace('_', '-')}" for name in idle if getattr(args, name) != getattr(defaults, name)]
    if idle:
        raise ValueError(
            f"{', '.join(idle)} would have no effect with --format {WEIGHTS}, which writes the whole network as it is; "
            "settings, --half and --output go with it; leave the others out"
        )
    from visionmtl.engine.checkpoint import open_model, save_weights

    opened = open_model(args.checkpoint, "cpu", args.overrides)
    path = args.output or opened.folder / "export" / f"{opened.path.stem}.{WEIGHTS}"
    if path.suffix != f".{WEIGHTS}":
        raise ValueError(f"{path} does not end in .{WEIGHTS}, as files of this format do; correct the name")
    with tried(path):
        save_weights(path, opened, half=args.half)
    open_model(path)  # reads all of it
    print(f"written: {path} ({path.stat().st_size / 1e6:.1f} MB; step {opened.step}), for visionmtl.load")
    return 0


def _show(exported: Exported, file_format: Format, batch: int | None) -> int:
    size = exported.path.stat().st_size / 1e6
    stated = f", {file_format.stated}" if file_format.stated else ""
    print(f"written: {exported.path} ({size:.1f} MB{stated}, batch {batch or ANY})")
    if exported.float_layers:
        print(f"int8: {exported.float_layers} last layers, decoding and the exponential of depth stay in float32")
    for loss in exported.losses:
        print(f"  {loss.name:<32} float32 {loss.before:.4f}  int8 {loss.after:.4f}  change {loss.change:+.4f}")
    if exported.parity:
        print(f"compared with the network in float32 on {exported.num_images} images:")
    width = max((len(one.task) for one in exported.parity), default=0)
    for one in exported.parity:
        print(f"  {one.task:<{width}}  {one.text}{'' if one.kept else '  DIFFERS'}")
    return int(not all(one.kept for one in exported.parity))


if __name__ == "__main__":
    sys.exit(main())
