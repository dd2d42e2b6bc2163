"""The Cityscapes reader on drawn metas in the official tree, and on the real ones where VISIONMTL_DATA has them."""

import json
import pickle
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from write_cityscapes import part_file, write_cityscapes

from visionmtl.datasets.cityscapes import Cityscapes, CityscapesReader, find_boxes
from visionmtl.io.cityscapes import CITYSCAPES19, THINGS8
from visionmtl.structures import IGNORE, Boxes

SIZE = (64, 128)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """Three training metas (two cities), one of validation and one of test; tests must not change it."""
    root = tmp_path_factory.mktemp("cityscapes")
    write_cityscapes(root, num_train=3, num_val=1, num_test=1, size=SIZE)
    return root


@pytest.fixture
def root(drawn: Path, tmp_path: Path) -> Path:
    """The same, to be spoilt."""
    return Path(shutil.copytree(drawn, tmp_path / "tree"))


def first(root: Path, part: str) -> Path:
    """A file of meta aachen_000000."""
    return part_file(root, "train", "aachen", 0, part)


def pixels(file: Path) -> np.ndarray:
    return cv2.imread(str(file), cv2.IMREAD_UNCHANGED)


def opened(root: Path, split: str = "train", **settings) -> CityscapesReader:
    return Cityscapes(root=str(root), split=split, **settings).build()


def as_set(boxes: Boxes) -> set[tuple]:
    columns = (boxes.xyxy.tolist(), boxes.labels.tolist(), boxes.crowd.tolist(), boxes.area.tolist())
    return {(tuple(xyxy), label, crowd, area) for xyxy, label, crowd, area in zip(*columns, strict=True)}


def test_frames_come_by_city_with_all_labels(drawn):
    reader = opened(drawn)
    assert [reader.read(index).image_id[:13] for index in range(3)] == [
        "aachen_000000",
        "aachen_000002",
        "bochum_000001",
    ]
    assert reader.notes == [] and list(reader.provides) == ["boxes", "segmentation", "depth_m"]
    sample = reader.read(0)
    assert (sample.image.shape, sample.image.dtype) == ((*SIZE, 3), np.uint8)
    assert (sample.image == pixels(first(drawn, "image"))[..., ::-1]).all()


def test_spaces_are_the_official_table():
    labels = pytest.importorskip("cityscapesscripts.helpers.labels").labels
    known = [label for label in labels if not label.ignoreInEval]
    things = [label for label in known if label.hasInstances]
    for space, chosen in ((CITYSCAPES19, known), (THINGS8, things)):
        assert space.classes == tuple(label.name for label in chosen)
        assert space.ids == tuple(label.id for label in chosen)
        assert space.colours == tuple(label.color for label in chosen)


@pytest.mark.parametrize("classes", [19, 7])
def test_classes_are_looked_up_in_the_official_table(root, classes):
    labels = pytest.importorskip("cityscapesscripts.helpers.labels").labels
    every = np.resize(np.append(np.arange(34), 255), SIZE).astype(np.uint8)  # 255: -1, a licence plate
    assert cv2.imwrite(str(first(root, "labelIds")), every)

    reader = opened(root, classes=classes, labels=("segmentation",))
    space = reader.provides["segmentation"]
    expected = {label.id % 256: label.name if classes == 19 else label.category for label in labels}
    ignored = {label.id % 256 for label in labels if label.ignoreInEval}
    for official, ours in zip(every.flat[:35], reader.read(0).segmentation.flat[:35], strict=True):
        assert ours == (IGNORE if official in ignored else space.classes.index(expected[official]))
    assert space.name == f"cityscapes{classes}" and len(space.classes) == classes


def test_boxes_include_the_last_pixel_and_groups_are_crowds():
    codes = np.zeros((8, 10), np.uint16)
    codes[2:4, 3:6] = codes[7, 9] = 26_005  # one car in two pieces, the second in the last corner
    codes[0, 0] = 24  # persons, not told apart
    codes[5, 0:2], codes[6, 0:2], codes[4, 4] = 29_001, 30, 7  # caravan, trailers, road: not evaluated, or no thing
    found = find_boxes(codes)
    assert found.labels.tolist() == [0, 2] and found.crowd.tolist() == [True, False]
    assert found.xyxy.tolist() == [[0, 0, 1, 1], [3, 2, 10, 8]]
    assert found.area.tolist() == [1, 7]
    assert find_boxes(np.full((8, 10), 7, np.uint16)).xyxy.shape == (0, 4)


