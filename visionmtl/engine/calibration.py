"""Depth calibrated in closed form: log depth becomes slope * log depth + offset, fitted on training images."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from numpy.typing import NDArray
from torch import Tensor

from visionmtl.data.label_spaces import align
from visionmtl.data.loader import val_loader
from visionmtl.data.transforms.augment import zoom
from visionmtl.datasets import open_datasets
from visionmtl.engine.checkpoint import check_output, load, open_state, save_for_prediction
from visionmtl.engine.evaluator import evaluate
from visionmtl.metrics.base import Direction
from visionmtl.ops.upload import beside
from visionmtl.structures import Sample
from visionmtl.tasks.depth import Depth

_SUMS = 5  # means over an image's pixels of x, y, x*x, x*y and y*y, for x = ln(prediction), y = ln(truth)


@dataclass(frozen=True)
class Calibration:
    """What was fitted for one task."""

    slope: float
    offset: float
    images: int
    rms_before: float  # of ln(prediction) - ln(truth), every image weighing the same
    rms_after: float


class _LineFit:
    """A meter that fits y = slope * x + offset by least squares; every image weighs the same.

    Metres are divided by how much larger everything looks than in training: x is what the last layer gives.
    """

    metrics: ClassVar[Mapping[str, Direction | None]] = {}

    def __init__(self, task: Depth, size: tuple[int, int], train_size: tuple[int, int]) -> None:
        """size, train_size: (H, W) of the network's input, here and in training."""
        self._limits = task.min_depth_m, task.max_depth_m
        self._sizes = size, train_size
        self._rows: list[Tensor] = []

    def update(self, prediction: NDArray[Any] | Tensor, sample: Sample) -> None:
        """Count one image; prediction: [H, W] metres. Predictions at the ends of the range were cut off: left out."""
        guess = torch.as_tensor(prediction).double()
        assert sample.depth_m is not None
        truth = beside(sample.depth_m, guess).double()
        low, high = self._limits
        valid = (truth >= low) & (truth <= high) & (guess > low) & (guess < high)
        height, width = guess.shape
        nearer = zoom((height, width), *self._sizes)
        x, y = (torch.where(valid, values / nearer, 1.0).log() for values in (guess, truth))
        sums = torch.stack([values.sum() for values in (x, y, x * x, x * y, y * y)])
        self._rows.append((sums / valid.sum()).cpu())  # NaN where nothing is valid

    def state(self) -> list[Tensor]:
        """One row an image."""
        return self._rows

    def merge(self, state: list[Tensor]) -> None:
        """Add another rank's images."""
        self._rows.extend(state)

    def compute(self) -> dict[str, Any]:
        """The fit, under its own name."""
        rows = [row for row in self._rows if not row.isnan().any()]
        x, y, xx, xy, yy = torch.stack(rows).mean(0).tolist() if rows else [0.0] * _SUMS
        if (variance := xx - x * x) <= 1e-8:
            raise ValueError(
                f"{len(rows)} images have measured depth where the prediction varies; a line needs two depths or "
                "more; give more images, or train further"
            )
        slope = (xy - x * y) / variance
        before, after = yy - 2 * xy + xx, yy - y * y - slope * (xy - x * y)
        rms = [math.sqrt(max(value, 0.0)) for value in (before, after)]
        return {"fit": Calibration(slope, y - slope * x, len(rows), *rms), "protocol": ""}


def calibrate(
    checkpoint: Path, output: Path, device: torch.device, overrides: tuple[str, ...] = (), limit: int | None = None
) -> dict[str, Calibration]:
    """Write a checkpoint whose depths are calibrated on the run's training images, whole and without augmentation.

    The line goes into the last layer's weights (or the bins' depths): predictions, evaluations and exports have it, at
    no cost. checkpoint: a file; limit: batches. Returns the fit by task. Raises ValueError where no task learns depth.
    """
    check_output(output)
    state = load(checkpoint)
    opened = open_state(state, checkpoint, device, overrides)
    run, net = opened.run, opened.net
    tasks = {name: task for name, task in run.tasks.items() if isinstance(task, Depth)}
    if not tasks:
        raise ValueError(
            f"{checkpoint} has the tasks {', '.join(run.tasks)}, none of type depth; calibration is of depth; give a "
            "network that predicts it"
        )
    datasets = align(open_datasets(run.data.train), run.tasks, net.spaces)
    loader = val_loader(run.data, tasks, net.spaces, datasets, run.train.batch_size, limit=limit)
    meters = {name: _LineFit(task, run.data.input_size, net.size) for name, task in tasks.items()}
    results = evaluate(net, loader, device, precision=run.train.precision, meters=meters)
    fits: dict[str, Calibration] = {}
    for name, task in tasks.items():
        if not results[name]["images"]:
            raise ValueError(f"no training image has depth for task {name!r}; some must; add data that has it")
        fits[name] = results[name]["fit"]
        if fits[name].slope <= 0:
            raise ValueError(
                f"task {name!r}: over {fits[name].images} images the fit is a line of slope {fits[name].slope:.3g}, by "
                "which what is nearer would be farther; a slope above 0 is needed; train further first"
            )
        task.rescale(net.decoders[name], fits[name].slope, fits[name].offset)
    save_for_prediction(output, state, {name: value.cpu() for name, value in net.state_dict().items()})
    return fits
