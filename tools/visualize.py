"""Draw what a network predicts, beside the truth where there is one, or what the loss sees of the training data."""

from __future__ import annotations

import argparse
import glob
import hashlib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from visionmtl.cli import ERROR, ToolParser, add_device, positive, run_tool, tried, tried_folder
from visionmtl.config.paths import home_path

if TYPE_CHECKING:  # what needs torch is imported where it is used: --help and a wrong command line are answered at once
    from visionmtl.datasets import NamedDataset
    from visionmtl.inference.predictor import Predictor
    from visionmtl.run import Run
    from visionmtl.visualization.draw import Picture

MAX_SHEET = 16
"""Pictures on the contact sheet."""
MAX_NAME = 200
"""Bytes of a file name; most file systems allow 255."""

Named = tuple[str, "Picture"]
Item = TypeVar("Item")


def score(text: str) -> float:
    """A number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value <= 1:
        hint = f"; did you mean {value / 100:g}?" if 1 < value <= 100 else ""
        raise argparse.ArgumentTypeError(f"{text!r} is no score; scores are 0 to 1{hint}")
    return value


def parser() -> ToolParser:
    """The command line."""
    p = ToolParser("visualize", __doc__)
    p.add_argument(
        "checkpoint", type=home_path, help="a run folder or a .pt file; with --mode data also a config"
    )  # fmt: skip
    p.add_argument(
        "inputs", nargs="*", default=[], type=expanduser, metavar="INPUT",
        help="image, folder, glob, video or camera:0; without any: the run's validation images; "
        "a.b=c replaces a setting of the run",
    )  # fmt: skip
    p.add_argument(
        "--output", type=home_path, metavar="DIR",
        help="a new or empty folder, or for one picture or video a new file (default: samples/MODE in the run's "
        "folder, numbered where results lie there)",
    )  # fmt: skip
    p.add_argument(
        "--mode", choices=["predict", "compare", "data"],
        help="predict: predictions on INPUT; compare: validation images, predictions above the truth; data: training "
        "images and labels after augmentation; default: predict with an INPUT, else compare",
    )  # fmt: skip
    p.add_argument("--tasks", metavar="A,B", help="only these; default: all")
    p.add_argument("--score", type=score, default=0.4, help="boxes below this score are left out (default: 0.4)")
    add_device(p)
    p.add_argument("--num", type=positive, metavar="N", help="pictures (default: 16, or every INPUT), or video frames")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns 0, or 2 for an error, also where one of several inputs could not be drawn."""
    return run_tool(_visualize, parser().parse_intermixed_args(argv))


def _visualize(args: argparse.Namespace) -> int:
    is_setting = re.compile(r"~[A-Za-z_][\w.]*$|[A-Za-z_][\w.]*=")
    overrides = [text for text in args.inputs if is_setting.match(text) and not Path(text).exists()]
    inputs = [text for text in args.inputs if text not in overrides]
    mode = args.mode or ("predict" if inputs else "compare")
    if (mode == "predict") != bool(inputs):
        raise ValueError(
            f"--mode {mode} was given {len(inputs)} inputs; predict draws on images of yours, compare and data on the "
            "run's own; " + ("name an image, a folder or a glob" if mode == "predict" else "leave the inputs out")
        )

    if mode == "data":
        run, folder = _read_run(args.checkpoint, overrides)
        with _open_output(args.output, folder / "samples" / mode, args.num or MAX_SHEET) as output:
            output.add_all(_augmented(run, args))
        return 0

    from visionmtl.engine import checkpoint
    from visionmtl.io.video import is_video

    videos = [text for text in inputs if is_video(text)]
    images = _images([text for text in inputs if not is_video(text)])[: args.num]
    path = checkpoint.find(args.checkpoint)
    num_results = len(videos) + len(images) if mode == "predict" else args.num or MAX_SHEET
    default = checkpoint.run_folder(path) / "samples" / mode
    with _open_output(args.output, default, num_results, videos=bool(videos)) as output:
        predictor = _open_predictor(path, overrides, args)
        if mode == "compare":
            output.add_all(_compared(predictor, args.num or MAX_SHEET, args.score))
            return 0
        output.add_all(_predicted(predictor, _readable(images, output), args.score))
        for video in videos:
            output.add_video(video, predictor, args.num, args.score)
        return ERROR if output.num_failed else 0


