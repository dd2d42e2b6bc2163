"""Comparisons: changes, intervals and delta_m by hand; subsets of data sets; comparison files and what they refuse."""

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import write_layouts
import write_nyuv2
import yaml
from scipy import stats
from toy_run import losses_of, small_batch, small_net, small_tasks

from visionmtl.cli import main
from visionmtl.config.loader import ConfigError
from visionmtl.data.transforms.augment import Augment
from visionmtl.datasets.folder import Folder
from visionmtl.datasets.nyuv2 import NYUv2
from visionmtl.datasets.nyuv2_mat import NYUv2Mat
from visionmtl.datasets.scenes import Scenes
from visionmtl.datasets.subset import Subset, _ranked
from visionmtl.io.atomic import write_json
from visionmtl.network import LossNet
from visionmtl.structures import ReadRequest
from visionmtl.study import comparison
from visionmtl.study.affinity import agreement, lookahead, read_affinity
from visionmtl.study.charts import draw_curves, draw_intervals
from visionmtl.study.compare import compare
from visionmtl.study.comparison import WeightSearch, key_of, renewed_key, settings_of
from visionmtl.study.costs import Cost, step_ms
from visionmtl.study.report import Measured, SearchedTrial, check_folder, write_report
from visionmtl.study.runner import Runner
from visionmtl.study.statistics import delta_m_over_metrics, delta_m_per_task, relative_change, student_interval
from visionmtl.study.tables import changes, figures
from visionmtl.study.worker import Result, differences

METRICS = {"segmentation": {"miou": "max", "pixel_accuracy": "max"}, "depth": {"rmse_m": "min"}}
ALONE = {
    "segmentation": {"segmentation": {"images": 2, "miou": 0.5, "pixel_accuracy": 0.8}},
    "depth": {"depth": {"images": 2, "rmse_m": 0.5}},
}


# ---- arithmetic ----


def test_changes_are_positive_where_the_run_is_better():
    assert relative_change(0.55, 0.5, "max") == pytest.approx(0.1)
    assert relative_change(0.55, 0.5, "min") == pytest.approx(-0.1)
    assert relative_change(0.1, 0.0, "max") is None, "a change relative to 0 has no value"


def test_the_two_conventions_of_delta_m_by_hand():
    joint = {"segmentation": {"miou": 0.45, "pixel_accuracy": 0.76}, "depth": {"rmse_m": 0.4}}
    against = changes(joint, ALONE, METRICS)

    assert against["segmentation"] == pytest.approx({"miou": -0.1, "pixel_accuracy": -0.05})
    assert against["depth"] == pytest.approx({"rmse_m": 0.2})
    assert delta_m_per_task(against) == pytest.approx((-0.075 + 0.2) / 2)
    assert delta_m_over_metrics(against) == pytest.approx((-0.1 - 0.05 + 0.2) / 3)


def test_results_of_several_data_sets_are_compared_one_by_one():
    joint = {"depth@a": {"rmse_m": 0.4}, "depth@b": {"rmse_m": 1.0}}
    alone = {"depth": {"depth@a": {"rmse_m": 0.5}, "depth@b": {"rmse_m": 0.8}}}

    assert changes(joint, alone, METRICS)["depth"] == pytest.approx({"a/rmse_m": 0.2, "b/rmse_m": -0.25})


def test_student_interval_by_the_table_and_by_scipy():
    of = student_interval([1.0, 2.0, 3.0], 0.95)  # s = 1, t(0.975; 2) = 4.3027
    assert (of.mean, of.half_width) == pytest.approx((2.0, 4.302652729911275 / math.sqrt(3)))

    values = [0.3, -0.1, 0.8, 0.2, 0.25]
    expected = stats.t.interval(0.9, 4, loc=np.mean(values), scale=stats.sem(values))
    assert (student_interval(values, 0.9).low, student_interval(values, 0.9).high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("values", "verdict"),
    [((-0.11, -0.1, -0.09), "negative"), ((0.1, -0.1, -0.2), "not shown"), ((-0.5,), "not shown")],
)
def test_transfer_is_negative_only_where_the_interval_excludes_zero(values: tuple[float, ...], verdict: str):
    assert student_interval(values, 0.95).verdict == verdict


