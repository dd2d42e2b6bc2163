"""One run on COCO, Cityscapes and NYUv2, each labelling its part of six tasks: who teaches whom, and who judges."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import scene_run
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from write_cityscapes import write_cityscapes
from write_coco import write_coco
from write_nyuv2 import drawn_frames, write_prepared

from visionmtl.data.label_spaces import eval_names, resolve_spaces
from visionmtl.data.loader import train_loader, val_loader
from visionmtl.data.sampler import Sampling
from visionmtl.datasets import open_datasets
from visionmtl.engine.evaluator import evaluate
from visionmtl.engine.monitor import Monitor
from visionmtl.engine.options import TrainOptions
from visionmtl.engine.trainer import train
from visionmtl.ops.ranks import step_totals
from visionmtl.run import Run
from visionmtl.structures import Batch

DECODER = {"type": "semantic_fpn", "levels": [3, 4], "channels": 16}
HEAD = {"type": "aligned", "levels": [3, 4], "num_convs": 1}
TASKS: dict[str, dict[str, Any]] = {
    "objects": {"type": "detection", "space": "coco80", "head": HEAD},
    "traffic": {"type": "detection", "space": "cityscapes_things8", "head": HEAD},
    "street": {"type": "segmentation", "space": "cityscapes19", "decoder": DECODER, "dropout": 0.0},
    "room": {"type": "segmentation", "space": "nyu13", "decoder": DECODER, "dropout": 0.0},
    "depth": {"type": "depth", "max_depth_m": 80.0, "decoder": DECODER},
    "room_depth": {"type": "depth", "learns_from": ["nyuv2"], "decoder": DECODER},
}
TEACHES = {
    "coco": {"objects"},
    "cityscapes": {"traffic", "street", "depth"},
    "nyuv2": {"room", "depth", "room_depth"},
}
EVAL_NAMES = {"objects", "traffic", "street", "room", "depth@cityscapes", "depth@nyuv2", "room_depth"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Drawn files in the official layouts; an epoch of two batches with two images of each data set."""
    root = tmp_path_factory.mktemp("data")
    write_coco(root / "coco", num_train=8, num_val=3, size=(48, 64))
    write_cityscapes(root / "cityscapes", num_train=4, num_val=2, size=(64, 128))
    write_prepared(root / "nyuv2", drawn_frames(3, (48, 64)))
    train_on, judge_on = (
        [
            {"type": "coco", "root": str(root / "coco"), "split": split},
            {"type": "cityscapes", "root": str(root / "cityscapes"), "split": split},
            {"type": "nyuv2", "root": str(root / "nyuv2"), "split": "train", "labels": ["segmentation", "depth_m"]},
        ]
        for split in ("train", "val")
    )
    sampling = {"by": "equal", "epoch_images": 12}
    plain = {
        "output": str(root / "run"),
        "model": {"encoder": {"name": "test_convnext"}, "pyramid": {"type": "fpn", "channels": 16}},
        "tasks": TASKS,
        "data": {"train": train_on, "val": judge_on, "sampling": sampling, "size": [64, 96], "workers": 0},
        "train": {"epochs": 1, "batch_size": 6, "precision": "fp32", "log_every_steps": 1, "sample_pictures": 1},
    }
    return Run.model_validate(plain)


def sources_of(batch: Batch) -> list[str]:
    """The data set of each image, told by who is labelled."""
    names = []
    for i in range(len(batch.image)):
        taught = {name for name, labelled in batch.labelled.items() if labelled[i]}
        names += [name for name, tasks in TEACHES.items() if tasks == taught]
    return names


def test_every_batch_mixes_the_data_sets_and_each_teaches_its_own_tasks(run: Run):
    batches = scene_run.batches(run)
    assert len(batches) == 2
    for batch in batches:
        assert Counter(sources_of(batch)) == {"coco": 2, "cityscapes": 2, "nyuv2": 2}


def raw_gradients(run: Run, batch: Batch) -> dict[str, list[Tensor]]:
    """By task: what the gradient of all losses together is in each of its raw outputs [B, ...]."""
    net = scene_run.state(run).net.eval()
    raw = net(batch.image)
    leaves = {
        name: [x for x in tree_leaves(of_task) if isinstance(x, Tensor) and x.requires_grad]
        for name, of_task in raw.items()
    }
    for tensors in leaves.values():
        for tensor in tensors:
            tensor.retain_grad()
    totals = step_totals([batch.counts])
    losses = [net.tasks[name].loss(raw[name], batch.targets[name], batch.labelled[name], totals[name]) for name in raw]
    torch.stack([part for parts in losses for part in parts.values()]).sum().backward()
    return {name: [t.grad for t in tensors if t.grad is not None] for name, tensors in leaves.items()}