# ---- what is drawn ----


def _open_predictor(path: Path, overrides: Sequence[str], args: argparse.Namespace) -> Predictor:
    from visionmtl.engine.checkpoint import open_model
    from visionmtl.engine.distributed import choose_device
    from visionmtl.inference.predictor import Predictor

    opened = open_model(path, choose_device(args.device), overrides)
    return Predictor(opened, args.tasks.split(",") if args.tasks else None)


def _read_run(path: Path, overrides: Sequence[str]) -> tuple[Run, Path]:
    """The run of a checkpoint or of a config file, and the run's folder."""
    from visionmtl.engine import checkpoint
    from visionmtl.run import load, restore

    if path.suffix == ".pt" or path.is_dir():
        path = checkpoint.find(path)
        return restore(checkpoint.load(path)["run"], str(path), overrides), checkpoint.run_folder(path)
    run = load(path, overrides)
    return run, Path(run.output or f"runs/{path.stem}")


def _images(inputs: Sequence[str]) -> list[Path]:
    """The image files that the inputs stand for, in the order given, each folder and glob sorted by name."""
    from visionmtl.io.images import SUFFIXES, list_images

    images: list[Path] = []
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            files = list_images(path)
        elif path.is_file():
            files = [path]
        else:
            files = sorted(Path(file) for file in glob.glob(text, recursive=True) if Path(file).is_file())
        if not files:
            raise ValueError(
                f"no image at {text!r}; an image ({' '.join(SUFFIXES)}), a folder of them, a glob in quotes, "
                "a video or camera:0 is needed; check the path"
            )
        images += files
    return images


def _readable(files: Iterable[Path], output: _Output) -> Iterator[Named]:
    """Pictures by name; a file that cannot be read is told of, and left out."""
    from visionmtl.io.images import read_image

    for file in files:
        try:
            yield file.stem, read_image(file)
        except ValueError as error:
            output.fail(str(error))


def _in_batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


def _predicted(predictor: Predictor, images: Iterable[Named], min_score: float, batch_size: int = 0) -> Iterator[Named]:
    for batch in _in_batches(images, batch_size or predictor.batch_size):
        results = predictor([image for _, image in batch])
        for (name, image), result in zip(batch, results, strict=True):
            yield name, _picture(predictor, image, {"prediction": result.predictions}, min_score)


def _picture(predictor: Predictor, image: Picture, rows: Mapping[str, Mapping[str, Any]], min_score: float) -> Picture:
    from visionmtl.inference.predictor import picture

    return picture(predictor.net.tasks, predictor.net.spaces, image, rows, min_score)


def _places(datasets: Sequence[NamedDataset]) -> list[tuple[NamedDataset, int]]:
    return [(dataset, index) for dataset in datasets for index in range(len(dataset))]


def _compared(predictor: Predictor, num: int, min_score: float) -> Iterator[Named]:
    """Validation images spread evenly over the data sets: neighbours tend to show one scene."""
    import numpy as np

    from visionmtl.data.label_spaces import align, supervises
    from visionmtl.datasets import open_datasets

    net = predictor.net
    places = _places(align(open_datasets(predictor.run.data.val), predictor.run.tasks, net.spaces))
    chosen = [places[at] for at in np.unique(np.linspace(0, len(places) - 1, num).astype(int))]
    for batch in _in_batches(chosen, predictor.batch_size):
        samples = [dataset.read(index) for dataset, index in batch]
        results = predictor([sample.image for sample in samples])
        for (dataset, _), sample, result in zip(batch, samples, results, strict=True):
            tasks = {name: task for name, task in net.tasks.items() if supervises(dataset, task, net.spaces[name])}
            truth = {name: task.truth(sample) for name, task in tasks.items()}
            rows = {"prediction": result.predictions, "truth": truth}
            yield sample.image_id, _picture(predictor, sample.image, rows, min_score)


