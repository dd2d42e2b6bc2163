"""The task contract: what the model, the loop, evaluation and drawing ask of a task."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor, nn
from typing_extensions import Self

from visionmtl.config.registry import Configurable, Spec
from visionmtl.metrics.base import Meter
from visionmtl.ops.soft_losses import area
from visionmtl.ops.upload import beside
from visionmtl.structures import MAX_CLASSES, ImageMeta, LabelSpace, Sample
from visionmtl.visualization.draw import DrawOptions

Raw = Any
"""What a task's module returns: a tensor, or a tuple or dict of tensors."""


def count_true(where: NDArray[np.bool_]) -> Tensor:
    """A float32 scalar. NumPy compares and counts on a CPU several times as fast as torch."""
    return torch.tensor(float(np.count_nonzero(where)))


NO_CLASS_LOGIT = -1e4
"""Of a class that is no choice: its share of a softmax and its sigmoid are exactly 0, and so are cross-entropy and
focal loss against 0. Finite, since interpolation of infinities gives NaN; float16 and bfloat16 hold it."""
TEMPERATURE = 2.0
"""At which classes are learnt from teachers, unless set: as in Learning without Forgetting (arXiv:1606.09282)."""


class SoftLoss(Spec):
    """How a task learns from teachers, see `Task.distill`; settings that a task does not read are refused."""

    weight: float = Field(1.0, gt=0, description="factor on the loss against the teachers")
    temperature: float | None = Field(
        None, gt=0, description="segmentation, classification; 2: what logits are divided by"
    )
    scale: Literal["metric", "free"] | None = Field(
        None, description="depth; metric. free: the scale of each image is left to the labels"
    )


