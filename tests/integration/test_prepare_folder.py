"""`prepare.py folder`: the layouts that people have are understood, said and written down, and train as they are."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import write_layouts
import yaml
from PIL import Image

from visionmtl import run as config
from visionmtl.cli import main
from visionmtl.data.folder_layout import config_text, network_size, understand
from visionmtl.datasets import open_datasets

SMALL = ["model.encoder={name: test_resnet, pretrained: false}", "model.pyramid.channels=16", "data.workers=0"]

LAYOUTS = {  # by layout: images of train and val, what is provided, what must be said
    "penn_fudan": (6, 2, {"boxes": ("person",), "segmentation": ("background", "person")}, "number the objects"),
    "camvid": (6, 3, {"segmentation": ("Sky", "Car")}, "colours of 2 classes from class_dict.csv; Void is no class"),
    "roboflow_yolo": (6, 3, {"boxes": ("cup", "plate")}, "classes from data.yaml: cup, plate"),
    "voc": (6, 3, {"boxes": ("cat", "dog"), "segmentation": ("class_0", "class_8", "class_12")}, "ImageSets/Main"),
    "labelme": (5, 1, {"boxes": ("mug",), "segmentation": ("mug", "background")}, "LabelMe json at {stem}.json"),
    "cityscapes": (2, 1, {"segmentation": ("class_0", "class_7")}, "gtFine/{split}/{path}_gtFine_labelIds.png"),
    "rgbd": (8, 2, {"depth_m": None}, "{path}_depth.png, taken for millimetres"),
    "multispectral": (5, 1, {"segmentation": ("class_0", "class_1")}, "images have 5, whose values [0.0, 9000.0]"),
    "coco": (6, 3, {"boxes": ("car",)}, "COCO json at annotations/instances_{split}.json"),
    "classes": (8, 8, {"image_labels": ("cat", "dog")}, "the folder of an image is its class"),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_understood(layout, tmp_path, capsys):
    source, target = tmp_path / layout, tmp_path / "mine.yaml"
    getattr(write_layouts, layout)(source)
    num_train, num_val, provides, said = LAYOUTS[layout]

    assert main(["prepare", "folder", str(source), str(target), "--no-check", "--object", "person"]) == 0

    assert said in capsys.readouterr().out and said in target.read_text()
    run = config.load(target)
    train, val = open_datasets(run.data.train), open_datasets(run.data.val)
    assert [len(one) for one in (*train, *val)] == [num_train, num_val]
    for data_set in (*train, *val):
        spaces = {field: space and space.classes for field, space in data_set.provides.items()}
        assert spaces == provides
        data_set.read(0)
    assert {task.field for task in run.tasks.values()} == set(provides)


DEPTH = np.full((write_layouts.H, write_layouts.W), 900, np.uint16)


def test_a_folder_is_prepared_checked_drawn_trained_and_evaluated(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_layouts.penn_fudan(tmp_path / "ped")

    assert main(["prepare", "folder", "ped", "--object", "person"]) == 0

    out = capsys.readouterr().out
    assert "6 train + 2 val images read: 0 errors" in out and Image.open("ped_sheet.png").size[0] > 1000
    assert main(["train", "ped.yaml", *SMALL, "train.epochs=1", "--max-steps", "2"]) == 0
    log = Path("runs/ped/train.log").read_text()
    assert "recipe    64x64 px, " in log and "boxes: read as instances, 17 boxes" in log
    assert main(["eval", "runs/ped", "data.workers=0", "--device", "cpu"]) == 0
    (results,) = Path("runs/ped/eval").glob("*.json")
    assert "miou" in json.dumps(json.loads(results.read_text()))


def test_nothing_is_written_over(tmp_path, capsys):
    write_layouts.labelme(tmp_path / "mugs")
    (tmp_path / "mugs.yaml").write_text("mine: 1\n")
    assert main(["prepare", "folder", str(tmp_path / "mugs"), str(tmp_path / "mugs.yaml")]) == 2
    assert "exists already; nothing is written over" in capsys.readouterr().err
    assert (tmp_path / "mugs.yaml").read_text() == "mine: 1\n"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["notes.md"], "holds 1 files and no photographs; images (.jpg"),
        (
            ["1/rgb.png", "1/depth.png", "2/rgb.png", "2/depth.png"],
            "holds 4 pictures, and which of them are photographs",
        ),
        (["a.jpg", "b.jpg"], "holds 2 images (*.jpg), but no labels that match them by name were found: COCO json"),
    ],
)
def test_a_folder_without_images_or_labels_is_refused(files, message, tmp_path, capsys):
    for file in files:
        content = "text" if file.endswith("md") else DEPTH if "depth" in file else write_layouts.photo(1)
        write_layouts.write(tmp_path / "x" / file, content)
    assert main(["prepare", "folder", str(tmp_path / "x"), str(tmp_path / "x.yaml")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "x.yaml").exists()


def test_a_class_of_images_may_be_called_train(tmp_path):
    for number in range(6):
        for name in ("car", "bus", "train"):
            write_layouts.write(tmp_path / f"flat/{name}/{number}.jpg", write_layouts.photo(number))
            for split in ("train", "val"):
                write_layouts.write(tmp_path / f"split/{split}/{name}/{number}.jpg", write_layouts.photo(number))
    for layout, images in (
        (understand(tmp_path / "flat"), "*/*.jpg"),
        (understand(tmp_path / "split"), "{split}/*/*.jpg"),
    ):
        assert layout.settings == {"images": images, "image_labels": {"classes": ["bus", "car", "train"]}}
    assert (layout.train, layout.val) == ("train", "val")


def test_texts_that_name_no_classes_are_passed_over_and_splits_with_folders_are_splits(tmp_path):
    for number in range(4):
        for file in (f"train/{number}", f"val/s/{number}", f"other/{number}"):
            write_layouts.write(tmp_path / f"images/{file}.jpg", write_layouts.photo(number))
            write_layouts.write(tmp_path / f"depth/{file}.png", DEPTH)
    write_layouts.write(tmp_path / "labels.txt", "What these\n\nlabels mean.\n")
    layout = understand(tmp_path)
    assert layout.settings["images"] == "images/{split}/**/*.jpg"
    assert layout.settings["depth"]["files"] == "depth/{split}/{path}.png"
    assert "not used: 4 files in depth/other, 4 files in images/other" in layout.said
    assert _images(tmp_path) == ["0", "1", "2", "3", "s/0", "s/1", "s/2", "s/3"]


def _images(root: Path) -> list[str]:
    """The images that the written config reads, without their endings."""
    target = root / "mine.yaml"
    target.write_text(config_text(understand(root)))
    data = config.load(target).data
    opened = [*open_datasets(data.train), *open_datasets(data.val)]
    return sorted(one.read(at).image_id for one in opened for at in range(len(one)))


NUMBERS = [f"{number:03}" for number in range(10)]
MAP = np.repeat(np.uint8([[0], [1], [5]]), 16, axis=0).repeat(write_layouts.W, axis=1)  # H = 48 rows


@pytest.mark.parametrize(
    ("endings", "label", "others", "images"),
    [
        ((".jpg", ".jpg"), "{}.png", [f"{number}_preview.jpg" for number in NUMBERS[:4]], "*[0-9].jpg"),
        ((".jpg", ".jpeg"), "{}.png", [], "*.jp[eg]*"),
        ((".jpg", ".bmp"), "{}.png", [], "*.[bj][mp][gp]"),
        ((".jpg", ".JPG"), "{}.png", [], "*.[Jj][Pp][Gg]"),
        ((".jpg", ".png"), "{}_mask.png", [], "*[0-9].*"),
        ((".jpg", ".png"), "masks/{}.png", [], "*.*"),  # nothing else lies there
    ],
)
def test_the_pattern_matches_the_photographs_alone(endings, label, others, images, tmp_path):
    for at, number in enumerate(NUMBERS):
        write_layouts.write(tmp_path / f"{number}{endings[at % 2]}", write_layouts.photo(at))
        write_layouts.write(tmp_path / label.format(number), MAP)
    for name in others:
        write_layouts.write(tmp_path / name, write_layouts.photo(77))

    layout = understand(tmp_path)

    assert layout.settings["images"] == images and layout.num_images == 10 and _images(tmp_path) == NUMBERS
    not_used = [text for text in layout.said if text.startswith("not used")]
    assert not_used == (["not used: 4 files in ."] if others else [])


def test_photographs_of_another_suffix_with_labels_of_their_own_are_read(tmp_path):
    for name in ("000", "001", "002", "000_flip", "001_flip"):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(
            tmp_path / f"{name}.jpg"
        )
        (tmp_path / f"{name}.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    (tmp_path / "classes.txt").write_text("chair\n")

    layout = understand(tmp_path)

    assert layout.num_images == 5 and layout.settings["images"] == "*.jpg"
    assert not [line for line in layout.said if line.startswith("not used")]


def test_photographs_that_no_pattern_tells_from_others_are_refused(tmp_path):
    for name in "how", "now", "low", "bee", "ape":
        write_layouts.write(tmp_path / f"{name}.jpg", write_layouts.photo(1))
        write_layouts.write(tmp_path / f"{name}.txt", "0 0.5 0.5 0.2 0.2\n")
    for name in "how", "now":
        write_layouts.write(tmp_path / f"{name}_view.jpg", write_layouts.photo(2))
    message = r"5 photographs, and no pattern.*\*\.jpg is wrong about 2 pictures, the first is how_view\.jpg; .*; move"
    with pytest.raises(ValueError, match=message):
        understand(tmp_path)


def test_photographs_are_no_labels_and_folders_may_have_a_start_in_common(tmp_path):
    for number in NUMBERS:
        folder = f"images_{int(number) % 2}"
        write_layouts.write(tmp_path / f"{folder}/{number}.png", np.repeat(write_layouts.photo(1)[..., :1], 3, axis=2))
        write_layouts.write(tmp_path / f"depth/{number}.png", DEPTH)
        write_layouts.write(tmp_path / f"masks/{folder}/{number}.png", MAP)
    layout = understand(tmp_path)
    assert layout.settings["images"] == "images_*/*.png"
    assert layout.settings["segmentation"]["files"] == "masks/{path}.png"


def test_a_folder_of_training_alone_holds_some_out(tmp_path):
    write_layouts.roboflow_yolo(tmp_path)
    shutil.rmtree(tmp_path / "valid")
    assert _images(tmp_path) == [f"img{number}_jpg.rf.0a1b2c" for number in range(6)]


def test_a_folder_named_for_two_splits_is_of_none(tmp_path):
    write_layouts.labelme(tmp_path / "VOC2012_train_val")
    assert len(_images(tmp_path)) == 6


def test_images_of_a_third_split_are_not_used(tmp_path):
    write_layouts.roboflow_yolo(tmp_path)
    for file in tmp_path.glob("valid/images/*"):  # without labels
        write_layouts.write(tmp_path / "test/images" / file.name, write_layouts.photo(1))
    layout = understand(tmp_path)
    assert "not used: 3 files in test/images" in layout.said and layout.num_images == 9
    assert "missing" not in layout.settings["boxes"]

    shutil.rmtree(tmp_path / "train")
    assert "not used: 3 files in test/images" in understand(tmp_path).said
    assert len(_images(tmp_path)) == 3


def test_yolo_images_without_labels_are_empty_and_depth_in_metres_is_seen(tmp_path):
    write_layouts.roboflow_yolo(tmp_path)
    (tmp_path / "train/labels/img0_jpg.rf.0a1b2c.txt").unlink()
    metres = np.linspace(1, 5, write_layouts.H * write_layouts.W, dtype=np.float32)
    for photo in tmp_path.glob("*/images/*.jpg"):
        file = photo.parents[1] / f"depth/{photo.stem}.npy"
        file.parent.mkdir(exist_ok=True)
        np.save(file, metres.reshape(write_layouts.H, write_layouts.W))
    layout = understand(tmp_path)
    assert layout.settings["boxes"]["missing"] == "empty"
    assert layout.settings["depth"] == {"files": "{split}/depth/{stem}.npy", "metres_per_unit": 1.0}
    assert any("1 of 9 images has no file: images without objects, as YOLO means it" in text for text in layout.said)


def test_photographs_in_tiff_need_no_package(tmp_path):
    write_layouts.camvid(tmp_path)
    for split in ("train", "val"):
        for file in (tmp_path / split).glob("*.png"):
            Image.open(file).save(file.with_suffix(".tif"))
            file.unlink()
    assert understand(tmp_path).settings["images"] == "{split}/*.tif"


def test_the_network_keeps_the_proportions_of_the_images():
    assert network_size((480, 640)) == (384, 512) and network_size((1024, 2048)) == (320, 640)
    assert network_size((60, 90)) == (64, 96)


def test_the_handbook_and_the_recipe_show_the_same_layout():
    recipe = yaml.safe_load((Path(config.__file__).parents[1] / "configs/folder.yaml").read_text())
    train, val = (recipe["data"][part][0] for part in ("train", "val"))
    assert {**train, "split": "val"} == val


def test_masks_saved_as_jpeg_are_no_class_of_images(tmp_path):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
        for index in range(3):
            Image.new("RGB", (40, 30), (index, 0, 0)).save(tmp_path / name / f"{index}.jpg")
    with pytest.raises(ValueError, match=r"masks is called as label maps are.*export them again as PNG"):
        understand(tmp_path)


def test_where_the_check_finds_errors_the_next_step_is_no_training(tmp_path, capsys):
    write_layouts.labelme(tmp_path / "mine")
    file = next((tmp_path / "mine").rglob("*.json"))
    content = json.loads(file.read_text())
    content["shapes"][0]["points"] = [[1, 1], [9, 9]]
    file.write_text(json.dumps(content | {"shapes": [content["shapes"][0] | {"shape_type": "polygon"}]}))

    assert main(["prepare", "folder", str(tmp_path / "mine"), str(tmp_path / "mine.yaml")]) == 2
    out = capsys.readouterr().out
    assert "next: correct the errors above" in out and "visionmtl train" not in out


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("names: [cup, plate]\nnc: 2\nkpt_shape: [4, 2]\n", "describes keypoints (kpt_shape)"),
        ("names: [cup, plate]\nnc: 3\n", "says nc: 3, but names 2 classes"),
        ("names: [yes, no]\n", "names a class that YAML takes for true"),
        ("names: [cup\n", "data.yaml"),
        ("kpt_shape: [4, 2]\n", "has no `names` of classes"),
    ],
)
def test_a_data_yaml_that_cannot_be_used_says_why(description, message, tmp_path, capsys):
    write_layouts.roboflow_yolo(tmp_path / "x")
    (tmp_path / "x" / "data.yaml").write_text(description)
    (tmp_path / "x" / "notes.yaml").write_text("about: us\n")  # another file is passed over
    assert main(["prepare", "folder", str(tmp_path / "x"), str(tmp_path / "x.yaml")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "x.yaml").exists()


@pytest.mark.parametrize("name", ["{a}", "${x}", "a:b"])
def test_folders_that_no_config_can_name_are_refused(name, tmp_path):
    write_layouts.labelme(tmp_path / "x" / name)
    with pytest.raises(ValueError, match=r"mean other things in the paths of a config; .*; rename it"):
        understand(tmp_path / "x")


@pytest.mark.parametrize("above", ["", "what? [1]/"])
@pytest.mark.parametrize("layout", ["labelme", "roboflow_yolo", "rgbd", "voc", "coco", "classes", "camvid"])
def test_signs_of_patterns_in_names_of_folders_stand_for_themselves(layout, above, tmp_path):
    root, target = tmp_path / "${x} {a} [2]*", tmp_path / "mine.yaml"  # what lies above is in no path
    getattr(write_layouts, layout)(root / f"{above}set [1]")

    assert main(["prepare", "folder", str(root), str(target), "--no-check"]) == 0

    data = config.load(target).data
    train, val = open_datasets(data.train), open_datasets(data.val)
    assert [len(one) for one in (*train, *val)] == list(LAYOUTS[layout][:2])
    for data_set in (*train, *val):
        assert set(data_set.provides) == set(LAYOUTS[layout][2])
        data_set.read(0)


@pytest.mark.parametrize("suffix", ["", "_rgb"])
def test_classes_txt_may_lie_beside_the_labels(suffix, tmp_path):
    write_layouts.roboflow_yolo(tmp_path)
    (tmp_path / "data.yaml").unlink()
    for image in [*tmp_path.glob("*/images/*.jpg")]:
        image.rename(image.with_name(f"{image.stem}{suffix}.jpg"))
    (tmp_path / "train/labels/classes.txt").write_text("cafe\u0301\nplate\n", encoding="utf-8")
    layout = understand(tmp_path)
    assert layout.settings["boxes"]["classes"] == "train/labels/classes.txt"
    assert any("classes from train/labels/classes.txt: caf\u00e9, plate" in text for text in layout.said)


def test_labels_and_classes_txt_may_lie_beside_the_images(tmp_path):
    write_layouts.roboflow_yolo(tmp_path / "x")
    for file in (tmp_path / "x/train").rglob("*.*"):
        (tmp_path / "flat").mkdir(exist_ok=True)
        file.rename(tmp_path / "flat" / file.name)
    (tmp_path / "flat/classes.txt").write_text("cup\nplate\n")
    assert understand(tmp_path / "flat").settings["boxes"] == {
        "format": "yolo", "files": "{stem}.txt", "classes": "classes.txt"
    }  # fmt: skip


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_images_to_hold_some_out_are_refused(count, tmp_path, capsys):
    write_layouts.penn_fudan(tmp_path / "x", count)
    assert main(["prepare", "folder", str(tmp_path / "x"), str(tmp_path / "x.yaml")]) == 2
    assert "three images or more are needed" in capsys.readouterr().err and not (tmp_path / "x.yaml").exists()


def test_splits_may_be_written_large(tmp_path):
    write_layouts.roboflow_yolo(tmp_path)
    for name in ("train", "valid"):
        (tmp_path / name).rename(tmp_path / name.capitalize())
    layout = understand(tmp_path)
    assert (layout.train, layout.val) == ("Train", "Valid")


def test_a_class_in_two_unicode_forms_is_one(tmp_path):
    write_layouts.voc(tmp_path)
    for number, file in enumerate(sorted(tmp_path.glob("Annotations/*.xml"))):
        name = "caf\u00e9" if number % 2 else "cafe\u0301"
        file.write_text(file.read_text().replace(">cat<", f">{name}<").replace(">dog<", f">{name}<"), encoding="utf-8")
    assert understand(tmp_path).settings["boxes"]["classes"] == ["caf\u00e9"]


def test_pictures_in_hidden_folders_are_no_images(tmp_path):
    write_layouts.rgbd(tmp_path / "x")
    before = understand(tmp_path / "x")
    for picture in list((tmp_path / "x").rglob("*.png")):
        for folder in (".thumbs", "__MACOSX"):
            write_layouts.write(picture.parent / folder / picture.name, write_layouts.photo(1))
    assert understand(tmp_path / "x") == before


def test_a_value_without_a_name_that_may_be_void_is_told(tmp_path, capsys):
    target, named = tmp_path / "mine.yaml", tmp_path / "named.yaml"
    for number in NUMBERS:
        write_layouts.write(tmp_path / f"x/images/{number}.jpg", write_layouts.photo(1))
        write_layouts.write(tmp_path / f"x/labels/{number}.png", MAP)

    assert main(["prepare", "folder", str(tmp_path / "x"), str(target), "--no-check"]) == 0

    out = capsys.readouterr().out
    assert "with values 0, 1, 5, which no file names" in out
    assert "0 is learnt as a class, class_0, though it is often void" in out
    lines = target.read_text().splitlines()
    at = next(at for at, line in enumerate(lines) if line.endswith("0 is void, in place of the line above:"))
    lines[at - 1 : at + 2] = [lines[at + 1].replace("# ", "")]
    target.write_text("\n".join(lines))
    for data_set in open_datasets(config.load(target).data.train):
        assert data_set.provides["segmentation"].classes == ("class_1", "class_5")
        assert np.unique(data_set.read(0).segmentation).tolist() == [0, 1, 255]

    (tmp_path / "x/classes.txt").write_text("floor\nwall\nsky\nroof\ndoor\nlamp\n")
    assert main(["prepare", "folder", str(tmp_path / "x"), str(named), "--no-check"]) == 0
    assert "void" not in capsys.readouterr().out + named.read_text()


def test_black_without_a_name_may_be_void(tmp_path):
    write_layouts.camvid(tmp_path)
    (tmp_path / "class_dict.csv").unlink()
    text = config_text(understand(tmp_path))
    assert "# where black is void" in text and "ignore_colors: [[0, 0, 0]]}" in text


def test_a_trial_of_one_epoch_is_no_shorter_than_the_warm_up(tmp_path):
    for layout, steps in (("roboflow_yolo", 3), ("labelme", 2)):  # 6 of 9 and 5 of 6 images, batches of 2
        getattr(write_layouts, layout)(tmp_path / layout)
        assert f"optim: {{warmup_steps: {steps}}}" in config_text(understand(tmp_path / layout))
