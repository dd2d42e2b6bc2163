"""Pipelines of one's own: repeatable, labels untouched, and nothing accepted that could make a label false."""

import json
import pickle
from pathlib import Path
from typing import Any

import albumentations as A
import numpy as np
import pytest
import yaml

from visionmtl.data.loader import Data, train_loader
from visionmtl.data.transforms.augment import Augment
from visionmtl.data.transforms.photometric import open_pipeline, repaint
from visionmtl.datasets import Dataset
from visionmtl.structures import Boxes, Sample

NOISY = A.Compose([A.GaussNoise(std_range=(0.1, 0.2), p=1), A.OneOf([A.Blur(p=1), A.RandomGamma(p=1)], p=0.5)])


def saved(folder: Path, pipeline: Any, form: str = "yaml", name: str = "pipeline.yaml") -> Path:
    """The pipeline as a file."""
    A.save(pipeline, folder / name, data_format=form)
    return folder / name


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (24, 32, 3), np.uint8)


def sample() -> Sample:
    rng = np.random.default_rng(1)
    boxes = Boxes(
        np.array([[2, 3, 20, 22]], np.float32), np.array([1]), np.array([True]), np.array([99], np.float32)
    )  # fmt: skip
    segmentation, depth_m = rng.integers(0, 9, (24, 32), np.uint8), rng.random((24, 32), np.float32)
    return Sample(image=picture(), image_id="a", boxes=boxes, segmentation=segmentation, depth_m=depth_m)


@pytest.mark.parametrize(("form", "name"), [("yaml", "a.yaml"), ("json", "a.json"), ("json", "json_inside.yaml")])
def test_the_same_numbers_give_the_same_image_whatever_came_before(tmp_path, form, name):
    file = saved(tmp_path, NOISY, form, name)
    rngs = [np.random.default_rng(seed) for seed in (5, 6, 5)]

    first, other, again = (repaint(picture(), file, rng) for rng in rngs)

    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert first.dtype == np.uint8 and first.shape == (24, 32, 3) and first.flags.c_contiguous
    assert rngs[0].random() == rngs[2].random(), "it takes as many numbers each time"


def test_transforms_of_one_pipeline_draw_numbers_of_their_own(tmp_path):
    halves = A.Compose([A.InvertImg(p=0.5), A.InvertImg(p=0.5)])  # in step they would always cancel out
    file = saved(tmp_path, halves)
    changed = [not np.array_equal(repaint(picture(), file, np.random.default_rng(i)), picture()) for i in range(24)]
    assert 0 < sum(changed) < 24


def test_labels_and_the_given_image_stay_as_they_are(tmp_path):
    plain, noisy = Augment(zoom=(1, 2), flip=0.5), Augment(zoom=(1, 2), flip=0.5, pipeline=saved(tmp_path, NOISY))
    given = sample()
    before = given.image.copy()

    one, two = (augment.apply(given, (24, 32), np.random.default_rng(3)) for augment in (plain, noisy))

    assert not np.array_equal(one.image, two.image) and np.array_equal(given.image, before)
    for field in ("segmentation", "depth_m"):
        np.testing.assert_array_equal(getattr(one, field), getattr(two, field))
    for field in ("xyxy", "labels", "crowd", "area"):
        np.testing.assert_array_equal(getattr(one.boxes, field), getattr(two.boxes, field))


def test_a_worker_with_the_pickled_settings_draws_the_same(tmp_path):
    augment = Augment(pipeline=saved(tmp_path, NOISY))
    here = augment.apply(sample(), (24, 32), np.random.default_rng(3))
    open_pipeline.cache_clear()  # a new process
    there = pickle.loads(pickle.dumps(augment)).apply(sample(), (24, 32), np.random.default_rng(3))
    np.testing.assert_array_equal(here.image, there.image)


@pytest.mark.filterwarnings("ignore:Got processor for bboxes")
def test_a_pipeline_saved_with_boxes_in_mind_and_a_single_transform_are_fine(tmp_path):
    boxed = A.Compose([A.ToGray(p=1)], bbox_params=A.BboxParams("pascal_voc", label_fields=["labels"]))
    for number, pipeline in enumerate((boxed, A.ToGray(p=1))):
        grey = repaint(picture(), saved(tmp_path, pipeline, name=f"{number}.yaml"), np.random.default_rng(0))
        assert (grey[..., 0] == grey[..., 1]).all()


@pytest.mark.parametrize(
    ("pipeline", "said"),
    [
        (A.Compose([A.OneOf([A.Blur(), A.HorizontalFlip()])]), "uses HorizontalFlip.* augment.zoom and augment.flip"),
        (A.Compose([A.CoarseDropout()]), "uses CoarseDropout, which may move or erase"),
        (A.Compose([A.Normalize()]), "Normalize, given a uint8 image .* returns float32 .*; take it out"),
        (
            A.Compose([A.TextImage("font.ttf")]),
            "TextImage, given .* alone, fails: .*textimage_metadata.*; take it out",
        ),
    ],
)
def test_what_would_make_labels_false_or_needs_more_than_the_image_is_refused(tmp_path, pipeline, said):
    with pytest.raises(ValueError, match=said):
        open_pipeline(saved(tmp_path, pipeline))


BLUR = {"__class_fullname__": "Blur", "p": 1.0}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "neither JSON nor YAML"),
        ("!!python/object/apply:os.getcwd []", "neither JSON nor YAML"),
        ("- 1", "holds no `transform`"),
        (json.dumps({"transform": {"transforms": []}}), "without a transform's name"),
        (json.dumps({"transform": BLUR | {"__class_fullname__": "Blurr"}}), "did you mean 'Blur'"),
        (json.dumps({"transform": BLUR | {"__class_fullname__": "os.system"}}), "names 'os.system'"),
        (json.dumps({"transform": BLUR | {"blur_limits": [3, 5]}}), "cannot be built: .*blur_limits"),
        (yaml.safe_dump({"transform": BLUR | {"blur_limit": -3}}), "cannot be built: "),
    ],
)
def test_a_file_that_is_no_pipeline_says_what_is_wrong(tmp_path, content, said):
    (tmp_path / "wrong.yaml").write_text(content)
    with pytest.raises(ValueError, match=said):
        open_pipeline(tmp_path / "wrong.yaml")


class _Pictures(Dataset):
    """Two pictures. No `type`, so that discovery passes it by."""

    def build(self) -> "_Pictures":
        return self

    provides = property(lambda self: {"depth_m": None})
    locality = property(lambda self: None)

    def __len__(self) -> int:
        return 2

    def read(self, index: int) -> Sample:
        return sample()


def test_a_missing_file_stops_the_training_before_it_starts_but_not_the_config(tmp_path):
    pictures = _Pictures()
    augment = Augment(pipeline=tmp_path / "nowhere.yaml")
    data = Data(train=[pictures], val=[pictures], size=(24, 32), augment=augment, workers=0)
    with pytest.raises(ValueError, match=r"nowhere.yaml does not exist; allowed is .* A.save.*; correct the path"):
        train_loader(data, {}, {}, [pictures], 2, 0)
