"""Labels as annotation tools write them: each format's boxes and classes by hand, and what is refused."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image
from pydantic import TypeAdapter, ValidationError
from write_layouts import write

from visionmtl.datasets import Dataset
from visionmtl.io import labelme as labelme_file
from visionmtl.io import voc as voc_file
from visionmtl.io.label_maps import color_file
from visionmtl.structures import IGNORE

H, W = 20, 40
DATA_YAML = "names: [cup, plate]\nnc: 2\ntrain: ../train/images\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two images, a and b, of 20x40 px."""
    for name in "ab":
        write(tmp_path / f"images/{name}.png", np.full((H, W, 3), 90, np.uint8))
    return tmp_path


def open_folder(root: Path, **settings: Any) -> Any:
    spec = {"type": "folder", "root": str(root), "images": "images/*.png", **settings}
    return TypeAdapter(Dataset).validate_python(spec).build()


def boxes_of(reader: Any, index: int) -> tuple[list, list[str], list[float], list[bool]]:
    """Boxes of an image: corners, classes by name, areas, crowds."""
    boxes = reader.read(index).boxes
    names = [reader.provides["boxes"].classes[k] for k in boxes.labels]
    return boxes.xyxy.round(3).tolist(), names, boxes.area.round(3).tolist(), boxes.crowd.tolist()


def voc(*objects: str, size: str = f"<width>{W}</width><height>{H}</height>") -> str:
    return f"<annotation><filename>a.png</filename><size>{size}<depth>3</depth></size>{''.join(objects)}</annotation>"


def voc_object(name: str, box: tuple[int, int, int, int], more: str = "") -> str:
    corners = "".join(
        f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    return f"<object><name>{name}</name>{more}<bndbox>{corners}</bndbox></object>"


def labelme(*shapes: dict[str, Any]) -> str:
    return json.dumps(
        {"version": "5.4", "shapes": list(shapes), "imageHeight": H, "imageWidth": W, "imagePath": "a.png"}
    )


def test_yolo_boxes_and_polygons(root):
    write(root / "data.yaml", DATA_YAML)
    # centre (10, 10) of 8x4 px; a triangle (4, 2) (20, 2) (4, 10), half of 16x8 px
    write(root / "labels/a.txt", "0 0.25 0.5 0.2 0.2\n1 0.1 0.1 0.5 0.1 0.1 0.5\n")
    write(root / "labels/b.txt", "")
    reader = open_folder(root, boxes={"files": "labels/{stem}.txt", "classes": "data.yaml"})
    assert boxes_of(reader, 0) == ([[6, 8, 14, 12], [4, 2, 20, 10]], ["cup", "plate"], [32, 64], [False, False])
    assert boxes_of(reader, 1)[0] == []
    assert any("read as yolo (by the ending" in note for note in reader.notes)
    assert root / "data.yaml" in reader.label_files(0) and root / "labels/a.txt" in reader.label_files(0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 10 5 8 4", r"labels/a.txt: line 1 is '0 10 5 8 4'; .*fractions.*look like pixels; divide x by the width"),
        ("2 0.5 0.5 0.1 0.1", r"class must be a whole number, 0 to 1 \(cup, plate\)"),
        ("0 0.5 0.5 0.1 0.1 0.9", "a fifth is a confidence, which predictions have"),
        ("0 0.5 0.5 0.1", "4 numbers are needed behind the class"),
        ("cup 0.5 0.5 0.1 0.1", "numbers are needed: class cx cy w h"),
        ("0 0.5 nan 0.1 0.1", "fractions of the image"),
    ],
)
def test_yolo_lines_that_are_none_are_named(root, line, message):
    write(root / "labels/a.txt", line)
    write(root / "labels/b.txt", "")
    with pytest.raises(ValueError, match=message):
        open_folder(root, boxes={"files": "labels/{stem}.txt", "classes": ["cup", "plate"]})


def test_all_files_that_cannot_be_read_are_counted_at_once(root):
    for name in "ab":
        write(root / f"labels/{name}.txt", "7 0.5 0.5 0.1 0.1")
    with pytest.raises(
        ValueError, match=r"labels/a.txt: line 1 .*\(and 1 more files of .*labels/{stem}.txt cannot be read"
    ):
        open_folder(root, boxes={"files": "labels/{stem}.txt", "classes": ["cup"]})