def test_the_gradient_of_a_samples_unlabelled_task_is_exactly_zero(run: Run):
    batch = scene_run.batches(run)[0]
    gradients = raw_gradients(run, batch)
    for name, labelled in batch.labelled.items():
        assert gradients[name], name
        for gradient in gradients[name]:
            assert (gradient[~labelled] == 0).all(), f"{name} teaches where it is not labelled"
        assert any((gradient[labelled] != 0).any() for gradient in gradients[name]), f"{name} teaches nobody"


def test_images_without_a_label_do_not_change_a_tasks_loss(run: Run):
    batch = scene_run.batches(run)[0]
    net = scene_run.state(run).net.eval()
    raw_all = net(batch.image)
    for name, labelled in batch.labelled.items():
        few = labelled.nonzero()[:, 0]
        raw_few = net(batch.image[few])
        targets = {key: values[few] for key, values in batch.targets[name].items()}
        task = net.tasks[name]
        totals = step_totals([batch.counts])[name]
        size = tuple(batch.image.shape[2:])
        alone = task.loss(raw_few[name], targets, labelled[few], step_totals([{name: task.count(targets, size)}])[name])
        among = task.loss(raw_all[name], batch.targets[name], labelled, totals)
        assert alone.keys() == among.keys()
        for part in alone:
            # the network computes other batch sizes in another order: float rounding, nothing more
            assert among[part].item() == pytest.approx(alone[part].item(), rel=2e-5, abs=1e-7), f"{name}/{part}"


def test_the_run_trains_all_six_tasks_and_judges_every_data_set_by_itself(run: Run):
    before = {name: value.clone() for name, value in scene_run.state(run).net.decoders.state_dict().items()}
    results = train(run)
    assert results.keys() == EVAL_NAMES
    counts = {name: of_one["images"] for name, of_one in results.items()}
    assert counts == {
        "objects": 3, "traffic": 2, "street": 2, "room": 3, "depth@cityscapes": 2, "depth@nyuv2": 3, "room_depth": 3
    }  # fmt: skip

    after = torch.load(Path(run.output or "") / "checkpoints" / "last.pt", weights_only=True)["net"]
    for task in TASKS:
        moved = [
            k for k, v in before.items() if k.startswith(task + ".") and not torch.equal(v, after["decoders." + k])
        ]
        assert moved, task
    log = (Path(run.output or "") / "train.log").read_text()
    assert "train on  coco: 8 images, 4 drawn an epoch; teaches objects" in log
    assert "train on  nyuv2: 3 images, 4 drawn an epoch; teaches room, depth, room_depth" in log
    (file,) = (Path(run.output or "") / "eval").glob("*.json")
    assert json.loads(file.read_text())["results"].keys() == EVAL_NAMES


def test_the_log_says_who_judges_whom_and_which_task_nobody_does(run: Run, tmp_path: Path):
    rooms = run.data.val[2].model_copy(update={"labels": ("segmentation",)})
    data = run.data.model_copy(update={"train": [run.data.train[2]], "val": [run.data.val[0], rooms]})
    changes = {"data": data.model_copy(update={"sampling": Sampling()}), "output": str(tmp_path)}
    few = {"tasks": {name: run.tasks[name] for name in ("room", "depth")}}
    one = {"train": run.train.model_copy(update={"batch_size": 1})}

    train(run.model_copy(update={**changes, **few, **one}), TrainOptions(max_steps=1))

    log = (tmp_path / "train.log").read_text()
    assert "coco: 3 images; judges none\n" in log and "nyuv2: 3 images; judges room\n" in log
    assert "note      no validation data set has labels of depth: trained, and not evaluated\n" in log


def test_a_task_without_labels_in_a_batch_has_no_loss_to_log(run: Run, tmp_path: Path):
    alone = run.model_copy(
        update={"output": str(tmp_path / "run"), "train": run.train.model_copy(update={"batch_size": 1})}
    )
    train(alone)
    rows = scene_run.rows(tmp_path / "run")
    assert len(rows) == 12
    assert {frozenset(row["losses"]) for row in rows} == {frozenset(tasks) for tasks in TEACHES.values()}


