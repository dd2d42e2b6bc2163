"""Segmentation meter: values by hand, absent classes, and parity with torchmetrics."""

import json

import numpy as np
import pytest
import torch

from visionmtl.metrics.segmentation import SegmentationMeter
from visionmtl.structures import IGNORE, LabelSpace, Sample

SPACE = LabelSpace("room", ("wall", "floor", "bed", "lamp"), ((0, 0, 0),) * 4)
PIXEL = np.zeros((1, 1, 3), np.uint8)


def metered(*pairs, space=SPACE):
    meter = SegmentationMeter(space)
    for predicted, true in pairs:
        truth = None if true is None else np.array(true, np.uint8)
        meter.update(np.array(predicted, np.uint8), Sample(image=PIXEL, image_id="a", segmentation=truth))
    return meter.compute()


def test_values_by_hand():
    result = metered(([[0, 0, 1, 1]], [[0, 1, 1, IGNORE]]))

    # wall: 1 hit of a union of 2; floor: 1 hit of a union of 2; the ignored pixel is no floor
    assert result["miou"] == 0.5
    assert result["fw_iou"] == 0.5
    assert result["pixel_accuracy"] == pytest.approx(2 / 3)
    assert result["mean_accuracy"] == 0.75  # wall 1/1, floor 1/2
    assert result["per_class"]["floor"] == {"iou": 0.5, "accuracy": 0.5, "pixels": 2}


def test_classes_neither_true_nor_predicted_are_named_and_left_out():
    result = metered(([[0, 1]], [[0, 1]]))

    assert result["miou"] == 1
    assert result["absent"] == ["bed", "lamp"]
    assert result["absent_but_predicted"] == []
    assert result["per_class"]["bed"] == {"iou": None, "accuracy": None, "pixels": 0}


def test_a_class_predicted_but_absent_counts_as_zero():
    result = metered(([[0, 0, 0, 2]], [[0, 0, 0, 0]]))

    assert result["miou"] == 0.375  # wall 3/4, bed 0: the official Cityscapes rule
    assert result["mean_accuracy"] == 0.75
    assert result["absent_but_predicted"] == ["bed"]


def test_what_is_predicted_on_ignored_pixels_does_not_matter():
    assert metered(([[0, 3]], [[0, IGNORE]])) == metered(([[0, 0]], [[0, IGNORE]]))


def test_images_are_pooled_not_averaged():
    result = metered(([[0, 1, 1, 1]], [[0, 0, 0, 0]]), ([[0]], [[0]]))

    assert result["per_class"]["wall"]["iou"] == 0.4  # 2 of 5 pixels; the mean over images would be 0.625


@pytest.mark.parametrize("pairs", [[], [([[0]], [[IGNORE]])], [([[0]], None)]])
def test_without_labelled_pixels_every_score_is_none(pairs):
    result = metered(*pairs)

    assert result["miou"] is result["pixel_accuracy"] is result["mean_accuracy"] is result["fw_iou"] is None
    json.dumps(result, allow_nan=False)


def test_a_prediction_of_another_size_is_an_error_that_says_what_to_do():
    with pytest.raises(ValueError, match=r"uint8 \[1, 2\] and the truth uint8 \[1, 3\].*resize the logits"):
        metered(([[0, 0]], [[0, 0, 0]]))


@pytest.mark.parametrize(("predicted", "true", "whose"), [(4, 0, "prediction"), (0, 4, "truth")])
def test_a_class_outside_the_label_space_is_an_error(predicted, true, whose):
    with pytest.raises(ValueError, match=f"the {whose} has class ids .* label space 'room' has 0 to 3"):
        metered(([[predicted]], [[true]]))


def test_a_pixel_for_which_no_class_was_predicted_is_a_miss_and_no_false_alarm():
    result = metered(([[0, IGNORE, 1, IGNORE]], [[0, 0, 1, IGNORE]]))

    assert result["per_class"]["wall"] == {"iou": 0.5, "accuracy": 0.5, "pixels": 2}
    assert result["miou"] == 0.75
    assert result["void_pixels"] == 1


