"""People's own images in a folder: what is described is read, and what cannot be meant is refused by name."""

import json
import pickle
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from visionmtl.config.text_files import parse_yaml
from visionmtl.datasets import Dataset
from visionmtl.datasets.folder import Folder
from visionmtl.structures import IGNORE

H, W = 6, 8
YAML = """
type: folder
split: train
images: "images/{split}/*.png"
boxes: {file: "annotations/{split}.json"}
segmentation: {files: "labels/{stem}.png", classes: [floor, shelf, person], values: {7: floor, 8: shelf, 9: shelf, 20: person}, ignore: [0, 255]}
depth: {files: "depth/{stem}.png", metres_per_unit: 0.001}
"""  # noqa: E501


def save(file: Path, pixels: np.ndarray, **settings: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file, **settings)


def annotate(root: Path, names: list[str], size: tuple[int, int] = (H, W)) -> None:
    content = {
        "images": [{"id": i, "file_name": name, "height": size[0], "width": size[1]} for i, name in enumerate(names)],
        "categories": [{"id": 5, "name": "person"}, {"id": 2, "name": "box"}],
        "annotations": [{"id": 1, "image_id": 0, "category_id": 5, "bbox": [1, 2, 3, 4], "area": 7, "iscrowd": 0}],
    }
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations/train.json").write_text(json.dumps(content))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Images b and a, of which the annotations list b first; pixel values 0, 7, 8, 9, 20; depths in millimetres."""
    for name in ("b", "a"):
        image = np.zeros((H, W, 3), np.uint8)
        image[..., 0] = 200
        save(tmp_path / f"images/train/{name}.png", image)
        save(tmp_path / f"labels/{name}.png", np.resize(np.array([0, 7, 8, 9, 20], np.uint8), (H, W)))
        save(tmp_path / f"depth/{name}.png", np.arange(H * W, dtype=np.uint16).reshape(H, W) * 100)
    annotate(tmp_path, ["b.png", "a.png"])
    return tmp_path


def spec(root: Path, **changes: Any) -> Any:
    """The settings above; a dict changes parts of a setting, None removes it."""
    settings = {"root": str(root), **yaml.safe_load(YAML)}
    for name, change in changes.items():
        settings[name] = {**settings[name], **change} if isinstance(change, dict) else change
    return TypeAdapter(Dataset).validate_python(settings)


def test_labels_are_read_as_described_in_yaml(root):
    reader = spec(root).build()
    a, b = reader.read(0), reader.read(1)

    assert len(reader) == 2 and (a.image_id, b.image_id) == ("a", "b") and a.image[0, 0].tolist() == [200, 0, 0]
    assert b.boxes.xyxy.tolist() == [[1, 2, 4, 6]] and b.boxes.area.tolist() == [7] and len(a.boxes.labels) == 0
    assert a.segmentation[0].tolist() == [IGNORE, 0, 1, 1, 2, IGNORE, 0, 1] and a.segmentation.dtype == np.uint8
    assert a.depth_m[0, :3].tolist() == [0, np.float32(0.1), np.float32(0.2)] and a.depth_m.dtype == np.float32
    assert reader.provides["boxes"].classes == ("box", "person") and reader.provides["boxes"].ids == (2, 5)
    assert (
        reader.provides["segmentation"].classes == ("floor", "shelf", "person") and reader.provides["depth_m"] is None
    )
    assert not reader.notes


@pytest.mark.parametrize("folder", [".thumbs", "a/.ipynb_checkpoints", "__MACOSX/images"])
def test_images_in_hidden_folders_are_passed_over(root: Path, folder: str):
    for name in ("a.png", "c.PNG"):
        file = root / "images/train" / folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes((root / "images/train/a.png").read_bytes())
    reader = spec(root, images="images/{split}/**/*.png").build()
    assert len(reader) == 2 and not any("are not read" in note for note in reader.notes)

    above = root / ".hidden"  # says nothing of what is in it
    above.mkdir()
    for part in ("images", "labels", "depth", "annotations"):
        (root / part).rename(above / part)
    assert len(spec(above, images="**/images/{split}/*.png").build()) == 2


@pytest.mark.parametrize("name", ["a{stem}", "a{path}", "{split}{folder}"])
def test_names_of_images_may_look_like_words_of_paths(root: Path, name: str):
    for folder in ("images/train", "labels", "depth"):
        (root / folder / "a.png").rename(root / folder / f"{name}.png")
    annotate(root, ["b.png", f"{name}.png"])
    for images in ("images/{split}/*.png", "images/{split}/{stem}.png"):
        reader = spec(root, images=images, depth={"files": "depth/{path}.png"}).build()
        assert {reader.read(i).image_id for i in range(2)} == {name, "b"}


