"""Where a run's numbers and pictures can be watched: TensorBoard, Weights & Biases, MLflow, behind one interface."""

import importlib.util
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visionmtl.config.text_files import read_text
from visionmtl.io.atomic import write_text
from visionmtl.run import LoggerName


class MetricLogger(ABC):
    """One place to which the main process of a run reports."""

    package: str
    """What it imports; "wandb" and "mlflow" are extras of the same name."""

    @abstractmethod
    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Numbers by path, as "train/losses/depth/silog"."""

    @abstractmethod
    def picture(self, tag: str, image: NDArray[np.uint8], step: int) -> None:
        """A picture [H, W, 3] RGB."""

    @abstractmethod
    def config(self, settings: Mapping[str, Any]) -> None:
        """The settings of the run, once, before anything else."""

    @abstractmethod
    def flush(self) -> None:
        """Write out what is pending; after each evaluation."""

    @abstractmethod
    def close(self) -> None:
        """The end of the run, whichever way it ended."""


class TensorBoard(MetricLogger):
    """Event files in the run's folder `tensorboard`."""

    package = "tensorboard"

    def __init__(self, folder: Path, resume_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # seconds to import, and only a training run needs it

        folder = folder / "tensorboard"
        if resume_step is None:
            for old in folder.glob("events.out.tfevents.*"):
                old.unlink()
        purge = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(folder), purge_step=purge)

    def config(self, settings: Mapping[str, Any]) -> None:
        """Nothing: config.yaml lies beside the event files."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, tag: str, image: NDArray[np.uint8], step: int) -> None:
        self._writer.add_image(tag, image, step, dataformats="HWC")

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _run_id(file: Path) -> str:
    """The id of a run, as wandb and MLflow write them. Raises ValueError for another text."""
    text = read_text(file, max_bytes=1000).strip()
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,128}", text):
        raise ValueError(
            f"{file} holds {text[:80]!r}, which is no id of a run; letters, digits, _ and - are allowed; delete the "
            "file to go on as a new run there"
        )
    return text


class WandB(MetricLogger):
    """Weights & Biases. Its own variables apply: WANDB_PROJECT, WANDB_MODE=offline, WANDB_ENTITY, ..."""

    package = "wandb"

    def __init__(self, folder: Path, resume_step: int | None) -> None:
        import wandb

        self._wandb = wandb
        file = folder / "wandb_run.txt"  # a resumed run goes on under its id
        known = _run_id(file) if resume_step is not None and file.exists() else None
        self._run = wandb.init(dir=str(folder), name=folder.name, id=known, resume="allow" if known else None)
        write_text(file, f"{self._run.id}\n")
        self._run.define_metric("*", step_metric="step")  # its own counter refuses what comes again after a resume

    def config(self, settings: Mapping[str, Any]) -> None:
        self._run.config.update(dict(settings), allow_val_change=True)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def picture(self, tag: str, image: NDArray[np.uint8], step: int) -> None:
        self._run.log({tag: self._wandb.Image(image), "step": step})

    def flush(self) -> None:
        """Nothing: it writes at once."""

    def close(self) -> None:
        self._run.finish()


class MLflow(MetricLogger):
    """MLflow. Its own variables apply: MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME; else the run's folder `mlflow`."""

    package = "mlflow"

    def __init__(self, folder: Path, resume_step: int | None) -> None:
        import os

        from mlflow.tracking import MlflowClient

        uri = os.environ.get("MLFLOW_TRACKING_URI") or (folder.resolve() / "mlflow").as_uri()
        if uri.startswith("file:"):  # from 3.14 on, MLflow asks for a yes to folders
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self._client = MlflowClient(tracking_uri=uri)
        file = folder / "mlflow_run.txt"  # a resumed run goes on under its id
        if resume_step is not None and file.exists():
            self._id = _run_id(file)
            self._client.update_run(self._id, status="RUNNING")
            return
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "visionmtl")
        known = self._client.get_experiment_by_name(experiment)
        number = known.experiment_id if known else self._client.create_experiment(experiment)
        self._id = self._client.create_run(number, run_name=folder.name).info.run_id
        write_text(file, f"{self._id}\n")

    def config(self, settings: Mapping[str, Any]) -> None:
        self._client.log_dict(self._id, dict(settings), "config.yaml")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        import time

        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(_allowed(name), float(value), now, step) for name, value in values.items()]
        for first in range(0, len(metrics), 1000):  # most in one call
            self._client.log_batch(self._id, metrics=metrics[first : first + 1000])

    def picture(self, tag: str, image: NDArray[np.uint8], step: int) -> None:
        self._client.log_image(self._id, image, f"{_allowed(tag)}/step-{step:07d}.png")

    def flush(self) -> None:
        """Nothing: it writes at once."""

    def close(self) -> None:
        self._client.set_terminated(self._id)


def _allowed(name: str) -> str:
    """In MLflow's names: letters, digits, _ - . / and spaces."""
    return "".join(sign if sign.isalnum() or sign in "_-. /" else "_" for sign in name)


LOGGERS: dict[LoggerName, type[TensorBoard] | type[WandB] | type[MLflow]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
}


def check_loggers(names: Sequence[LoggerName]) -> None:
    """Raises ValueError naming the extra where a package is missing."""
    for name in names:
        if importlib.util.find_spec(LOGGERS[name].package) is None:
            raise ValueError(
                f"train.loggers has {name!r}, but the package {LOGGERS[name].package} is not installed; the extra "
                f'`{name}` brings it; run pip install "visionmtl[{name}]", or leave {name!r} out'
            )


def open_loggers(names: Sequence[LoggerName], folder: Path, resume_step: int | None) -> list[MetricLogger]:
    """Those of `train.loggers`, which were checked; resume_step: as of `RunLog.open`."""
    return [LOGGERS[name](folder, resume_step) for name in names]
