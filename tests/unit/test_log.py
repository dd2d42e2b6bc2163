"""The log: rows, lines and pictures arrive, once each, and survive a resumed run."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from visionmtl.engine.environment import PACKAGES, environment
from visionmtl.engine.loggers import WandB
from visionmtl.engine.logging import RunLog, logger, results_table

RESULTS = {
    "segmentation": {"miou": 0.5, "per_class": {"wall": {"iou": 0.5}}, "pixels": 12, "protocol": "all pixels"},
    "depth": {"rmse_m": None, "protocol": "eigen"},
}


def train(log: RunLog, step: int, silog: float = 0.25) -> None:
    """A row of training."""
    log.train(
        step=step, epoch=step // 10, total_steps=100, losses={"depth": {"silog": silog, "gradient": 0.5}},
        weights={"depth": 1.0}, lr=1e-3, grad_norm=2.0, images_per_s=12.5, data_time=0.03, eta_s=3725.0,
    )  # fmt: skip


def rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    """(step, value) of a TensorBoard scalar, as TensorBoard itself reads it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_rows_hold_what_was_measured(tmp_path: Path):
    with RunLog.open(tmp_path, show=False) as log:
        train(log, 20)
        log.val(step=20, epoch=2, results=RESULTS)

    first, second = rows(tmp_path)
    assert (first["kind"], first["step"], first["epoch"]) == ("train", 20, 2)
    assert first["losses"] == {"depth": {"silog": 0.25, "gradient": 0.5}}
    assert first["memory_mb"] > 1
    assert second["kind"] == "val" and second["results"] == {"segmentation": {"miou": 0.5, "pixels": 12}, "depth": {}}


def test_what_is_not_finite_is_null_in_the_rows(tmp_path: Path):
    with RunLog.open(tmp_path, show=False) as log:
        train(log, 20, silog=math.nan)
    assert rows(tmp_path)[0]["losses"]["depth"]["silog"] is None