def test_an_image_without_a_yolo_file_is_refused_unlabelled_or_empty_as_is_said(root):
    write(root / "labels/a.txt", "0 0.5 0.5 0.5 0.5")
    settings = {"files": "labels/{stem}.txt", "classes": ["cup"]}
    with pytest.raises(ValueError, match=r"1 of 2 images has no file, labels/b.txt;.*missing: empty"):
        open_folder(root, boxes=settings)
    assert open_folder(root, boxes={**settings, "missing": "unlabelled"}).read(1).boxes is None
    empty = open_folder(root, boxes={**settings, "missing": "empty"})
    assert len(empty.read(1).boxes.labels) == 0 and len(empty.read(0).boxes.labels) == 1
    assert any("1 of 2 images has no file" in note and "looked at and empty" in note for note in empty.notes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("names: [a, b]\nnc: 3\n", "says nc: 3, but names 2 classes"),
        ("names: {1: a, 2: b}\n", "has no `names` of classes"),
        ("names: [a, a]\n", "names 'a' twice"),
        ("names: [a]\nkpt_shape: [17, 3]\n", "describes keypoints"),
    ],
)
def test_a_data_yaml_that_contradicts_itself_is_refused(root, content, message):
    write(root / "data.yaml", content)
    write(root / "labels/a.txt", "")
    with pytest.raises(ValueError, match=message):
        open_folder(root, boxes={"files": "labels/{stem}.txt", "classes": "data.yaml", "missing": "empty"})


def test_voc_counts_from_one_and_its_difficult_objects_are_neither_hit_nor_miss(root):
    difficult = "<difficult>1</difficult>"
    write(root / "xml/a.xml", voc(voc_object("plate", (1, 1, 10, 5)), voc_object("cup", (11, 2, 20, 20), difficult)))
    write(root / "xml/b.xml", voc())
    reader = open_folder(root, boxes={"files": "xml/{stem}.xml"})
    assert boxes_of(reader, 0) == ([[0, 0, 10, 5], [10, 1, 20, 20]], ["plate", "cup"], [50, 190], [False, True])
    assert reader.provides["boxes"].classes == ("cup", "plate")
    notes = "\n".join(reader.notes)
    assert "counted from 1, as in the standard" in notes and "1 objects are `difficult`" in notes
    part = "<part><name>handle</name><bndbox><xmin>0</xmin><ymin>3</ymin><xmax>2</xmax><ymax>5</ymax></bndbox></part>"
    write(root / "xml/b.xml", voc(voc_object("cup", (1, 2, 4, 4), part)))
    parts = open_folder(root, boxes={"files": "xml/{stem}.xml"})
    assert boxes_of(parts, 0)[0][1] == [10, 1, 20, 20], "a part of an object, which is not read, decides nothing"
    write(root / "xml/b.xml", voc(voc_object("cup", (0, 0, 4, 4)), size=""))
    other = open_folder(root, boxes={"files": "xml/{stem}.xml"})
    assert boxes_of(other, 1)[0] == [[0, 0, 4, 4]] and any("1 files do not give the size" in n for n in other.notes)
    assert boxes_of(open_folder(root, boxes={"files": "xml/{stem}.xml", "first_pixel": 0}), 0)[0][0] == [1, 1, 10, 5]


BOMB = '<!DOCTYPE a [<!ENTITY x "xxxxxxxxxx"><!ENTITY y "&x;&x;&x;">]>'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (BOMB + voc("<object><name>&y;</name></object>"), r"xml/a.xml declares a document type.*remove <!DOCTYPE"),
        (voc(voc_object("cup", (1, 1, 10, 5)))[:-20], "xml/a.xml is no complete XML"),
        (voc("<object><name>cup</name></object>"), r"xml/a.xml: object\[0\] is 'without bndbox'"),
        (voc(voc_object("cup", (1, 1, 10, 5)).replace("10", "ten")), r"object\[0\].xmax is 'ten'; a number of pixels"),
        (voc(size="<width>4</width><height>2.5</height>"), "xml/a.xml: size is '2.5x4'; height and width are whole"),
        ("<svg/>", "xml/a.xml: its root is 'svg'; Pascal VOC's is `annotation`"),
    ],
)
def test_xml_that_is_no_annotation_is_refused(root, content, message):
    write(root / "xml/a.xml", content)
    shutil.copy(root / "xml/a.xml", root / "xml/b.xml")
    with pytest.raises(ValueError, match=message):
        open_folder(root, boxes={"files": "xml/{stem}.xml"})