@pytest.mark.parametrize("label", ["boxes", "segmentation", "depth"])
def test_any_subset_of_labels_will_do(root, label):
    reader = spec(root, **{name: None for name in ("boxes", "segmentation", "depth") if name != label}).build()
    field = "depth_m" if label == "depth" else label
    sample = reader.read(0)
    known = [name for name in ("boxes", "segmentation", "depth_m") if getattr(sample, name) is not None]
    assert list(reader.provides) == known == [field]


def test_a_list_names_the_images_of_a_split(root):
    (root / "train.txt").write_text("./b.png\n\n")
    assert [spec(root, list_file="{split}.txt", boxes=None).build().read(0).image_id] == ["b"]
    reader = spec(root, list_file="{split}.txt").build()
    assert len(reader) == 1 and reader.read(0).boxes.xyxy.shape == (1, 4)
    assert len(reader.notes) == 1 and "1 of its 2 images are not among those read" in reader.notes[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty; it names an image a line"),
        ("a\nc\n", r"1 of 2 lines cannot be used, the first, 'c', is none of the images"),
        ("../train/a.png\n", r"'../train/a.png', is none of the images; needed are paths .* without '\.\.'"),
        ("a\na.png\n", "'images/train/a.png' stands for two images or twice"),
    ],
)
def test_a_list_that_cannot_be_meant_is_refused(root, content, message):
    (root / "train.txt").write_text(content)
    with pytest.raises(ValueError, match=message):
        spec(root, list_file="{split}.txt").build()


def test_images_in_many_folders_keep_their_labels_apart(root):
    for folder in ("x", "y"):
        (root / f"many/{folder}").mkdir(parents=True)
        save(root / f"many/{folder}/a.png", np.zeros((H, W, 3), np.uint8))
        np_file = root / f"metres/{folder}/a.npy"
        np_file.parent.mkdir(parents=True)
        np.save(np_file, np.full((H, W), 1 if folder == "x" else 2, np.float32))
    settings = {"images": "many/**/*.png", "split": None, "boxes": None, "segmentation": None}
    by_path = spec(root, **settings, depth={"files": "metres/{path}.npy", "metres_per_unit": 1}).build()
    assert [by_path.read(i).depth_m.max() for i in range(2)] == [1, 2] and by_path.read(1).image_id == "y/a"
    with pytest.raises(ValueError, match=r"'depth/a.png' stands for two images.*write {path} instead of {stem}"):
        spec(root, **settings).build()


def test_a_missing_partner_is_an_error_or_counted_but_never_passed_over(root):
    (root / "labels/a.png").unlink()
    annotate(root, ["b.png"])
    for label in ("boxes", "segmentation"):
        with pytest.raises(ValueError, match=rf"{label}: 1 of 2 images has no .*/?a.png; .*missing: unlabelled"):
            spec(root, boxes=None if label == "segmentation" else {}).build()
    reader = spec(root, boxes={"missing": "unlabelled"}, segmentation={"missing": "unlabelled"}).build()
    assert reader.read(0).boxes is None and reader.read(0).segmentation is None and reader.read(0).depth_m is not None
    assert reader.read(1).boxes is not None
    assert len(reader.notes) == 2 and all("it is not labelled" in note for note in reader.notes)


def test_labels_that_fit_no_image_are_an_error_even_where_some_may_miss(root):
    with pytest.raises(ValueError, match=r"2 of 2 images have no file, the first is lables/a\.png"):
        spec(root, segmentation={"files": "lables/{stem}.png", "missing": "unlabelled"}).build()


def test_millimetres_declared_as_metres_are_told_with_a_histogram(root):
    (text,) = spec(root, depth={"metres_per_unit": 1.0}).build().notes
    assert "beyond" in text and "0.001 for millimetres" in text and "depth/a.png" in text
    assert "1000 to 10000 m |####" in text and text.count("\n") == 2
    assert "below" in spec(root, depth={"metres_per_unit": 1e-6}).build().notes[0]


def test_arrays_hold_depth_in_any_number_type(root):
    values = np.full((H, W), 2.5)
    values[0, :3] = np.nan, -1, 99
    np.save(root / "depth/a.npy", values)
    np.save(root / "depth/b.npy", np.full((H, W), 3, np.int32))
    depth = {"files": "depth/{stem}.npy", "metres_per_unit": 1, "invalid": [99]}
    reader = spec(root, depth=depth).build()
    assert reader.read(0).depth_m[0, :4].tolist() == [0, 0, 0, 2.5] and reader.read(1).depth_m.max() == 3


