"""Show a network in the browser: drop an image or use the camera, and point at things for class, metres and score."""

from __future__ import annotations

import argparse
import sys

from visionmtl.cli import CHECKPOINT, ToolParser, add_device, add_tasks, run_tool, score
from visionmtl.config.paths import home_path

MANUAL = """
The page needs the extra: pip install 'visionmtl[demo]'. Images are sent to this machine only, and lie in a
temporary folder for ten minutes.

examples:
  visionmtl demo runs/nyuv2                      then open http://127.0.0.1:7860
  visionmtl demo runs/nyuv2 --tasks detection,depth --score 0.3
  visionmtl demo runs/nyuv2 --host 0.0.0.0       for everyone in the network: there is no password
"""


def port(text: str) -> int:
    """A number from 1 to 65535."""
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is no port; a number from 1 to 65535 is needed")
    return int(text)


def parser() -> ToolParser:
    """The command line."""
    p = ToolParser("demo", __doc__, MANUAL)
    p.add_argument("checkpoint", type=home_path, help=CHECKPOINT)
    p.add_overrides("settings that replace those of the run")
    add_tasks(p)
    p.add_argument("--score", type=score, default=0.4, help="where the threshold of boxes stands at first (0.4)")
    p.add_argument("--host", default="127.0.0.1", help="the address to listen at; default: this machine alone")
    p.add_argument("--port", type=port, default=7860, help="default: 7860")
    add_device(p)
    p.add_imports()
    return p


def main(argv: list[str] | None = None) -> int:
    """Serve until interrupted; returns 0, or 2 for an error."""
    return run_tool(_demo, parser().parse_intermixed_args(argv))


def _demo(args: argparse.Namespace) -> int:
    from visionmtl.engine.checkpoint import open_model
    from visionmtl.engine.distributed import choose_device
    from visionmtl.inference.demo import build, check_address, serve
    from visionmtl.inference.predictor import Predictor

    check_address(args.host, args.port)
    opened = open_model(args.checkpoint, choose_device(args.device), args.overrides, reads_data=False)
    predictor = Predictor(opened, args.tasks)
    page = build(predictor, str(args.checkpoint), args.score)
    print(f"http://{args.host}:{args.port} shows {args.checkpoint}; Ctrl-C ends it", flush=True)
    serve(page, args.host, args.port)
    return 0


if __name__ == "__main__":
    sys.exit(main())
