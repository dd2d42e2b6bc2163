"""Label spaces that differ class by class: one task learns their union, and no image teaches what nobody looked for."""

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from contract import SIZE, random_maps
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from visionmtl.data.label_spaces import align, eval_names, resolve_spaces, supervises, taught_classes
from visionmtl.datasets import NamedDataset
from visionmtl.metrics.detection import DetectionMeter
from visionmtl.metrics.segmentation import SegmentationMeter
from visionmtl.modeling.heads.aligned import Aligned
from visionmtl.modeling.heads.fcos import FCOS
from visionmtl.ops.fused import upsampled_cross_entropy
from visionmtl.ops.ranks import step_totals
from visionmtl.structures import IGNORE, Boxes, Detections, ImageMeta, LabelSpace, Sample
from visionmtl.tasks.detection import Detection
from visionmtl.tasks.segmentation import Segmentation


def space(name: str, *classes: str) -> LabelSpace:
    return LabelSpace(name, classes, tuple((0, 0, 0) for _ in classes))


class Reader:
    """One image with a box of each class, and a row of pixels: one of each class, one not labelled."""

    def __init__(self, name: str, *classes: str) -> None:
        of_reader = space(name, *classes)
        self.provides = {"boxes": of_reader, "segmentation": of_reader}

    def __len__(self) -> int:
        return 1

    def read(self, index: int) -> Sample:
        labels = np.arange(len(self.provides["boxes"].classes))
        boxes = Boxes(
            np.stack([labels, labels, labels + 1, labels + 1], axis=1).astype(np.float32), labels, labels > 9,
            np.ones(len(labels), np.float32),
        )  # fmt: skip
        pixels = np.append(labels, IGNORE).astype(np.uint8)[None]
        return Sample(image=np.zeros((1, 1, 3), np.uint8), image_id="0", boxes=boxes, segmentation=pixels)


PHOTOS = NamedDataset("photos", Reader("photos", "person", "couch", "tv", "chair"))
ROOMS = NamedDataset("rooms", Reader("rooms", "chair", "sofa", "television", "bed"))
RENAME = {"couch": "sofa", "photos": {"tv": "television"}}


def union(kind: type = Detection, **settings: Any) -> Any:
    return kind(**{"classes": "union", "rename": RENAME, **settings})


# ---- which classes ----


def test_the_union_has_each_class_once_in_the_order_of_the_data_sets():
    spaces = resolve_spaces({"t": union()}, [PHOTOS, ROOMS], [ROOMS])
    assert spaces["t"].classes == ("person", "sofa", "television", "chair", "bed")


def test_a_list_chooses_classes_and_their_order():
    task = union(classes=("chair", "sofa"), rename={"couch": "sofa"})
    assert resolve_spaces({"t": task}, [PHOTOS, ROOMS], [])["t"].classes == ("chair", "sofa")


@pytest.mark.parametrize("kind", [Detection, Segmentation])
def test_labels_come_in_the_classes_of_the_union_and_say_which_were_looked_for(kind: type):
    tasks = {"t": union(kind)}
    spaces = resolve_spaces(tasks, [PHOTOS, ROOMS])
    photos, rooms = pickle.loads(pickle.dumps(align([PHOTOS, ROOMS], tasks, spaces)))
    field = kind.field

    assert supervises(photos, tasks["t"], spaces["t"]) and supervises(rooms, tasks["t"], spaces["t"])
    labels = {"boxes": lambda s: s.boxes.labels.tolist(), "segmentation": lambda s: s.segmentation[0, :-1].tolist()}
    assert labels[field](photos.read(0)) == [0, 1, 2, 3]
    assert labels[field](rooms.read(0)) == [3, 1, 2, 4]
    assert photos.read(0).annotated[field].tolist() == [True, True, True, True, False]
    assert rooms.read(0).annotated[field].tolist() == [False, True, True, True, True]
    assert photos.notes == [f"{field}: tells of 4 of 5 classes: person, couch as sofa, tv as television, chair"]
    assert align([photos], tasks, spaces) == [photos]
    assert taught_classes(tasks, spaces, [PHOTOS, ROOMS])["t"] == {
        "photos": ["person", "sofa", "television", "chair"],
        "rooms": ["sofa", "television", "chair", "bed"],
    }
    assert eval_names(tasks, spaces, [photos, rooms]) == {"t@photos": "t", "t@rooms": "t"}


