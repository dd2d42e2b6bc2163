"""`prepare.py nyuv2`: the folder holds the samples of the official file, neither more nor less nor twice."""

import errno
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO
from write_nyuv2 import drawn_frames, official_mapping, real_frames, write_official, write_prepared

from visionmtl.cli.prepare import main
from visionmtl.datasets.nyuv2 import NYUv2
from visionmtl.datasets.nyuv2_mat import NYUv2Mat

EVERY_SETTING = [
    (split, classes, depth) for split in ("train", "test") for classes, depth in ((13, "raw"), (40, "inpainted"))
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """official/: six drawn metas as MATLAB writes them; prepared/: made of it; reference/: written independently."""
    root = tmp_path_factory.mktemp("nyuv2")
    metas = drawn_frames(6)
    write_official(root / "official", metas, test=(2, 5))
    assert main(["nyuv2", str(root / "official"), str(root / "prepared")]) == 0
    write_prepared(root / "reference", metas, "train", [1, 3, 4, 6])
    write_prepared(root / "reference", metas, "test", [2, 5])
    return root


def check_same(one, other) -> None:
    """Every field of every sample, with its type."""
    assert len(one) == len(other) and one.provides == other.provides
    for index in range(len(one)):
        a, b = one.read(index), other.read(index)
        assert a.image_id == b.image_id
        pairs = [(getattr(a, name), getattr(b, name)) for name in ("image", "segmentation", "depth_m")]
        pairs += [(getattr(a.boxes, name), getattr(b.boxes, name)) for name in ("xyxy", "labels", "crowd", "area")]
        for x, y in pairs:
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(("split", "classes", "depth"), EVERY_SETTING)
def test_the_prepared_folder_gives_the_samples_of_the_official_file(folders, split, classes, depth):
    settings = {"split": split, "classes": classes, "depth": depth}
    official = NYUv2Mat(root=str(folders / "official"), **settings).build()
    check_same(official, NYUv2(root=str(folders / "prepared"), **settings).build())
    check_same(official, NYUv2(root=str(folders / "reference"), **settings).build())
    scenes = [folders / name / "scene_types.txt" for name in ("prepared", "reference")]
    assert scenes[0].read_text() == scenes[1].read_text()


def test_pycocotools_reads_the_boxes(folders):
    coco = COCO(str(folders / "prepared/annotations/objects37_train.json"))
    assert coco.getImgIds() == [1, 3, 4, 6] and len(coco.getCatIds()) == 37
    assert min(coco.getAnnIds()) == 1  # evaluators take 0 for "no match"
    assert all(one["area"] <= one["bbox"][2] * one["bbox"][3] for one in coco.loadAnns(coco.getAnnIds()))


def test_the_folder_says_what_its_numbers_mean(folders):
    meta = json.loads((folders / "prepared/meta.json").read_text())
    assert meta["depth_scale"] == 1000 and len(meta["seg40"]) == 41 and meta["seg13"][12] == "wall"
    depth = cv2.imread(str(folders / "prepared/depth_raw/test/0002.png"), cv2.IMREAD_UNCHANGED)
    assert depth.dtype == np.uint16 and depth.min() == 0 and 700 < depth.max() <= 10000


def test_what_is_prepared_is_not_overwritten(folders, tmp_path, capsys):
    source = str(folders / "official")
    assert main(["nyuv2", source, str(folders / "prepared")]) == 2
    assert "holds a prepared data set already" in capsys.readouterr().err
    (tmp_path / "thesis.tex").touch()
    assert main(["nyuv2", source, str(tmp_path)]) == 2
    assert "holds thesis.tex" in capsys.readouterr().err


def test_an_interrupted_run_is_not_taken_for_a_data_set_and_can_be_repeated(folders, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        assert main(["nyuv2", str(folders / "official"), str(tmp_path)]) == 2
    with pytest.raises(ValueError, match=r"found no .*train.txt"):
        NYUv2(root=str(tmp_path)).build()
    assert main(["nyuv2", str(folders / "official"), str(tmp_path)]) == 0
    assert len(NYUv2(root=str(tmp_path)).build()) == 4


def test_a_wrong_source_is_an_error_that_says_what_is_missing(tmp_path, capsys):
    assert main(["nyuv2", str(tmp_path / "nothing"), str(tmp_path / "out")]) == 2
    assert "found no" in (message := capsys.readouterr().err) and "nyu_depth_v2_labeled.mat" in message
    assert not (tmp_path / "out").exists()


def test_real_frames_come_through_unchanged(real_data, tmp_path):
    given = real_data / "nyuv2"
    write_official(tmp_path / "official", real_frames(given, "train", 2), (2,), *official_mapping(given))
    assert main(["nyuv2", str(tmp_path / "official"), str(tmp_path / "prepared")]) == 0

    check_same(NYUv2Mat(root=str(tmp_path / "official")).build(), NYUv2(root=str(tmp_path / "prepared")).build())
    new, old = NYUv2(root=str(tmp_path / "prepared")).build().read(0), NYUv2(root=str(given)).build().read(0)
    np.testing.assert_array_equal(new.image, old.image)
    np.testing.assert_array_equal(new.segmentation, old.segmentation)
    np.testing.assert_allclose(new.depth_m, old.depth_m, rtol=0, atol=0.5001e-3)