def _augmented(run: Run, args: argparse.Namespace) -> Iterator[Named]:
    """The first images of the first epoch, out of the very data set that training reads."""
    import torch

    from visionmtl.data.label_spaces import align, resolve_spaces
    from visionmtl.data.loader import train_loader
    from visionmtl.datasets import open_datasets
    from visionmtl.inference.predictor import choose_tasks, picture
    from visionmtl.ops.color import apply_matrices

    datasets = open_datasets(run.data.train)
    spaces = resolve_spaces(run.tasks, datasets)
    datasets = align(datasets, run.tasks, spaces)
    tasks = choose_tasks(run.tasks, args.tasks.split(",") if args.tasks else None)
    alone = run.data.model_copy(update={"workers": 0})
    loader = train_loader(alone, run.tasks, spaces, datasets, batch_size=1, seed=run.seed)
    dataset: Any = loader.dataset
    for (key,) in islice(loader.batch_sampler or (), args.num or MAX_SHEET):
        example = dataset[key]
        image = example.image
        if example.color is not None:
            pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
            colored = apply_matrices(pixels, torch.from_numpy(example.color)[None])
            image = colored[0].permute(1, 2, 0).round().byte().numpy()
        truth = {name: task.truth(example.sample) for name, task in tasks.items() if name in example.tasks}
        yield example.sample.image_id, picture(tasks, spaces, image, {"label": truth}, args.score)


# ---- where it goes ----


@dataclass
class _Output:
    """The results of one call: numbered pictures and videos in a folder that was empty before, or one file."""

    path: Path
    is_file: bool
    sheet: list[Picture] = field(default_factory=list)
    num_pictures: int = 0
    num_failed: int = 0

    def add_all(self, pictures: Iterable[Named]) -> None:
        """Save each picture as it comes; in a folder the first of them also on contact_sheet.jpg."""
        from visionmtl.visualization.panels import contact_sheet

        for name, drawn in pictures:
            self._save(self._name(f"{self.num_pictures:03d}_", name, ".png"), drawn)
            self.num_pictures += 1
            if len(self.sheet) < MAX_SHEET:
                self.sheet.append(drawn)
        if len(self.sheet) > 1:
            self._save(self.path / "contact_sheet.jpg", contact_sheet(self.sheet))

    def add_video(self, source: str, predictor: Predictor, num_frames: int | None, min_score: float) -> None:
        """Save a video of the drawings of a video's frames."""
        from visionmtl.io.video import read_frames, write_video

        is_camera = source.startswith("camera:")
        try:
            frames_per_s, frames = read_frames(source)
        except ValueError as error:
            self.fail(str(error))
            return
        images = (("", frame) for frame in islice(frames, num_frames))
        drawn = (picture for _, picture in _predicted(predictor, images, min_score, batch_size=int(is_camera)))
        stem = source.replace(":", "") if is_camera else Path(source).stem
        names = (self._name("", stem, f"{end}.mp4") for end in ("", *(f"-{number}" for number in range(2, 10_000))))
        file = next(name for name in names if self.is_file or not name.exists())
        num_written = write_video(file, drawn, frames_per_s)
        if num_written:
            print(f"written: {file} ({num_written} frames of {source})", flush=True)
        else:
            self.fail(f"{source} has no frame that can be read; convert it with ffmpeg")

    def fail(self, message: str) -> None:
        """Tell of an input that could not be drawn; the others still are."""
        print(f"error: {message}", file=sys.stderr)
        self.num_failed += 1

    def _save(self, file: Path, drawn: Picture) -> None:
        from PIL import Image

        from visionmtl.inference.predictor import save_picture

        print(f"written: {save_picture(file, Image.fromarray(drawn))}", flush=True)

    def _name(self, start: str, stem: str, end: str) -> Path:
        """A file in the folder; a name that is too long is cut, and told apart by its hash."""
        if self.is_file:
            return self.path
        safe = re.sub(r"[^A-Za-z0-9.-]+", "_", stem)
        if len(safe) > MAX_NAME:
            safe = f"{safe[:MAX_NAME]}-{hashlib.sha1(stem.encode(errors='surrogateescape')).hexdigest()[:8]}"
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
    elif _holds_something(path):
        raise ValueError(
            f"--output {path} holds files already, and nothing is written over or mixed; a new or empty folder is "
            "needed; choose another"
        )
    with tried_folder(path):
        yield _Output(path, is_file=False)


def _holds_something(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.exists()


if __name__ == "__main__":
    sys.exit(main())
