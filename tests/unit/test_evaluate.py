"""Evaluation: who is measured on what, over ranks, and how results become one number and one file."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from visionmtl.datasets import NamedDataset
from visionmtl.engine.evaluator import evaluate, evaluate_files, save_json
from visionmtl.metrics.depth import DepthMeter
from visionmtl.metrics.segmentation import SegmentationMeter
from visionmtl.structures import Batch, ImageMeta, LabelSpace, Sample

SPACE = LabelSpace("two", ("dark", "bright"), ((0, 0, 0), (255, 255, 255)))


class Task(SimpleNamespace):
    """Just what evaluation asks of a task; raw is the prediction."""

    def predict(self, raw, metas, size):
        assert raw.shape[1:] == size
        return [one[: meta.size[0], : meta.size[1]].numpy() for one, meta in zip(raw, metas, strict=True)]

    predict_for_meter = predict


class Net(nn.Module):
    """Predicts from the brightness of the red channel alone."""

    def __init__(self):
        super().__init__()
        self.dropout, self.frozen = nn.Dropout(), nn.BatchNorm2d(3).eval()
        self.spaces = {"seg": SPACE, "depth": None}
        self.tasks = {
            "seg": Task(meter=SegmentationMeter),
            "depth": Task(meter=lambda space: DepthMeter("per_image")),
        }

    def forward(self, image):
        assert not self.training
        assert torch.is_inference_mode_enabled()
        red = image[:, 0]
        return {"seg": (red > 100).byte(), "depth": red.float() / 100}


def batch(*values, seg=True, depth=True):
    """2x3 pixel images of one brightness, padded to 4x4; the truth is what `Net` predicts on 50 and on 150."""
    images = torch.zeros(len(values), 3, 4, 4, dtype=torch.uint8)
    for image, value in zip(images, values, strict=True):
        image[:, :2, :3] = value
    samples = [
        Sample(
            image=np.full((2, 3, 3), value, np.uint8),
            image_id=str(value),
            segmentation=np.full((2, 3), value > 100, np.uint8),
            depth_m=np.full((2, 3), value / 100, np.float32),
        )
        for value in values
    ]
    labelled = {"seg": torch.full((len(values),), seg), "depth": torch.full((len(values),), depth)}
    return Batch(
        image=images, targets={}, labelled=labelled, metas=[ImageMeta((2, 3), (2, 3))] * len(values), samples=samples
    )


def test_every_task_is_measured_at_original_size():
    results = evaluate(Net(), [batch(50, 150), batch(200)], "cpu")

    assert results["seg"]["miou"] == 1
    assert results["seg"]["pixels"] == 18
    assert results["seg"]["images"] == results["depth"]["images"] == 3
    assert results["depth"]["rmse_m"] == pytest.approx(0, abs=1e-6)


def test_a_meter_sees_only_images_that_are_labelled_for_its_task():
    mixed = batch(50, 150)
    mixed.labelled["seg"][0] = False  # labels of another label space, say: present, but not this task's

    results = evaluate(Net(), [mixed, batch(60, seg=False)], "cpu")

    assert (results["seg"]["images"], results["depth"]["images"]) == (1, 3)
    assert results["seg"]["absent"] == ["dark"]


def test_what_is_annotated_for_another_task_of_the_same_field_leaves_out_no_class():
    net, mixed, seen = Net(), batch(50, 150), []
    mixed.labelled["seg"][0] = False
    mixed.metas = [ImageMeta((2, 3), (2, 3), annotated={"segmentation": np.ones(5, bool)}) for _ in range(2)]

    def predict(raw, metas, size):
        seen.extend(metas)
        return type(net.tasks["seg"]).predict_for_meter(net.tasks["seg"], raw, metas, size)

    net.tasks["seg"].predict_for_meter = predict
    evaluate(net, [mixed], "cpu")

    assert [list(meta.annotated) for meta in seen] == [[], ["segmentation"]]


def test_a_task_without_any_label_is_flagged_not_scored():
    net = Net()
    results = evaluate(net, [batch(50, depth=False)], "cpu")

    assert results["depth"] == {"images": 0}
    assert results["seg"]["miou"] == 1


def test_every_module_gets_its_mode_back():
    net = Net()
    evaluate(net, [batch(50)], "cpu")

    assert net.training
    assert net.dropout.training
    assert not net.frozen.training


def test_the_mode_comes_back_after_an_error_too():
    net = Net()
    broken = batch(50)
    broken.image = None

    with pytest.raises(AttributeError):
        evaluate(net, [broken], "cpu")
    assert net.training


def test_on_image_gets_every_sample_with_all_predictions_and_the_tasks_that_it_is_labelled_for():
    seen = []

    evaluate(Net(), [batch(50, 150, seg=False)], "cpu", on_image=lambda *image: seen.append(image))

    assert [sample.image_id for sample, _, _ in seen] == ["50", "150"]
    assert all(set(of_task) == {"seg", "depth"} and judged == ["depth"] for _, of_task, judged in seen)
    assert (seen[1][1]["seg"] == 1).all()


def test_flipping_measures_both_views_together_and_says_so():
    net, seen = Net(), []

    def joined(raw, mirrored, metas, size):
        seen.append((raw, mirrored))
        return net.tasks["seg"].predict(raw, metas, size)

    net.tasks["seg"].predict_mirrored = joined
    one = batch(50)
    one.image[:, :, :, 0] = 200

    results = evaluate(net, [one], "cpu", meters={"seg": SegmentationMeter(SPACE)}, flip=True)

    (raw, mirrored) = seen[0]
    assert raw[0, 0].tolist() == [1, 0, 0, 0]
    assert mirrored[0, 0].tolist() == [0, 0, 1, 0], "the content is 3 pixels wide; the padding stays where it is"
    assert results["seg"]["protocol"].endswith("; mean of each image and its mirror image")
    assert set(results) == {"seg"}, "only the tasks that have a meter are measured"


def test_images_of_one_name_in_two_data_sets_are_told_apart_where_one_meter_sees_both():
    class Names(SegmentationMeter):
        def update(self, prediction, sample):
            seen.append(sample.image_id)

    seen = []
    net = Net()
    net.tasks["seg"].meter = Names
    evaluate(net, [replace(batch(50), datasets=[name]) for name in ("rooms", "streets")], "cpu")

    assert seen == ["rooms/50", "streets/50"]


class Reader:
    provides = {"segmentation": SPACE, "depth_m": None}

    def __len__(self):
        return len(VALUES)

    def read(self, index):
        return batch(VALUES[index]).samples[0]


def test_predictions_in_files_are_measured_as_those_of_a_network():
    net = Net()
    tasks = {"seg": net.tasks["seg"], "depth": net.tasks["depth"]}
    tasks["seg"].field, tasks["depth"].field = "segmentation", "depth_m"
    tasks["seg"].learns_from = tasks["depth"].learns_from = None
    meters = {name: task.meter(net.spaces[name]) for name, task in tasks.items()}
    reads = {
        "seg": lambda sample: (sample.image_id, (sample.image[..., 0] > 100).astype(np.uint8)),
        "depth": lambda sample: (sample.image_id, sample.image[..., 0].astype(np.float32) / 100),
    }

    results = evaluate_files(reads, meters, tasks, net.spaces, [NamedDataset("values", Reader())])

    assert results == evaluate(net, [batch(value) for value in VALUES], "cpu")

    twice = {f"{name}@{place}": tasks[name].meter(net.spaces[name]) for name in tasks for place in ("here", "there")}
    with pytest.raises(ValueError, match=r"images '101' of here and '101' of there are both evaluated by .*'depth'"):
        evaluate_files(
            reads, twice, tasks, net.spaces, [NamedDataset("here", Reader()), NamedDataset("there", Reader())]
        )


VALUES = [30, 90, 101, 150, 240]


def test_the_file_of_an_evaluation_has_a_header(tmp_path):
    save_json({"seg": {"miou": np.float64(0.5), "ap": math.nan}}, tmp_path / "eval" / "val.json", {"step": np.int64(7)})

    found = json.loads((tmp_path / "eval" / "val.json").read_text())
    assert found == {"header": {"step": 7}, "results": {"seg": {"miou": 0.5, "ap": None}}}


def _rank(rank, store, queue):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    queue.put((rank, evaluate(Net(), [batch(value, seg=value > 50) for value in VALUES[rank::2]], "cpu")))
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_return_the_numbers_of_one(tmp_path):
    context = torch.multiprocessing.get_context("fork")  # spawned ones would import everything anew
    queue = context.SimpleQueue()
    ranks = [context.Process(target=_rank, args=(rank, tmp_path / "store", queue)) for rank in range(2)]
    for process in ranks:
        process.start()
    results = dict(queue.get() for _ in ranks)
    for process in ranks:
        process.join(60)

    alone = evaluate(Net(), [batch(value, seg=value > 50) for value in VALUES], "cpu")
    assert results[0] == results[1] == alone
    assert alone["seg"]["images"] == 4