def test_tensorboard_reads_the_same_numbers_and_the_picture_back(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunLog.open(tmp_path, show=False) as log:
        train(log, 20)
        train(log, 40)
        log.val(step=40, epoch=4, results=RESULTS)
        log.picture("depth/0", np.full((4, 6, 3), 7, np.uint8), 40)

    assert scalars(tmp_path, "train/losses/depth/silog") == [(20, 0.25), (40, 0.25)]
    assert scalars(tmp_path, "val/results/segmentation/miou") == [(40, 0.5)]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    picture = events.Images("depth/0")[0]
    assert (picture.step, picture.height, picture.width) == (40, 4, 6)


def test_a_resumed_run_repeats_no_row(tmp_path: Path):
    with RunLog.open(tmp_path, show=False) as log:
        for step in (20, 40, 60):
            train(log, step)
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"kind": "train", "st')  # the crash

    with RunLog.open(tmp_path, show=False, resume_step=40) as log:
        train(log, 60, silog=0.5)

    assert [row["step"] for row in rows(tmp_path)] == [20, 40, 60]
    assert scalars(tmp_path, "train/losses/depth/silog") == [(20, 0.25), (40, 0.25), (60, 0.5)]
    assert len((tmp_path / "train.log").read_text(encoding="utf-8").splitlines()) == 4, "what people read is kept"


def test_damaged_rows_are_counted_named_and_kept_beside(tmp_path: Path):
    with RunLog.open(tmp_path, show=False) as log:
        for step in (20, 40, 60):
            train(log, step)
    file = tmp_path / "metrics.jsonl"
    lines = file.read_bytes().split(b"\n")
    file.write_bytes(b"\n".join([b"\xff\x00", lines[0], b"[1, 2]", b'{"step": "x", "kind": 3}', *lines[1:]]))
    before = file.read_bytes()

    RunLog.open(tmp_path, show=False, resume_step=40).close()

    assert [row["step"] for row in rows(tmp_path)] == [20, 40]
    assert "3 damaged line(s) (1, 3, 4)" in (tmp_path / "train.log").read_text(encoding="utf-8")
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == before


def test_a_fresh_log_starts_empty_files(tmp_path: Path):
    for _ in range(2):
        with RunLog.open(tmp_path, show=False) as log:
            train(log, 20)
    assert len(rows(tmp_path)) == 1


def test_other_ranks_write_and_show_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with RunLog.open(tmp_path / "run", write=False) as log:
        log.config("seed: 0\n")
        logger.info("hello")
        train(log, 20)
        log.val(step=20, epoch=1, results=RESULTS)
        log.picture("depth/0", np.zeros((4, 4, 3), np.uint8), 20)

    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_a_run_that_breaks_says_so_in_its_log(tmp_path: Path):
    with pytest.raises(RuntimeError), RunLog.open(tmp_path, show=False):
        raise RuntimeError("loss is nan")
    assert "ended by RuntimeError: loss is nan" in (tmp_path / "train.log").read_text(encoding="utf-8")


def test_the_environment_names_versions_and_neither_host_nor_user(tmp_path: Path):
    with RunLog.open(tmp_path, show=False) as log:
        log.config("seed: 0\n")

    text = (tmp_path / "env.json").read_text(encoding="utf-8")
    found = json.loads(text)
    assert found == json.loads(json.dumps(environment()))
    assert set(found["packages"]) <= set(PACKAGES) and "torch" in found["packages"]
    assert found["commit"] is None or re.fullmatch(r"[0-9a-f]{40}(\+changes)?", found["commit"])
    assert str(Path.home()) not in text and str(tmp_path) not in text
    assert (tmp_path / "config.yaml").read_text(encoding="utf-8") == "seed: 0\n"


def test_the_table_names_every_number_and_its_protocol():
    assert results_table(RESULTS).splitlines() == [
        "segmentation  miou      0.5000",
        "              pixels    12",
        "              protocol  all pixels",
        "depth         rmse_m    no labels",
        "              protocol  eigen",
    ]


def test_wandb_keeps_numbers_settings_and_the_picture_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wandb = pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_PROJECT": "toy"}.items():
        monkeypatch.setenv(name, value)
    with RunLog.open(tmp_path, loggers=("wandb",), show=False) as log:
        log.config("seed: 3\n")
        train(log, 1)
        log.picture("sample/a", np.zeros((4, 5, 3), np.uint8), 1)
    assert not (tmp_path / "tensorboard").exists()
    wandb.teardown()  # its process writes the last of the file when it ends
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    content = file.read_bytes()
    for text in (b"train/losses/depth/silog", b"sample/a", b"seed"):
        assert text in content
    identity = (tmp_path / "wandb_run.txt").read_text()
    with RunLog.open(tmp_path, resume_step=1, loggers=("wandb",), show=False) as log:
        train(log, 2)
    assert (tmp_path / "wandb_run.txt").read_text() == identity, "a resumed run goes on under its id"


def test_mlflow_keeps_numbers_settings_and_the_picture_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    for resume_step in (None, 1):
        with RunLog.open(tmp_path / "run", resume_step=resume_step, loggers=("mlflow",), show=False) as log:
            log.config("seed: 3\n")
            train(log, 2 if resume_step else 1)
            log.picture("sample/a", np.zeros((4, 5, 3), np.uint8), 1)
    client = MlflowClient((tmp_path / "store").as_uri())
    identity = (tmp_path / "run" / "mlflow_run.txt").read_text().strip()
    history = client.get_metric_history(identity, "train/losses/depth/silog")
    assert [(one.step, one.value) for one in history] == [(1, 0.25), (2, 0.25)]
    assert {one.path for one in client.list_artifacts(identity)} == {"config.yaml", "sample"}
    assert client.get_run(identity).info.status == "FINISHED"


def test_a_logger_whose_package_is_missing_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(WandB, "package", "no_such_package")
    with pytest.raises(ValueError, match=r"no_such_package is not installed; .*visionmtl\[wandb\]"):
        RunLog.open(tmp_path / "run", loggers=("wandb",), show=False)
    assert not (tmp_path / "run").exists()
