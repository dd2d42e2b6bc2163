"""Draw what a network predicts, beside the truth where there is one, or what the loss sees of the training data."""

import argparse
import glob
import itertools
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if (Path(__file__).resolve().parents[1] / "visionmtl").is_dir():  # a plain checkout works without installing
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image

from visionmtl.config.loader import Tree
from visionmtl.config.registry import did_you_mean
from visionmtl.data.label_spaces import resolve_spaces, supervises
from visionmtl.data.loader import TrainLoader
from visionmtl.data.sampler import random_numbers
from visionmtl.datasets import NamedDataset, open_datasets
from visionmtl.drawing import Picture, contact_sheet
from visionmtl.engine import checkpoint
from visionmtl.engine.checkpoint import Opened, open_model
from visionmtl.engine.distributed import choose_device
from visionmtl.inference.predictor import picture, predict
from visionmtl.ops.color import apply_matrices
from visionmtl.ops.images import SUFFIXES, read_image
from visionmtl.ops.videos import is_video, read_frames, write_video
from visionmtl.run import Run, load
from visionmtl.structures import LabelSpace, Sample
from visionmtl.tasks.base import Task

MAX_SHEET = 16
"""Pictures on the contact sheet."""


@dataclass(frozen=True)
class Show:
    """What is drawn and how."""

    tasks: Mapping[str, Task]
    spaces: Mapping[str, LabelSpace | None]
    min_score: float

    def picture(self, image: Picture, rows: Mapping[str, Mapping[str, Any]]) -> Picture:
        """The image and its rows of drawings."""
        return picture(self.tasks, self.spaces, image, rows, self.min_score)

    def truths(self, sample: Sample, source: NamedDataset) -> dict[str, Any]:
        """The sample's labels by task, of those tasks that it supervises."""
        return {
            name: task.truth(sample) for name, task in self.tasks.items() if supervises(source, task, self.spaces[name])
        }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="visualize", description=__doc__)
    p.add_argument("checkpoint", type=Path, help="a .pt file of a run; with --mode data also a config")
    p.add_argument(
        "inputs", nargs="*", metavar="INPUT",
        help="image, folder, glob, video or camera:0; without any: the run's validation images; "
        "a.b=c replaces a setting of the run",
    )  # fmt: skip
    p.add_argument("--output", type=Path, metavar="DIR", help="default: samples/MODE in the run's folder")
    p.add_argument(
        "--mode", choices=["predict", "compare", "data"],
        help="predict: predictions on INPUT; compare: validation images, predictions above the truth; data: training "
        "images and labels after augmentation; default: predict with an INPUT, else compare",
    )  # fmt: skip
    p.add_argument("--tasks", metavar="A,B", help="only these; default: all")
    p.add_argument("--score", type=float, default=0.4, help="boxes below this score are left out (default: 0.4)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    p.add_argument("--num", type=int, metavar="N", help="pictures (default: 16, or every INPUT), or video frames")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = parser().parse_intermixed_args(argv)
    try:
        files = _draw(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(f"written: {file}" for file in files))
    return 0


def _draw(args: argparse.Namespace) -> list[Path]:
    is_setting = re.compile(r"~[A-Za-z_][\w.]*$|[A-Za-z_][\w.]*=")
    overrides = [text for text in args.inputs if is_setting.match(text) and not Path(text).exists()]
    inputs = [text for text in args.inputs if text not in overrides]
    mode = args.mode or ("predict" if inputs else "compare")
    if (mode == "predict") != bool(inputs):
        raise ValueError(
            f"--mode {mode} was given {len(inputs)} inputs; predict draws on images of yours, compare and data on the "
            "run's own; " + ("name an image, a folder or a glob" if mode == "predict" else "leave the inputs out")
        )
    if args.num is not None and args.num < 1:
        raise ValueError(f"--num is {args.num}; at least 1 is needed; leave it out for the default")

    if mode == "data":
        run, folder = _config(args.checkpoint, overrides)
        return _save(args.output or folder / "samples" / mode, _augmented(run, args))
    opened = _open(args.checkpoint, overrides, args.device)
    folder = args.output or opened.folder / "samples" / mode
    show = Show(_chosen(opened.net.tasks, args.tasks), opened.net.spaces, args.score)
    if mode == "compare":
        return _save(folder, _compared(opened, show, args.num or 16))

    files = _save(folder, _predicted(opened, show, _images(inputs)[: args.num]))
    for source in filter(is_video, inputs):
        frames_per_s, frames = read_frames(source)
        drawn = (image for _, image in _shown(opened, show, ((source, f) for f in itertools.islice(frames, args.num))))
        file = folder / f"{Path(source.replace(':', '')).stem}.mp4"
        print(f"{write_video(file, drawn, frames_per_s)} frames of {source}")
        files.append(file)
    return files


def _open(path: Path, overrides: Sequence[str], device: str) -> Opened:
    settings = Tree(checkpoint.load(path)["run"], {(): f"checkpoint {path}"})
    for override in overrides:
        settings.override(override)
    return open_model(path, choose_device(device), settings.resolved())


def _config(path: Path, overrides: Sequence[str]) -> tuple[Run, Path]:
    """The run of a checkpoint or of a config file, and the run's folder."""
    if path.suffix == ".pt":
        opened = _open(path, overrides, "cpu")
        return opened.run, opened.folder
    run = load(path, overrides)
    return run, Path(run.output or f"runs/{path.stem}")


def _chosen(tasks: Mapping[str, Task], names: str | None) -> dict[str, Task]:
    wanted = names.split(",") if names else list(tasks)
    for name in wanted:
        if name not in tasks:
            raise ValueError(
                f"--tasks names {name!r}{did_you_mean(name, tasks)}; this run has {', '.join(tasks)}; correct --tasks"
            )
    return {name: task for name, task in tasks.items() if name in wanted}


def _images(inputs: Sequence[str]) -> list[Path]:
    """The image files that the inputs stand for, in the order given, each folder and glob sorted by name."""
    found: list[Path] = []
    for text in inputs:
        if is_video(text):
            continue
        path = Path(text)
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        elif path.is_file():
            files = [path]
        else:
            files = sorted(Path(file) for file in glob.glob(text, recursive=True) if Path(file).is_file())
        if not files:
            raise ValueError(
                f"no image at {text!r}; an image ({' '.join(SUFFIXES)}), a folder of them, a glob in quotes, "
                "a video or camera:0 is needed; check the path"
            )
        found += files
    return found


def _predicted(opened: Opened, show: Show, files: Sequence[Path]) -> Iterator[tuple[str, Picture]]:
    yield from _shown(opened, show, ((file.stem, read_image(file)) for file in files))


def _shown(opened: Opened, show: Show, images: Iterator[tuple[str, Picture]]) -> Iterator[tuple[str, Picture]]:
    for name, image in images:
        prediction = predict(opened.net, [image], opened.run.data.input_size)[0]
        yield name, show.picture(image, {"prediction": prediction})


def _places(sources: Sequence[NamedDataset]) -> list[tuple[NamedDataset, int]]:
    return [(source, index) for source in sources for index in range(len(source))]


def _compared(opened: Opened, show: Show, num: int) -> Iterator[tuple[str, Picture]]:
    """Validation images spread evenly over the data sets: neighbours tend to show one scene."""
    places = _places(open_datasets(opened.run.data.val))
    for at in np.unique(np.linspace(0, len(places) - 1, num).astype(int)):
        source, index = places[at]
        sample = source.read(index)
        prediction = predict(opened.net, [sample.image], opened.run.data.input_size)[0]
        rows = {"prediction": prediction, "truth": show.truths(sample, source)}
        yield sample.image_id, show.picture(sample.image, rows)


def _augmented(run: Run, args: argparse.Namespace) -> Iterator[tuple[str, Picture]]:
    """The first images of the first epoch, with the very random numbers that training draws (see `data`)."""
    data, sources = run.data, open_datasets(run.data.train)
    places = _places(sources)
    spaces = resolve_spaces(run.tasks, sources)
    show = Show(_chosen(run.tasks, args.tasks), spaces, args.score)
    alone = data.model_copy(update={"workers": 0})
    loader = TrainLoader(alone, run.tasks, spaces, sources, batch_size=1, seed=run.seed)
    for at, again in loader.draws(epoch=0)[: args.num or 16]:
        source, index = places[at]
        rng = random_numbers(run.seed, 0, at, again)
        sample = data.augment.apply(source.read(index), data.size, rng)
        image = sample.image
        if data.augment.colours:
            pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
            matrix = torch.from_numpy(data.augment.colour(image, rng))[None]
            image = apply_matrices(pixels, matrix)[0].permute(1, 2, 0).round().byte().numpy()
        yield sample.image_id, show.picture(image, {"label": show.truths(sample, source)})


def _save(folder: Path, pictures: Iterator[tuple[str, Picture]]) -> list[Path]:
    """Each picture as a numbered PNG, and the first of them on contact_sheet.png."""
    folder.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    first: list[Picture] = []
    for number, (name, drawn) in enumerate(pictures):
        files.append(folder / f"{number:03d}_{re.sub(r'[^A-Za-z0-9.-]+', '_', name)}.png")
        Image.fromarray(drawn).save(files[-1])
        if number < MAX_SHEET:
            first.append(drawn)
    if len(first) > 1:
        files.append(folder / "contact_sheet.png")
        columns = 1 if first[0].shape[1] > 3 * first[0].shape[0] else 2
        Image.fromarray(contact_sheet(first, columns, width_px=3600)).save(files[-1])
    return files


if __name__ == "__main__":
    sys.exit(main())