def test_a_file_made_for_another_size_is_named(root):
    for name in "ab":
        write(root / f"xml/{name}.xml", voc(voc_object("cup", (1, 1, 4, 4)), size="<width>9</width><height>9</height>"))
    with pytest.raises(ValueError, match=r"xml/a.xml is made for 9x9 px, but .*images/a.png is 20x40"):
        open_folder(root, boxes={"files": "xml/{stem}.xml"}).read(0)


def test_labelme_shapes(root):
    write(
        root / "images/a.json",
        labelme(
            {"label": "plate", "points": [[1, 2], [9, 2], [9, 6]], "shape_type": "polygon"},
            {"label": "cup", "points": [[20, 10], [12, 4]], "shape_type": "rectangle"},
            {"label": "cup", "points": [[30, 10], [30, 14]], "shape_type": "circle"},
            {"label": "lid", "points": [[0, 0], [2, 0], [2, 2]], "shape_type": "polygon", "group_id": 1},
            {"label": "lid", "points": [[4, 4], [8, 4], [8, 8]], "shape_type": "polygon", "group_id": 1},
            {"label": "tip", "points": [[3, 3]], "shape_type": "point"},
        ),
    )
    write(root / "images/b.json", labelme())
    reader = open_folder(root, boxes={"files": "images/{stem}.json"})
    corners, names, areas, _ = boxes_of(reader, 0)
    assert corners == [[1, 2, 9, 6], [12, 4, 20, 10], [26, 6, 34, 14], [0, 0, 8, 8]]
    assert names == ["plate", "cup", "cup", "lid"] and areas == [16, 48, pytest.approx(50.265, abs=1e-3), 10]
    assert any("1 shapes of kind point have no box" in note for note in reader.notes)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            {"label": "a", "points": [[1, 2], [3, 4]], "shape_type": "polygon"},
            r"shapes\[0\].points .* 3 or more points",
        ),
        ({"label": "a", "points": [[1, "x"]], "shape_type": "circle"}, "2 or more points"),
        ({"points": [[1, 2]]}, "a shape has a label"),
        ({"label": "a", "points": [], "shape_type": "star"}, "shape_type is 'star'; known are polygon"),
    ],
)
def test_labelme_shapes_that_are_none_are_named(root, shape, message):
    for name in "ab":
        write(root / f"images/{name}.json", labelme(shape))
    with pytest.raises(ValueError, match=rf"images/a.json: .*{message}"):
        open_folder(root, boxes={"files": "images/{stem}.json"})


def instance_map() -> np.ndarray:
    ids = np.zeros((H, W), np.uint8)
    ids[2:6, 3:9], ids[10:12, 20:30] = 1, 2
    return ids


def test_instance_pngs_give_boxes_and_with_ranges_a_segmentation(root):
    """As Penn-Fudan's: images/a.png, masks/a_mask.png with 0 for the background, then a number a person."""
    for name in "ab":
        write(root / f"masks/{name}_mask.png", instance_map())
    reader = open_folder(
        root,
        boxes={"files": "masks/{stem}_mask.png", "classes": ["person"]},
        segmentation={"files": "masks/{stem}_mask.png", "classes": ["background", "person"],
                      "values": {0: "background", "1-254": "person"}},
    )  # fmt: skip
    assert boxes_of(reader, 0) == ([[3, 2, 9, 6], [20, 10, 30, 12]], ["person"] * 2, [24, 20], [False] * 2)
    classes = reader.read(0).segmentation
    assert [classes[0, 0], classes[3, 4], classes[10, 25]] == [0, 1, 1] and classes.sum() == 44


def test_sixteen_bit_instances_have_classes_by_range(root):
    ids = instance_map().astype(np.uint16)
    ids[ids == 1], ids[ids == 2], ids[0, 0] = 1000, 2001, 65535
    for name in "ab":
        write(root / f"masks/{name}.png", ids)
    settings = {"files": "masks/{stem}.png", "values": {"1000-1999": "car", "2000-2999": "person"}}
    reader = open_folder(root, boxes={**settings, "ignore": [0, 65535]})
    assert boxes_of(reader, 0)[1] == ["car", "person"]
    with pytest.raises(ValueError, match=r"masks/a.png holds the id 65535, for which no class is declared"):
        open_folder(root, boxes=settings)


