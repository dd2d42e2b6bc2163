"""Draw what a network predicts, beside the truth where there is one, or what the loss sees of the training data."""

from __future__ import annotations

import argparse
import glob
import hashlib
import json
import mimetypes
import os
import re
import sys
import unicodedata
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from visionmtl.cli import (
    CHECKPOINT,
    ERROR,
    ToolParser,
    add_device,
    add_tasks,
    is_config,
    is_setting,
    positive,
    run_tool,
    score,
    tried,
    tried_folder,
)
from visionmtl.config.paths import home_path

if TYPE_CHECKING:  # what needs torch is imported where it is used: --help and a wrong command line are answered at once
    from visionmtl.datasets import NamedDataset
    from visionmtl.inference.predictor import Predictor, Result
    from visionmtl.run import Run
    from visionmtl.visualization.draw import DrawOptions, Picture

MAX_SHEET = 16
"""Pictures on the contact sheet."""
MAX_SHEET_PX = 2400
"""Width of the contact sheet."""
MAX_NAME = 200
"""Bytes of a file name; most file systems allow 255."""

MANUAL = """
examples:
  visionmtl visualize runs/quickstart photo.jpg                   panels of every task
  visionmtl visualize runs/quickstart photos/ --layout overlay    classes, boxes and metres on the photos themselves
  visionmtl visualize runs/quickstart drive.mp4 --depth-range 0.5:80
  visionmtl visualize runs/quickstart photos/ --json --maps       and as files for programs
  find . -name '*.jpg' | visionmtl visualize runs/quickstart -    files from a list
  visionmtl visualize runs/quickstart                             validation images: prediction, truth and errors
  visionmtl visualize runs/quickstart --worst 8 --by depth        the images with the worst depth
  visionmtl visualize configs/nyuv2.yaml --mode data data.root=DIR   what training sees after augmentation
"""

Named = tuple[str, "Picture"]
Item = TypeVar("Item")


def depth_range(text: str) -> tuple[float, float] | str:
    """Two distances in metres, written 0.5:10, or "auto"."""
    low, _, high = text.partition(":")
    try:
        values = float(low), float(high)
    except ValueError:
        values = 0.0, 0.0
    if text != "auto" and not 0 < values[0] < values[1] < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no range; auto or metres such as 0.5:10 are")
    return "auto" if text == "auto" else values


def parser() -> ToolParser:
    """The command line."""
    p = ToolParser("visualize", __doc__, MANUAL)
    p.add_argument("checkpoint", type=home_path, help=f"{CHECKPOINT}; with --mode data also a config")
    p.add_argument(
        "inputs", nargs="*", default=[], type=expanduser, metavar="INPUT",
        help="image, folder, glob, video or camera:0, or - for a list of them on standard input; without any: the "
        "run's validation images; a.b=c replaces a setting of the run",
    )  # fmt: skip
    p.add_argument(
        "--output", type=home_path, metavar="DIR",
        help="a new or empty folder, or for one picture or video a new file (default: samples/MODE in the run's "
        "folder, numbered where results lie there)",
    )  # fmt: skip
    p.add_argument(
        "--mode", choices=["predict", "compare", "data"],
        help="predict: predictions on INPUT; compare: validation images, predictions, truth and errors; data: training "
        "images and labels after augmentation; default: predict with an INPUT, else compare",
    )  # fmt: skip
    add_tasks(p)
    p.add_argument("--score", type=score, help="boxes below this score are left out (default: 0.4)")
    p.add_argument(
        "--layout", choices=["panels", "overlay"],
        help="panels: a drawing for each task (default); overlay: all on the image, at its own size",
    )  # fmt: skip
    p.add_argument(
        "--depth-range", type=depth_range, metavar="MIN:MAX",
        help="metres at the ends of the colours of depth, to compare pictures by eye; default: auto, those of each "
        "picture, prediction and truth the same ones, followed slowly in videos",
    )  # fmt: skip
    p.add_argument("--json", action="store_true", help="also write each prediction as NAME.json; of videos NAME.jsonl")
    p.add_argument(
        "--maps", action="store_true",
        help="also write NAME_TASK.png: class ids of 8 bits, normals of 16 bits, depth of 16 bits in millimetres "
        "(metres x 256 where the task goes beyond 65 m)",
    )  # fmt: skip
    p.add_argument("--no-pictures", action="store_true", help="with --json or --maps: only these")
    p.add_argument("--worst", type=positive, metavar="N", help="compare: the N images with the worst metric, in order")
    p.add_argument("--best", type=positive, metavar="N", help="compare: the N images with the best metric, in order")
    p.add_argument(
        "--by", metavar="TASK[/METRIC]", help="metric of --worst and --best (default: the first task's primary one)"
    )
    add_device(p)
    p.add_argument(
        "--num", type=positive, metavar="N",
        help="pictures (default: 16, or every INPUT), or video frames; with --worst or --best: the images to choose "
        "from (default: all)",
    )  # fmt: skip
    p.add_imports()
    return p