def test_boxes_are_those_of_a_mask_for_each_id():
    codes = np.random.default_rng(0).choice([0, 7, 24, 29_001, 24_000, 33_007, 26_999], (20, 30)).astype(np.uint16)
    found = find_boxes(codes)
    assert len(found.labels) == 4
    for code, xyxy, area in zip((24, 24_000, 26_999, 33_007), found.xyxy, found.area, strict=True):
        y, x = np.nonzero(codes == code)
        assert xyxy.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1] and area == len(x)


def test_depth_is_metric_by_the_camera_of_the_image(root):
    codes = np.full(SIZE, 2561, np.uint16)  # 10 px
    codes[0, :4] = 0, 1, 2, 65_535
    assert cv2.imwrite(str(first(root, "disparity")), codes)
    assert cv2.imwrite(str(first(root, "labelIds")), np.full(SIZE, 7, np.uint8))
    first(root, "camera").write_text('{"extrinsic": {"baseline": 0.25}, "intrinsic": {"fx": 2000}}')

    sample = opened(root).read(0)
    depth = sample.depth_m
    assert depth.dtype == np.float32 and sample.disparity_px_metre == 500
    assert sample.disparity_px_metre / depth[1, 0] == 10  # px, as stored
    assert depth[0, :4].tolist() == [0, 0, 128_000, np.float32(500 / (65_534 / 256))]
    assert (depth[1:] == 50).all()
    assert sample.intrinsics is None, "the file has no more than a focal length"


def test_intrinsics_are_those_of_the_camera_file_in_coordinates_of_boxes(root):
    camera = {"extrinsic": {"baseline": 0.2}, "intrinsic": {"fx": 2262.5, "fy": 2265.25, "u0": 1096.5, "v0": 513}}
    first(root, "camera").write_text(json.dumps(camera))
    assert opened(root).read(0).intrinsics == (2262.5, 2265.25, 1097, 513.5)


@pytest.mark.parametrize("marked_by", ["labelIds", "instanceIds"])
def test_ego_vehicle_and_borders_are_not_measured(root, marked_by):
    hidden = np.isin(pixels(first(root, "labelIds")), [1, 2, 3])
    for part in ("labelIds", "instanceIds"):
        if part != marked_by:
            first(root, part).unlink()
    depth = opened(root, labels=("depth_m",)).read(0).depth_m
    assert hidden.any() and (depth[hidden] == 0).all()
    assert (depth[~hidden] > 0).mean() > 0.4  # the sky and one pixel in ten are not measured


def test_missing_parts_are_not_labelled_and_counted(root):
    first(root, "instanceIds").unlink()
    first(root, "camera").unlink()
    part_file(root, "train", "bochum", 1, "disparity").unlink()
    part_file(root, "train", "aachen", 2, "labelIds").unlink()
    shutil.rmtree(root / "disparity" / "val")

    reader = opened(root)
    known = [
        (s.boxes is not None, s.segmentation is not None, s.depth_m is not None) for s in map(reader.read, range(3))
    ]
    assert known == [(False, True, False), (True, False, True), (True, True, False)]
    assert [note.split(" (")[0] for note in reader.notes] == [
        "cityscapes train, boxes: 1 of 3 images not labelled",
        "cityscapes train, segmentation: 1 of 3 images not labelled",
        "cityscapes train, depth_m: 2 of 3 images not labelled",
    ]
    val = opened(root, "val")
    assert "depth_m" not in val.provides and val.read(0).depth_m is None
    assert "depth_m: 1 of 1 images not labelled (no *_disparity.png" in val.notes[0]


def test_depth_that_nothing_marks_the_ego_vehicle_in_is_counted(root):
    shutil.rmtree(root / "gtFine")
    reader = opened(root, labels=("depth_m",))
    assert reader.notes == [
        "cityscapes train, depth_m: 3 of 3 images measured on the ego vehicle too (no gtFine file that marks it)"
    ]
    assert (reader.read(0).depth_m[-1] > 0).any()


def test_the_withheld_labels_of_the_test_split_are_not_read_as_empty(drawn):
    reader = opened(drawn, "test")
    assert list(reader.provides) == ["depth_m"] and reader.read(0).boxes is None
    assert sum("withheld" in note for note in reader.notes) == 2


def write_panoptic(root: Path, capsys) -> Path:
    """Make it by the official script, then take instanceIds away."""
    script = pytest.importorskip("cityscapesscripts.preparation.createPanopticImgs")
    script.convert2panoptic(str(root / "gtFine"), str(root / "gtFine"), setNames=["train"])
    capsys.readouterr()
    return root / "gtFine" / "cityscapes_panoptic_train.json"


def test_boxes_equal_those_of_the_official_panoptic_script(root, capsys):
    from_ids = [as_set(opened(root).read(index).boxes) for index in range(3)]
    write_panoptic(root, capsys)
    for file in (root / "gtFine").rglob("*_instanceIds.png"):
        file.unlink()
    from_json = opened(root)
    assert [as_set(from_json.read(index).boxes) for index in range(3)] == from_ids
    assert sum(map(len, from_ids)) > 3 and any(crowd for boxes in from_ids for _, _, crowd, _ in boxes)