def colored() -> np.ndarray:
    pixels = np.full((H, W, 3), (128, 128, 128), np.uint8)
    pixels[10:], pixels[15:, :5] = (64, 0, 128), (0, 0, 0)
    return pixels


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("label_colors.txt", "128 128 128\t\tSky\n64 0 128\t\tCar\n0 0 0\t\tVoid\n"),
        ("class_dict.csv", "name,r,g,b\nSky,128,128,128\nCar,64,0,128\nVoid,0,0,0\n"),
        ("labelmap.txt", "# label:color_rgb:parts:actions\nSky:128,128,128::\nCar:64,0,128::\nVoid:0,0,0::\n"),
        ("colors.yaml", "{Sky: [128, 128, 128], Car: [[64, 0, 128]], Void: [0, 0, 0]}"),
    ],
)
def test_colours_by_any_of_the_usual_tables(root, name, content):
    for image in "ab":
        write(root / f"masks/{image}_L.png", colored())
    write(root / name, content)
    settings = {"files": "masks/{stem}_L.png", "colors": name}
    reader = open_folder(root, segmentation=settings)
    space, classes = reader.provides["segmentation"], reader.read(0).segmentation
    assert space.classes == ("Sky", "Car", "Void") and space.colours[1] == (64, 0, 128)
    assert [classes[0, 0], classes[12, 20], classes[19, 0]] == [0, 1, 2]
    fewer = open_folder(root, segmentation={**settings, "classes": ["Car", "Sky"]})
    classes = fewer.read(0).segmentation
    assert [classes[0, 0], classes[12, 20], classes[19, 0]] == [1, 0, IGNORE]
    assert any("1 colours are no class: Void" in note for note in fewer.notes)


def test_colours_that_mean_nothing_are_told(root):
    for image in "ab":
        write(root / f"masks/{image}.png", colored())
    settings = {"files": "masks/{stem}.png", "colors": {"sky": [128, 128, 128], "car": [64, 0, 128]}}
    with pytest.raises(
        ValueError, match=r"masks/a.png holds 1 colours .* mean nothing, \[0, 0, 0\], in 3.12% .*smoothing"
    ):
        open_folder(root, segmentation=settings).read(0)
    assert (
        open_folder(root, segmentation={**settings, "ignore_colors": [[0, 0, 0]]}).read(0).segmentation[19, 0] == IGNORE
    )
    with pytest.raises(ValueError, match=r"colour \[64, 0, 128\] is ignored and car as well"):
        open_folder(root, segmentation={**settings, "ignore_colors": [[64, 0, 128]]})
    with pytest.raises(
        ValueError, match=r"a.png is uint8 with 3 channels, its colours .*\[64, 0, 128\].*set colors: {NAME"
    ):
        open_folder(root, segmentation={"files": "masks/{stem}.png", "classes": ["sky", "car"]}).read(0)


def test_values_may_be_ranges_that_do_not_meet(root):
    for image in "ab":
        write(root / f"masks/{image}.png", instance_map())
    settings: dict[str, Any] = {"files": "masks/{stem}.png", "classes": ["a", "b"], "values": {"0-1": "a", "1-2": "b"}}
    with pytest.raises(ValueError, match="pixel value 1 is 'a' and, by '1-2', 'b' as well"):
        open_folder(root, segmentation=settings)
    with pytest.raises(ValidationError, match=r"'2-1' is no pixel value"):
        open_folder(root, segmentation={**settings, "values": {"2-1": "a"}})
    with pytest.raises(ValueError, match=r"'200-300' is no pixel value; whole numbers of 0 to 255"):
        open_folder(root, segmentation={**settings, "values": {"0-1": "a", 2: "b", "200-300": "b"}})
    write(root / "classes.yaml", "{0: a, 1-254: b}")
    reader = open_folder(root, segmentation={"files": "masks/{stem}.png", "classes": "classes.yaml"})
    assert reader.read(0).segmentation[3, 4] == 1


def test_a_suffix_of_the_image_may_be_another_one_of_its_label(tmp_path):
    for scene, value in (("room/1", 1000), ("room/2", 2000)):
        write(tmp_path / f"{scene}/color/0_rgb.png", np.zeros((H, W, 3), np.uint8))
        write(tmp_path / f"{scene}/depth/0_depth.png", np.full((H, W), value, np.uint16))
    settings = {"type": "folder", "root": str(tmp_path), "images": "{folder}/color/{stem}_rgb.png"}
    depth = {"files": "{folder}/depth/{stem}_depth.png", "metres_per_unit": 0.001}
    reader = TypeAdapter(Dataset).validate_python(settings | {"depth": depth}).build()
    assert [reader.read(i).depth_m[0, 0] for i in range(2)] == [1, 2]
    assert [reader.read(i).image_id for i in range(2)] == ["room/1/color/0", "room/2/color/0"]
    with pytest.raises(ValidationError, match=r"paths of labels have {folder}, and `images` has not"):
        TypeAdapter(Dataset).validate_python(settings | {"images": "**/*_rgb.png", "depth": depth})


