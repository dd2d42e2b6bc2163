"""Image labels: losses and meters by hand, and the readers that give them."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F
from write_nyuv2 import drawn_frames, scene_type, write_official, write_prepared

from visionmtl.data.cache.packed import SampleStore, pack, to_parts
from visionmtl.data.transforms.augment import Augment
from visionmtl.datasets import NamedDataset, Relabelled
from visionmtl.datasets.folder import Folder
from visionmtl.datasets.nyuv2 import SCENE_TYPES, NYUv2
from visionmtl.datasets.nyuv2_mat import NYUv2Mat
from visionmtl.datasets.scenes import SCENES_FLOORS, Scenes
from visionmtl.metrics.classification import ClassificationMeter, average_precision
from visionmtl.ops.ranks import step_totals
from visionmtl.structures import ImageClasses, ImageMeta, LabelSpace, Sample
from visionmtl.tasks.classification import Classification
from visionmtl.visualization.draw import DrawOptions

IMAGE = np.zeros((8, 8, 3), np.uint8)
META = ImageMeta(size=(8, 8), content_size=(8, 8))


def space(count: int) -> LabelSpace:
    return LabelSpace("letters", tuple("abcdefgh"[:count]), ((0, 0, 0),) * count)


def sample(*labels: int, annotated: Any = None) -> Sample:
    known = {} if annotated is None else {"image_labels": np.array(annotated, bool)}
    return Sample(image=IMAGE, image_id="1", image_labels=np.array(labels, np.int64), annotated=known)


def loss(task: Classification, raw: torch.Tensor, *samples: Sample | None) -> torch.Tensor:
    targets = task.collate(samples, (8, 8))
    totals = step_totals([{"t": task.count(targets, (8, 8))}])["t"]
    return task.loss(raw, targets, torch.tensor([one is not None for one in samples]), totals)["cross_entropy"]


# ---- losses ----


def test_one_label_by_hand():
    """The mean of log(1 + 1/3) and log 2 over the two images that have a label."""
    raw = torch.tensor([[np.log(3), 0.0], [0.0, 0.0], [9.0, 9.0], [9.0, -9.0]], dtype=torch.float32)
    expected = (np.log(4 / 3) + np.log(2)) / 2
    assert loss(Classification(), raw, sample(0), sample(1), None, sample()) == pytest.approx(expected, rel=1e-6)


def test_many_labels_by_hand():
    """Each image is the mean over its classes, also the one of no label."""
    raw = torch.tensor([[0.0, 0.0], [np.log(3), -np.log(3)]], dtype=torch.float32)
    expected = (np.log(2) + (np.log(4) + np.log(4 / 3)) / 2) / 2
    assert loss(Classification(many=True), raw, sample(0, 1), sample()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_one_label_equals_torch_with_weights_and_smoothing(smoothing: float):
    weights, raw = (0.5, 2.0, 1.0), torch.randn(4, 3)
    labels = torch.tensor([0, 2, 1, 1])
    task = Classification(class_weights=weights, label_smoothing=smoothing)
    expected = F.cross_entropy(raw, labels, torch.tensor(weights), label_smoothing=smoothing, reduction="none").mean()
    torch.testing.assert_close(loss(task, raw, *(sample(label) for label in labels.tolist())), expected)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"many": True}])
def test_classes_that_nobody_looked_for_neither_teach_nor_count(options: dict[str, Any]):
    raw = torch.randn(2, 3, requires_grad=True)
    value = loss(
        Classification(classes="union", **options), raw, sample(0, annotated=[1, 1, 0]), sample(2, annotated=[0, 1, 1])
    )
    value.backward()
    assert raw.grad[0, 2] == 0 and raw.grad[1, 0] == 0 and (raw.grad != 0).sum() == 4

    plain = Classification(**options)
    few = [loss(plain, raw[:1, :2], sample(0)), loss(plain, raw[1:, 1:], sample(1))]
    torch.testing.assert_close(value, torch.stack(few).mean())


def test_two_labels_where_one_is_learnt_are_an_error():
    with pytest.raises(ValueError, match=r"image '1' has 2 image labels, classes \[0, 1\]; .* set many: true"):
        loss(Classification(), torch.zeros(1, 2), sample(0, 1))
    with pytest.raises(ValidationError, match="many is true, where it would have no effect"):
        Classification(many=True, label_smoothing=0.1)
    with pytest.raises(ValueError, match="one factor for each of: a, b"):
        Classification(class_weights=(1,)).build(4, space(2))


def test_predictions_are_ranked_probabilities():
    raw = torch.tensor([[0.0, np.log(3), np.log(4)]], dtype=torch.float32)
    (one,) = Classification().predict(raw, [META], (8, 8))
    assert one.labels.tolist() == [2, 1, 0] and one.scores == pytest.approx([4 / 8, 3 / 8, 1 / 8])
    (many,) = Classification(many=True).predict(raw, [META], (8, 8))
    assert many.scores == pytest.approx([4 / 5, 3 / 4, 1 / 2])
    (mean,) = Classification().predict_mirrored(raw, torch.zeros(1, 3), [META], (8, 8))
    assert mean.scores == pytest.approx([(4 / 8 + 1 / 3) / 2, (3 / 8 + 1 / 3) / 2, (1 / 8 + 1 / 3) / 2])


# ---- meters ----


def scores(*values: float) -> ImageClasses:
    order = np.argsort(-np.array(values), kind="stable")
    return ImageClasses(order, np.array(values, np.float32)[order])


def measured(meter: ClassificationMeter, *pairs: tuple[ImageClasses, Sample]) -> dict[str, Any]:
    """Over two ranks."""
    other = ClassificationMeter(meter.space, meter.many)
    for i, (prediction, truth) in enumerate(pairs):
        (meter if i % 2 else other).update(prediction, truth)
    other.merge(meter.state())
    return other.compute()


def test_accuracy_and_f1_of_one_label_by_hand():
    """Truth a a b, predicted a b b: F1 of a 2/3, of b 2/3, of c, which is in neither, none."""
    a, b = scores(0.7, 0.2, 0.1), scores(0.1, 0.8, 0.1)
    result = measured(ClassificationMeter(space(3)), (a, sample(0)), (b, sample(0)), (b, sample(1)), (b, sample()))
    assert result["accuracy"] == pytest.approx(2 / 3) and result["f1"] == pytest.approx(2 / 3)
    assert result["mean_accuracy"] == pytest.approx((1 / 2 + 1) / 2) and result["absent"] == ["c"]
    assert result["per_class"]["a"] == {"precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "images": 2}
    assert "top5_accuracy" not in result and "map" not in result


def test_top_5_counts_with_more_than_5_classes():
    ranked = scores(0.3, 0.25, 0.2, 0.15, 0.07, 0.03)
    result = measured(ClassificationMeter(space(6)), (ranked, sample(4)), (ranked, sample(5)))
    assert result["accuracy"] == 0 and result["top5_accuracy"] == 0.5


def test_average_precision_by_hand():
    """Right, wrong, right: (1/1 + 2/3) / 2; two equal scores are one step of precision 1/2."""
    assert average_precision(np.array([0.9, 0.8, 0.7]), np.array([True, False, True])) == pytest.approx(5 / 6)
    assert average_precision(np.array([0.5, 0.5]), np.array([True, False])) == pytest.approx(1 / 2)
    assert average_precision(np.array([0.5]), np.array([False])) is None


def test_map_and_f1_of_many_labels_by_hand():
    result = measured(
        ClassificationMeter(space(3), many=True),
        (scores(0.9, 0.6, 0.1), sample(0)),
        (scores(0.8, 0.2, 0.1), sample()),
        (scores(0.7, 0.9, 0.3), sample(0, 1)),
    )
    # a: AP 5/6, 3 predicted, 2 right of 2; b: AP 1, 2 predicted, 1 right of 1; c: nothing
    assert result["map"] == pytest.approx((5 / 6 + 1) / 2)
    assert result["f1"] == pytest.approx((4 / 5 + 2 / 3) / 2) and result["micro_f1"] == pytest.approx(6 / 8)
    assert result["per_class"]["c"] == {"precision": None, "recall": None, "f1": None, "ap": None, "images": 0}


def test_figures_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    guess, truth = rng.integers(0, 9, (40, 4)) / 8, rng.random((40, 4)) < 0.4
    many = ClassificationMeter(space(4), many=True)
    one = ClassificationMeter(space(4))
    for row, labels in zip(guess, truth, strict=True):
        many.update(scores(*row), sample(*np.flatnonzero(labels)))
        one.update(scores(*row), sample(int(labels.argmax())))
    assert many.compute()["map"] == pytest.approx(metrics.average_precision_score(truth, guess, average="macro"))
    assert many.compute()["f1"] == pytest.approx(metrics.f1_score(truth, guess >= 0.5, average="macro"))
    result, labels, best = one.compute(), truth.argmax(1), guess.argmax(1)
    assert result["f1"] == pytest.approx(metrics.f1_score(labels, best, average="macro"))
    assert result["mean_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(labels, best))


def test_a_data_set_is_judged_by_the_classes_that_it_annotates():
    known = [False, True, True]
    result = measured(ClassificationMeter(space(3)), (scores(0.9, 0.08, 0.02), sample(1, annotated=known)))
    assert result["accuracy"] == 1 and list(result["per_class"]) == ["b", "c"] and result["not_annotated"] == ["a"]
    many = ClassificationMeter(space(3), many=True)
    result = measured(many, (scores(0.9, 0.8, 0.1), sample(1, annotated=known)), (scores(0.9, 0.1, 0.1), sample(0)))
    assert result["per_class"]["a"]["images"] == 1 and result["map"] == 1 and result["micro_f1"] == 1


def test_without_images_nothing_is_told():
    for many in (False, True):
        result = ClassificationMeter(space(3), many).compute()
        assert result["f1"] is None and result["absent"] == ["a", "b", "c"] and "not_annotated" not in result


def test_class_ids_out_of_the_space_and_too_many_labels_are_errors():
    with pytest.raises(ValueError, match=r"the truth has class ids 3 to 3; .* has 0 to 2"):
        ClassificationMeter(space(3)).update(scores(1, 0, 0), sample(3))
    with pytest.raises(ValueError, match="has 2 labels; one is allowed here"):
        ClassificationMeter(space(3)).update(scores(1, 0, 0), sample(0, 1))


# ---- readers ----


def test_scenes_know_their_floor():
    reader = Scenes(size=(32, 32), num_images=40).build()
    floors = [reader.read(index).image_labels for index in range(40)]
    assert {int(label) for (label,) in floors} == set(range(len(SCENES_FLOORS.classes)))


def test_the_prepared_folder_and_the_official_file_give_one_scene_type(tmp_path: Path):
    metas = drawn_frames(3, (32, 40))
    write_official(tmp_path / "mat", metas)
    write_prepared(tmp_path / "folder", metas)
    readers = [
        kind(root=str(tmp_path / name), labels=("image_labels",)).build()
        for kind, name in ((NYUv2Mat, "mat"), (NYUv2, "folder"))
    ]
    for index in range(3):
        expected = SCENE_TYPES.index(scene_type(index + 1).replace("_", " "))
        assert [reader.read(index).image_labels.tolist() for reader in readers] == [[expected]] * 2
    assert readers[0].provides == readers[1].provides and len(SCENE_TYPES) == 27
    assert readers[1].label_files(0)[0] == tmp_path / "folder" / "scene_types.txt"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "found no .*scene_types.txt, .* leave image_labels out"),
        ("0001 kitchen\n", "lists 1 images, but not 1 of the split, the first is 0002"),
        ("0001 kitchen\n0002 bedrom\n", r"scene_types.txt:2 is 'bedrom' \(did you mean 'bedroom'\?\)"),
        ("0001 kitchen\n0001 kitchen\n", "scene_types.txt:2 is '0001 kitchen'; a line has the number"),
    ],
)
def test_scene_types_that_are_missing_or_wrong_are_named(tmp_path: Path, text: str | None, message: str):
    write_prepared(tmp_path, drawn_frames(2, (32, 40)))
    (tmp_path / "scene_types.txt").unlink()
    if text:
        (tmp_path / "scene_types.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        NYUv2(root=str(tmp_path), labels=("image_labels",)).build()


def folder(root: Path, *names: str, **settings: Any) -> Any:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(root / name), np.zeros((32, 32, 3), np.uint8))
    return Folder(root=str(root), images="photos/**/*.png", image_labels=settings).build()


def test_a_folder_names_the_class_of_its_images(tmp_path: Path):
    reader = folder(tmp_path, "photos/kitchen/1.png", "photos/bath/2.png", "photos/old/bath/3.png")
    assert reader.provides["image_labels"].classes == ("bath", "kitchen")
    assert {reader.read(i).image_id: reader.read(i).image_labels.tolist() for i in range(3)} == {
        "kitchen/1": [1], "bath/2": [0], "old/bath/3": [0],
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"1 of 4 images has no folder of its own below .*photos, .* unlabelled"):
        folder(tmp_path, "photos/4.png")
    assert folder(tmp_path, missing="unlabelled").read(0).image_labels is None
    with pytest.raises(ValueError, match=r"the class 'bath' \(did you mean 'baths'\?\), which image_labels.classes"):
        folder(tmp_path, missing="unlabelled", classes=("baths", "kitchen"))


def test_a_file_lists_any_number_of_classes(tmp_path: Path):
    labels = {"1.png": ["cat", "dog", "cat"], "2.png": [], "3.png": "dog", "other.png": "cow"}
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    reader = folder(tmp_path, *(f"photos/{i}.png" for i in (1, 2, 3)), file="labels.json", classes=("dog", "cat"))
    assert [reader.read(i).image_labels.tolist() for i in range(3)] == [[1, 0], [], [0]]
    assert reader.notes == [f"{tmp_path / 'labels.json'}: 1 of its 4 images are not among those read"]
    assert reader.label_files(0) == [tmp_path / "labels.json"]
    (tmp_path / "labels.json").write_text('{"1.png": 3}')
    with pytest.raises(ValueError, match=r"'1\.png' is 3; a class name or a list of them is needed"):
        folder(tmp_path, file="labels.json")


def test_labels_stay_through_augmentation_cache_and_renaming(tmp_path: Path):
    known = sample(2, 0, annotated=[1, 1, 1])
    assert Augment().apply(known, (8, 8), np.random.default_rng(0)).image_labels.tolist() == [2, 0]
    pack(tmp_path, [(to_parts(known), (8, 8), 1), (to_parts(sample()), (8, 8), 1)], {})
    kept = [SampleStore(tmp_path).read(i, frozenset({"image_labels"})).image_labels for i in range(2)]
    assert [one.tolist() for one in kept] == [[2, 0], []] and kept[1].dtype == np.int64

    class Reader:
        provides = {"image_labels": space(3)}

        def __len__(self) -> int:
            return 1

        def read(self, index: int) -> Sample:
            return known

    names = {"image_labels": {"a": "x", "c": "x"}}
    union = LabelSpace("union", ("y", "x"), ((0, 0, 0),) * 2)
    joined = NamedDataset("r", Relabelled(Reader(), {"image_labels": union}, names)).read(0)
    assert joined.image_labels.tolist() == [1] and joined.annotated["image_labels"].tolist() == [False, True]


def test_the_best_class_is_written_under_the_image_and_truth_without_scores():
    task, image = Classification(), np.full((64, 64, 3), 90, np.uint8)
    weak = task.draw(image, scores(0.2, 0.5, 0.3), space(3), DrawOptions(0.9))
    none = task.draw(image, ImageClasses(np.zeros(0, np.int64), np.zeros(0, np.float32)), space(3), DrawOptions(0.9))
    assert weak.shape[0] > weak.shape[1] and weak.shape[1] == 320 and none.shape[1] == 320
    assert (weak != task.draw(image, task.truth(sample(1)), space(3), DrawOptions(0.9))).any()