@pytest.mark.parametrize(
    ("file", "pixels", "message"),
    [
        ("labels/a.png", np.zeros((H, W), np.uint16), "labels/a.png is uint16 with 1 channel.*labels are 8-bit grey"),
        ("labels/a.png", np.zeros((H, W, 3), np.uint8),
         r"uint8 with 3 channels, its colours \(RGB\) are \[0, 0, 0\];.*one of the equal channels"),
        ("labels/a.png", np.full((H, W), 3, np.uint8), r"labels/a.png holds \[3\], which are neither classes nor"),
        ("labels/a.png", np.zeros((H, W + 1), np.uint8), "labels/a.png is made for 6x9 px, but .*a.png is 6x8"),
        ("labels/a.png", np.zeros((W, H), np.uint8), "change `upright` if the image has an EXIF orientation"),
        ("depth/a.png", np.ones((H + 1, W), np.uint16), "depth/a.png is made for 7x8 px"),
        ("depth/a.png", np.ones((H, W, 3), np.uint8), "it shows depth, it does not hold it"),
    ],
)  # fmt: skip
def test_a_map_that_is_none_is_named(root, file, pixels, message):
    save(root / file, pixels)
    with pytest.raises(ValueError, match=message):
        spec(root).build().read(0)


def test_a_palette_picture_gives_its_indices_and_says_so(root):
    for name in ("a", "b"):
        picture = Image.fromarray(np.full((H, W), 7, np.uint8)).convert("P")
        picture.putpalette([10, 20, 30] * 256)
        picture.putdata([8] * W + [7] * (H - 1) * W)
        picture.save(root / f"labels/{name}.png")
    reader = spec(root).build()
    assert reader.read(0).segmentation[:2, 0].tolist() == [1, 0]
    assert any("have a palette, whose indices are the values" in note for note in reader.notes)


@pytest.mark.parametrize("file", ["images/train/a.png", "labels/a.png", "depth/b.png"])
def test_a_file_cut_short_is_named(root, file):
    (root / file).write_bytes((root / file).read_bytes()[:-30])
    with pytest.raises(ValueError, match=f"{file} (cannot be read|is missing or no readable)"):
        [reader.read(index) for reader in [spec(root).build()] for index in range(2)]


def test_pictures_of_any_kind_become_rgb_and_upright(root):
    grey, light = np.full((H, W), 90, np.uint8), Image.Exif()
    light[0x0112] = 6  # turn by 90 degrees
    save(root / "any/1.png", grey)
    save(root / "any/2.png", np.dstack([grey] * 3 + [np.full_like(grey, 255)]))
    save(root / "any/3.jpg", np.dstack([grey] * 3), exif=light)
    Image.fromarray(grey).convert("CMYK").save(root / "any/4.jpg")
    plain = {"images": "any/*", "split": None, "boxes": None, "segmentation": None, "depth": None}
    images = [spec(root, **plain).build().read(i).image for i in range(4)]
    assert [image.shape for image in images] == [(H, W, 3), (H, W, 3), (W, H, 3), (H, W, 3)]
    assert all(abs(int(image[0, 0, 0]) - 90) < 4 for image in images)
    assert spec(root, **plain, upright=False).build().read(2).image.shape == (H, W, 3)


def test_boxes_of_an_image_of_another_size_are_refused(root):
    annotate(root, ["b.png", "a.png"], (W, H))
    with pytest.raises(ValueError, match=r"train.json is made for 8x6 px, but .*a.png is 6x8"):
        spec(root).build().read(0)


def test_a_file_name_that_leaves_the_folder_is_refused(root):
    annotate(root, ["../b.png", "a.png"])
    with pytest.raises(ValueError, match=r"without '\.\.'"):
        spec(root).build()