@pytest.mark.parametrize("ending", ["png", "npy", "tif", "exr"])
def test_depth_in_every_format(root, ending):
    metres = np.linspace(0.5, 4, H * W, dtype=np.float32).reshape(H, W)
    (root / "depth").mkdir()
    for name in "ab":
        file = root / f"depth/{name}.{ending}"
        if ending == "npy":
            np.save(file, metres)
        elif ending == "exr":
            exr = pytest.importorskip("OpenEXR")
            header = {"compression": exr.ZIP_COMPRESSION, "type": exr.scanlineimage}
            channels = {"RGB": np.dstack([metres] * 3)} if name == "a" else {"Z": metres}
            with exr.File(header, channels) as opened:
                opened.write(str(file))
        else:
            write(file, metres if ending == "tif" else (metres * 1000).astype(np.uint16))
    unit = 0.001 if ending == "png" else 1
    reader = open_folder(root, depth={"files": f"depth/{{stem}}.{ending}", "metres_per_unit": unit})
    for index in range(2):
        np.testing.assert_allclose(reader.read(index).depth_m, metres, atol=0.001 if ending == "png" else 0)
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ValueError, match=rf"b.{ending}"):
        reader.read(1)


def test_boxes_written_in_fractions_are_called_so(root):
    content = {
        "images": [{"id": i, "file_name": f"{name}.png", "height": H, "width": W} for i, name in enumerate("ab")],
        "categories": [{"id": 1, "name": "cup"}],
        "annotations": [{"id": 1, "image_id": 0, "category_id": 1, "bbox": [0.1, 0.2, 0.3, 0.4], "iscrowd": 0}],
    }
    write(root / "boxes.json", json.dumps(content))
    with pytest.raises(
        ValueError, match=r"all 1 boxes lie in 0..1, the first is \[0.1, 0.2, 0.3, 0.4\]; COCO's are pixels"
    ):
        open_folder(root, boxes={"file": "boxes.json"})


def test_a_list_of_images_with_labels_is_called_so(root):
    write(root / "train.txt", "images/a.png 3\nimages/b.png 0\n")
    with pytest.raises(
        ValueError, match=r"2 of 2 lines have 2 columns, the first is 'images/a.png 3', as lists of image"
    ):
        open_folder(root, list_file="train.txt")


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ({}, "boxes need one of `file` .* none is set"),
        ({"file": "a.json", "files": "{stem}.txt"}, "both is set"),
        ({"files": "{stem}.abc"}, "boxes.format is None for '{stem}.abc'"),
        ({"file": "a.json", "classes": ["a"]}, "boxes.classes has no effect with format coco"),
        ({"files": "{stem}.xml", "values": {1: "a"}}, "boxes.values has no effect with format voc; .*instances"),
        ({"files": "{stem}.txt"}, "boxes in YOLO files are numbers; `classes` must name them"),
        ({"files": "{stem}.png"}, "boxes of instance maps need `classes`"),
        ({"file": "a.json", "missing": "empty"}, "boxes.missing: empty has no effect with format coco"),
    ],
)
def test_boxes_that_cannot_be_meant_are_refused(root, boxes, message):
    with pytest.raises(ValidationError, match=message):
        open_folder(root, boxes=boxes)


def test_a_class_that_the_list_lacks_is_told(root):
    for name in "ab":
        write(root / f"xml/{name}.xml", voc(voc_object("cupp", (1, 1, 4, 4))))
    with pytest.raises(ValueError, match=r"class 'cupp' \(did you mean 'cup'\?\), which boxes.classes does not name"):
        open_folder(root, boxes={"files": "xml/{stem}.xml", "classes": ["cup"]})


