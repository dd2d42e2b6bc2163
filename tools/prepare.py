"""Write the config of a folder of your own, turn NYUv2's download into a folder, or any data set into shards."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visionmtl.cli import ToolParser, at_least, positive, run_tool, tried
from visionmtl.config.paths import check_outside, home_path

if TYPE_CHECKING:  # imported where they are used: --help and a wrong command line are answered at once
    from visionmtl.data.loader import Data
    from visionmtl.datasets.nyuv2_mat import Official

SHARD_MB = 256
_HEAD = "# written by visionmtl prepare shards"
BOXES_RULE = (
    "one object for each (label, instance) pair of the official file; wall, floor, ceiling and unlabelled are none; "
    "category = class of the 40; area = pixels of the object; boxes include the last pixel"
)


MANUAL = """
folder: images with labels as annotation tools write them: COCO json, YOLO txt with data.yaml, Pascal VOC xml, LabelMe
json, label PNGs (values, palette or colours), instance PNGs, depth as PNG, TIFF, EXR or .npy, folders of classes. What
was understood is printed and written into the YAML, where it can be corrected. Nothing in SRC is changed.

shards: the data sets of a config (or of a folder, as `prepare folder` understands it) as tar files with an index, for a
web server or an object store; DST/data.yaml names them. Images keep their bytes, labels are the same bit for bit. What
was written before a stop is not written again; shards that are missing or damaged by then are. Each --split needs a
DST of its own.

exit status: 0; 1 with errors in the data; 2 where nothing was prepared. Nothing that exists is written over.

examples:
  visionmtl prepare folder /data/mine              writes mine.yaml, checks the data, draws mine_sheet.png
  visionmtl prepare folder /data/mine rooms.yaml   writes rooms.yaml and rooms_sheet.png
  visionmtl prepare nyuv2 /downloads/nyuv2 /data/nyuv2
  visionmtl prepare shards mine.yaml /data/shards
  visionmtl prepare shards configs/coco_resnet50.yaml /data/shards data.root=/data/coco --shard-mb 512
"""


def parser() -> ToolParser:
    """The command line."""
    p = ToolParser("prepare", __doc__, MANUAL)
    p.add_argument(
        "data", choices=["folder", "nyuv2", "shards"],
        help="what is prepared: a folder of your own, a data set, or the shards of any data set",
    )  # fmt: skip
    p.add_argument(
        "source", type=home_path, metavar="SRC",
        help="folder: your images and labels; nyuv2: the folder with the official files: nyu_depth_v2_labeled.mat, "
        "splits.mat and classMapping40.mat; shards: a config, of which `data` alone matters, or a folder of your own",
    )  # fmt: skip
    p.add_argument(
        "target", type=home_path, metavar="DST", nargs="?",
        help="folder: the config to write, default NAME_OF_SRC.yaml here; nyuv2: the folder for image, label and depth "
        "PNGs (about 1.5 GB), made if it does not exist; shards: the folder to write into",
    )  # fmt: skip
    p.add_overrides("shards: settings that replace those of the config")
    p.add_argument(
        "--object", default="object", metavar="NAME", dest="object_name",
        help="folder: the class of the objects in instance masks or masks of one class, which no file names",
    )  # fmt: skip
    p.add_argument(
        "--no-check", action="store_false", dest="check", help="folder: write the config alone; no check, no sheet"
    )
    p.add_argument(
        "--shard-mb", type=positive, metavar="N", help=f"shards: million bytes of a shard; default: {SHARD_MB}"
    )
    p.add_argument(
        "--split", choices=["train", "val"],
        help="shards: write the data sets of data.train or data.val alone, into a DST of its own",
    )  # fmt: skip
    p.add_argument(
        "--workers", type=at_least(0), metavar="N",
        help="shards: processes that read; 0: this one; default: one for each core but one",
    )  # fmt: skip
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns 0, 1 when a folder's data have errors, 2 where nothing was prepared."""
    return run_tool(_prepare, parser().parse_intermixed_args(argv))


def _prepare(args: argparse.Namespace) -> int:
    given = [name for name in ("shard_mb", "split", "workers") if getattr(args, name) is not None]
    if args.data != "shards" and (given or args.overrides):
        strange = f"--{given[0].replace('_', '-')}" if given else args.overrides[0]
        raise ValueError(f"{strange} has no effect on prepare {args.data}; it is for shards; leave it out")
    if args.data == "folder":
        name = args.source.resolve().name or "folder"
        return _prepare_folder(args, args.target or Path(f"{name}.yaml"))
    if args.target is None or not args.check or args.object_name != "object":
        raise ValueError(
            f"prepare {args.data} takes SRC and DST, the folder to write into, and neither --no-check nor --object; "
            f"those are for a folder; write visionmtl prepare {args.data} SRC DST"
        )
    if args.data == "shards":
        _prepare_shards(args)
    else:
        _prepare_nyuv2(args.source, args.target)
    return 0