def test_each_seed_is_compared_with_the_references_of_its_own_seed():
    results = [{"depth": {"rmse_m": 0.4}}, {"depth": {"rmse_m": 0.9}}]
    references = [{"depth": {"depth": {"rmse_m": 0.5}}}, {"depth": {"depth": {"rmse_m": 1.0}}}]

    of = figures(results, references, {"depth": {"rmse_m": "min"}}, 0.95)

    assert of.transfer["depth"].values == pytest.approx((0.2, 0.1))
    assert of.per_task is not None and of.per_task.mean == pytest.approx(0.15)


def test_delta_m_needs_a_reference_for_every_task():
    joint = {"segmentation": {"miou": 0.4, "pixel_accuracy": 0.8}, "depth": {"rmse_m": 0.4}}
    of = figures([joint], [{"depth": ALONE["depth"]}], METRICS, 0.95)

    assert set(of.transfer) == {"depth"} and of.per_task is None and of.over_metrics is None


def test_searched_weights_begin_with_the_configs_own_and_stay_in_their_ranges():
    search = WeightSearch(weights={"depth": (0.1, 10.0)}, trials=50)
    first, *drawn = search.draw()
    weights = [one["depth"] for one in drawn]

    assert not first and len(drawn) == 49 and drawn == search.draw()[1:]
    assert min(weights) >= 0.1 and max(weights) <= 10
    assert 0.3 < np.exp(np.mean(np.log(weights))) < 3, "log-uniform: the geometric mean of the ends"


def test_milliseconds_are_the_ratio_times_the_calmest_baseline():
    costs = {"equal": Cost("", "equal", 80.0, 1.0, 1, 1.0), "upgrad": Cost("", "equal", 160.0, 1.1, 1, 1.0)}
    assert step_ms(costs) == pytest.approx({"equal": 80.0, "upgrad": 88.0})


def test_agreement_is_the_mean_rank_correlation_of_pairs_of_seeds():
    assert agreement([[0.1, 0.2, 0.9], [1, 5, 6]]) == pytest.approx(1)
    assert agreement([[1, 2, 3], [3, 2, 1], [1, 2, 3]]) == pytest.approx(-1 / 3)
    assert agreement([[1, 2, 3]]) is None
    # ties share their mean rank: ranks 1.5 1.5 3 and 1.5 3 1.5; without any order there is nothing to agree on
    assert agreement([[0, 0, 0.1], [0, 0.1, 0]]) == pytest.approx(-0.5)
    assert agreement([[0, 0, 0], [0, 0, 0]]) is None


def test_look_ahead_agrees_with_the_first_order_and_leaves_the_network_alone():
    tasks = small_tasks()
    net, batch = small_net(tasks), small_batch(tasks)
    before = {name: value.clone() for name, value in net.state_dict().items()}

    matrix = lookahead(net, batch, step=1e-5)

    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    shared = net.trunk.shared_parameters()
    losses = [torch.stack(list(parts.values())).sum() for parts in losses_of(LossNet(net, cut=False), batch).values()]
    rows = [torch.autograd.grad(loss, shared, retain_graph=True, allow_unused=True) for loss in losses]
    flat = torch.stack(
        [
            torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(row, shared, strict=True)])
            for row in rows
        ]
    )
    length = 1e-5 * torch.cat([p.detach().flatten() for p in shared]).norm()
    expected = length * (flat @ flat.T) / flat.norm(dim=1)[:, None] / torch.stack(losses).detach()
    assert (np.diag(matrix) > 0).all()
    # of the dense tasks: detection's targets follow its predictions, which no gradient tells
    assert np.allclose(matrix[:, 1:], expected.numpy()[:, 1:], rtol=0.05, atol=1e-6)


# ---- subsets ----


def test_a_part_is_by_file_name_or_by_path_where_names_repeat(tmp_path):
    def part(pattern: str) -> set[str]:
        reader = Subset(of=Folder(root=str(tmp_path), images=pattern), part=(0, 0.3)).build()
        return {reader.read(index).image_id for index in range(len(reader))}

    for number in range(20):
        for name in (f"all/{number}", f"scenes/{number}/view"):
            write_layouts.write(tmp_path / f"{name}.png", np.zeros((4, 4, 3), np.uint8))

    def first(names: list[str]) -> set[str]:
        return set(sorted(names, key=lambda name: hashlib.blake2b(name.encode(), digest_size=8).digest())[:6])

    assert part("all/*.png") == {name[:-4] for name in first([f"{number}.png" for number in range(20)])}
    of_scenes = first([f"{number}/view.png" for number in range(20)])
    assert part("scenes/*/*.png") == {name[:-4] for name in of_scenes} != {f"{n}/view" for n in range(6)}