def check(args: argparse.Namespace, mode: str) -> None:
    """Raises ValueError for what would have no effect."""
    idle = [name for name in ("worst", "best", "by") if getattr(args, name) and mode != "compare"]
    idle += [name for name in ("json", "maps", "no_pictures", "layout") if getattr(args, name) and mode != "predict"]
    idle += ["depth_range"] if args.depth_range and args.no_pictures else []
    idle += ["score"] if args.score is not None and (mode == "data" or (args.no_pictures and not args.json)) else []
    idle += ["device"] if args.device != "auto" and mode == "data" else []
    if idle:
        raise ValueError(
            f"--{idle[0].replace('_', '-')} would have no effect with mode {mode}"
            f"{' without pictures' if args.no_pictures else ''}; leave it out, or see --mode"
        )
    if args.no_pictures and not (args.json or args.maps):
        raise ValueError("--no-pictures alone would write nothing; --json or --maps is needed with it; add one")
    if args.by and not (args.worst or args.best):
        raise ValueError("--by would have no effect without --worst N or --best N; add one of them, or leave it out")
    if args.worst and args.best:
        raise ValueError("--worst and --best are two orders; one call draws one of them; run it twice")


def _check_tasks(args: argparse.Namespace, fields: Container[str]) -> None:
    """Raises ValueError for options of labels that no task predicts."""
    for name, value, label in (("score", args.score, "boxes"), ("depth-range", args.depth_range, "depth_m")):
        if value is not None and label not in fields:
            raise ValueError(
                f"--{name} would have no effect: it is for {label}, which no task here predicts; leave it out, or "
                "choose other --tasks"
            )


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns 0, or 2 for an error, also where one of several inputs could not be drawn."""
    return run_tool(_visualize, parser().parse_intermixed_args(argv))


def _visualize(args: argparse.Namespace) -> int:
    overrides = [text for text in args.inputs if is_setting(text)]
    inputs = [text for text in args.inputs if text not in overrides]
    mode = args.mode or ("predict" if inputs else "compare")
    if (mode == "predict") != bool(inputs):
        raise ValueError(
            f"--mode {mode} was given {len(inputs)} inputs; predict draws on images of yours, compare and data on the "
            "run's own; " + ("name an image, a folder or a glob" if mode == "predict" else "leave the inputs out")
        )

    check(args, mode)
    from visionmtl.visualization.draw import MIN_SCORE, DrawOptions

    options = DrawOptions(MIN_SCORE if args.score is None else args.score, args.depth_range or "auto")
    if mode == "data":
        run, folder = _read_run(args.checkpoint, overrides)
        with _open_output(args.output, folder / "samples" / mode, args.num or MAX_SHEET) as output:
            output.add_all(_augmented(run, args, options))
        return 0

    from visionmtl.engine import checkpoint
    from visionmtl.io.video import is_video

    inputs = [text for entry in inputs for text in (_listed() if entry == "-" else [entry])]
    inputs = [file for text in inputs for file in _matches(text)]
    videos = [text for text in inputs if is_video(text)]
    images = _images([text for text in inputs if not is_video(text)])[: args.num]
    if args.maps and videos:
        raise ValueError(f"--maps writes files for each image, and {videos[0]} is a video; leave it out, or use --json")
    path = checkpoint.find(args.checkpoint)
    num_results = len(videos) + len(images) if mode == "predict" else args.worst or args.best or args.num or MAX_SHEET
    default = checkpoint.run_folder(path) / "samples" / mode
    if joined := _below(Path(args.output or default), inputs, images):
        raise ValueError(
            f"{joined} lies in {args.output or default}, where drawn pictures go, and in a folder that is drawn; a "
            "picture is not drawn again; choose an --output outside of that folder, or move what is there"
        )
    with _open_output(args.output, default, num_results, videos=bool(videos)) as output:
        predictor = _open_predictor(path, overrides, args, mode)
        tasks = predictor.net.tasks
        _check_tasks(args, {task.field for task in tasks.values()})
        over_depth = {task.field for task in tasks.values()} & {"boxes", "segmentation"}
        if args.depth_range and args.layout == "overlay" and over_depth:
            raise ValueError(
                f"--depth-range would have no effect in an overlay of {', '.join(tasks)}: it shows depth as colours "
                "where there is nothing else to see; add --tasks with depth alone, or leave --layout out"
            )
        if mode == "compare":
            output.add_all(_compared(predictor, _validation(predictor, args), args, options))
            return 0
        if output.is_file and (args.json or args.maps):
            raise ValueError(f"--json and --maps write several files; {args.output} is one; name a folder")
        output.add_all(_predicted(predictor, _readable(images, output), args, options, output))
        for video in videos:
            output.add_video(video, predictor, args, options)
        output.tell_failed()
        return ERROR if output.failed else 0


# ---- what is drawn ----


def _open_predictor(path: Path, overrides: Sequence[str], args: argparse.Namespace, mode: str) -> Predictor:
    from visionmtl.engine.checkpoint import open_model
    from visionmtl.engine.distributed import choose_device
    from visionmtl.inference.predictor import Predictor

    opened = open_model(path, choose_device(args.device), overrides, reads_data=mode == "compare")
    return Predictor(opened, args.tasks)


def _read_run(path: Path, overrides: Sequence[str]) -> tuple[Run, Path]:
    """The run of a checkpoint or of a config file, and the run's folder."""
    from visionmtl.engine import checkpoint
    from visionmtl.run import load, restore

    if not is_config(path):
        path = checkpoint.find(path)
        return restore(checkpoint.load(path)["run"], str(path), overrides), checkpoint.run_folder(path)
    run = load(path, overrides)
    return run, Path(run.output or f"runs/{path.stem}")


