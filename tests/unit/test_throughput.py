"""Throughput and advice: figures by hand, and a word about waiting for data when there is something to gain."""

from pathlib import Path
from typing import Any

import pytest
import scene_run

from visionmtl.data import workers as loading
from visionmtl.data.loader import Data, train_loader, val_loader
from visionmtl.datasets import open_datasets
from visionmtl.engine import throughput as module
from visionmtl.engine import trainer as training
from visionmtl.engine.throughput import DataTimeAdvice, ThroughputMeter


def data(**settings: Any) -> Data:
    plain = {"train": [{"type": "scenes"}], "val": [{"type": "scenes"}], "size": [512, 640]}
    return Data.model_validate(plain | settings)


def advice(workers: int = 3, cores: int = 16, processes: int = 1, **settings: Any) -> DataTimeAdvice:
    """Warmed up."""
    warm = DataTimeAdvice(data(**settings), workers, cores, processes)
    assert warm.line(0.9, 10) is None, "start-up is no news"
    return warm


def test_figures_are_those_since_the_last_reading(monkeypatch: pytest.MonkeyPatch):
    now, waited = [0.0], [0.5]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    pace = ThroughputMeter(8, lambda: waited.pop() if waited else 0.0)
    assert waited == [], "what was waited for before does not count"

    for _ in range(5):
        now[0] += 2.0
        pace.step()
    waited.append(1.0)
    assert pace.read(steps_left=3) == {"images_per_s": 4.0, "data_time": 0.1, "eta_s": 6.0}

    now[0], waited[:] = now[0] + 100.0, [7.0]
    pace.restart()  # an evaluation
    now[0] += 1.0
    pace.step()
    assert pace.read(steps_left=1) == {"images_per_s": 8.0, "data_time": 0.0, "eta_s": 1.0}


def test_advice_comes_once_and_again_when_it_got_much_worse():
    shares = [0.03, 0.05, 0.10, 0.12, 0.24, 0.26, 0.30, 0.04, 0.10]
    one = advice()
    assert [share for share in shares if one.line(share, 20)] == [0.10, 0.26]


def test_a_run_that_waits_says_so_in_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Scenes are drawn in the training process itself here, which takes longer than so small a step."""
    monkeypatch.setattr(module, "WARMUP_STEPS", 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(training, "num_cores", lambda: 8)
    folder = tmp_path / "run"

    training.train(scene_run.run(folder, ["depth"]), training.TrainOptions(max_steps=3))

    said = [line for line in (folder / "train.log").read_text().splitlines() if "advice    waiting for data" in line]
    assert said and "data.cache=FOLDER" in said[0]
    assert "data.workers=1 instead of 0 (8 cores)" in said[0], "of its quarter of the cores one is left"


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores
def test_the_processes_of_one_machine_share_its_cores_and_those_of_another_do_not(monkeypatch: pytest.MonkeyPatch):
    """Two machines of 16 cores, four processes on each; then eight, started by something that is not torchrun."""
    monkeypatch.setattr(loading, "num_cores", lambda: 16)
    run = scene_run.run(names=["depth"], data={"workers": "auto"}, train={"batch_size": 1})
    sources = open_datasets(run.data.train)
    chosen = []
    for local in ("4", ""):
        monkeypatch.setenv("WORLD_SIZE", "8")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        train = train_loader(run.data, run.tasks, {"depth": None}, sources, 1, seed=0, rank=0, world=8)
        val = val_loader(run.data, run.tasks, {"depth": None}, sources, 1, rank=0, world=8)
        reason = loading.choose_workers("auto", loading.num_processes_here())[1]
        chosen.append((train.num_workers, val.num_workers, reason.partition(",")[0]))

    assert chosen == [(3, 3, "auto: 16 cores for 4 processes"), (1, 1, "auto: 16 cores for 8 processes")]
