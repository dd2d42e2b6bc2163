"""Read every image and label of a config's data sets: counts, a contact sheet, and errors that name the file."""

import argparse
import sys

from visionmtl.cli import ERROR, ToolParser, at_least, positive, run_tool, tried
from visionmtl.config.paths import home_path

MANUAL = """
exit status: 0 without errors; 1 with errors in the data; 2 where the check could not run: wrong arguments or
settings, or no data set could be opened. FILE must not exist yet.

examples:
  visionmtl check_data mine.yaml                                   every image and label
  visionmtl check_data mine.yaml --limit 100 --sheet sheet.jpg     a hundred of each data set, and a picture
  visionmtl check_data configs/coco_resnet50.yaml data.root=/data/coco --json findings.json
"""


def parser() -> ToolParser:
    """The command line."""
    p = ToolParser("check_data", __doc__, MANUAL)
    p.add_argument("config", help="YAML file, of which `data` alone matters; shipped configs are found from anywhere")
    p.add_overrides()
    p.add_argument("--json", type=home_path, metavar="FILE", help="write all numbers and findings there")
    p.add_argument("--sheet", type=home_path, metavar="FILE.png", help="draw images with their labels there")
    p.add_argument(
        "--workers", type=at_least(0), metavar="N",
        help="processes that read; 0: this one; default: data.workers, and if that is auto one for each core",
    )  # fmt: skip
    p.add_argument("--limit", type=positive, metavar="N", help="N images of each data set, evenly spread")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns 0, 1 when there are errors in the data, 2 when they could not be checked."""
    return run_tool(_check, parser().parse_intermixed_args(argv))


def _check(args: argparse.Namespace) -> int:
    with tried(args.json, args.sheet):  # now: reading may take an hour
        if args.sheet:
            from visionmtl.io.images import picture_format

            picture_format(args.sheet)
        return _report(args)


def _report(args: argparse.Namespace) -> int:
    # here, not above: they import torch, for which --help need not wait
    from PIL import Image

    from visionmtl.config.console import Console
    from visionmtl.data.check.sheet import draw_sheet
    from visionmtl.data.check.survey import choose_processes, open_data_sets, plan, read_all
    from visionmtl.data.check.taught import taught
    from visionmtl.data.check.terminal import count_all, print_result, progress
    from visionmtl.data.check.verdict import all_findings
    from visionmtl.io.atomic import atomic_path, write_json
    from visionmtl.run import load_data, load_union_tasks

    console = Console(markup=False, highlight=False, width=None if sys.stdout and sys.stdout.isatty() else 120)
    data, tasks = load_data(args.config, args.overrides), load_union_tasks(args.config, args.overrides)
    checked = open_data_sets(data)
    images = plan(checked, args.limit)
    workers = choose_processes(data, images) if args.workers is None else args.workers
    with progress(console, images) as count:
        read_all(checked, workers, count, data.timeout_s)

    findings = [
        *(finding for data_set in checked for finding in data_set.findings),
        *all_findings(checked),
        *taught(checked, tasks),
    ]
    numbers = [data_set.numbers() for data_set in checked]
    counts = count_all(findings)
    # before anything is printed: a closed pipe or a terminal without Unicode must not lose what took an hour
    if args.json:
        asked = {"config": args.config, "overrides": args.overrides, "limit": args.limit}
        rows = [finding.as_json() for finding in findings]
        content = {**asked, "counts": counts, "data_sets": numbers, "findings": rows}
        write_json(args.json, content)
    has_sheet = args.sheet and any(data_set.seen for data_set in checked)
    if has_sheet:
        with atomic_path(args.sheet) as unfinished:
            Image.fromarray(draw_sheet(checked, findings)).save(unfinished)
    print_result(console, numbers, findings)
    for file in (args.json, args.sheet if has_sheet else None):
        if file:
            console.print(f"written: {file}")
    if not any(data_set.source for data_set in checked):
        print("error: no data set could be opened, so nothing was checked; correct what is said above", file=sys.stderr)
        return ERROR
    return 1 if counts["error"] else 0


if __name__ == "__main__":
    sys.exit(main())