@pytest.mark.parametrize(
    ("content", "values", "expected"),
    [
        ("[floor, shelf, person]", {7: "floor", 8: "shelf", 9: "shelf", 20: "person"}, ("floor", "shelf", "person")),
        ("{7: ground, 8: thing, 9: thing, 20: man}", None, ("ground", "thing", "man")),
        ('{"20": "man", "7": "a", "8": "b", "9": "c"}', None, ("a", "b", "c", "man")),
    ],
)
def test_classes_may_stand_in_a_file(root, content, values, expected):
    (root / "classes.yaml").write_text(content)
    reader = spec(root, segmentation={"classes": "classes.yaml", "values": values}).build()
    assert reader.provides["segmentation"].classes == expected
    assert reader.read(0).segmentation[0, 4] == len(expected) - 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": {7: "floor", 8: "shelves"}}, "do not name the same: person, shelf, shelves"),
        ({"values": None, "ignore": [0]}, "pixel value 0 is class 'floor' and ignored as well"),
        ({"classes": ["floor", "floor"], "values": None, "ignore": [255]}, "'floor' stands twice in a list of classes"),
    ],
)
def test_classes_that_contradict_themselves_are_refused(root, change, message):
    with pytest.raises(ValueError, match=message):
        spec(root, segmentation=change).build()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": "../elsewhere/{split}/*.png"}, "leads out of `root`; allowed are paths relative"),
        (
            {"segmentation": {"files": "labels/{name}.png"}},
            r"has {name}; allowed are .*{split}, {folder}, {stem} and {path}",
        ),
        ({"depth": {"files": "depth/all.png"}}, "is one file for all images"),
        ({"split": None}, "paths have {split}, but `split` is not set"),
        ({"split": "../x"}, "should match pattern"),
        ({"images": "*.png", "boxes": None}, "`split` has no effect"),
        ({"depth": {"metres_per_unit": 0}}, "greater than 0"),
        ({"imges": "x"}, r"did you mean 'images'"),
    ],
)
def test_a_description_that_cannot_be_meant_is_refused(root, change, message):
    with pytest.raises(ValidationError, match=message):
        spec(root, **change)


def test_the_example_in_the_handbook_is_a_description():
    handbook = (Path(__file__).parents[2] / "datasets/README.md").read_text(encoding="utf-8")
    (example,) = [part.partition("```")[0] for part in handbook.split("```yaml\n")[1:] if "type: folder" in part]
    data = parse_yaml(example, "the example")[0]["data"]
    train, val = (TypeAdapter(Dataset).validate_python(data[part][0]) for part in ("train", "val"))
    assert train.model_copy(update={"split": "val"}) == val


def test_an_empty_folder_is_refused(root):
    with pytest.raises(ValueError, match=r"found no image as .*images/train/\*.gif"):
        spec(root, images="images/{split}/*.gif").build()


def test_a_worker_gets_the_same_and_little_of_it(root):
    reader = spec(root).build()
    copy = pickle.loads(pickle.dumps(reader))
    np.testing.assert_array_equal(copy.read(1).boxes.xyxy, reader.read(1).boxes.xyxy)
    assert Folder.model_validate_json(spec(root).model_dump_json()) == spec(root)


def decompose(root: Path) -> None:
    """Every name below the root in the Unicode form in which macOS writes it."""
    for file in sorted(root.rglob("*"), reverse=True):
        file.rename(file.with_name(unicodedata.normalize("NFD", file.name)))


def test_labels_meet_images_whose_names_are_in_another_unicode_form(root):
    for file in [*root.rglob("a.png")]:
        file.rename(file.with_name("Möwe.png"))
    annotate(root, ["b.png", "Möwe.png"])
    (root / "Übung.txt").write_text("Möwe\n")
    for folder in ("images", "labels", "annotations"):
        (root / folder).rename(root / f"{folder}_ä")
    decompose(root / "images_ä"), decompose(root / "annotations_ä")
    for path in (root / "images_ä", root / "Übung.txt"):
        path.rename(path.with_name(unicodedata.normalize("NFD", path.name)))
    settings = spec(
        root, images="images_ä/{split}/*.png", boxes={"file": "annotations_ä/{split}.json"}, list_file="Übung.txt",
        segmentation={"files": "labels_ä/{stem}.png"},
    )  # fmt: skip

    reader = pickle.loads(pickle.dumps(settings.build()))

    assert len(reader) == 1
    sample = reader.read(0)
    assert sample.segmentation[0, 1] == 0 and sample.depth_m[0, 1] == np.float32(0.1) and len(sample.boxes.labels) == 0
    assert all(file.is_file() for file in (reader.file(0), *reader.label_files(0)))


def test_undeclared_values_of_all_files_are_told_at_once(root):
    for name, value in (("a", 77), ("b", 78)):
        save(root / f"labels/{name}.png", np.full((H, W), value, np.uint8))
    reader = spec(root).build()
    for index, value in ((0, 77), (1, 78)):
        message = rf"holds \[{value}\], which are neither .*; undeclared in all files are \[77, 78\]; allowed"
        with pytest.raises(ValueError, match=message):
            reader.read(index)


def test_one_file_of_boxes_takes_no_name_of_an_image(root):
    with pytest.raises(ValidationError, match=r"has {stem}; allowed are .* and {split}, since it is one file for all"):
        spec(root, boxes={"file": "annotations/{stem}.xml"})


def test_sidecars_of_macos_are_passed_over(root):
    for file in [*root.rglob("a.png"), root / "annotations/train.json"]:
        file.with_name(f"._{file.name}").write_bytes(b"\x00\x05\x16\x07")
    assert len(spec(root).build()) == 2


def test_images_without_an_entry_are_told_beside_a_name_that_the_file_lists(root):
    annotate(root, ["b\u200b.png", "a.PNG.png"])
    with pytest.raises(ValueError, match=r"2 of 2 images have no entry in .*, which lists .* 'b\\u200b.png', "):
        spec(root).build()