def _listed() -> list[str]:
    """The inputs named on standard input, one a line."""
    inputs = [expanduser(line.rstrip("\r\n")) for line in sys.stdin if line.strip()]
    if not inputs:
        raise ValueError("- stands for a list of inputs on standard input, which is empty; one a line is needed")
    return inputs


def _matches(text: str) -> list[str]:
    """The files of a glob, images and videos alike, sorted by name; else the text as it is."""
    if not glob.has_magic(text) or os.path.exists(text):
        return [text]
    return sorted(filter(os.path.isfile, glob.glob(text, recursive=True))) or [text]


def _images(inputs: Sequence[str]) -> list[Path]:
    """The image files that the inputs stand for, in the order given, each folder sorted by name."""
    from visionmtl.io.images import SUFFIXES, list_images

    images: list[Path] = []
    for text in inputs:
        path = Path(text)
        files = list_images(path) if path.is_dir() else [path] if path.is_file() else []
        if not files:
            found = "holds no image" if path.is_dir() else "names no file"
            raise ValueError(
                f"{text!r} {found}; an image ({' '.join(SUFFIXES)}), a folder of them, a glob in quotes, "
                "a video or camera:0 is needed; check the path"
            )
        images += files
    return images


def _below(output: Path, inputs: Sequence[str], images: Sequence[Path]) -> Path | None:
    """The first of the images that an earlier call has drawn into a folder within an input."""
    target = output.resolve()
    around = [text for text in inputs if Path(text).is_dir() and Path(text).resolve() in target.parents]
    return next((file for file in images if around and file.resolve().is_relative_to(target)), None)


def _readable(files: Iterable[Path], output: _Output) -> Iterator[Named]:
    """Pictures by name; a file that cannot be read is told of, and left out."""
    from visionmtl.io.images import read_image

    for file in files:
        try:
            yield str(file), read_image(file)
        except ValueError as error:
            output.fail(str(file), str(error))


def _in_batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


def _results(predictor: Predictor, images: Iterable[Named], batch_size: int = 0) -> Iterator[tuple[str, Result]]:
    for batch in _in_batches(images, batch_size or predictor.batch_size):
        results = predictor([image for _, image in batch])
        for (name, _), result in zip(batch, results, strict=True):
            yield name, replace(result, source=name)


