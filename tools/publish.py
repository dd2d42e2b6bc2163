"""Write a trained network with its model card as the Hugging Face hub has it, or upload it."""

import argparse
import sys
from os.path import expanduser

from visionmtl.cli import CHECKPOINT, ToolParser, run_tool
from visionmtl.config.paths import home_path

MANUAL = """
Weights are written as safetensors, settings as JSON, and a model card with tasks, classes, data and the metrics of the
newest evaluation by protocol. `visionmtl.export.hub.from_pretrained` reads a folder or a repository.

examples:
  visionmtl publish runs/nyuv2 --folder published/ --licence other
  visionmtl publish runs/nyuv2 --repo me/nyuv2-mobilenet --licence other --public"""


def parser() -> ToolParser:
    """The command line."""
    p = ToolParser("publish", __doc__, MANUAL)
    p.add_argument("checkpoint", type=expanduser, metavar="CHECKPOINT", help=CHECKPOINT)
    p.add_argument("--folder", type=home_path, metavar="DIR", help="a new folder to write")
    p.add_argument("--repo", metavar="OWNER/NAME", help="upload to this repository; log in with `hf auth login` before")
    p.add_argument(
        "--licence", required=True, metavar="NAME",
        help="of the weights, by the hub's name, e.g. apache-2.0; data may forbid what code allows; networks of the "
        "package keep their own",
    )  # fmt: skip
    p.add_argument(
        "--results",
        type=home_path,
        metavar="FILE",
        help="JSON of an evaluation; default: the newest of this checkpoint",
    )
    p.add_argument("--half", action="store_true", help="weights as float16, in half the bytes")
    p.add_argument("--public", action="store_true", help="with --repo: everybody may read it; default: private")
    p.add_imports()
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns 0, or 2 for an error."""
    return run_tool(_publish, parser().parse_args(argv))


def _publish(args: argparse.Namespace) -> int:
    if (args.folder is None) == (args.repo is None):
        raise ValueError("the network goes to --folder DIR or to --repo OWNER/NAME; one of them is needed; give it")
    if args.public and args.repo is None:
        raise ValueError(
            "--public would have no effect without --repo; a folder is as public as its place; leave it out"
        )
    from visionmtl.export.hub import push_to_hub, save_pretrained

    options = {"licence": args.licence, "results": args.results, "half": args.half}
    if args.folder is not None:
        print(f"written: {save_pretrained(args.checkpoint, args.folder, **options)}")
    else:
        print(f"uploaded: {push_to_hub(args.checkpoint, args.repo, private=not args.public, **options)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