def test_what_is_not_chosen_is_no_box_and_no_labelled_pixel():
    tasks = {"boxes": union(classes=("sofa", "bed"), rename={"couch": "sofa"})}
    tasks["pixels"] = union(Segmentation, classes=("sofa", "bed"), rename={"couch": "sofa"})
    photos = align([PHOTOS], tasks, resolve_spaces(tasks, [PHOTOS, ROOMS]))[0]
    sample = photos.read(0)

    assert sample.boxes.labels.tolist() == [0] and sample.boxes.xyxy.tolist() == [[1, 1, 2, 2]]
    assert len(sample.boxes.crowd) == len(sample.boxes.area) == 1
    assert sample.segmentation.tolist() == [[IGNORE, 0, IGNORE, IGNORE, IGNORE]]
    assert sample.annotated["boxes"].tolist() == [True, False]
    assert photos.notes[0] == "boxes: tells of 1 of 2 classes: couch as sofa; leaves out person, tv, chair"


def test_a_data_set_without_any_of_the_classes_does_not_teach():
    task = union(classes=("bed", "sofa"), rename={})
    tasks, others = {"t": task}, NamedDataset("streets", Reader("streets", "car"))
    spaces = resolve_spaces(tasks, [ROOMS, others])
    (aligned,) = align([others], tasks, spaces)
    assert aligned is others and not supervises(aligned, task, spaces["t"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classes": ("sofas",)}, r"tasks.t.classes names 'sofas' \(did you mean 'sofa'\?\).* photos, rooms annotate"),
        ({"rename": {"coach": "sofa"}}, r"rename names 'coach' \(did you mean 'couch'\?\), which is no class of any"),
        ({"rename": {"rooms": {"couch": "sofa"}}}, r"rename names 'couch', which is no class of rooms"),
        ({"rename": {"photo": {"couch": "sofa"}}}, r"names a data set 'photo' \(did you mean 'photos'\?\)"),
        ({"rename": {"couch": "soffa"}}, r"calls 'couch' 'soffa' \(did you mean 'sofa'\?\), as no other class"),
        ({"classes": ("chair",), "rename": {"couch": "chairs"}}, r"'chairs' \(did you mean 'chair'\?\).* not list"),
        ({"classes": ("person", "couch", "tv", "chair"), "rename": {}, "learns_from": ("photos",)}, "no effect"),
        ({"rename": {}, "learns_from": ("photos",)}, "photos annotate these very classes; .*; remove it"),
    ],
)
def test_names_that_nobody_has_and_settings_without_effect_are_errors(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        resolve_spaces({"t": union(**settings)}, [PHOTOS, ROOMS], [])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rename": {"couch": "sofa"}}, "classes is unset, so it would have no effect"),
        ({"classes": "union", "space": "coco80"}, "space is 'coco80' and classes is set as well"),
        ({"classes": ("bed", "bed")}, "classes names 'bed' twice"),
    ],
)
def test_contradicting_settings_are_errors(settings: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        Detection(**settings)


def test_rename_may_speak_of_a_class_that_only_the_validation_data_have():
    task = union(rename={"settee": "sofa"})
    judge = NamedDataset("judge", Reader("judge", "settee"))
    spaces = resolve_spaces({"t": task}, [PHOTOS, ROOMS], [judge])
    assert align([judge], {"t": task}, spaces)[0].read(0).boxes.labels.tolist() == [spaces["t"].classes.index("sofa")]


def test_a_class_of_the_validation_data_that_nobody_learnt_is_an_error():
    judge = NamedDataset("judge", Reader("judge", "settee", "bed"))
    spaces = resolve_spaces({"t": union()}, [PHOTOS, ROOMS], [])
    with pytest.raises(
        ValueError,
        match=r"judge labels 'boxes' with settee, which no training data set .* map them with tasks.t.rename",
    ):
        align([judge], {"t": union()}, spaces)


def test_background_that_hides_classes_of_others_asks_for_a_decision():
    mixed = [NamedDataset("things", Reader("things", "cup", "background")), ROOMS]
    with pytest.raises(ValueError, match=r"rooms do not annotate: .* set tasks.t.rename.background to null, or to"):
        resolve_spaces({"t": union(Segmentation, rename={})}, mixed, [])

    left_out = {"t": union(Segmentation, rename={"background": None})}
    spaces = resolve_spaces(left_out, mixed, [])
    assert "background" not in spaces["t"].classes
    assert align(mixed, left_out, spaces)[0].read(0).segmentation.tolist() == [[0, IGNORE, IGNORE]]
    kept = resolve_spaces({"t": union(Segmentation, rename={"background": "background"})}, mixed, [])
    assert "background" in kept["t"].classes


def test_one_field_of_a_data_set_is_not_read_in_two_spaces():
    own, joined = Detection(space="rooms"), union(rename=RENAME)
    for tasks in ({"own": own, "joined": joined}, {"joined": joined, "own": own}):
        spaces = resolve_spaces(tasks, [PHOTOS, ROOMS])
        with pytest.raises(ValueError, match=r"reads 'boxes' of data set rooms in another label space .* learns_from"):
            align([PHOTOS, ROOMS], tasks, spaces)


# ---- losses ----

CLASSES = ("person", "sofa", "television", "chair", "bed")
ANNOTATED = [np.array([1, 1, 1, 1, 0], bool), np.array([0, 1, 1, 1, 1], bool)]
HEADS = {"aligned": Aligned(num_convs=1), "bins": Aligned(num_convs=1, bins=8), "fcos": FCOS(num_convs=1)}
DENSE: dict[str, dict[str, Any]] = {
    "cross-entropy": {},
    "smoothing": {"label_smoothing": 0.1},
    "weights": {"label_smoothing": 0.1, "class_weights": (1, 2, 0.5, 1, 3)},
    "hardest": {"hardest": 0.3, "label_smoothing": 0.1},
    "dice": {"region_loss": "dice"},
    "lovasz": {"region_loss": "lovasz"},
}


def labelled_sample(number: int) -> Sample:
    """With labels of its annotated classes alone."""
    rng, known = np.random.default_rng(number), np.flatnonzero(ANNOTATED[number])
    low = rng.uniform(0, (SIZE[1] - 40, SIZE[0] - 40), (4, 2))
    xyxy = np.concatenate([low, low + rng.uniform(15, 40, (4, 2))], axis=1).astype(np.float32)
    boxes = Boxes(xyxy, rng.choice(known, 4), np.zeros(4, bool), np.full(4, 64, np.float32))
    pixels = rng.choice(known, SIZE).astype(np.uint8)
    pixels[:9] = IGNORE
    return Sample(
        image=np.zeros((*SIZE, 3), np.uint8), image_id=str(number), boxes=boxes, segmentation=pixels,
        annotated=dict.fromkeys(("boxes", "segmentation"), ANNOTATED[number]),
    )  # fmt: skip


def parts_of(task: Any, raw: Any, samples: list[Sample | None]) -> dict[str, Tensor]:
    targets = task.collate(samples, SIZE)
    totals = step_totals([{"t": task.count(targets, SIZE)}])["t"]
    return task.loss(raw, targets, torch.tensor([sample is not None for sample in samples]), totals)


def summed(parts: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(parts.values())).sum()


@pytest.mark.parametrize("head", HEADS)
def test_the_gradient_of_an_unannotated_classs_logits_is_exactly_zero_in_detection(head: str):
    task = union(head=HEADS[head])
    torch.manual_seed(0)
    raw = task.build(64, space("union", *CLASSES))(random_maps(task.levels, 3))
    raw["logits"].retain_grad()

    summed(parts_of(task, raw, [labelled_sample(0), labelled_sample(1), None])).backward()

    gradient = raw["logits"].grad
    for number, annotated in enumerate(ANNOTATED):
        assert (gradient[number][:, ~annotated] == 0).all()
        assert (gradient[number][:, annotated] != 0).all(), "negatives of the classes that were looked for teach"
    assert (gradient[2] == 0).all()


@pytest.mark.parametrize("head", HEADS)
def test_the_loss_of_an_image_is_that_of_a_head_with_the_annotated_classes_alone(head: str):
    task, sample = union(head=HEADS[head]), labelled_sample(1)
    torch.manual_seed(0)
    raw = task.build(64, space("union", *CLASSES))(random_maps(task.levels, 1))
    known = ANNOTATED[1]
    labels = np.array([np.flatnonzero(known).tolist().index(label) for label in sample.boxes.labels])
    few = {**raw, "logits": raw["logits"][..., torch.from_numpy(known)]}
    alone = Sample(
        image=sample.image, image_id="", boxes=Boxes(sample.boxes.xyxy, labels, sample.boxes.crowd, sample.boxes.area)
    )

    torch.testing.assert_close(parts_of(task, raw, [sample]), parts_of(Detection(head=HEADS[head]), few, [alone]))


@pytest.mark.parametrize("settings", DENSE)
def test_the_gradient_of_an_unannotated_classs_logits_is_exactly_zero_in_segmentation(settings: str):
    task = union(Segmentation, **DENSE[settings])
    raw = torch.randn(3, 5, SIZE[0] // 4, SIZE[1] // 4, requires_grad=True)

    summed(parts_of(task, raw, [labelled_sample(0), labelled_sample(1), None])).backward()

    assert raw.grad.isfinite().all()
    for number, annotated in enumerate(ANNOTATED):
        assert (raw.grad[number][~annotated] == 0).all()
        assert all(plane.any() for plane in raw.grad[number][annotated])
    assert (raw.grad[2] == 0).all()


def test_cross_entropy_by_hand():
    """One pixel of a chair where sofa is not looked for: -log(e^1 / (e^1 + e^2)), whatever the logit of the sofa."""
    task = Segmentation(classes="union")
    pixel = Sample(
        image=np.zeros((1, 1, 3), np.uint8), image_id="", segmentation=np.array([[0]], np.uint8),
        annotated={"segmentation": np.array([True, False, True])},
    )  # fmt: skip
    for of_sofa in (-5.0, 0.0, 50.0):
        raw = torch.tensor([1.0, of_sofa, 2.0]).view(1, 3, 1, 1)
        targets = task.collate([pixel], (1, 1))
        loss = task.loss(raw, targets, torch.tensor([True]), {"pixels": torch.tensor(1.0)})["cross_entropy"]
        assert loss == pytest.approx(np.log1p(np.exp(1)), rel=1e-6)


@pytest.mark.parametrize("settings", [name for name in DENSE if name not in ("dice", "lovasz")])
def test_the_loss_of_pixels_is_that_of_a_softmax_over_the_annotated_classes(settings: str):
    """Each image by itself with torch's cross-entropy over the columns that are annotated."""
    options = DENSE[settings]
    task, samples = union(Segmentation, **options), [labelled_sample(0), labelled_sample(1)]
    raw = torch.randn(2, 5, SIZE[0] // 4, SIZE[1] // 4)
    losses = []
    for logits, sample, annotated in zip(raw, samples, ANNOTATED, strict=True):
        full = F.interpolate(logits[None, torch.from_numpy(annotated)], scale_factor=4.0, mode="bilinear")
        position = np.full(256, IGNORE)
        position[np.flatnonzero(annotated)] = np.arange(annotated.sum())
        weights = torch.tensor(options.get("class_weights", (1.0,) * 5), dtype=torch.float32)[annotated]
        losses.append(F.cross_entropy(
            full, torch.from_numpy(position[sample.segmentation])[None], weights, ignore_index=IGNORE,
            label_smoothing=options.get("label_smoothing", 0.0), reduction="none",
        ))  # fmt: skip
    values = torch.cat([loss[0, 9:].flatten() for loss in losses])
    if "hardest" in options:
        values = values.sort(descending=True).values[: int(np.ceil(options["hardest"] * len(values)))]

    torch.testing.assert_close(parts_of(task, raw, samples)["cross_entropy"], values.mean(), rtol=1e-5, atol=1e-6)


def test_a_task_of_one_label_space_makes_no_mask():
    for task in (Detection(), Segmentation()):
        assert "annotated" not in task.collate([labelled_sample(0)], SIZE)


def test_where_everything_is_annotated_the_mask_changes_nothing():
    sample = labelled_sample(0)
    whole = Sample(image=sample.image, image_id="", boxes=sample.boxes, segmentation=sample.segmentation)
    torch.manual_seed(0)
    for kind in (Detection, Segmentation):
        raw = kind().build(64, space("union", *CLASSES)).eval()(random_maps(kind().levels, 1))
        torch.testing.assert_close(
            parts_of(kind(classes="union"), raw, [whole]), parts_of(kind(), raw, [whole]), rtol=0, atol=0
        )


def test_smoothing_over_the_classes_of_each_image_is_that_of_each_image_alone():
    logits = torch.randn(2, 5, 3, 4)
    classes = torch.randint(1, 4, (2, 12, 16), dtype=torch.uint8)
    masks = torch.from_numpy(np.stack(ANNOTATED))
    masked = torch.where(masks[..., None, None], logits, -1e30)
    options: dict[str, Any] = {"ignore": IGNORE, "label_smoothing": 0.2}
    both = upsampled_cross_entropy(masked, classes, smooth_over=masks, **options)
    each = [
        upsampled_cross_entropy(logits[i : i + 1, mask], classes[i : i + 1] - (1 if i else 0), **options)
        for i, mask in enumerate(masks)
    ]
    torch.testing.assert_close(both, torch.stack(each).sum())


# ---- predictions and scores ----


def meta(annotated: np.ndarray | None) -> ImageMeta:
    known = {} if annotated is None else dict.fromkeys(("boxes", "segmentation"), annotated)
    return ImageMeta(size=SIZE, content_size=SIZE, annotated=known)


def test_a_data_set_judges_predictions_of_the_classes_that_it_annotates():
    torch.manual_seed(0)
    detection, segmentation = union(min_score=0.0), union(Segmentation)
    with torch.no_grad():
        boxes = detection.build(64, space("union", *CLASSES)).eval()(random_maps(detection.levels, 2))
    pixels = torch.randn(2, 5, SIZE[0] // 4, SIZE[1] // 4)
    metas = [meta(ANNOTATED[1]), meta(None)]

    some, everything = detection.predict(boxes, metas, SIZE)
    assert set(some.labels) == {1, 2, 3, 4} and set(everything.labels) == {0, 1, 2, 3, 4}
    for predict in (segmentation.predict, lambda raw, *rest: segmentation.predict_mirrored(raw, raw, *rest)):
        some, everything = predict(pixels, metas, SIZE)
        assert set(some.flat) == {1, 2, 3, 4} and set(everything.flat) == {0, 1, 2, 3, 4}


def test_ap_leaves_out_classes_that_nobody_looked_for():
    meter = DetectionMeter(space("union", "person", "sofa"))
    xyxy = np.array([[0, 0, 10, 10]], np.float32)
    truth = Boxes(xyxy, np.array([1]), np.array([False]), np.array([100], np.float32))
    found = Detections(xyxy.repeat(2, 0), np.array([0.9, 0.8], np.float32), np.array([0, 1]))
    sample = Sample(
        image=np.zeros((20, 20, 3), np.uint8), image_id="1", boxes=truth, annotated={"boxes": np.array([False, True])}
    )
    meter.update(found, sample)
    result = meter.compute()
    assert result["ap"] == pytest.approx(1.0) and result["absent"] == [] and result["not_annotated"] == ["person"]
    assert result["protocol"] == "coco, over the 1 of 2 classes that are annotated"


@pytest.mark.parametrize("as_tensor", [False, True])
def test_iou_leaves_out_classes_that_nobody_looked_for(as_tensor: bool):
    """Truth b b c, predicted b a c: b 1/2, c 1; a is found but not looked for, which is a miss and no class."""
    meter = SegmentationMeter(space("union", "a", "b", "c"))
    known = {"segmentation": np.array([False, True, True])}
    truth, guess = np.array([[1, 1, 2]], np.uint8), np.array([[1, 0, 2]], np.uint8)
    sample = Sample(image=np.zeros((1, 3, 3), np.uint8), image_id="1", segmentation=truth, annotated=known)
    meter.update(torch.from_numpy(guess) if as_tensor else guess, sample)
    other = SegmentationMeter(space("union", "a", "b", "c"))
    other.merge(meter.state())
    result = other.compute()
    assert result["miou"] == pytest.approx(0.75) and list(result["per_class"]) == ["b", "c"]
    assert result["not_annotated"] == ["a"] and result["void_pixels"] == 1 and result["absent"] == []
    assert result["protocol"].endswith("over the 2 of 3 classes that are annotated")
