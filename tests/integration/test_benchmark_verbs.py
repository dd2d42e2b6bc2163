"""Every verb of `tools/benchmark.py` on the smallest sizes: what its tables hold, and what it refuses."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from visionmtl.benchmark.figures import Figure, Note, Row, Table
from visionmtl.benchmark.gpu import measure_gpu
from visionmtl.benchmark.measure import Budget, Timing
from visionmtl.benchmark.peers import PEERS
from visionmtl.benchmark.step import Step
from visionmtl.benchmark.workload import Workload
from visionmtl.cli import main

pytestmark = pytest.mark.slow

TURNS, TURN = ["--rounds", "1", "--seconds", "0.001"], Timing(1, 0.001)
OVERRIDES = (
    "model.pyramid.channels=32", "tasks.detection.head.num_convs=1",
    "tasks.segmentation.decoder.channels=16", "tasks.depth.decoder.channels=16",
)  # fmt: skip
SMALL = ["--encoder", "test_resnet", "--size", "64", "64", "--set", *OVERRIDES]
BATCH = ["--batch", "2", "--boxes", "3"]


def measure(folder: Path, *command: str) -> tuple[int, dict[str, Any]]:
    """The exit status, and what is in the JSON file."""
    file = folder / "figures.json"
    status = main(["benchmark", *command, "--json", str(file), "--markdown", str(folder / "figures.md")])
    return status, json.loads(file.read_text())


def column(content: dict[str, Any], table: int, name: str) -> dict[str, Any]:
    """One column of a table by its first."""
    of_one = content["tables"][table]
    place = of_one["columns"].index(name)
    return {row[0]: row[place] for row in of_one["rows"]}


def test_a_step_is_timed_beside_its_parts_and_its_peers(tmp_path):
    options = ("--peers", "--without", "--compare-boxes", "1", "40", "--clock", "cpu", "--device", "cpu")
    _, content = measure(tmp_path, "step", *SMALL, *BATCH, *TURNS, *options)

    ms = column(content, 0, "ms")
    ours = ("encoder alone, eager", "joint, eager")
    with_boxes = ("joint, eager, boxes: 1", "joint, eager, boxes: 40")
    without = tuple(f"joint without {task}" for task in ("detection", "segmentation", "depth"))
    assert set(ms) == {*ours, *PEERS, *with_boxes, *without}
    assert all(value > 0 for value in ms.values())
    flops = column(content, 0, "GFLOP")
    assert flops["encoder alone, eager"] < flops["joint without detection"] < flops["joint, eager"]

    rows = {row["name"]: row for row in content["rows"]}
    achieved = flops["joint, eager"] / (ms["joint, eager"] / 1e3)
    share = 100 * achieved / rows["matrix peak"]["value"]
    assert column(content, 0, "% of matrix peak")["joint, eager"] == pytest.approx(share)
    together = rows["joint, eager / sum of the three peers"]["value"]
    assert together == pytest.approx(1 / rows["sum of the three peers / joint, eager"]["value"])
    assert together == pytest.approx(ms["joint, eager"] / sum(ms[name] for name in PEERS))  # one round: no medians
    assert rows["joint, eager, 40 boxes / 1"]["limit"] == 1.05
    assert "share of depth in the step (eager)" in rows
    assert "| joint, eager " in (tmp_path / "figures.md").read_text()


def step_of(budget: Budget) -> list[Figure]:
    """A step, plain and as if compiled."""
    workload = Workload(encoder="test_resnet", batch=2, size=(64, 64), boxes=3, device="cpu", overrides=OVERRIDES)
    return list(Step(workload, TURN, ("eager", "compiled"), budget=budget).measure())


def test_compiled_steps_have_the_operations_of_the_plain_ones(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **settings: function)
    figures = step_of(Budget(None))

    (table,) = (one for one in figures if isinstance(one, Table))
    flops = {str(row[0]): row[table.columns.index("GFLOP")] for row in table.rows}
    assert list(flops) == [f"{name}, {mode}" for mode in ("eager", "compiled") for name in ("encoder alone", "joint")]
    assert flops["joint, compiled"] == flops["joint, eager"] and flops["encoder alone, compiled"]
    assert any(isinstance(one, Row) and one.name.endswith(" / encoder alone, compiled") for one in figures)


def test_what_takes_long_to_compile_is_skipped_by_name_and_the_rest_is_timed():
    class HalfAMinute(Budget):
        def fits(self, seconds: float) -> bool:
            return seconds < 30

    figures = step_of(HalfAMinute(None))
    skipped = [one.text.partition(";")[0] for one in figures if isinstance(one, Note) and "SKIPPED" in one.text]
    assert skipped == ["SKIPPED: encoder alone, compiled", "SKIPPED: joint, compiled"]
    (table,) = (one for one in figures if isinstance(one, Table))
    assert [row[0] for row in table.rows] == ["encoder alone, eager", "joint, eager"]


def test_without_time_left_a_step_says_what_it_skipped_and_still_ends(tmp_path):
    status, content = measure(tmp_path, "gpu", *SMALL, *BATCH, *TURNS, "--device", "cpu", "--budget", "1e-9")

    skipped = [note for note in content["notes"] if note.startswith("SKIPPED")]
    assert status == 1, "the whole took longer than its budget"
    assert content["tables"] == [] and rows_named(content, "all of this took")
    for name in ("host waits", "predictions", "joint, eager", *PEERS):
        assert any(name in note for note in skipped), name


def test_with_time_left_one_go_measures_predictions_and_steps():
    workload = Workload(encoder="test_resnet", batch=2, size=(64, 64), boxes=3, device="cpu", overrides=OVERRIDES)
    figures = list(measure_gpu(workload, TURN, budget_s=3600, compare_boxes=(), infer_batches=(1,)))

    titles = {one.title for one in figures if isinstance(one, Table)}
    one_task = "One task kept of the joint network, raw outputs at batch 1"
    assert titles == {"Training steps", "Latency, batch 1", one_task, "Images a second, joint"}
    skipped = [one.text for one in figures if isinstance(one, Note) and "SKIPPED" in one.text]
    assert len(skipped) == 1 and "host waits, compiled steps, CUDA graphs; cpu is not a CUDA device" in skipped[0]
    assert isinstance(figures[-1], Row) and figures[-1].kept and figures[-1].limit == 3600


def test_each_balancing_method_is_compared_with_fixed_weights(tmp_path):
    _, content = measure(tmp_path, "balance", *SMALL, *BATCH, *TURNS, "--methods", "upgrad", "--peers")
    peers = [f"TorchJD, {name}" for name in ("MGDA", "ConFIG", "PCGrad")]
    assert [table["title"] for table in content["tables"]] == [f"Balancing methods, {n} tasks" for n in (3, 5)]
    for number in (0, 1):
        factors = column(content, number, "x fixed weights")
        assert list(factors) == ["fixed", "upgrad", "upgrad, on parameters", *peers]
        assert factors["fixed"] == 1 and factors["TorchJD, MGDA"] > 0


def test_each_way_of_sharing_stands_beside_one_network_a_task(tmp_path):
    ways = ["hard", "branching:pyramid", "cross_stitch"]
    _, content = measure(tmp_path, "sharing", *SMALL, *BATCH, *TURNS, "--ways", *ways)
    (table,) = content["tables"]
    rows = {row[0]: dict(zip(table["columns"], row, strict=True)) for row in table["rows"]}
    assert list(rows) == ways
    assert rows["cross_stitch"]["own M"] < rows["cross_stitch"]["shared M"] > 2 * rows["hard"]["shared M"]
    assert 0 < rows["hard"]["GFLOP, batch 1"] < rows["branching:pyramid"]["GFLOP, batch 1"]
    assert all(row["ms, batch 1"] > 0 for row in rows.values())


def test_predictions_are_timed_with_and_without_suppression(tmp_path):
    _, content = measure(tmp_path, "infer", *SMALL, *TURNS, "--batches", "1", "2")
    latency = {(network, until) for network, until, *_ in content["tables"][0]["rows"]}
    assert latency >= {("joint", "raw outputs"), ("joint", "without suppression"), ("joint", "predictions")}
    assert ("depth", "predictions") in latency and ("depth", "without suppression") not in latency
    for _, _, median, late, _ in content["tables"][0]["rows"]:
        assert 0 < median <= late
    for _, kept, alone, *_ in content["tables"][1]["rows"]:
        assert kept == alone > 0, "a task that is left out costs nothing"
    assert any("in 3 threads / one after the other" in row["name"] for row in content["rows"])
    assert [row[0] for row in content["tables"][2]["rows"]] == ["1", "2"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["step", "--modes", "cuda_graph", "--device", "cpu"], "only CUDA devices record such graphs; leave it out"),
        (["step", "--compare-boxes", "5"], "two numbers or more are compared"),
        (["step", "--encoder", "resnet5"], "no model 'resnet5'"),
        (["step", "--set", "model.pyramd.channels=3"], "unknown field 'pyramd' .did you mean 'pyramid'"),
        (["sharing", "--ways", "cros_stitch"], "did you mean 'cross_stitch'.*correct --ways"),
        (["balance", "--methods", "upgrade"], "did you mean 'upgrad'.*correct --methods"),
        (
            ["step", "--config", "configs/quickstart.yaml", "--batch", "3"],
            "--batch would have no effect beside --config",
        ),
        (
            ["step", "--config", "configs/quickstart.yaml", "--peers", "--set", "~tasks.depth"],
            "the config's tasks are detection, segmentation; the peers are one network each",
        ),
        (["step", "--encoder", "resnet10t", "--set", "model.encoder.name=resnet34"], "chooses .*; use --encoder"),
        (["step", "--set", "train.batch_size=16"], "chooses train.batch_size; use --batch$"),
        (["gpu", "--set", "train.precision=bf16"], "chooses train.precision; use --precision"),
        (["balance", "--set", "balance=pcgrad"], "chooses balance; use --methods"),
        (["sharing", "--set", "model.sharing=branching"], "chooses model.sharing; use --ways"),
        (["infer", "--config", "configs/quickstart.yaml", "--set", "train.batch_size=2"], "; use --batches$"),
        (["infer", "--runtimes", "eager", "--set", "train.precision=bf16"], "chooses train.precision; leave it out"),
        (["step", "--config", "configs/quickstart.yaml", "--set", "balance=pcgrad"], "chooses balance; leave it out"),
        (["step", "--config", "configs/quickstart.yaml", "--set", "train.compile=true"], "; use --modes"),
        (["step", "--set", "train.activation_memory=0.5"], "; name compiled in --modes"),
        (["infer", "--runtimes", "onxx"], "names 'onxx'; allowed are eager, aotinductor, onnx, .*; correct it"),
        (["infer", "--runtimes", "eager", "--batches", "2"], "--batches would have no effect beside --runtimes"),
        (["infer", "--runtimes", "eager", "--precision", "bf16"], "--precision would have no effect beside --runtimes"),
        (["infer", "--runtimes", "eager", "--beside", "a=setup.py"], "run in onnx and openvino; add one"),
        (
            ["infer", "--runtimes", "eager", "--threads", "100000"],
            "--threads names 100000, .*lower it",
        ),
        (["infer", "--runtimes", "onnx", "--beside", "depth=setup.py"], "--beside names a file 'depth'"),
        (["infer", "--runtimes", "eager", "eager"], "--runtimes names eager 2 times; .*remove the repeated one"),
        (["infer", "--batches", "1", "1"], "--batches names 1 2 times"),
        (["step", "--compare-boxes", "1", "1"], "--compare-boxes names 1 2 times"),
        (["balance", "--tasks", "3", "3"], "--tasks names 3 2 times"),
        (["data", "--only", "memory", "a.b=c"], "a.b=c would have no effect beside --only memory"),
        (["data", "--only", "memory", "--clock", "wall"], "--clock would have no effect beside --only memory"),
        (["data", "--only", "memory", "--config", "configs/quickstart.yaml"], "--config would have no effect"),
        (["data", "data.root=/x", "--only", "loading"], "--only loading is given without --config"),
        (["data", "data.root=/x"], "data.root=/x would have no effect without --config"),
        (
            ["data", "--only", "loading", "--config", "configs/quickstart.yaml", "--images", "5"],
            "--images would have no effect beside --only loading",
        ),
        (
            ["sharing", "--encoder", "test_resnet", "--size", "64", "64", "--ways", "hard", "branching:99"],
            "--ways names branching:99, which cannot be built here",
        ),
        (["infer", "--threads", "2"], "--threads would have no effect without --runtimes"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(options, text, capsys):
    assert main(["benchmark", *options]) == 2
    assert re.search(text, capsys.readouterr().err.strip())


def test_the_clock_of_the_process_is_refused_where_it_would_add_up_threads(monkeypatch, capsys):
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    assert main(["benchmark", "step", "--clock", "cpu", "--device", "cpu"]) == 2
    assert "set OMP_NUM_THREADS=1 and --device cpu, or --clock wall" in capsys.readouterr().err


def rows_named(content: dict[str, Any], name: str) -> list[Any]:
    return [row for row in content["rows"] if row["name"] == name]


def test_workers_share_the_annotations_and_start_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("visionmtl.io.index.MIN_BYTES", 0)
    status, content = measure(tmp_path, "data", "--images", "300", "--boxes", "2000")

    rows = {row["name"]: row for row in content["rows"]}
    assert status == 0 and rows["growth of a worker, Uss"]["value"] < rows["growth of a worker, Uss"]["limit"] == 5
    assert rows["start from the cache"]["value"] < 3
    assert "loading is not measured" in content["notes"][0]


@pytest.mark.parametrize(
    ("command", "text"),
    [
        (["fly"], "choose from"),
        (["step", "--batch", "0"], "'0' is not a whole number of at least 1"),
        (["roofline", "--tflops", "0"], "--tflops: '0' is not a finite number above 0"),
        (["roofline", "--tbytes", "inf"], "'inf' is not a finite number above 0"),
        (["step", "--seconds", "nan"], "'nan' is not a finite number above 0"),
        (["step", "--seconds", "-1"], "'-1' is not a finite number above 0"),
        (["gpu", "--budget", "soon"], "'soon' is not a finite number above 0"),
    ],
)
def test_an_argument_that_cannot_be_is_refused(command, text, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["benchmark", *command])
    assert stopped.value.code == 2 and text in capsys.readouterr().err


def test_infer_measures_each_runtime_on_each_number_of_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("onnxscript")
    monkeypatch.setattr("visionmtl.benchmark.runtimes.num_cores", lambda: 2)
    runtimes = ["eager", "onnx", "onnx_int8"]
    command = ["infer", *SMALL, "--runtimes", *runtimes, "--threads", "1", "2", "--rounds", "1"]
    status, content = measure(tmp_path, *command)
    assert status == 0  # goals are known for one network alone
    assert [table["title"] for table in content["tables"]] == ["Latency, 1 thread", "Latency, 2 threads"]
    networks = ["joint", "detection", "segmentation", "depth"]
    for table in content["tables"]:
        assert [row[:2] for row in table["rows"]] == [[runtime, name] for runtime in runtimes for name in networks]
    named = [row["name"] for row in content["rows"]]
    assert named[:3] == [f"joint / sum of one network a task, {runtime}, 1 thread" for runtime in runtimes]
    assert named[3].startswith("joint, eager / onnx")


def test_the_roofline_predicts_the_arithmetic_that_a_step_is_counted_to_have(tmp_path: Path):
    _, counted = measure(tmp_path / "step", "step", *SMALL, *BATCH, *TURNS, "--device", "cpu")
    status, content = measure(tmp_path, "roofline", *SMALL, "train.activation_memory=1", *BATCH, "--launch-us", "1")

    rows = {row["name"]: row["value"] for row in content["rows"]}
    flops = column(counted, 0, "GFLOP")
    assert status == 0
    # what is missing are small matrix products; the backward of upsampling has them too, but only where compiled
    assert column(content, 0, "GFLOP")["convolutions"] == pytest.approx(flops["joint, eager"], rel=1e-3)
    by_kind, by_part = column(content, 0, "ms"), column(content, 1, "ms")
    assert sum(by_kind.values()) == pytest.approx(rows["joint step, at least"]) == pytest.approx(sum(by_part.values()))
    assert {"encoder", "pyramid and sharing", "detection", "segmentation", "depth", "losses"} <= set(by_part)
    assert 0 < rows["encoder alone, at least"] < rows["joint step, at least"]


def test_a_config_is_measured_as_it_trains(tmp_path: Path):
    small = ("--set", "data.size=[64, 96]", "train.batch_size=2")
    options = ("--config", "configs/quickstart.yaml", *small, *TURNS, "--device", "cpu", "--without")
    status, content = measure(tmp_path, "step", *options)
    assert status == 0 and "resnet10t, 64x96" in content["notes"][0] and "batch 2" in content["notes"][0]
    assert "joint without depth" in column(content, 0, "ms")