def _prepare_folder(args: argparse.Namespace, target: Path) -> int:
    """Say what the folder holds, write the config, check the data by it and draw a sheet."""
    from visionmtl.cli.check_data import main as check_data
    from visionmtl.data.folder_layout import config_text, understand
    from visionmtl.io.atomic import write_text
    from visionmtl.run import load

    if target.suffix not in (".yaml", ".yml"):
        raise ValueError(f"{target} is no name of a config; DST ends with .yaml; write {target}.yaml")
    sheet = target.with_name(f"{target.stem}_sheet.png")
    with tried(target, sheet if args.check else None):
        layout = understand(args.source, args.object_name)
        print(f"understood {args.source}:")
        for sentence in layout.said:
            print(f"  {sentence}")
        head = [
            f"# Written by `visionmtl prepare folder {args.source}`; correct here what was guessed wrong.",
            f"#   visionmtl check_data {target} --sheet FILE.png",
            f"#   visionmtl train {target}",
            # on one line each: names from the data must not become settings
            *(f"# {' '.join(sentence.split())}" for sentence in layout.said),
        ]
        write_text(target, "\n".join(head) + "\n" + config_text(layout))
    try:
        run = load(target)
    except ValueError:
        target.unlink()  # ours, and of no use
        raise
    size, train = run.data.size, run.train
    print(f"written: {target}, on the recipe configs/folder.yaml; chosen:")
    print(f"  tasks {', '.join(run.tasks)}; encoder {run.model.encoder.name}, pretrained; {size[0]}x{size[1]} px")
    pace = f"{train.epochs} epochs of batches of {train.batch_size}, {train.precision}"
    print(f"  {pace}, warm-up of {run.optim.warmup_steps} steps, learning rate {run.optim.lr:g}")
    status = check_data([str(target), "--sheet", str(sheet)]) if args.check else 0
    if status:
        print(f"next: correct the errors above, then visionmtl check_data {target} --sheet FILE.png")
    else:
        print(f"next: {f'look at {sheet}, then ' if args.check else ''}visionmtl train {target}")
    return status


def _prepare_shards(args: argparse.Namespace) -> None:
    """Write the data sets of a config as shards, and a data block that reads them."""
    import yaml
    from rich.progress import Progress

    from visionmtl.config.console import Console
    from visionmtl.data.shard_writer import write_shards
    from visionmtl.data.workers import choose_workers
    from visionmtl.datasets import open_datasets
    from visionmtl.io.atomic import write_text
    from visionmtl.io.paths import stays_inside

    target, listing = args.target, args.target / "data.yaml"
    if listing.exists():
        ours = listing.read_bytes().startswith(_HEAD.encode())
        found = f"{target} holds shards already" if ours else f"{listing} is a file of yours"
        advice = f", or delete {listing} to have missing and damaged shards of the same call written" if ours else ""
        raise ValueError(
            f"{found}, and is not written over; a new or unfinished folder is needed, one for each --split; choose "
            f"another DST{advice}"
        )
    check_outside(target, args.source)
    data = _data_of(args.source, args.overrides)
    shard_bytes = 1_000_000 * (args.shard_mb or SHARD_MB)
    workers = choose_workers("auto")[0] if args.workers is None else args.workers
    block: dict[str, Any] = {"root": str(target.resolve())}
    for split in (args.split,) if args.split else ("train", "val"):
        specs, block[split] = getattr(data, split), []
        for dataset, spec in zip(open_datasets(specs), specs, strict=True):
            if not stays_inside(dataset.name) or ":" in dataset.name:
                raise ValueError(
                    f"the data set of data.{split} is named {dataset.name!r}, which cannot be a folder; a name without "
                    "'..', ':' and '\\' is needed; set another `name`"
                )
            with Progress(console=Console()) as progress:
                bar = progress.add_task(f"{split} {dataset.name}", total=len(dataset))
                on_sample = partial(progress.advance, bar)
                folder = target / split / dataset.name
                index = write_shards(dataset, spec, folder, shard_bytes, workers, on_sample)
            size = sum(shard.tar.num_bytes for shard in index.shards)
            print(f"{split} {dataset.name}: {len(dataset)} images, {len(index.shards)} shard(s), {size / 1e6:,.1f} MB")
            settings = {"type": "shards", "name": dataset.name, "root": f"${{data.root}}/{split}/{dataset.name}"}
            block[split].append(settings | ({"weight": spec.weight} if spec.weight != 1 else {}))
    text = yaml.safe_dump({"data": block}, sort_keys=False, allow_unicode=True, width=120)
    write_text(listing, f"{_HEAD} {args.source}\n{text}")
    print(f"written: {listing}; put its `data` in place of that of your config, with the URL of {target} as data.root")


def _data_of(source: Path, overrides: list[str]) -> Data:
    """The data of a config, or of a folder that `prepare folder` understands."""
    from visionmtl.data.folder_layout import config_text, understand
    from visionmtl.run import load_data

    if not source.is_dir():
        return load_data(source, overrides)
    with tempfile.TemporaryDirectory() as folder:
        layout = understand(source, "object")
        for sentence in layout.said:
            print(f"  {sentence}")
        config = Path(folder) / "own.yaml"  # another name than that of its base
        config.write_text(config_text(layout), encoding="utf-8")
        return load_data(config, overrides)


