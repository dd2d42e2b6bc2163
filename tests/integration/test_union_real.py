"""COCO's and NYUv2's boxes in one detector over classes that each has a part of, where VISIONMTL_DATA has them."""

import json
from pathlib import Path

import pytest
import scene_run
import torch

from visionmtl.data.label_spaces import align, resolve_spaces
from visionmtl.data.loader import train_loader
from visionmtl.datasets import open_datasets
from visionmtl.engine.trainer import train
from visionmtl.ops.ranks import step_totals
from visionmtl.run import Run

SHARED = ["chair", "sofa", "table", "bed", "television"]
COCO, NYUV2 = {*SHARED, "person"}, {*SHARED, "lamp"}
CLASSES = [*SHARED, "person", "lamp"]


@pytest.fixture(scope="module")
def run(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    def both(coco_split: str, nyuv2_split: str) -> list[dict[str, object]]:
        return [
            {"type": "coco", "root": str(real_data / "coco"), "split": coco_split},
            {"type": "nyuv2", "root": str(real_data / "nyuv2"), "split": nyuv2_split, "labels": ["boxes"]},
        ]

    rename = {"couch": "sofa", "dining table": "table", "tv": "television"}
    return scene_run.run(
        tmp_path_factory.mktemp("union") / "run",
        ("detection",),
        tasks={"detection": {"classes": CLASSES, "rename": rename}},
        data={
            "train": both("train", "train"), "val": both("val", "test"), "size": [96, 128],
            "sampling": {"by": "equal", "epoch_images": 24},
        },
        train={"batch_size": 8},
    )  # fmt: skip


def test_images_of_each_data_set_leave_the_classes_of_the_other_alone(run: Run):
    sources = open_datasets(run.data.train)
    spaces = resolve_spaces(run.tasks, sources, open_datasets(run.data.val))
    assert spaces["detection"].classes == tuple(CLASSES)
    sources = align(sources, run.tasks, spaces)
    batch = next(scene_run.epoch(train_loader(run.data, run.tasks, spaces, sources, 8, 0)))
    task, net = run.tasks["detection"], scene_run.state(run).net

    raw = net(batch.image)["detection"]
    raw["logits"].retain_grad()
    targets = batch.targets["detection"]
    parts = task.loss(raw, targets, batch.labelled["detection"], step_totals([batch.counts])["detection"])
    torch.stack(list(parts.values())).sum().backward()

    looked_for = targets["annotated"][:, : len(CLASSES)]
    assert {tuple(row.tolist()) for row in looked_for} == {
        tuple(name in known for name in CLASSES) for known in (COCO, NYUV2)
    }
    for gradient, known, labels, valid in zip(
        raw["logits"].grad, looked_for, targets["labels"], targets["valid"], strict=True
    ):
        assert (gradient[:, ~known] == 0).all() and (gradient[:, known] != 0).any(dim=0).all()
        assert known[labels[valid]].all()


def test_each_data_set_judges_its_own_classes(run: Run):
    results = train(run)

    assert results.keys() == {"detection@coco", "detection@nyuv2"}
    for name, known in (("coco", COCO), ("nyuv2", NYUV2)):
        result = results[f"detection@{name}"]
        assert {*result["per_class"], *result["absent"]} == known
        assert set(result["not_annotated"]) == set(CLASSES) - known
    counted = json.loads((Path(run.data.val[1].root) / "annotations" / "derived_boxes19_test.json").read_text())
    names = {row["id"]: row["name"] for row in counted["categories"]}
    chairs = sum(names[row["category_id"]] == "chair" for row in counted["annotations"])
    assert results["detection@nyuv2"]["per_class"]["chair"]["boxes"] == chairs
