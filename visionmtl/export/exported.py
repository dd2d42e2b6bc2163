"""An exported file at work: the same predictions as the trained network's, by whatever runtime it is for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter

from visionmtl.config.imports import foreign_settings
from visionmtl.config.paths import home_path
from visionmtl.config.text_files import check_object
from visionmtl.data.transforms.augment import fit
from visionmtl.engine.options import check_counts
from visionmtl.export.base import Format, format_of
from visionmtl.export.graph import CONTENT, FORMAT, IMAGE, Description, restore_raw
from visionmtl.io.images import check_pixels
from visionmtl.structures import ImageMeta, LabelSpace
from visionmtl.tasks.base import Task

Pixels = NDArray[np.uint8]  # [H, W, 3] RGB


class ExportedModel:
    """A file that `export` wrote, opened on the CPU: images in, predictions by task out."""

    def __init__(self, path: str | Path, threads: int | None = None, file_format: Format | None = None) -> None:
        """threads: None = as many as the runtime likes; file_format: None = by the file's ending."""
        check_counts(threads=threads)
        path = home_path(path)
        if not path.is_file():
            raise ValueError(f"there is no file {path}; an exported network is needed; correct the path")
        chosen = file_format or format_of(path)
        chosen.check_installed()
        self.description: Description = chosen.read_description(path)
        check_object(self.description, f"the description in {path}", {f"inputs.{IMAGE}": dict, "tasks": dict})
        if self.description.get("format") != FORMAT:
            raise ValueError(
                f"{path} has a description of format {self.description.get('format')!r}; this version reads {FORMAT}; "
                "export the network again"
            )
        self.run = chosen.open(path, threads)
        image = self.description["inputs"][IMAGE]
        self.size: tuple[int, int] = (image["size"][0], image["size"][1])
        self.batch: int | None = image["batch"]
        self.channels: int = image["channels"]
        self._trained: tuple[int, int] = (image["trained_size"][0], image["trained_size"][1])
        self._inside = image["preprocessing"] == "inside"
        self._mean, self._std = (np.array(image[name], np.float32) for name in ("mean", "std"))
        adapter: TypeAdapter[Task] = TypeAdapter(Task)
        described = self.description["tasks"].items()
        with foreign_settings(str(path)):
            self.tasks = {name: adapter.validate_python(of_task["settings"]) for name, of_task in described}
        self.spaces = {
            name: of_task["space"] and LabelSpace.from_plain(of_task["space"]) for name, of_task in described
        }

    def predict(self, images: Sequence[Pixels]) -> list[dict[str, Any]]:
        """Each image's predictions by task at its own resolution, as `inference.predictor.predict` gives them."""
        if not isinstance(images, list | tuple):
            raise ValueError(
                f"images is of type {type(images).__name__}; a list of arrays uint8 [H, W, {self.channels}] is needed; "
                "put a single image into a list"
            )
        if not images:
            return []
        check_pixels(images, self.channels)
        resized, metas = zip(*(fit(image, self.size, self._trained) for image in images), strict=True)
        return self.predictions(self.run_padded(resized), metas)

    def run_padded(self, images: Sequence[Pixels]) -> dict[str, NDArray[Any]]:
        """The file's outputs for images [h, w, 3] that fit into its input, each at the top left of it."""
        parts = []
        step = self.batch or len(images)
        for first in range(0, len(images), step):
            chosen = list(images[first : first + step])
            missing = (self.batch or len(chosen)) - len(chosen)
            outputs = self.run(self.inputs_of([*chosen, *chosen[-1:] * missing]))
            parts.append({name: output[: len(chosen)] for name, output in outputs.items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def inputs_of(self, images: Sequence[Pixels]) -> dict[str, NDArray[Any]]:
        """What the file takes for images [h, w, 3] that fit into its input: as many as its batch is."""
        check_pixels(images, self.channels)
        for number, image in enumerate(images):
            if image.shape[0] > self.size[0] or image.shape[1] > self.size[1]:
                raise ValueError(
                    f"images[{number}] has {image.shape[0]}x{image.shape[1]} pixels; the file's input is "
                    f"{self.size[0]}x{self.size[1]}; resize it first, or give it to `predict`, which does"
                )
        canvas = np.zeros((len(images), *self.size, self.channels), np.uint8)
        for padded, image in zip(canvas, images, strict=True):
            padded[: image.shape[0], : image.shape[1]] = image
        inputs: dict[str, NDArray[Any]] = {IMAGE: canvas}
        if not self._inside:
            normalised = (canvas.astype(np.float32) - self._mean) / self._std
            inputs[IMAGE] = np.ascontiguousarray(normalised.transpose(0, 3, 1, 2))
        if self.description["decoded"]:
            inputs[CONTENT] = np.array([image.shape[:2] for image in images], np.int64)
        return inputs

    def predictions(self, outputs: dict[str, NDArray[Any]], metas: Sequence[ImageMeta]) -> list[dict[str, Any]]:
        """A file's outputs as predictions by task, at the resolutions that the metas tell."""
        by_task: dict[str, list[Any]] = {}
        for name, task in self.tasks.items():
            if self.description["decoded"]:
                own = {key: outputs[f"{name}_{key}"] for key in task.decoded_outputs}
                by_task[name] = task.from_decoded(own, metas)
            else:
                tensors = {key: torch.from_numpy(value) for key, value in outputs.items()}
                raw = restore_raw(self.description["tasks"][name]["raw"], tensors)
                by_task[name] = task.predict(raw, metas, self.size)
        return [{name: of_task[i] for name, of_task in by_task.items()} for i in range(len(metas))]