def _predicted(
    predictor: Predictor, images: Iterable[Named], args: argparse.Namespace, options: DrawOptions, output: _Output
) -> Iterator[Named]:
    """Pictures of image files; other files of the same name are written on the way."""
    for file, result in _results(predictor, images):
        name = Path(file).stem
        output.add_files(name, result, args, options)
        if not args.no_pictures:
            yield name, _draw(result, args, options)
        else:
            output.num_pictures += 1


def _draw(result: Result, args: argparse.Namespace, options: DrawOptions) -> Picture:
    from visionmtl.visualization.panels import draw_overlay, draw_panels

    if args.layout == "overlay":
        return draw_overlay(result.spaces, result.image, result.predictions, options, result.tasks)
    return draw_panels(result.tasks, result.spaces, result.image, {"prediction": result.predictions}, options)


def _places(datasets: Sequence[NamedDataset]) -> list[tuple[NamedDataset, int]]:
    return [(dataset, index) for dataset in datasets for index in range(len(dataset))]


def _validation(predictor: Predictor, args: argparse.Namespace) -> list[NamedDataset]:
    """Raises ValueError, also where a photograph was forgotten."""
    from visionmtl.datasets import open_datasets

    data = predictor.run.data
    forgotten = "" if args.mode else "; or name a photograph, for without one validation images are drawn"
    return open_datasets(data.val, data.elsewhere("val") + forgotten)


def _compared(
    predictor: Predictor, datasets: Sequence[NamedDataset], args: argparse.Namespace, options: DrawOptions
) -> Iterator[Named]:
    """Validation images spread evenly over the data sets (neighbours tend to show one scene), or the worst or best."""
    import numpy as np

    from visionmtl.data.label_spaces import align, supervises
    from visionmtl.inference.ranking import choose_metric, image_metric, ranked
    from visionmtl.visualization.panels import draw_panels

    net = predictor.net
    places = _places(align(datasets, predictor.run.tasks, net.spaces))
    num_ranked = args.worst or args.best
    num = args.num or (len(places) if num_ranked else MAX_SHEET)
    chosen = [places[at] for at in np.unique(np.linspace(0, len(places) - 1, num).astype(int))]
    titles = ["image"] * len(chosen)
    if num_ranked:
        name, metric = choose_metric(net.tasks, args.by)
        task, space = net.tasks[name], net.spaces[name]
        meter, values = task.meter(space), []
        for batch in _in_batches(_told(chosen, f"{name}/{metric} of each image"), predictor.batch_size):
            samples = [dataset.read(index) for dataset, index in batch]
            results = predictor(samples, tasks=[name])
            for (dataset, _), sample, result in zip(batch, samples, results, strict=True):
                can_evaluate = supervises(dataset, task, space)
                values.append(image_metric(meter, sample, result.predictions[name], metric) if can_evaluate else None)
        order = ranked(values, task, metric)
        order = order[:num_ranked] if args.worst else order[::-1][:num_ranked]
        if not order:
            raise ValueError(f"no validation image tells {name}/{metric}; labels of {name} are needed; choose --by")
        titles = [f"image, {metric} {values[at]:.4g}" for at in order]
        chosen = [chosen[at] for at in order]
    waiting = iter(titles)
    for batch in _in_batches(chosen, predictor.batch_size):
        samples = [dataset.read(index) for dataset, index in batch]
        results = predictor(samples)
        for (dataset, _), sample, result in zip(batch, samples, results, strict=True):
            tasks = {name: task for name, task in net.tasks.items() if supervises(dataset, task, net.spaces[name])}
            truth = {name: task.truth(sample) for name, task in tasks.items()}
            rows = {"prediction": result.predictions, "truth": truth}
            yield sample.image_id, draw_panels(net.tasks, net.spaces, sample.image, rows, options, next(waiting))