def _prepare_nyuv2(source: Path, target: Path) -> None:
    """One image in memory at a time; meta.json comes last, so that a folder without it is known to be unfinished."""
    from rich.progress import track

    from visionmtl.config.console import Console
    from visionmtl.datasets.nyuv2 import SCENE_FILE, SCENE_TYPES
    from visionmtl.datasets.nyuv2_mat import Official
    from visionmtl.io.atomic import write_json, write_text

    official = Official(source)
    scenes = official.scenes()
    _check_target(target)
    for split, numbers in official.splits.items():
        if not len(numbers):
            print(f"{split}: splits.mat lists no image, nothing written")
            continue
        images: list[dict[str, Any]] = []
        objects: list[dict[str, Any]] = []
        for number in track(numbers.tolist(), description=split, console=Console()):
            size = _write_pixels(official, number, split, target)
            images.append({"id": number, "file_name": f"{number:04}.png", "width": size[1], "height": size[0]})
            objects.extend(_annotations(official, number, first_id=len(objects) + 1))
        _write_split(target, split, images, objects)
        print(f"{split}: {len(images)} images, {len(objects)} boxes")

    lines = [f"{number:04} {SCENE_TYPES[label].replace(' ', '_')}\n" for number, label in enumerate(scenes, start=1)]
    write_text(target / SCENE_FILE, "".join(lines))
    write_json(target / "meta.json", _meta())
    print(f"written: {target}; train with data.root={target}")


def _check_target(target: Path) -> None:
    if (target / "meta.json").exists():
        raise ValueError(
            f"{target} holds a prepared data set already, and is not overwritten; allowed is a new, empty or "
            "unfinished folder; delete it or choose another DST"
        )
    known = {"image", "seg13", "seg40", "depth", "depth_raw", "annotations", "train.txt", "test.txt", "scene_types.txt"}
    strange = sorted(file.name for file in target.iterdir() if file.name not in known) if target.is_dir() else []
    if strange or target.is_file():
        raise ValueError(
            f"{target} {'holds ' + ', '.join(strange[:5]) if strange else 'is a file'}; allowed is a new, empty or "
            "unfinished folder; choose another DST"
        )


def _write_pixels(official: Official, number: int, split: str, target: Path) -> tuple[int, ...]:
    """The five pictures of an image, all lossless; returns its (H, W)."""
    import numpy as np

    from visionmtl.io.images import write_png

    image = official.image(number)
    pictures = {
        "image": np.ascontiguousarray(image[..., ::-1]),  # OpenCV writes BGR
        "seg13": official.codes(number, 13),
        "seg40": official.codes(number, 40),
        "depth": official.millimetres(number, "inpainted"),
        "depth_raw": official.millimetres(number, "raw"),
    }
    for name, pixels in pictures.items():
        write_png(target / name / split / f"{number:04}.png", pixels)
    return image.shape[:2]


def _annotations(official: Official, number: int, first_id: int) -> Iterable[dict[str, Any]]:
    """COCO annotations of an image; ids begin at 1, since evaluators take 0 for "no match"."""
    from visionmtl.datasets.nyuv2 import things_space

    boxes, ids = official.objects(number), things_space().ids
    for i, (x1, y1, x2, y2) in enumerate(boxes.xyxy.tolist()):
        yield {
            "id": first_id + i,
            "image_id": number,
            "category_id": ids[boxes.labels[i]],
            "bbox": [int(x1), int(y1), int(x2 - x1), int(y2 - y1)],
            "area": int(boxes.area[i]),
            "iscrowd": 0,
        }


def _write_split(target: Path, split: str, images: list[dict[str, Any]], objects: list[dict[str, Any]]) -> None:
    from visionmtl.datasets.nyuv2 import things_space
    from visionmtl.io.atomic import write_json, write_text

    things = things_space()
    content = {
        "info": {"description": f"NYUv2 {split}: {BOXES_RULE}"},
        "images": images,
        "annotations": objects,
        "categories": [{"id": i, "name": name} for i, name in zip(things.ids, things.classes, strict=True)],
    }
    write_json(target / "annotations" / f"objects37_{split}.json", content, indent=None)
    listing = "".join(f"{image['id']:04}\n" for image in images)
    write_text(target / f"{split}.txt", listing)


def _meta() -> dict[str, Any]:
    from visionmtl.datasets.nyuv2 import CLASSES
    from visionmtl.datasets.nyuv2_mat import MAT, SEG40_TO_13, UNITS_PER_METRE

    return {
        "depth_scale": UNITS_PER_METRE,
        "depth_scale_means": "metres = value / depth_scale; 0 = not measured",
        "depth": "official `depths`: holes filled",
        "depth_raw": "official `rawDepths`: holes are 0",
        "seg40": ["void", *CLASSES[40]],
        "seg13": ["void", *CLASSES[13]],
        "seg40_to_seg13": SEG40_TO_13.tolist(),
        "boxes": BOXES_RULE,
        "source": MAT,
    }


if __name__ == "__main__":
    sys.exit(main())