class Task(Configurable, package="visionmtl.tasks"):
    """Frozen settings of one task; the only state is the module that `build` returns."""

    field: ClassVar[str]
    """The field of `Sample` that supervises the task."""
    result_field: ClassVar[str | None] = None
    """The field of `inference.predictor.Result` that predictions fill; None: only `Result.predictions` has them."""
    meter_type: ClassVar[type[Meter]]
    """What measures the task; `meter` makes one."""
    primary_metric: ClassVar[str]
    """The metric that `train.best: mean` looks at; which way it is better stands in `meter_type.metrics`."""

    weight: float = Field(1.0, gt=0)
    """Factor on this task's loss under fixed weighting."""
    learns_from: tuple[str, ...] | None = Field(None, min_length=1)
    """Names of the data sets that teach and judge it; None: all whose labels are of its kind."""

    @property
    @abstractmethod
    def levels(self) -> tuple[int, ...]:
        """The pyramid levels the decoder reads, finest first."""

    @abstractmethod
    def build(self, channels: int, space: LabelSpace | None) -> nn.Module:
        """The decoder: module(maps: dict[level, [B, channels, h, w]]) -> raw."""

    @abstractmethod
    def collate(self, samples: Sequence[Sample | None], size: tuple[int, int]) -> dict[str, Tensor]:
        """Labels of a batch as the loss wants them, [B, ...]; runs in the loader.

        samples: augmented, at most `size` = (H, W) pixels at the top left of the padded input; None = not labelled
        for this task. Padding and missing labels must be marked so that they teach nothing.
        """

    @abstractmethod
    def count(self, targets: dict[str, Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
        """How many labelled items the loss is a mean over, by name: float32 scalars; runs in the loader.

        targets: what `collate` gave, of inputs of `size` = (H, W). The names must not depend on the values. Each count
        is a sum over images: the loop adds those of all ranks and micro-batches, so that one optimiser step of k
        micro-batches is the step of one batch of k times the size.
        """

    def worst_case(self, targets: dict[str, Tensor], size: tuple[int, int], most: int | None) -> dict[str, Tensor]:
        """The targets of a batch, as large as labels may make them; for measuring memory, so values hardly matter.

        targets: what `collate` gave, of inputs of `size` = (H, W); most: labelled objects in the fullest image of the
        run, None: not known. The shapes of most tasks' targets are fixed: these stay.
        """
        return targets

    @property
    def settings_in_weights(self) -> tuple[str, ...]:
        """Names of settings whose values the weights of a trained network hold, so that no other values fit them."""
        return ()

    def size_problem(self, size: tuple[int, int]) -> str | None:
        """What of the settings has no effect on inputs of (H, W) pixels, in three parts; None where all has one."""
        return None

    def with_most_predictions(self) -> Self:
        """The task with settings under which it predicts as much an image as it ever may; for measuring memory."""
        return self

    @property
    def counts_predictions(self) -> bool:
        """Whether `count_predictions` counts anything."""
        return False

    def count_predictions(self, raw: Raw, targets: dict[str, Tensor], labelled: Tensor) -> dict[str, Tensor]:
        """Further counts that depend on predictions; only asked for where a step has several micro-batches.

        Then a forward pass without gradients over all of them comes first, and `loss` finds the sums in `totals`. In a
        step of one batch they are not in `totals`: there the loss sums them over ranks itself (`ops.ranks`).
        """
        return {}

    def num_objects(self, targets: dict[str, Tensor]) -> Tensor | None:
        """How many labelled items a batch holds, for tasks whose `count` names none; None: not known."""
        return None

    def early(self) -> "tuple[float, Task] | None":
        """Up to which share of the epochs another task's `loss` replaces this one's, and that task; None: never.

        Nothing but `loss` may differ between the two, and `count` gives the totals of both.
        """
        return None

    @abstractmethod
    def loss(
        self, raw: Raw, targets: dict[str, Tensor], labelled: Tensor, totals: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Named loss parts (float32 scalars, >= 0); their sum is the task's loss.

        targets: what `collate` gave, on the device; labelled: bool [B].
        totals: by the names of `count`: the items of the whole step, divided by the number of ranks (over which
        gradients are averaged); above 0. Each part is a sum over labelled items divided by one of these: exactly 0
        with exactly zero gradient when nothing is labelled. No host waits: no `.item()`, boolean indexing, `nonzero`.
        """

    # ---- learning from teachers; a task that defines these can ----

    counting_when_trained: ClassVar[tuple[str, ...] | None] = None
    """The settings that predictions and evaluations of a trained network heed; None: any may. Others cannot be changed
    then: they are for training, or what the weights mean depends on them."""
    soft_settings: ClassVar[tuple[str, ...]] = ()
    """The fields of `SoftLoss` beside `weight` that it reads."""

    def check_teacher(self, teacher: "Task") -> None:
        """Raise ValueError where the raw outputs of another task's module cannot teach this one."""
        raise ValueError(
            f"task type {self.type!r} does not say how it learns from a teacher; distillation works for tasks that "
            f"define `soft_targets` and `distill`; define them in {type(self).__module__}, or leave it out of "
            "distill.tasks"
        )

    def soft_targets(
        self, raw: Raw, settings: SoftLoss, order: Tensor | None, mirrored: bool, zoom: float
    ) -> dict[str, Tensor]:
        """The raw output of a teacher of this very task as what `distill` learns from, float32 [B, ...] by name.

        The targets of several teachers and views are averaged by name; maps [B, C, h, w] of other sizes are resized.
        order: int64 [K], the teacher's class for each class of the student; None: they are the same
        mirrored: the teacher saw the input turned left to right; the targets are those of the input
        zoom: how much larger inputs are than those the teacher was trained on, see `ImageMeta`
        """
        raise NotImplementedError

    def count_soft(self, soft: dict[str, Tensor]) -> dict[str, Tensor]:
        """What `distill` is a mean over, by names that begin with `soft_`: float32 scalars, sums over images.

        Unless a task defines it otherwise: the area of images.
        """
        return {"soft_area": area(soft["content"])}

    def distill(
        self, raw: Raw, soft: dict[str, Tensor], totals: dict[str, Tensor], settings: SoftLoss
    ) -> dict[str, Tensor]:
        """Named parts of the loss against the teachers (float32 scalars, >= 0), for images with labels and without.

        soft: the mean of what `soft_targets` gave, and "content": as `ops.soft_losses.content_shares` gives it
        totals: by the names of `count_soft`; otherwise as in `loss`. Without `settings.weight`. No host waits.
        """
        raise NotImplementedError

    @abstractmethod
    def predict(self, raw: Raw, metas: Sequence[ImageMeta], size: tuple[int, int]) -> list[Any]:
        """One prediction per image, in user units at the original resolution, as numpy (see the task's docstring).

        size: (H, W) of the padded network input.
        """

    def predict_for_meter(self, raw: Raw, metas: Sequence[ImageMeta], size: tuple[int, int]) -> list[Any]:
        """As `predict`, but a task may leave what its meter also takes as tensors on the device: nothing waits then."""
        return self.predict(raw, metas, size)

    def predict_mirrored(self, raw: Raw, mirrored: Raw, metas: Sequence[ImageMeta], size: tuple[int, int]) -> list[Any]:
        """As `predict`, from two views: `raw` of the input, and `mirrored` of its contents turned left to right.

        Where a task does not define it, it cannot be evaluated with flipping.
        """
        raise ValueError(
            f"task type {self.type!r} does not say how a prediction and its mirror image become one; flipping works "
            f"for tasks that define `predict_mirrored`; define it in {type(self).__module__}, or leave out --tta flip"
        )

    # ---- inside exported graphs; a task that defines these can be exported with its decoding ----

    decoded_outputs: ClassVar[dict[str, str]] = {}
    """What `decode_in_graph` returns, by name: dtype, shape and meaning, for whoever reads an exported file."""

    def decode_in_graph(self, raw: Raw, size: tuple[int, int], content: Tensor, zoom: float) -> dict[str, Tensor]:
        """Raw outputs as tensors [B, ...] in user units at the input's size, by the names of `decoded_outputs`.

        size: (H, W) of the padded input; content: int64 [B, 2], the (H, W) that the image takes of it
        zoom: how much larger everything looks than in training, see `ImageMeta`
        Traced by torch.export: shapes follow from the inputs' shapes alone, and no Python value from a tensor's.
        """
        raise ValueError(
            f"task type {self.type!r} does not say how it is decoded inside a graph; that works for tasks that define "
            f"`decode_in_graph`; define it in {type(self).__module__}, export it raw, or leave it out with --tasks"
        )

    def from_decoded(self, outputs: dict[str, NDArray[Any]], metas: Sequence[ImageMeta]) -> list[Any]:
        """What a graph decoded -> one prediction per image as `predict` gives them, at the original resolution.

        Maps that were decoded at the input's size are resized from there. `ImageMeta.zoom` is in them already.
        """
        raise NotImplementedError

    def labels_need_mirror(self, confidence: float) -> bool:
        """Whether `pseudo_labels` needs the view of the mirrored image to judge this confidence."""
        return False

    def pseudo_labels(
        self,
        raw: Raw,
        mirrored: Raw | None,
        metas: Sequence[ImageMeta],
        size: tuple[int, int],
        confidence: float,
        unsure: float | None,
    ) -> list[Any]:
        """Predictions to learn from: for each image a value of `field` of `Sample`, at the original resolution.

        raw, mirrored, metas, size: as of `predict_mirrored`; mirrored is None unless it was asked for or is needed
        confidence: in 0..1; what is less sure is left out, or marked as not labelled
        unsure: of boxes: the score down to which they are marked as neither right nor wrong; None: they are left out
        """
        raise ValueError(
            f"task type {self.type!r} does not say how its predictions become labels; that works for tasks that define "
            f"`pseudo_labels`; define it in {type(self).__module__}, or leave the task out with --tasks"
        )

    def meter(self, space: LabelSpace | None) -> Meter:
        """A fresh meter for one split; define it where `meter_type` takes arguments."""
        return self.meter_type()

    @abstractmethod
    def truth(self, sample: Sample) -> Any | None:
        """The sample's label in the form of a prediction, or None; for drawing beside it."""

    @abstractmethod
    def draw(
        self, image: NDArray[np.uint8], prediction: Any, space: LabelSpace | None, options: DrawOptions
    ) -> NDArray[np.uint8]:
        """A picture [H', W', 3] RGB of the prediction over or beside the image [H, W, 3], with its legend."""

    def draw_errors(
        self, image: NDArray[np.uint8], prediction: Any, truth: Any, space: LabelSpace | None, options: DrawOptions
    ) -> NDArray[np.uint8] | None:
        """As `draw`: where the prediction differs from the truth, which is in its form; None: nothing to see."""
        return None


def check_class_weights(weights: Sequence[float] | None, space: LabelSpace) -> None:
    """Raise ValueError unless there is one for each class, or none at all."""
    if weights is not None and len(weights) != len(space.classes):
        raise ValueError(
            f"class_weights has {len(weights)} factors, but label space {space.name!r} has {len(space.classes)} "
            f"classes; give one factor for each of: {', '.join(space.classes)}"
        )


class ClassTask(Task):
    """A task that predicts classes: which ones, where its data sets have different lists."""

    space: str | None = Field(None, description="label space to learn; unset = the only one the data offers")
    classes: Literal["union"] | Annotated[tuple[str, ...], Field(min_length=1)] | None = Field(
        None,
        description="classes by name over all data sets, whatever their label spaces: the union of their lists, or "
        "those of a list; unset = the classes of one label space",
    )
    rename: dict[str, str | dict[str, str | None] | None] = Field(
        {},
        description="what `classes` calls a class of a data set: {couch: sofa}, of one data set alone: "
        "{coco: {couch: sofa}}; null leaves the class out",
    )

    @model_validator(mode="after")
    def _classes_are_chosen_once(self) -> Self:
        if self.classes is None and self.rename:
            raise ValueError(
                f"rename names {', '.join(self.rename)}, but classes is unset, so it would have no effect: one label "
                "space is learnt as it is; set classes: union, or to a list of names, or remove rename"
            )
        if self.classes is not None and self.space is not None:
            raise ValueError(
                f"space is {self.space!r} and classes is set as well; one of them says what is learnt; remove one "
                "(learns_from limits the data sets)"
            )
        if isinstance(self.classes, tuple) and len(set(self.classes)) < len(self.classes):
            repeated = next(name for name in self.classes if self.classes.count(name) > 1)
            raise ValueError(f"classes names {repeated!r} twice; a name stands for one class; remove one")
        return self

    def name_of(self, dataset: str, name: str) -> str | None:
        """What the task calls a class of a data set; None: it is left out."""
        of_dataset = self.rename.get(dataset)
        if isinstance(of_dataset, dict) and name in of_dataset:
            return of_dataset[name]
        new = self.rename.get(name, name)
        return name if isinstance(new, dict) else new

    def collate_annotated(self, samples: Sequence[Sample | None]) -> dict[str, Tensor]:
        """annotated: bool [B, MAX_CLASSES], of which classes the labels of an image tell; nothing without `classes`.

        As wide as any label space, so that the shape does not depend on which images a batch holds.
        """
        if self.classes is None:
            return {}
        annotated = torch.ones(len(samples), MAX_CLASSES, dtype=torch.bool)
        for row, sample in zip(annotated, samples, strict=True):
            known = None if sample is None else sample.annotated.get(self.field)
            if known is not None:
                row[: len(known)] = torch.from_numpy(known)
        return {"annotated": annotated}

    def annotated_classes(self, metas: Sequence[ImageMeta], logits: Tensor) -> Tensor | None:
        """bool [B, K] beside `logits`: the classes that the data set of an image looks for; None where they are all.

        logits: [B, K, ...]
        """
        known = [meta.annotated.get(self.field) for meta in metas]
        if all(one is None for one in known):
            return None
        everything = np.ones(logits.shape[1], np.bool_)
        return beside(np.stack([everything if one is None else one for one in known]), logits)