def test_a_part_of_the_official_file_is_that_of_the_prepared_folder(tmp_path):
    metas = write_nyuv2.drawn_frames(10)
    write_nyuv2.write_official(tmp_path / "official", metas, test=(2, 5))
    write_nyuv2.write_prepared(tmp_path / "prepared", metas, "train", [1, 3, 4, 6, 7, 8, 9, 10])
    parts = []
    for of in (NYUv2Mat(root=str(tmp_path / "official")), NYUv2(root=str(tmp_path / "prepared"))):
        reader = Subset(of=of, part=(0, 0.5)).build()
        parts.append([reader.read(index).image_id for index in range(len(reader))])
    assert parts[0] == parts[1] and len(parts[0]) == 4


def test_larger_parts_contain_smaller_ones_and_parts_that_meet_are_disjoint():
    def images(begin: float, end: float) -> set[int]:
        reader = Subset(of=Scenes(num_images=200, size=(32, 32)), part=(begin, end)).build()
        return set(reader._indices.tolist())

    held_out, rest = images(0, 0.1), images(0.1, 1)
    assert len(held_out) == 20 and not held_out & rest and held_out | rest == set(range(200))
    assert images(0, 0.05) < held_out < images(0, 0.5)
    assert held_out != set(range(20)), "not simply the first"


def test_a_fraction_of_one_label_leaves_the_others_alone():
    labels = {}
    for fraction in (0.1, 0.25):
        reader = Subset(of=Scenes(num_images=40, size=(32, 32)), labels={"depth_m": fraction}).build()
        samples = [reader.read(index) for index in range(len(reader))]
        assert all(sample.segmentation is not None and sample.boxes is not None for sample in samples)
        labels[fraction] = {sample.image_id for sample in samples if sample.depth_m is not None}

    assert len(labels[0.1]) == 4 and len(labels[0.25]) == 10 and labels[0.1] < labels[0.25]


def test_images_are_ordered_by_their_names_not_by_their_numbers(tmp_path: Path):
    (tmp_path / "images").mkdir()
    for name in "abcdef":
        cv2.imwrite(str(tmp_path / "images" / f"{name}.png"), np.zeros((32, 32, 3), np.uint8))
        np.save(tmp_path / f"{name}.npy", np.ones((32, 32), np.float32))
    mine = Folder(root=str(tmp_path), images="images/*.png", depth={"files": "{stem}.npy", "metres_per_unit": 1.0})

    def order() -> list[str]:
        reader = mine.build()
        return [Path(reader.file(index)).stem for index in _ranked(reader)]

    before = order()
    (tmp_path / "images" / "b.png").unlink()  # later images move up by one

    assert order() == [name for name in before if name != "b"]


