"""Benchmark protocols by name: what they score, that the name stays with the number, and what does not fit fails."""

import pickle
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from visionmtl.datasets import NamedDataset, read_part
from visionmtl.engine.protocols import CITYSCAPES_CATEGORIES, PROTOCOLS, Resized, find_protocol
from visionmtl.io.cityscapes import CITYSCAPES7, CITYSCAPES19
from visionmtl.structures import EVERYTHING, Boxes, LabelSpace, Sample
from visionmtl.tasks.depth import Depth
from visionmtl.tasks.detection import Detection
from visionmtl.tasks.normals import Normals
from visionmtl.tasks.segmentation import Segmentation

TASKS = {"boxes": Detection(), "classes": Segmentation(), "depth": Depth(), "normals": Normals()}
DENSE = {name: TASKS[name] for name in ("classes", "depth")}


def space(name, count):
    return LabelSpace(name, tuple(f"class {k}" for k in range(count)), ((0, 0, 0),) * count)


SPACES = {"boxes": space("coco80", 80), "classes": space("nyu13", 13), "depth": None, "normals": None}


def street(height=4, width=6):
    return Sample(
        image=np.zeros((height, width, 3), np.uint8),
        image_id="street",
        segmentation=np.tile(np.array([0, 1, 13, 14, 2, 255], np.uint8), (height, width // 6)),
        depth_m=np.full((height, width), 4, np.float32),
        disparity_px_metre=400.0,
        intrinsics=(500.0, 600.0, width / 2, height / 2),
    )


@pytest.mark.parametrize(
    ("name", "scored"),
    [
        ("coco", {"boxes"}),
        ("nyu_eigen", {"depth"}),
        ("nyu_median", {"depth"}),
        ("nyu13_288x384", {"classes", "depth", "normals"}),
    ],
)
def test_a_protocol_scores_its_own_parts_alone(name, scored):
    assert set(find_protocol(name).makers(TASKS, SPACES)) == scored


@pytest.mark.parametrize("name", PROTOCOLS)
def test_the_name_stays_with_the_number(name):
    spaces = {"boxes": SPACES["boxes"], "depth": None, "normals": None}
    of_name = {"nyu13_288x384": SPACES["classes"], "nyu_joint": SPACES["classes"], "nyu40": space("nyu40", 40)}
    spaces["classes"] = of_name.get(name, CITYSCAPES19)
    if name == "nyu_joint":
        spaces["boxes"] = space("nyu_things19", 19)
    without_classes = {k: v for k, v in TASKS.items() if k != "classes"}
    tasks = without_classes if name in ("coco", "nyu_eigen", "nyu_median") else TASKS

    protocol = find_protocol(name)
    results = {task: make().compute() for task, make in protocol.makers(tasks, spaces).items()}
    for result in protocol.named(results).values():
        assert result["protocol"].partition(":")[0] == name


@pytest.mark.parametrize("classes", ["nyu13", "nyu40"])
def test_the_declared_benchmark_scores_boxes_classes_and_metres(classes):
    spaces = {"boxes": space("nyu_things19", 19), "classes": space(classes, int(classes[3:])), "depth": None}
    protocol = find_protocol("nyu_joint")
    makers = protocol.makers({name: TASKS[name] for name in spaces}, spaces)
    says = {
        name: result["protocol"]
        for name, result in protocol.named({n: m().compute() for n, m in makers.items()}).items()
    }
    assert set(says) == set(spaces)
    assert says["boxes"] == "nyu_joint: coco"
    assert says["depth"].startswith("nyu_joint: nyu_eigen: 0.001 < truth < 10 m")
    with pytest.raises(ValueError, match="'nyu_joint' scores boxes in nyu_things19, but task 'boxes' learns coco80"):
        protocol.makers(TASKS, SPACES)


def test_boxes_of_a_protocol_are_counted_by_what_the_task_chose():
    pytest.importorskip("faster_coco_eval")
    tasks = {"boxes": Detection(ap_backend="faster_coco_eval")}
    assert find_protocol("coco").makers(tasks, SPACES)["boxes"]().backend == "faster_coco_eval"


def test_what_was_learnt_in_another_label_space_is_no_number_of_this_protocol():
    with pytest.raises(ValueError, match="'nyu40' scores segmentation in nyu40, but task 'classes' learns nyu13"):
        find_protocol("nyu40").makers(TASKS, SPACES)
    with pytest.raises(ValueError, match=r"'coco' scores boxes, but the tasks learn segmentation, depth_m; .* choose"):
        find_protocol("coco").makers(DENSE, SPACES)
    with pytest.raises(ValueError, match=r"unknown protocol 'nyu4' \(did you mean 'nyu40'\?\); known are coco "):
        find_protocol("nyu4")


def test_cityscapes_depth_counts_80_m_and_nothing_beyond():
    cityscapes = find_protocol("cityscapes")
    meter = cityscapes.makers({"depth": Depth()}, SPACES)["depth"]()
    truth = np.array([[0, 80, 80.1, 3]], np.float32)

    meter.update(truth, replace(street(), segmentation=None, depth_m=truth))

    result = cityscapes.named({"depth": meter.compute()})["depth"]
    assert (result["pixels"], result["rmse_m"]) == (2, 0)
    assert result["protocol"].startswith("cityscapes: per_image: 0.001 < truth < 80 m")


@pytest.mark.parametrize("name", ["nyu_eigen", "eigen"])
def test_a_depth_task_scores_the_protocol_of_that_name_by_its_rules(name):
    """Whatever range the task learns; `eigen` is what configs and checkpoints called it."""
    learns = Depth(protocol=name, min_depth_m=0.5, max_depth_m=8.0)

    ours = learns.meter(None).compute()
    benchmark = find_protocol("nyu_eigen").makers({"depth": learns}, {"depth": None})["depth"]().compute()

    assert learns.protocol == "nyu_eigen"
    assert ours["protocol"] == benchmark["protocol"]
    assert ours["protocol"].startswith("nyu_eigen: 0.001 < truth < 10 m")


def test_disparity_protocol_scores_categories_and_disparity_in_the_units_of_the_files():
    spaces = {"classes": CITYSCAPES19, "depth": None}
    makers = find_protocol("cityscapes_disparity_128x256").makers(DENSE, spaces)
    meters = {name: make() for name, make in makers.items()}
    one = street()
    confused = np.where(one.segmentation == 0, 1, one.segmentation).astype(np.uint8)  # road as sidewalk: both flat
    confused[one.segmentation == 255] = 18
    meters["classes"].update(confused, one)
    meters["depth"].update(one.depth_m / 2, one)

    assert meters["classes"].compute()["miou"] == 1
    assert meters["classes"].compute()["per_class"]["flat"]["pixels"] == 8
    result = meters["depth"].compute()  # 200 px for 100 px
    assert (result["abs_err_px"], result["abs_err"]) == (100, 100 * 256 / 65535)
    assert result["rel_err"] == pytest.approx(1, rel=1e-4)


def test_categories_are_those_of_the_seven_class_space():
    assert tuple(CITYSCAPES_CATEGORIES) == CITYSCAPES7.classes
    assert sorted(name for names in CITYSCAPES_CATEGORIES.values() for name in names) == sorted(CITYSCAPES19.classes)


class Reader:
    provides = {"segmentation": CITYSCAPES19, "depth_m": None, "boxes": CITYSCAPES19}

    def __len__(self):
        return 1

    def read(self, index):
        nothing = Boxes(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, bool), np.zeros(0, np.float32))
        return replace(street(256, 516), boxes=nothing)


def test_a_protocol_with_a_size_brings_image_and_truth_to_it_without_mixing_labels():
    (resized,) = find_protocol("cityscapes_disparity_128x256").sources([NamedDataset("streets", Reader())])
    one = resized.read(0)

    assert one.image.shape == (128, 256, 3)
    assert one.segmentation.shape == one.depth_m.shape == (128, 256)
    assert set(np.unique(one.segmentation)) <= {0, 1, 2, 13, 14, 255}
    assert one.boxes is None
    assert one.intrinsics == (500 * 256 / 516, 300, 128, 64), "the middle stays the middle"
    assert one.disparity_px_metre == 400, "disparity stays that of the whole image"
    assert set(resized.provides) == {"segmentation", "depth_m"}
    assert find_protocol("nyu40").sources([NamedDataset("streets", Reader())])[0].provides is Reader.provides


def test_images_of_another_size_than_a_protocols_are_an_error():
    (source,) = find_protocol("cityscapes").sources([NamedDataset("streets", Reader())])
    source = pickle.loads(pickle.dumps(source))  # as worker processes get it
    for read in (source.reader.read, partial(read_part, source.reader, request=EVERYTHING)):
        with pytest.raises(ValueError, match="'street' is 256x516 px; protocol 'cityscapes' is defined for 1024x2048"):
            read(0)
    whole = Reader()
    whole.read = lambda index: Sample(image=np.zeros((480, 640, 3), np.uint8), image_id="room")
    assert find_protocol("nyu40").sources([NamedDataset("rooms", whole)])[0].read(0).size == (480, 640)


def test_a_label_takes_the_pixel_under_its_centre():
    reader = Reader()
    reader.read = lambda index: Sample(
        image=np.zeros((4, 4, 3), np.uint8), image_id="a", depth_m=np.arange(16, dtype=np.float32).reshape(4, 4)
    )

    assert Resized(reader, (2, 2)).read(0).depth_m.tolist() == [[5, 7], [13, 15]]
    assert Resized(reader, (8, 8)).read(0).depth_m[::2, ::2].tolist() == reader.read(0).depth_m.tolist()


def test_images_of_one_channel_keep_it():
    reader = Reader()
    reader.read = lambda index: Sample(image=np.full((4, 4, 1), 7, np.uint8), image_id="a")
    assert Resized(reader, (2, 2)).read(0).image.tolist() == [[[7], [7]], [[7], [7]]]