def test_a_panoptic_json_counts_what_it_does_not_list_and_what_has_no_size(root, capsys):
    file = write_panoptic(root, capsys)
    content = json.loads(file.read_text())
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] != "aachen_000000_000019"]
    car = {"id": 1, "category_id": 26, "area": 9, "iscrowd": 0}
    content["annotations"][0]["segments_info"] = [{**car, "bbox": [1, 2, 3, 4]}, {**car, "bbox": [1, 2, 0, 4]}]
    file.write_text(json.dumps(content))
    first(root, "instanceIds").unlink()
    part_file(root, "train", "aachen", 2, "instanceIds").unlink()

    reader = opened(root, labels=("boxes",))
    assert reader.read(0).boxes is None and reader.read(1).boxes.xyxy.tolist() == [[1, 2, 4, 6]]
    assert reader.notes[0] == f"{file}: dropped 1 of 8 boxes: 1 without width or height; correct or remove them"
    assert "boxes: 1 of 3 images not labelled" in reader.notes[1]


def test_unwanted_labels_are_neither_read_nor_needed(root):
    shutil.rmtree(root / "disparity")
    first(root, "instanceIds").write_bytes(b"")
    reader = opened(root, labels=("segmentation",))
    assert list(reader.provides) == ["segmentation"] and reader.notes == [] and reader.read(0).boxes is None


def test_a_reader_survives_the_way_to_a_worker_and_holds_no_object_per_image(drawn):
    reader = opened(drawn)
    copy = pickle.loads(pickle.dumps(reader))
    assert as_set(copy.read(2).boxes) == as_set(reader.read(2).boxes)
    state = [value for kept in vars(reader).values() for value in (kept.values() if isinstance(kept, dict) else [kept])]
    assert not [value for value in state if isinstance(value, list) and value]


@pytest.mark.parametrize(
    ("part", "content", "message"),
    [
        ("image", b"", "aachen_000000_000019_leftImg8bit.png is missing or no readable image"),
        ("labelIds", b"", "gtFine_labelIds.png is missing or no readable image"),
        ("labelIds", np.full(SIZE, 40, np.uint8), r"holds ids \[40\]; official ids are 0 to 33"),
        ("labelIds", np.full(SIZE, 7, np.uint16), "is uint16; the official file has uint8; unpack gtFine"),
        ("labelIds", np.zeros((*SIZE, 3), np.uint8), "one value a pixel"),
        ("instanceIds", np.full(SIZE, 7, np.uint8), "is uint8; the official file has uint16"),
        ("instanceIds", np.zeros((9, 9), np.uint16), "one value a pixel"),
        ("disparity", np.full(SIZE, 7, np.uint8), "is uint8; the official file has uint16; unpack disparity"),
        ("camera", b'{"extrinsic": {"base', "camera.json is no complete JSON"),
        ("camera", b"[]", "extrinsic.baseline null and intrinsic.fx null; both must be"),
        ("camera", b'{"extrinsic": {"baseline": 0.2}}', "extrinsic.baseline 0.2 and intrinsic.fx null; both must be"),
    ],
)
def test_a_broken_file_is_named_with_what_to_do(root, part, content, message):
    file = first(root, part)
    file.write_bytes(content) if isinstance(content, bytes) else cv2.imwrite(str(file), content)
    with pytest.raises(ValueError, match=message):
        opened(root).read(0)


@pytest.mark.parametrize("part", ["image", "labelIds", "instanceIds", "disparity"])
def test_a_file_cut_short_is_named(root, part):
    file = first(root, part)
    file.write_bytes(file.read_bytes()[:-60])
    with pytest.raises(ValueError, match=f"{file.name} is missing or no readable image"):
        opened(root).read(0)


def test_a_root_without_images_says_where_they_should_lie(root):
    with pytest.raises(ValueError, match=r"found no images in .*unpack leftImg8bit_trainvaltest"):
        opened(root / "gtFine")


def test_a_panoptic_json_of_train_ids_is_refused(root, capsys):
    file = write_panoptic(root, capsys)
    content = json.loads(file.read_text())
    for number, category in enumerate(content["categories"]):
        category["id"] = number
    file.write_text(json.dumps(content))
    first(root, "instanceIds").unlink()
    with pytest.raises(ValueError, match="official ids, not train ids"):
        opened(root)
    file.write_text(json.dumps(content)[:100])
    with pytest.raises(ValueError, match=r"panoptic_train\.json is no complete JSON"):
        opened(root)