def test_groups_are_scored_as_if_they_had_been_the_classes():
    groups = {"structure": ("wall", "floor"), "thing": ("bed",)}
    meter = SegmentationMeter(SPACE, groups)
    guess, true = np.array([[0, 1, 2, 3, 0]], np.uint8), np.array([[1, 0, 0, 2, 3]], np.uint8)
    meter.update(guess, Sample(image=PIXEL, image_id="a", segmentation=true))

    assert meter.confusion().tolist() == [[2, 1], [0, 0]]  # lamps are in no group: ignored where true
    assert meter.compute()["per_class"]["structure"]["iou"] == 2 / 3
    assert meter.compute()["per_class"]["thing"]["iou"] == 0  # predicted as lamp: a miss
    with pytest.raises(ValueError, match="groups name sofa; label space 'room' has wall, floor"):
        SegmentationMeter(SPACE, {"seat": ("sofa",)})


def reference(guess, true, num_classes):
    """Sets of pixels, class by class, in float64; None: the class is neither true nor predicted."""
    known = [place for place, label in np.ndenumerate(true) if label != IGNORE]
    ious, accuracies = [], []
    for k in range(num_classes):
        truly, said = {p for p in known if true[p] == k}, {p for p in known if guess[p] == k}
        ious += [len(truly & said) / len(truly | said)] if truly | said else []
        accuracies += [len(truly & said) / len(truly)] if truly else []
    return {
        "miou": sum(ious) / len(ious),
        "mean_accuracy": sum(accuracies) / len(accuracies),
        "pixel_accuracy": sum(guess[p] == true[p] for p in known) / len(known),
        "fw_iou": sum(
            sum(true[p] == k for p in known) / len(known)
            * len({p for p in known if true[p] == guess[p] == k}) / len({p for p in known if k in (true[p], guess[p])})
            for k in {true[p] for p in known}
        ),
    }  # fmt: skip


RNG = np.random.default_rng(6)
CASES = {
    "random": (RNG.integers(0, 4, (30, 40)), RNG.choice([0, 1, 2, 3, IGNORE], (30, 40))),
    "everything wrong": (np.zeros((4, 5)), np.ones((4, 5))),
    "one labelled pixel": (np.full((4, 5), 3), np.where(np.eye(4, 5), IGNORE, IGNORE) - 252 * np.eye(4, 5, 4)),
    "void predicted": (RNG.choice([0, 1, IGNORE], (9, 9)), RNG.choice([0, 1, 2, IGNORE], (9, 9))),
    "one pixel of a rare class": (np.zeros((20, 20)), np.pad([[3]], ((0, 19), (0, 19)))),
}


@pytest.mark.parametrize("case", CASES)
def test_every_score_agrees_with_a_reference_that_counts_sets(case):
    guess, true = (values.astype(np.uint8) for values in CASES[case])

    result = metered((guess, true))

    expected = reference(guess, true, len(SPACE.classes))
    assert {name: result[name] for name in expected} == pytest.approx(expected, abs=1e-6)


def test_the_same_as_torchmetrics():
    classification = pytest.importorskip("torchmetrics.functional.classification")
    rng = np.random.default_rng(0)
    space = LabelSpace("nineteen", tuple(str(k) for k in range(19)), ((0, 0, 0),) * 19)
    true = rng.choice([*range(17), IGNORE], (3, 40, 50)).astype(np.uint8)  # 17 and 18 are absent from the truth
    guess = np.where(rng.random(true.shape) < 0.7, true, rng.integers(0, 18, true.shape)).astype(np.uint8)
    guess[true == IGNORE] = 0

    result = metered(*zip(guess, true, strict=True), space=space)

    arguments = torch.from_numpy(guess).long(), torch.from_numpy(true).long()
    settings = {"num_classes": 19, "ignore_index": IGNORE}
    iou = classification.multiclass_jaccard_index(*arguments, average="none", **settings).numpy()
    assert [row["iou"] or 0 for row in result["per_class"].values()] == pytest.approx(iou.tolist(), abs=1e-6)
    assert result["miou"] == pytest.approx(iou[:18].mean(), abs=1e-6)  # 17 predicted but absent; 18 neither
    accuracy = classification.multiclass_accuracy(*arguments, average="micro", **settings)
    assert result["pixel_accuracy"] == pytest.approx(accuracy.item(), abs=1e-6)