def test_random_normals_are_unit_vectors_and_the_same_at_each_reading():
    reader = Subset(of=Scenes(num_images=4, size=(40, 56)), random_normals=True).build()
    first = reader.read_part(2, ReadRequest(frozenset({"normals"}))).normals
    assert first is not None and first.shape == (40, 56, 3)
    assert np.allclose(np.linalg.norm(first, axis=2), 1, atol=1e-5)
    assert np.array_equal(first, reader.read(2).normals) and not np.array_equal(first, reader.read(3).normals)
    true = Scenes(num_images=4, size=(40, 56)).build().read(2).normals
    assert abs((first * true).sum(axis=2).mean()) < 0.5, "nothing of the true ones is left"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "the data set itself"),
        ({"part": (0.5, 0.5)}, "allowed is 0 <= begin < end <= 1"),
        ({"of": {"type": "scenes", "weight": 2.0}, "part": (0, 0.5)}, "set them beside `of`"),
        ({"random_normals": True, "labels": {"normals": 0.5}}, "remove one of the two"),
    ],
)
def test_a_subset_refuses_what_has_no_effect(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Subset.model_validate({"of": {"type": "scenes"}, **settings})


def test_a_subset_refuses_labels_that_are_not_there():
    with pytest.raises(ValueError, match="'normals', which that data set does not provide"):
        Subset(of=Scenes(labels=("depth_m",)), labels={"normals": 0.5}).build()


# ---- comparison files ----

BASE = {
    "config": "quickstart.yaml",
    "seeds": [3, 4],
    "held_out": 0.25,
    "runs": {"equal": {}, "alone": {"tasks": ["depth"]}, "upgrad": {"overrides": ["balance=upgrad"]}},
}


def plan(tmp_path: Path, overrides: tuple[str, ...] = (), only: tuple[str, ...] = (), **changes: object):
    file = tmp_path / "comparison.yaml"
    file.write_text(yaml.safe_dump({**BASE, **changes}, sort_keys=False))
    return comparison.read(file, overrides, only)


def test_a_run_trains_on_what_is_not_held_out_and_is_tested_on_the_configs_own_data(tmp_path: Path):
    equal = plan(tmp_path).variants["equal"]
    (train,), (val,), (test,) = equal.run.data.train, equal.run.data.val, equal.test

    assert isinstance(train, Subset) and isinstance(val, Subset)
    assert (train.part, val.part) == ((0.25, 1.0), (0.0, 0.25)) and train.of == val.of
    assert (test.type, test.split) == ("scenes", "val") and train.name == "scenes"
    assert list(plan(tmp_path).variants["alone"].run.tasks) == ["depth"]
    assert plan(tmp_path).reference("depth", None) == "alone"


def test_data_that_one_run_adds_is_trained_on_as_a_whole_and_judges_nothing(tmp_path: Path):
    own, more = "{type: scenes, split: train, num_images: 3000}", "{type: scenes, split: train, num_images: 8}"
    variants = plan(tmp_path, runs={"equal": {}, "more": {"overrides": [f"data.train=[{own}, {more}]"]}}).variants
    (first, second), val = variants["more"].run.data.train, variants["more"].run.data.val

    assert isinstance(first, Subset) and first.part == (0.25, 1.0)
    assert second.type == "scenes" and second.num_images == 8
    assert [one.of for one in val] == [one.of for one in variants["equal"].run.data.val]


def test_metrics_are_the_primary_ones_unless_named(tmp_path: Path):
    of = plan(tmp_path, metrics={"depth": ["abs_rel", "delta1"]}).metrics
    assert of["depth"] == {"abs_rel": "min", "delta1": "max"} and of["segmentation"] == {"miou": "max"}


def test_label_fractions_thin_the_task_and_leave_other_runs_as_they_are(tmp_path: Path):
    runs = {"equal": {}, "alone": {"tasks": ["depth"]}, "other": {"tasks": ["segmentation"]}}
    of = plan(tmp_path, runs=runs, label_fractions={"task": "depth", "fractions": [0.1, 1.0]})

    assert list(of.variants) == ["equal@0.1", "equal@1", "alone@0.1", "alone@1", "other"]
    thinned, whole = (of.variants[f"equal@{fraction}"].run.data.train[0] for fraction in ("0.1", "1"))
    assert thinned.labels == {"depth_m": 0.1} and whole.labels == {}
    assert of.reference("depth", 0.1) == "alone@0.1" and of.reference("segmentation", 0.1) == "other"


def test_the_number_of_workers_does_not_make_another_run(tmp_path: Path):
    first, second = (plan(tmp_path, (f"data.workers={n}",)).variants["equal"].run for n in (0, 3))
    other = plan(tmp_path, ("optim.lr=0.1",)).variants["equal"].run
    assert key_of(first) == key_of(second) != key_of(other)


def test_a_setting_that_a_later_version_added_makes_no_other_run(tmp_path: Path):
    run = plan(tmp_path).variants["equal"].run
    before = settings_of(run)
    del before["train"]["curriculum"], before["data"]["eval_size"], before["tasks"]["depth"]["weight"]
    assert differences(before, run) == [] and renewed_key(json.dumps(before)) == key_of(run)


def test_a_default_that_a_later_version_changed_makes_another_run(tmp_path: Path):
    run = plan(tmp_path).variants["equal"].run
    before = settings_of(run)
    before["train"]["batch_size"] = 3  # what the default may have been
    assert differences(before, run) == [f"train.batch_size 3 (now {run.train.batch_size})"]
    assert renewed_key(json.dumps(before)) != key_of(run)
    assert renewed_key(json.dumps({**before, "no_such": 1})) != key_of(run), "what is no longer known fits no run"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runs": {"a": {"tasks": ["dept"]}}}, "runs.a.tasks .*did you mean .depth"),
        ({"runs": {"a": {"overrides": ["optim.lr=x"]}}}, "run 'a' of .*: optim.lr"),
        ({"runs": {"a": {"overrides": ["seed=1"]}}}, "the comparison decides seed, output"),
        ({"runs": {"a": {"tasks": ["depth"]}, "b": {"tasks": ["depth"]}}}, "a and b .* both learn 'depth' alone"),
        ({"metrics": {"depth": ["rmse"]}}, "names 'rmse' .did you mean"),
        ({"metrics": {"depth": ["pixels"]}}, "no better direction"),
        ({"references": {"depth": "nobody"}}, "a run .equal, alone, upgrad. are needed"),
        ({"leave_one_out": "alone"}, "learns depth alone; two tasks or more"),
        ({"affinity": "nobody"}, "allowed is one of the runs"),
        ({"seeds": [1, 1]}, "each counts once"),
        ({"runs": {"a": {"search": {"weights": {"depth": [1, 2]}, "trials": 3}}}}, "needs single-task references"),
        ({"runs": {"a": {"search": {"weights": {"depth": [2, 1]}, "trials": 3}}}}, "0 < least < greatest"),
        ({"label_fractions": {"task": "normals", "fractions": [0.5, 1]}}, "label_fractions.task"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, changes: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        plan(tmp_path, **changes)


def test_leave_one_out_trains_without_each_task(tmp_path: Path):
    of = plan(tmp_path, leave_one_out="upgrad", only=("upgrad",))
    assert list(of.variants["upgrad-without-depth"].run.tasks) == ["detection", "segmentation"]
    assert of.variants["upgrad-without-depth"].run.balance.type == "upgrad"
    assert {f"upgrad-without-{task}" for task in ("detection", "segmentation", "depth")} < of.selected


def test_a_run_of_some_tasks_leaves_out_what_augments_the_labels_of_others(tmp_path: Path):
    augment = ("data.augment={min_box_px: 4, max_class_share: 0.75, zoom: [1, 1.5]}",)
    runs = {"all": {}, "boxes": {"tasks": ["detection"]}, "classes": {"tasks": ["segmentation"]}}
    of = plan(tmp_path, augment, runs=runs)
    augments = {name: of.variants[name].run.data.augment for name in runs}
    assert [one.min_box_px for one in augments.values()] == [4, 4, Augment().min_box_px]
    assert [one.max_class_share for one in augments.values()] == [0.75, None, 0.75]
    assert {one.zoom for one in augments.values()} == {(1, 1.5)}


@pytest.mark.parametrize("entry", [{"tasks": ["depth"]}, {"overrides": ["model.sharing=single"]}])
def test_affinity_of_what_shares_nothing_is_told_before_anything_is_trained(entry: dict, tmp_path: Path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="affinity is 'apart', in whose network two tasks share no parameter"):
        compare(
            plan(tmp_path, ("data.size=[96,128]",), runs={"apart": entry}, affinity="apart"), out,
            Runner(out, 1, 1, "cpu", False, print), train=True, with_costs=False, tell=print,
        )  # fmt: skip
    assert not out.exists()


def test_only_takes_runs_and_their_references(tmp_path: Path):
    assert plan(tmp_path, only=("upgrad",)).selected == {"upgrad", "alone"}
    with pytest.raises(ConfigError, match=r"--only upgrd .did you mean"):
        plan(tmp_path, only=("upgrd",))


def test_a_config_is_no_comparison():
    with pytest.raises(ConfigError, match="is the config of one run"):
        comparison.read("quickstart.yaml")


@pytest.mark.parametrize("name", ["scenes", "nyuv2", "label_fraction", "noise_task"])
def test_shipped_comparisons_can_be_read(name: str):
    of = comparison.read(f"compare/{name}.yaml", ["data.root=DIR"] if name == "nyuv2" else [])
    assert of.comparison.seeds == (0, 1, 2) and of.references


def test_charts_are_pictures(tmp_path: Path):
    of = student_interval([-0.1, 0.02, 0.05], 0.95)
    draw_intervals(tmp_path / "a.png", "title", [("one run", of), ("another", student_interval([0.1], 0.95))])
    draw_curves(tmp_path / "b.png", "title", {"alone": [(0.05, of), (1.0, of)]}, "rmse_m")
    for name in ("a.png", "b.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_what_the_font_lacks_is_no_box_in_a_chart(tmp_path: Path):
    of = student_interval([-0.1, 0.02, 0.05], 0.95)
    no_font_has_it = "\U0010ffff"
    for number, letter in enumerate(("Δ", no_font_has_it)):
        draw_intervals(tmp_path / f"{number}.png", f"{letter}m", [(f"{letter} run", of)])
    assert (tmp_path / "0.png").read_bytes() != (tmp_path / "1.png").read_bytes()


def test_a_change_is_over_the_metrics_that_all_seeds_have():
    metrics = {"detection": {"ap": "max", "ap75": "max"}, "depth": {"rmse_m": "min"}}
    results = [{"detection": {"ap": 0.2, "ap75": 0.1}, "depth": {"rmse_m": 0.5}}] * 2

    def alone(ap75: float):
        reference = {"detection": {"ap": 0.1, "ap75": ap75}, "depth": {"rmse_m": 0.5}}
        return {"detection": reference, "depth": reference}

    of = figures(results, [alone(0.2), alone(0.0)], metrics, 0.95)  # of 0 there is no relative change
    assert of.transfer["detection"].values == (1.0, 1.0)


def test_a_report_is_written_over_nothing_but_itself(tmp_path: Path, capsys):
    of, folder = plan(tmp_path), tmp_path / "out"
    folder.mkdir()
    check_folder(folder, of)
    (folder / "results.csv").write_text("mine")
    with pytest.raises(ValueError, match=r"holds results.csv and no comparison.json, .* choose another --output"):
        check_folder(folder, of)
    assert main(["compare", str(tmp_path / "comparison.yaml"), "--output", str(folder)]) == 2
    assert (folder / "results.csv").read_text() == "mine" and len(list(folder.iterdir())) == 1
    capsys.readouterr()

    (folder / "results.csv").unlink()
    write_report(folder, of, [], {})
    check_folder(folder, of)
    finished = replace(of, comparison=of.comparison.model_copy(update={"config": str(tmp_path)}))
    with pytest.raises(ValueError, match=r"holds a report on quickstart.yaml, and this one is on .*; a folder holds"):
        check_folder(folder, finished)


def test_options_of_training_are_refused_for_runs_that_are_finished(tmp_path: Path, capsys):
    command = ["compare", str(tmp_path), "--output", str(tmp_path / "out"), "--jobs", "2", "--device", "cpu"]
    assert main(command) == 2
    assert "is a folder of finished runs, so --jobs --device would have no effect; leave it" in capsys.readouterr().err


def test_a_pair_of_tasks_that_one_seed_does_not_know_is_left_out_there(tmp_path: Path):
    of = plan(tmp_path, affinity="upgrad", seeds=[0, 1])
    rows = [[[0.3, 0.1, 0.2], [0.1, 0.3, 0.2], [0.1, None, 0.3]], [[0.5, 0.3, 0.4], [0.3, 0.5, 0.4], [0.3, 0.2, None]]]
    runs = [of.variants["upgrad"].seeded(seed) for seed in (0, 1)]
    write_json(tmp_path / "affinity.json", dict(zip(map(key_of, runs), rows, strict=True)))
    cosines = [{"a-b": 0.1, "a-c": 0.2, "b-c": 0.3, "c-d": 0.4}, {"a-c": 0.4, "a-b": 0.3, "b-c": 0.5}]
    results = {
        seed: Result({}, None, 1, {}, None, (), 1, 1.0, 1.0, {"cosine": seen}) for seed, seen in enumerate(cosines)
    }

    measured = [Measured(of.variants["upgrad"], results, ())]
    write_report(tmp_path, of, measured, {}, list(read_affinity(tmp_path).values()))

    gradients, affinity = json.loads((tmp_path / "comparison.json").read_text())["tables"]
    assert [cell.partition(" ")[0] for cell in gradients["rows"][0][1:5]] == ["0.2000", "0.3000", "0.4000", "0.4000"]
    assert gradients["rows"][0][5] == "+1.00", "of the three pairs that both know"
    # in percent; of the third row the second is of one seed, the last of the other
    assert [cell.partition(" ")[0] for cell in affinity["rows"][2][1:]] == ["20.0000", "20.0000", "30.0000"]
    assert affinity["title"].endswith("rank correlation between seeds +1.00")


def test_a_trial_without_a_score_says_why(tmp_path: Path):
    of, weights = plan(tmp_path), {"depth": 1.0}
    result = Result({}, None, 1, {}, ALONE["depth"], (), 1, 1.0, 1.0)
    trials = [
        SearchedTrial(0, weights, 0.0125, False), SearchedTrial(1, weights, None, True),
        SearchedTrial(2, weights, None, False),
    ]  # fmt: skip
    write_report(tmp_path, of, [Measured(of.variants["upgrad"], {0: result}, trials)], {})
    told = (tmp_path / "report.md").read_text()
    assert [line.split(" | ")[-1].strip(" |") for line in told.splitlines() if line.startswith("| ")][-3:] == [
        "+1.25", "diverged", "nothing to compare with",
    ]  # fmt: skip