def test_polygons_of_labelme_become_a_segmentation_smaller_above_larger(root):
    square = {"label": "plate", "points": [[2, 2], [12, 2], [12, 12], [2, 12]], "shape_type": "polygon"}
    small = {"label": "cup", "points": [[4, 4], [8, 8]], "shape_type": "rectangle"}
    for name in "ab":
        write(root / f"images/{name}.json", labelme(small, square))
    settings: dict[str, Any] = {"files": "images/{stem}.json", "classes": ["table", "plate", "cup"]}
    classes = open_folder(root, segmentation=settings).read(0).segmentation
    assert [(classes == k).sum() for k in (0, 1, 2, IGNORE)] == [0, 100 - 16, 16, H * W - 100]
    assert classes[5, 5] == 2 and classes[2, 2] == 1 and classes[1, 1] == IGNORE
    outside = open_folder(root, segmentation={**settings, "outside": "table"}).read(0).segmentation
    assert outside[0, 0] == 0 and (outside == IGNORE).sum() == 0
    with pytest.raises(ValidationError, match=r"outside is 'tabel' \(did you mean 'table'\?\)"):
        open_folder(root, segmentation={**settings, "outside": "tabel"})
    with pytest.raises(ValueError, match=r"a shape has the class 'plate', which segmentation.classes does not name"):
        open_folder(root, segmentation={**settings, "classes": ["cup"]}).read(0)


def test_lines_of_labelme_are_no_background(root):
    line = {"label": "crack", "points": [[5, 5], [20, 9]], "shape_type": "linestrip"}
    square = {"label": "plate", "points": [[2, 2], [12, 2], [12, 12], [2, 12]], "shape_type": "polygon"}
    for name in "ab":
        write(root / f"images/{name}.json", labelme(square, line))
    settings: dict[str, Any] = {"files": "images/{stem}.json", "outside": "table"}
    with pytest.raises(ValueError, match=r"a.json: 1 shapes of classes .* lines, the first is 'crack'; .* polygons"):
        open_folder(root, segmentation={**settings, "classes": ["table", "plate", "crack"]}).read(0)
    classes = open_folder(root, segmentation={**settings, "classes": ["table", "plate"]}).read(0).segmentation
    assert (classes == 1).sum() == 100  # a line of another name marks something else


def test_polygons_of_yolo_become_a_segmentation_and_boxes_do_not(root):
    write(root / "data.yaml", DATA_YAML)
    write(root / "labels/a.txt", "1 0.1 0.1 0.6 0.1 0.6 0.6 0.1 0.6\n")  # (4, 2) to (24, 12)
    write(root / "labels/b.txt", "0 0.5 0.5 0.1 0.1\n")
    settings: dict[str, Any] = {"files": "labels/{stem}.txt", "classes": "data.yaml", "outside": "floor"}
    reader = open_folder(root, segmentation=settings)
    classes = reader.read(0).segmentation
    assert reader.provides["segmentation"].classes == ("cup", "plate", "floor")
    assert [(classes == k).sum() for k in range(3)] == [0, 200, H * W - 200]
    with pytest.raises(
        ValueError, match=r"labels/b.txt: an object of class 'cup' is a box .* segmentation needs polygons"
    ):
        reader.read(1)
    with pytest.raises(ValidationError, match=r"segmentation of polygons .yolo. needs `classes`"):
        open_folder(root, segmentation={**settings, "classes": None})


@pytest.mark.parametrize("value", [1e30, -1e6, float("nan")])
def test_coordinates_of_labelme_that_would_kill_pycocotools_are_refused(tmp_path, value):
    file = tmp_path / "a.json"
    shape = {"label": "cup", "points": [[1, 2], [value, 2], [3, 4]], "shape_type": "polygon"}
    file.write_text(json.dumps({"imageHeight": H, "imageWidth": W, "shapes": [shape]}))
    with pytest.raises(ValueError, match=r"a.json: shapes\[0\].points is .* are needed, below 100,000 px"):
        labelme_file.read_objects(file)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('<?xml version="1.0" encoding="shift_jis"?><annotation/>', "is no complete XML: multi-byte encodings"),
        ('<?xml version="1.0" encoding="none"?><annotation/>', "is no complete XML: unknown encoding"),
        ("<!DOCTYPE a [<!ENTITY b 'cccc'><!ENTITY d '&b;&b;&b;'>]><annotation>&d;</annotation>", "a document type"),
        ("<!DOCTYPE a SYSTEM 'file:///etc/passwd'><annotation/>", "a document type"),
        ("<annotation>&nothing;</annotation>", "is no complete XML: undefined entity"),
    ],
)
def test_xml_that_is_more_than_xml_is_refused(tmp_path, content, said):
    file = tmp_path / "a.xml"
    file.write_text(content)
    with pytest.raises(ValueError, match=said) as told:
        voc_file.read_objects(file, 1)
    assert type(told.value).__module__ != "xml.parsers.expat" and "a.xml" in str(told.value)


