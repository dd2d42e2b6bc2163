"""What benchmarks are made of: rounds in alternation, ratios by round, budgets, limits, and how figures are written."""

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from visionmtl.benchmark.figures import Note, Report, Row, markdown
from visionmtl.benchmark.measure import Budget, Timing, alternate, count_flops, milliseconds, ratio
from visionmtl.benchmark.workload import Workload, check_counts

CPU = torch.device("cpu")
SMALL = Workload(encoder="test_resnet", batch=5, size=(64, 96), boxes=4, device="cpu")


def test_works_take_turns_and_each_has_a_time_for_each_round():
    order: list[str] = []
    times = alternate({name: lambda n=name: order.append(n) for name in "abc"}, CPU, Timing(rounds=3, seconds=1e-9))

    assert {name: len(of_one) for name, of_one in times.items()} == {"a": 3, "b": 3, "c": 3}
    assert "".join(order) == "aabbcc" + "abc" + "cba" + "abc"  # warmed and timed once; every other round backwards


def test_a_call_takes_its_mean_over_several():
    assert 50 <= milliseconds(lambda: time.sleep(0.05), CPU, calls=5) < 250


def test_the_clock_of_the_process_does_not_count_what_it_sleeps():
    assert milliseconds(lambda: time.sleep(0.05), CPU, clock="cpu") < 20


def test_a_ratio_is_that_of_the_middle_round_not_of_the_middle_times():
    ours, one, other = [1.0, 10.0, 3.0], [2.0, 1.0, 3.0], [2.0, 1.0, 3.0]
    assert ratio(ours, one, other) == 0.5  # of 1/4, 10/2, 3/6; medians would give 3 / 4


def test_operations_are_counted_forward_and_backward():
    layer, x = nn.Linear(8, 4, bias=False), torch.randn(2, 8, requires_grad=True)
    assert count_flops(lambda: layer(x).sum().backward()) == 3 * 2 * 2 * 8 * 4


@pytest.mark.parametrize("groups", [1, 8])
def test_grouped_convolutions_count_what_they_compute(groups: int):
    convolve, x = nn.Conv2d(8, 8, 3, padding=1, groups=groups, bias=False), torch.randn(2, 8, 4, 4, requires_grad=True)
    one = 2 * (2 * 4 * 4) * 8 * (8 // groups) * 3 * 3  # a multiply-add is two; cells, outputs, inputs, taps
    assert count_flops(lambda: convolve(x).sum().backward()) == 3 * one


def test_a_budget_lets_in_what_would_end_in_time():
    assert Budget(None).fits(1e9)
    assert Budget(10).fits(9) and not Budget(10).fits(11)


@pytest.mark.parametrize(
    ("row", "kept"),
    [
        (Row("a", 1, "s"), True),
        (Row("a", 1, "s", limit=1), True),
        (Row("a", 1.1, "s", limit=1), False),
        (Row("a", 4.8, "", least=4.9), False),
        (Row("a", float("nan"), "s", limit=1), False),
    ],
)
def test_a_limit_that_is_not_kept_is_named(row, kept):
    assert row.kept == kept and ("MISSED" in markdown(row)) == (not kept)


def test_files_are_never_behind_what_was_printed(tmp_path, capsys):
    files = tmp_path / "new" / "a.json", tmp_path / "new" / "a.md"
    report = Report("benchmark.py step", "step", {}, *files)
    for number, figure in enumerate((Row("a", 1, "s", limit=2), Note("skipped"), Row("b", 3, "s", limit=2))):
        report.add(figure)
        assert capsys.readouterr().out.strip() in files[1].read_text()
        assert report.kept == (number < 2)
    content = json.loads(files[0].read_text())
    assert content["rows"][1] == {"name": "b", "value": 3, "unit": "s", "limit": 2, "least": None, "kept": False}
    assert content["notes"] == ["skipped"] and content["machine"]["cpu"] and content["date"]


def test_a_workload_has_the_boxes_that_it_says():
    counts = [len(one.boxes.labels) for seed in range(40) for one in SMALL.samples(seed=seed) if one.boxes]
    assert min(counts) == 1 and max(counts) == 7 and np.mean(counts) == pytest.approx(4, abs=0.5)

    batch = SMALL.batch_of(SMALL.samples(boxes=100))
    assert batch.targets["detection"]["valid"].sum(dim=1).tolist() == [100] * 5
    boxes = batch.targets["detection"]["boxes"]
    assert (boxes >= 0).all() and (boxes <= torch.tensor([96, 64, 96, 64])).all()
    assert batch.image.shape == (5, 3, 64, 96) and batch.image.dtype == torch.uint8
    assert (
        batch.targets["segmentation"]["classes"].shape[-2:] == batch.targets["depth"]["depth_m"].shape[-2:] == (64, 96)
    )
    assert SMALL.samples()[0].segmentation.shape == SMALL.samples()[0].depth_m.shape == SMALL.samples()[0].size
    assert batch.targets["segmentation"]["classes"].unique().max() == 255  # some pixels nobody labelled
    assert (batch.targets["depth"]["depth_m"] == 0).any()


def test_settings_of_the_run_reach_the_workload():
    overrides = ("model.pyramid.channels=32", "optim.lr=0.1", "train.activation_memory=0.5")
    run = replace(SMALL, overrides=overrides).run(mode="compiled")
    assert (run.train.batch_size, run.train.compile, run.train.precision) == (5, True, "fp32")
    assert run.model.pyramid.channels == 32 and run.optim.lr == 0.1 and run.optim.ema_decay and run.optim.clip_norm
    assert list(run.tasks) == ["detection", "segmentation", "depth"]


INSTEAD = {"train.batch_size": "use --batch", "data": "leave it out"}


@pytest.mark.parametrize(
    "override",
    ["train.batch_size=2", "~train.batch_size", "train={batch_size: 2}", "~train", "data.size=[64,64]", "data={}"],
)
def test_settings_that_the_benchmark_replaces_are_refused_however_they_are_written(override: str):
    with pytest.raises(ValueError, match=r"itself chooses (train.batch_size; use --batch|data; leave)"):
        check_counts([override], INSTEAD)


def test_settings_beside_those_that_the_benchmark_replaces_are_taken():
    check_counts(["train.channels_last=false", "train={epochs: 2}", "model.sharing=branching", "~train.keep"], INSTEAD)


def test_the_benchmark_keeps_its_tasks():
    with pytest.raises(ValueError, match=r"without --config they are detection, .*or name a config"):
        replace(SMALL, overrides=["~tasks.depth"]).run()


def test_a_batch_too_small_to_normalise_names_the_option():
    with pytest.raises(ValueError, match=r"set --batch to at least 2, .* or a larger --size"):
        replace(SMALL, batch=1, size=(32, 32)).trainer()


def test_a_config_takes_what_only_compiled_steps_use():
    overrides = ["data.size=[64,96]", "train.activation_memory=0.5"]
    workload = Workload.of_config(Path("configs/quickstart.yaml"), 3, None, "cpu", overrides)
    assert workload.size == (64, 96) and workload.run(mode="compiled").train.activation_memory == 0.5
    assert not workload.run().train.compile
