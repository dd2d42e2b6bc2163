"""The comparison of loaders: the other one does the same work, and every figure that is promised comes."""

import cv2
import numpy as np
import pytest
import torch
import write_nyuv2
import yaml

from visionmtl.benchmark.figures import Note, Row
from visionmtl.benchmark.loading import PlainLoader, measure_loading
from visionmtl.data.shard_writer import write_shards
from visionmtl.data.transforms.augment import Augment
from visionmtl.data.transforms.crop_resize import CropParams, CropResize
from visionmtl.datasets import open_datasets
from visionmtl.datasets.nyuv2 import NYUv2
from visionmtl.datasets.shards import Shards

SIZE = (48, 64)


@pytest.fixture
def root(tmp_path):
    write_nyuv2.write_prepared(tmp_path / "data", write_nyuv2.drawn_frames(8, (96, 128)))
    return tmp_path / "data"


def config_of(tmp_path, **data):
    """A config file with these settings under `data`."""
    spec = {"type": "nyuv2", "root": str(tmp_path / "data")}
    plain = {
        "model": {"encoder": {"name": "test_convnext"}},
        "tasks": {name: {"type": name} for name in ("detection", "segmentation", "depth")},
        "data": {
            "train": [spec],
            "val": [spec],
            "size": list(SIZE),
            "augment": {"flip": 0.5, "hue_turns": 0.1},
            **data,
        },
    }
    (tmp_path / "run.yaml").write_text("# A run.\n" + yaml.safe_dump(plain))
    return tmp_path / "run.yaml"


def test_both_loaders_show_the_same_view(root):
    augment, spec = Augment(zoom=(1.0, 1.5), flip=0.5), NYUv2(root=str(root))
    source = open_datasets([spec])[0]
    samples = [source.read(index) for index in range(8)]
    plain = PlainLoader(source, spec, [sample.boxes for sample in samples], augment, SIZE, 2)
    mean, std = (torch.tensor(values)[:, None, None] for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    for index, sample in enumerate(samples):
        image, (classes, depth), boxes = plain._load(index, np.random.default_rng(index))
        view = augment.apply(sample, SIZE, np.random.default_rng(index))

        theirs = ((image * std + mean) * 255).permute(1, 2, 0).numpy()
        # the metas are noise, and the filter is a triangle instead of a box
        assert np.corrcoef(theirs.ravel(), view.image.ravel())[0, 1] > 0.9 > 2 * _one_pixel_beside(view.image)
        assert classes.shape == depth.shape == SIZE and depth.dtype == torch.float32
        codes = sample.segmentation + np.uint8(1)  # in the file 0 is void
        np.testing.assert_array_equal(np.asarray(classes), nearest(codes, augment.draw(np.random.default_rng(index))))
        corners = boxes["boxes"].numpy()  # ours leaves out what is hardly visible
        assert all(np.abs(corners - box).sum(axis=1).min() < 0.1 for box in view.boxes.xyxy)

    images, maps, _ = next(plain.epoch(0))
    assert images.shape == (2, 3, *SIZE) and images.dtype == torch.float32 and len(maps) == 2


def nearest(labels: np.ndarray, params: CropParams) -> np.ndarray:
    """As torchvision samples: up to half a pixel beside the centre, where ours does not."""
    crop = CropResize.cut(labels.shape, SIZE, params)
    rows, columns = slice(crop.top, crop.top + crop.size[0]), slice(crop.left, crop.left + crop.size[1])
    resized = cv2.resize(labels[rows, columns], crop.out[::-1], interpolation=cv2.INTER_NEAREST)
    return resized[:, ::-1] if crop.mirrored else resized


def _one_pixel_beside(image: np.ndarray) -> float:
    return float(np.corrcoef(image[:, 1:].ravel(), image[:, :-1].ravel())[0, 1])


def test_every_figure_comes(root, tmp_path):
    figures = list(measure_loading(config_of(tmp_path), (), batch=2, rounds=1))
    rows = {figure.name: figure for figure in figures if isinstance(figure, Row)}
    assert all(rows[f"{name}: images/s per core"].value > 0 for name in ("decoding", "packed cache", "straightforward"))
    assert rows["decoding against straightforward"].least == 3
    assert rows["packed cache against straightforward"].least == 6
    assert "8 images to 48x64" in next(figure.text for figure in figures if isinstance(figure, Note))


def test_classes_chosen_by_name_are_loaded(root, tmp_path):
    config = config_of(tmp_path)
    chosen = ("tasks.detection.classes=[chair,bed]", "tasks.segmentation.classes=[chair,bed]")
    figures = list(measure_loading(config, chosen, batch=2, rounds=1))
    assert "8 images to 48x64" in next(figure.text for figure in figures if isinstance(figure, Note))


def test_shards_are_loaded_by_both_alike(root, tmp_path):
    spec = NYUv2(root=str(root))
    write_shards(open_datasets([spec])[0], spec, tmp_path / "shards", 10**6, workers=0)
    shards = {"type": "shards", "root": str(tmp_path / "shards")}
    plain = []
    for one in (spec, Shards(root=str(tmp_path / "shards"))):
        source = open_datasets([one])[0]
        boxes = [source.read(index).boxes for index in range(8)]
        plain.append(PlainLoader(source, one, boxes, Augment(zoom=(1.0, 1.5)), SIZE, 2))
    (image, (_, depth), _), (other, (_, other_depth), _) = (
        loader._load(1, np.random.default_rng(1)) for loader in plain
    )
    assert torch.equal(image, other)
    torch.testing.assert_close(torch.Tensor(depth), torch.Tensor(other_depth), rtol=1e-6, atol=0)

    figures = list(measure_loading(config_of(tmp_path, train=[shards], val=[shards]), (), batch=2, rounds=1))
    rows = {figure.name: figure for figure in figures if isinstance(figure, Row)}
    assert all(rows[f"{name}: images/s per core"].value > 0 for name in ("decoding", "packed cache", "straightforward"))


def test_what_cannot_be_compared_is_an_error(root, tmp_path):
    scenes = {"type": "scenes", "num_images": 8, "size": list(SIZE)}
    with pytest.raises(
        ValueError, match=r"scenes is of type scenes; .* reads nyuv2, shards, and coco with boxes; choose"
    ):
        list(measure_loading(config_of(tmp_path, train=[scenes], val=[scenes]), ()))
    with pytest.raises(ValueError, match=r"trains on 2 data sets; loaders are compared on one; set data.train"):
        list(measure_loading(config_of(tmp_path, train=[scenes, scenes], val=[scenes]), ()))
