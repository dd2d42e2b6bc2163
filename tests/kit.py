"""Contract checks that run on everything found on disk, and the small labelled images they run on."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from visionmtl.config.registry import Kind
from visionmtl.structures import LABEL_FIELDS, Boxes, Detections, ImageMeta, LabelSpace, Maps, Sample
from visionmtl.tasks.base import Task

CHANNELS = 64  # GroupNorm needs two channels a group where a map has one cell
SIZE = (64, 96)  # H, W of the padded input
SPACE = LabelSpace("toy", ("ball", "box", "wall"), ((255, 0, 0), (0, 255, 0), (0, 0, 255)))


def found(kind: type[Kind]) -> list[Any]:
    """Every member of the package, for `parametrize`; what tests themselves declare is left out."""
    members = sorted(kind.members().items())
    return [pytest.param(member, id=name) for name, member in members if member.__module__.startswith("visionmtl.")]


def check_spec(spec: Kind, base: type[Kind]) -> None:
    """Settings are frozen, refuse what they do not know, and come back from their own dump."""
    with pytest.raises(ValidationError):
        spec.type = "other"  # type: ignore[misc]
    with pytest.raises(ValidationError, match="unknown field 'no_such_field'"):
        type(spec)(no_such_field=1)  # type: ignore[call-arg]
    back = TypeAdapter(base)
    assert back.validate_python(spec.model_dump()) == spec
    assert back.validate_json(spec.model_dump_json()) == spec


def sample(seed: int, *fields: str, size: tuple[int, int] = (50, 96), num_boxes: int = 3) -> Sample:
    """A random image whose labels are in `fields`, all of them when none is named."""
    rng = np.random.default_rng(seed)
    height, width = size
    low = rng.uniform(0, (width - 30, height - 30), (num_boxes, 2))
    vectors = rng.normal(size=(*size, 3))
    known: dict[str, Any] = {
        "boxes": Boxes(
            np.concatenate([low, low + rng.uniform(8, 30, (num_boxes, 2))], axis=1).astype(np.float32),
            rng.integers(0, len(SPACE.classes), num_boxes),
            np.zeros(num_boxes, np.bool_),
            np.full(num_boxes, 64, np.float32),
        ),
        "segmentation": rng.integers(0, len(SPACE.classes), size).astype(np.uint8),
        "depth_m": rng.uniform(0.5, 9, size).astype(np.float32),
        "normals": (vectors / np.linalg.norm(vectors, axis=2, keepdims=True)).astype(np.float32),
    }
    wanted = fields or LABEL_FIELDS
    image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    return Sample(image=image, image_id=f"image_{seed}", **{name: known[name] for name in wanted})


def blank(task: Task) -> Sample:
    """Labelled, and there is nothing: no boxes, or no pixel that anybody measured."""
    one = sample(9, task.field)
    if task.field == "boxes":
        return sample(9, "boxes", num_boxes=0)
    nothing = np.full_like(getattr(one, task.field), 255 if task.field == "segmentation" else 0)
    return Sample(image=one.image, image_id="blank", **{task.field: nothing})


def random_maps(levels: Sequence[int], batch: int, channels: int = CHANNELS) -> Maps:
    """A pyramid of noise for inputs of SIZE, rounded up where the stride is too coarse."""
    return {k: torch.randn(batch, channels, -(-SIZE[0] // 2**k), -(-SIZE[1] // 2**k)) for k in levels}


def decoder(task: Task) -> nn.Module:
    """The task's module, the same at each call."""
    torch.manual_seed(1)
    return task.build(CHANNELS, SPACE)


def loss_parts(task: Task, raw: Any, samples: Sequence[Sample | None], spoil: bool = False) -> Mapping[str, Tensor]:
    """The loss of what `collate` makes of the samples; spoil: NaN in every float label of those that are None."""
    labelled = torch.tensor([one is not None for one in samples])
    targets = task.collate(samples, SIZE)
    for values in targets.values():
        if spoil and values.is_floating_point():
            values[~labelled] = torch.nan
    return task.loss(raw, targets, labelled)


def total(parts: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(list(parts.values())).sum()


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """By name, zeros where a parameter got none; cleared for the next backward."""
    of_all = {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in module.named_parameters()}
    module.zero_grad()
    return of_all


def check_prediction(prediction: Any, size: tuple[int, int]) -> None:
    """User units at the original size, as numpy."""
    if isinstance(prediction, Detections):
        count = len(prediction.scores)
        assert (prediction.xyxy.shape, prediction.labels.shape) == ((count, 4), (count,))
        assert (prediction.xyxy.dtype, prediction.scores.dtype) == (np.float32, np.float32)
        assert prediction.labels.dtype == np.int64 and set(prediction.labels) <= set(range(len(SPACE.classes)))
        assert (np.diff(prediction.scores) <= 0).all() and (prediction.scores <= 1).all(), "best first, 0..1"
        assert (prediction.xyxy >= 0).all() and (prediction.xyxy[:, 2:] <= np.array(size[::-1]) + 1e-3).all()
        assert (prediction.xyxy[:, 2:] > prediction.xyxy[:, :2]).all(), "no box without an area"
        return
    assert isinstance(prediction, np.ndarray) and prediction.shape[:2] == size
    assert prediction.dtype in (np.uint8, np.float32) and np.isfinite(prediction).all()


FRAMES = [
    ImageMeta(size=(100, 180), content_size=(53, 96)),  # a wide image: the bottom of the input is padding
    ImageMeta(size=(64, 40), content_size=(64, 40)),  # a high one: the right is
    ImageMeta(size=SIZE, content_size=SIZE),
]