def test_a_class_list_has_a_name_on_every_line(root):
    write(root / "txt/a.txt", "1 .5 .5 .2 .2\n")
    write(root / "txt/b.txt", "")
    boxes = {"files": "txt/{stem}.txt", "classes": "classes.txt"}
    write(root / "classes.txt", "cat\n\ndog\n\n")
    with pytest.raises(ValueError, match=r"classes.txt: line 2 is empty; each line is the name of a class"):
        open_folder(root, boxes=boxes)
    write(root / "classes.txt", "cat\ndog\n\n")
    assert boxes_of(open_folder(root, boxes=boxes), 0)[1] == ["dog"]


@pytest.mark.parametrize(
    "settings",
    [
        {"boxes": {"files": "{stem}.txt", "classes": ["x", "y", "x"]}},
        {"segmentation": {"files": "{stem}.json", "classes": ["x", "y", "x"]}},
        {"segmentation": {"files": "{stem}.png", "colors": {"x": [0, 0, 0]}, "classes": ["x", "x"]}},
        {"image_labels": {"classes": ["x", "y", "x"]}},
    ],
)
def test_a_class_that_is_listed_twice_is_refused_everywhere(root, settings):
    with pytest.raises(ValidationError, match="'x' stands twice in a list of classes"):
        open_folder(root, **settings)


def test_class_names_are_one_in_both_unicode_forms(tmp_path):
    write(tmp_path / "images/cafe\u0301/1.png", np.zeros((4, 4, 3), np.uint8))
    reader = open_folder(tmp_path, images="images/*/*.png", image_labels={"classes": ["cafe\u0301", "bar"]})
    assert reader.provides["image_labels"].classes == ("caf\xe9", "bar") and reader.read(0).image_labels.tolist() == [0]


@pytest.mark.parametrize("begin", ["0.00", "0.5"])
@pytest.mark.parametrize("place", ["xml/{split}/{stem}.xml", "a [1]/{split}/b_{stem}.xml", "{split}/xml_{path}.xml"])
def test_voc_corners_below_1_are_counted_from_0_in_all_splits(tmp_path, begin, place):
    for split, corner in (("train", begin), ("val", "5")):
        write(tmp_path / f"images/{split}/a.png", np.zeros((H, W, 3), np.uint8))
        file = place.replace("{split}", split).replace("{stem}", "a").replace("{path}", "a")
        write(tmp_path / file, voc(voc_object("cup", (corner, 2, 20, 20))))
    for split, corner in (("train", float(begin)), ("val", 5)):
        reader = open_folder(tmp_path, images="images/{split}/*.png", split=split, boxes={"files": place})
        assert boxes_of(reader, 0)[0] == [[corner, 2, 20, 20]]
        assert "counted from 0" in " ".join(reader.notes)


def test_voc_difficult_is_a_yes_or_no(root):
    write(root / "xml/a.xml", voc(voc_object("cup", (1, 1, 9, 9), "<difficult>True</difficult>")))
    write(root / "xml/b.xml", voc())
    boxes = {"files": "xml/{stem}.xml"}
    assert boxes_of(open_folder(root, boxes=boxes), 0)[3] == [True]
    write(root / "xml/a.xml", voc(voc_object("cup", (1, 1, 9, 9), "<difficult>2</difficult>")))
    with pytest.raises(ValueError, match=r"object\[0\].difficult is '2'; 0 or 1 is needed"):
        open_folder(root, boxes=boxes)