def test_two_heads_of_one_field_learn_two_label_spaces(run: Run):
    net = scene_run.state(run).net
    assert {name: space and space.name for name, space in net.spaces.items()} == {
        "objects": "coco80", "traffic": "cityscapes_things8", "street": "cityscapes19", "room": "nyu13",
        "depth": None, "room_depth": None,
    }  # fmt: skip


def test_a_limited_evaluation_looks_at_every_data_set(run: Run):
    net, sources = scene_run.state(run).net, open_datasets(run.data.val)
    (batch,) = val_loader(run.data, run.tasks, net.spaces, sources, 4, limit=1)
    assert batch.datasets == ["coco", "cityscapes", "nyuv2", "coco"]


def test_a_data_set_judged_alone_gives_what_it_gives_among_others(run: Run):
    net, sources = scene_run.state(run).net.eval(), open_datasets(run.data.val)
    together = val_loader(run.data, run.tasks, net.spaces, sources, 3)
    names = eval_names(run.tasks, net.spaces, sources)
    meters = {name: run.tasks[task].meter(net.spaces[task]) for name, task in names.items()}
    results = evaluate(net, together, "cpu", meters=meters)
    alone = evaluate(net, val_loader(run.data, {"depth": run.tasks["depth"]}, net.spaces, sources[2:], 3), "cpu",
                     meters={"depth": run.tasks["depth"].meter(None)})  # fmt: skip
    assert results["depth@nyuv2"] == pytest.approx(alone["depth"])
    assert Monitor("depth@nyuv2/rmse_m", run.tasks, names).value(results) == -results["depth@nyuv2"]["rmse_m"]


def test_a_task_learns_from_the_data_sets_it_names_only(run: Run):
    tasks, sources = dict(run.tasks), open_datasets(run.data.train)
    with pytest.raises(
        ValueError, match=r"tasks.depth.learns_from names 'nyu2' \(did you mean 'nyuv2'\?\).* coco, city"
    ):
        resolve_spaces({**tasks, "depth": tasks["depth"].model_copy(update={"learns_from": ("nyu2",)})}, sources)
    with pytest.raises(ValueError, match="no training data set provides among coco; they provide boxes; add"):
        resolve_spaces({"depth": tasks["depth"].model_copy(update={"learns_from": ("coco",)})}, sources)


def test_who_learns_from_one_name_is_not_judged_under_another(run: Run):
    tasks, sources = run.tasks, open_datasets(run.data.val)
    renamed = [*sources[:2], replace(sources[2], name="rooms")]
    spaces = resolve_spaces(tasks, sources)
    assert eval_names(tasks, spaces, sources).keys() == EVAL_NAMES
    with pytest.raises(ValueError, match=r"task 'room_depth' learns from nyuv2, but .* coco, cityscapes, rooms; .*"):
        eval_names(tasks, spaces, renamed)


def test_a_task_that_its_data_set_cannot_judge_keeps_a_result_of_no_images(run: Run):
    tasks = {"depth": run.tasks["depth"].model_copy(update={"learns_from": ("cityscapes",)})}
    streets = run.data.val[1].model_copy(update={"labels": ("boxes", "segmentation")})
    sources = open_datasets([streets, run.data.val[2]])
    assert eval_names(tasks, {"depth": None}, sources) == {"depth": "depth"}


def test_a_data_set_that_teaches_nobody_or_is_never_drawn_is_an_error(run: Run):
    def load(**changes: Any) -> Any:
        data = run.data.model_copy(update=changes)
        sources = open_datasets(data.train)
        tasks = {"objects": run.tasks["objects"]} if "sampling" not in changes else run.tasks
        return train_loader(data, tasks, resolve_spaces(tasks, sources), sources, 6, 0)

    with pytest.raises(
        ValueError, match=r"training data set 'cityscapes' teaches none of the tasks objects; .* remove"
    ):
        load()
    few = run.data.sampling.model_copy(update={"by": "size", "epoch_images": 6})
    rare = [*run.data.train[:2], run.data.train[2].model_copy(update={"weight": 0.01})]
    with pytest.raises(ValueError, match=r"'nyuv2' would never be drawn in an epoch of 6 images; .* raise its weight"):
        load(sampling=few, train=rare)


def test_a_name_stands_for_one_data_set(run: Run):
    twice = [run.data.train[0].model_copy(update={"name": "same"})] * 2
    with pytest.raises(ValueError, match=r"2 data sets are named same, same; .* give each a name of its own"):
        open_datasets(twice)
    assert [source.name for source in open_datasets([run.data.train[0]] * 2)] == ["coco", "coco-2"]