def _told(items: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
    """The items, with a progress bar on a terminal."""
    from rich.progress import track

    from visionmtl.config.console import Console

    console = Console(stderr=True)
    return iter(track(items, what, total=total, console=console, disable=not console.is_terminal))


def _augmented(run: Run, args: argparse.Namespace, options: DrawOptions) -> Iterator[Named]:
    """The first images of the first epoch, out of the very data set that training reads."""
    import torch

    from visionmtl.data.label_spaces import align, resolve_spaces
    from visionmtl.data.loader import train_loader
    from visionmtl.datasets import open_datasets
    from visionmtl.inference.predictor import choose_tasks
    from visionmtl.ops.color import apply_matrices
    from visionmtl.visualization.panels import draw_panels

    datasets = open_datasets(run.data.train)
    spaces = resolve_spaces(run.tasks, datasets)
    datasets = align(datasets, run.tasks, spaces)
    tasks = choose_tasks(run.tasks, args.tasks)
    alone = run.data.model_copy(update={"workers": 0})
    loader = train_loader(alone, run.tasks, spaces, datasets, batch_size=1, seed=run.seed, unlabelled=run.is_taught)
    dataset: Any = loader.dataset
    for (key,) in islice(loader.batch_sampler or (), args.num or MAX_SHEET):
        example = dataset[key]
        image = example.image
        if example.color is not None:
            pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
            colored = apply_matrices(pixels, torch.from_numpy(example.color)[None])
            image = colored[0].permute(1, 2, 0).round().byte().numpy()
        truth = {name: task.truth(example.sample) for name, task in tasks.items() if name in example.tasks}
        yield example.sample.image_id, draw_panels(tasks, spaces, image, {"label": truth}, options)


# ---- where it goes ----


@dataclass
class _Output:
    """The results of one call: numbered pictures and videos in a folder that was empty before, or one file."""

    path: Path
    is_file: bool
    sheet: list[Picture] = field(default_factory=list)
    num_pictures: int = 0
    failed: list[str] = field(default_factory=list)

    def add_all(self, pictures: Iterable[Named]) -> None:
        """Save each picture as it comes; in a folder the first of them also on contact_sheet.jpg."""
        from visionmtl.visualization.draw import to_cell
        from visionmtl.visualization.panels import contact_sheet

        for name, drawn in pictures:
            self._save(self._name(f"{self.num_pictures:03d}_", name, ".png"), drawn)
            self.num_pictures += 1
            if len(self.sheet) < MAX_SHEET:
                self.sheet.append(to_cell(drawn, MAX_SHEET_PX))
        if len(self.sheet) > 1:
            self._save(self.path / "contact_sheet.jpg", contact_sheet(self.sheet, MAX_SHEET_PX))

    def add_files(self, name: str, result: Result, args: argparse.Namespace, options: DrawOptions) -> None:
        """The prediction of the next picture as JSON and maps."""
        from visionmtl.inference.results_io import encode_map, fitting_depth_units
        from visionmtl.io.atomic import write_bytes
        from visionmtl.io.images import write_png

        start = f"{self.num_pictures:03d}_"
        if args.json:
            file = self._name(start, name, ".json")
            text = json.dumps(result.to_dict(options.min_score), indent=1, ensure_ascii=False)
            # names of files may be no UTF-8: what is not is escaped, as JSON has it
            write_bytes(file, f"{text}\n".encode(errors="backslashreplace"))
            print(f"written: {file}", flush=True)
        if not args.maps:
            return
        units = fitting_depth_units(result.tasks)
        for task_name, task in result.tasks.items():
            pixels = encode_map(task, result.predictions[task_name], result.spaces[task_name], units)
            if pixels is None:
                continue
            file = self._name(start, name, f"_{task_name}.png")
            write_png(file, pixels)
            print(f"written: {file}", flush=True)

    def add_video(self, source: str, predictor: Predictor, args: argparse.Namespace, options: DrawOptions) -> None:
        """Save a video of the drawings of a video's frames, at its frame rate."""
        from visionmtl.io.video import count_frames, cut_short, read_frames, write_video
        from visionmtl.visualization.panels import SteadyRange, is_depth

        is_camera = source.startswith("camera:")
        try:
            frames_per_s, frames = read_frames(source)
        except ValueError as error:
            self.fail(source, str(error))
            return
        total = min((n for n in (count_frames(source), args.num) if n), default=None)
        images = ((f"{source}#{number}", frame) for number, frame in enumerate(islice(frames, args.num)))
        results = _results(predictor, _told(images, Path(source).name, total), batch_size=int(is_camera))
        steady = SteadyRange(frames_per_s)
        stem = source.replace(":", "") if is_camera else Path(source).stem
        numbers = ("", *(f"-{number}" for number in range(2, 10_000)))
        end = next(
            end for end in numbers
            if self.is_file or not any(self._name("", stem, f"{end}{kind}").exists() for kind in (".mp4", ".jsonl"))
        )  # fmt: skip

        def drawn(lines: TextIO | None) -> Iterator[Picture]:
            for _, result in results:
                if lines:
                    lines.write(json.dumps(result.to_dict(options.min_score), ensure_ascii=False) + "\n")
                depth = [value for value in result.predictions.values() if is_depth(value)]
                of_frame = replace(options, all_classes=True)
                if options.depth_range_m == "auto" and depth:
                    of_frame = replace(of_frame, depth_range_m=steady.update(depth[0]))
                yield result.image if args.no_pictures else _draw(result, args, of_frame)

        with ExitStack() as files:
            lines = None
            if args.json:
                path = self._name("", stem, f"{end}.jsonl")
                lines = files.enter_context(path.open("x", encoding="utf-8", errors="backslashreplace"))
                print(f"written: {path}", flush=True)
            if args.no_pictures:
                num_read = sum(1 for _ in drawn(lines))
            else:
                file = self._name("", stem, f"{end}.mp4")
                num_read = write_video(file, drawn(lines), frames_per_s)
        if not num_read:
            self.fail(source, f"{source} has no frame that can be read; one is needed; convert it with ffmpeg")
            return
        if not args.no_pictures:
            print(f"written: {file} ({num_read} frames of {source}, {frames_per_s:g} a second)", flush=True)
        if told := cut_short(source, num_read, total):
            self.fail(f"{source} after frame {num_read}", told)

    def fail(self, name: str, message: str) -> None:
        """Tell of an input that could not be drawn; the others still are."""
        print(f"error: {message}", file=sys.stderr)
        self.failed.append(name)

    def tell_failed(self) -> None:
        """List at the end what could not be drawn: the first lines may have scrolled away."""
        if self.failed:
            print("\n  ".join([f"not drawn, {len(self.failed)} of the inputs:", *self.failed]), file=sys.stderr)

    def _save(self, file: Path, drawn: Picture) -> None:
        from PIL import Image

        from visionmtl.inference.predictor import save_picture

        print(f"written: {save_picture(file, Image.fromarray(drawn))}", flush=True)

    def _name(self, start: str, stem: str, end: str) -> Path:
        """A file in the folder; a name that is too long is cut, and told apart by its hash."""
        if self.is_file:
            return self.path
        safe = re.sub(r"[^\w.-]+", "_", unicodedata.normalize("NFC", stem))
        if len(encoded := safe.encode()) > MAX_NAME:
            number = hashlib.sha1(stem.encode(errors="surrogateescape")).hexdigest()[:8]
            safe = f"{encoded[:MAX_NAME].decode(errors='ignore')}-{number}"
        return self.path / f"{start}{safe}{end}"


@contextmanager
def _open_output(path: Path | None, default: Path, num_results: int, videos: bool = False) -> Iterator[_Output]:
    """Try the place of the results before the work. A folder that stays empty is removed again."""
    from visionmtl.io import images, video

    if path is None:
        names = (default, *(default.with_name(f"{default.name}-{number}") for number in range(2, 10_000)))
        path = next(folder for folder in names if not _holds_something(folder))
    elif path.suffix.lower() in (video.SUFFIXES if videos else images.SUFFIXES) and not path.is_dir():
        if num_results != 1:
            raise ValueError(
                f"--output {path} is one file, but there are {num_results} results; a folder is needed for several; "
                "name one, or draw one picture"
            )
        with tried(path):
            yield _Output(path, is_file=True)
        return
    elif _is_named_as_picture(path) and not path.is_dir():
        what, endings = ("videos", video.SUFFIXES) if videos else ("pictures", images.SUFFIXES)
        raise ValueError(
            f"--output {path} does not end as {what} do ({' '.join(endings)}), and {what} are drawn here; name such a "
            "file, or a folder"
        )
    elif _holds_something(path):
        raise ValueError(
            f"--output {path} holds files already, and nothing is written over or mixed; a new or empty folder is "
            "needed; choose another"
        )
    with tried_folder(path):
        yield _Output(path, is_file=False)


def _is_named_as_picture(path: Path) -> bool:
    """Whether its name ends as that of a picture or video, of those that we can write or any other."""
    from visionmtl.io import images, video

    kind = mimetypes.guess_type(path.name)[0] or ""
    return path.suffix.lower() in (*images.SUFFIXES, *video.SUFFIXES) or kind.startswith(("image/", "video/"))


def _holds_something(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.exists()


if __name__ == "__main__":
    sys.exit(main())