def test_invalid_depth_is_compared_in_the_precision_of_the_file(root):
    for name in "ab":
        np.save(root / f"{name}.npy", np.array([[65.535, 1]] * H, np.float32).repeat(W // 2, 1))
    depth = {"files": "{stem}.npy", "metres_per_unit": 1, "invalid": [65.535]}
    assert np.unique(open_folder(root, depth=depth).read(0).depth_m).tolist() == [0, 1]


def test_depth_of_several_pages_or_half_floats_is_refused(root):
    tifffile = pytest.importorskip("tifffile")
    depth = {"files": "{stem}.tif", "metres_per_unit": 1}
    for pages, told in (
        (np.ones((2, H, W), np.float32), "has 2 pages, of which two or more have one size; one image is read"),
        (np.ones((H, W), np.float16), "floats in TIFF need 32 or 64 bits"),
    ):
        for name in "ab":
            tifffile.imwrite(root / f"{name}.tif", pages, photometric="minisblack")
        with pytest.raises(ValueError, match=told):
            open_folder(root, depth=depth).read(0)


def test_further_channels_beside_a_turned_photograph_are_refused(root):
    for name in "ab":
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 3
        Image.fromarray(np.zeros((H, W, 3), np.uint8)).save(root / f"images/{name}.jpg", exif=exif)
        write(root / f"more/{name}.png", np.zeros((H, W), np.uint8))
    more = {"images": "images/*.jpg", "channels": 4, "more_channels": [{"files": "more/{stem}.png"}]}
    with pytest.raises(ValueError, match="EXIF orientation, and channels other than RGB are read as stored"):
        open_folder(root, **more).read(0)
    assert open_folder(root, upright=False, **more).read(0).image.shape == (H, W, 4)


def test_yolo_boxes_beside_images_of_many_channels(tmp_path):
    (tmp_path / "images").mkdir()
    np.save(tmp_path / "images/a.npy", np.zeros((H, W, 5), np.uint8))
    write(tmp_path / "txt/a.txt", "0 .5 .5 .5 .5\n")
    boxes = {"files": "txt/{stem}.txt", "classes": ["c"]}
    reader = open_folder(tmp_path, images="images/*.npy", channels=5, boxes=boxes)
    assert boxes_of(reader, 0)[0] == [[W / 4, H / 4, 3 * W / 4, 3 * H / 4]]


def test_a_folder_for_each_sample(tmp_path):
    for number in (1, 2):
        write(tmp_path / f"scene_{number}/rgb.png", np.full((H, W, 3), number, np.uint8))
        write(tmp_path / f"scene_{number}/depth.png", np.full((H, W), number, np.uint16))
    depth = {"files": "{folder}/depth.png", "metres_per_unit": 1}
    reader = open_folder(tmp_path, images="{folder}/rgb.png", depth=depth)
    samples = [reader.read(index) for index in range(2)]
    assert [(s.image_id, s.image.max(), s.depth_m.max()) for s in samples] == [
        ("scene_1/rgb", 1, 1),
        ("scene_2/rgb", 2, 2),
    ]
    reader = open_folder(tmp_path, images="{folder}/rgb{stem}.png", depth=depth)
    assert [reader.read(index).image_id for index in range(2)] == ["scene_1/rgb", "scene_2/rgb"]


@pytest.mark.skipif(os.name == "nt", reason="the name is none there")
def test_colons_in_names_and_paths_from_here(tmp_path):
    write(tmp_path / "images/2020-01-01T10:00:00.png", np.zeros((H, W, 3), np.uint8))
    images = [{"id": 1, "file_name": "./2020-01-01T10:00:00.png", "height": float(H), "width": W}]
    content = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "cup"}]}
    write(tmp_path / "boxes.json", json.dumps(content))
    write(tmp_path / "list.txt", "2020-01-01T10:00:00.png\n")
    assert len(open_folder(tmp_path, boxes={"file": "boxes.json"}, list_file="list.txt")) == 1


def test_a_label_has_no_control_characters(root):
    write(root / "json/a.json", labelme({"label": "x\n", "points": [[1, 1], [5, 5]], "shape_type": "rectangle"}))
    write(root / "json/b.json", labelme())
    with pytest.raises(ValueError, match=r"json/a.json: shapes\[0\] is .*without control characters"):
        open_folder(root, boxes={"files": "json/{stem}.json"})


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("0 128 64 128 road", None), ("road 128 64 128 7", None), ("0,road,128,64,128", None), ("lane 2 1 2 3", None),
        ("road,128,64,128,7", None), ('"sky, up",0,0,0', ("sky, up", (0, 0, 0))),
        ("lane 2,1,2,3", ("lane 2", (1, 2, 3))),
        ("road 2:1,2,3", ("road 2", (1, 2, 3))), ("1:1,2,3::", ("1", (1, 2, 3))), ("a:1,2,3:x,1,2,3", ("a", (1, 2, 3))),
        ("128, 64, 128 road", ("road", (128, 64, 128))), ("road:128,64,128::", ("road", (128, 64, 128))),
        ("1 2 3 a 4 b", ("a 4 b", (1, 2, 3))), ("road,128,64,128,flat", ("road", (128, 64, 128))),
    ],
)  # fmt: skip
def test_lines_of_colour_tables_have_three_numbers(tmp_path, line, found):
    write(tmp_path / "colors.txt", line + "\n")
    if found is None:
        with pytest.raises(ValueError, match="three numbers 0 to 255 and no further one"):
            color_file(tmp_path / "colors.txt")
    else:
        assert color_file(tmp_path / "colors.txt") == {found[0]: (found[1],)}
