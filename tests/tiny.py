"""One tiny run on drawn scenes, as small as a run of every task can be; tests change what they are about."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from visionmtl.data.label_spaces import resolve_spaces
from visionmtl.data.loader import train_loader
from visionmtl.datasets import open_datasets
from visionmtl.engine.distributed import Ranks
from visionmtl.engine.trainer import Trainer
from visionmtl.network import build_model
from visionmtl.run import Run
from visionmtl.structures import Batch

TASKS = ("detection", "segmentation", "depth")
SIZE = [64, 64]
ALONE = Ranks(0, 1, torch.device("cpu"))


def run(output: Path | None = None, names: Sequence[str] = TASKS, **changes: Any) -> Run:
    """8 scenes to train on, 4 to validate. names: the tasks; changes: nested settings that replace those below."""
    decoder = {"type": "semantic_fpn", "levels": [3, 4], "channels": 16}
    known = {
        "detection": {"type": "detection", "head": {"type": "aligned", "levels": [3, 4], "num_convs": 1}},
        "segmentation": {"type": "segmentation", "decoder": decoder},
        "depth": {"type": "depth", "max_depth_m": 12.0, "decoder": decoder},
        "normals": {"type": "normals", "decoder": decoder},
    }
    plain: dict[str, Any] = {
        "output": output and str(output),
        "model": {"encoder": {"name": "test_convnext"}, "pyramid": {"type": "fpn", "channels": 16}},
        "tasks": {name: known[name] for name in names},
        "data": {"train": [scenes(8)], "val": [scenes(4, split="val")], "size": SIZE, "workers": 0},
        "optim": {"lr": 2e-3, "schedule": "constant", "ema_decay": 0.9},
        "train": {"epochs": 1, "batch_size": 2, "precision": "fp32", "log_every_steps": 1, "sample_pictures": 0},
    }
    return Run.model_validate(merged(plain, changes))


def scenes(count: int, **settings: Any) -> dict[str, Any]:
    """A data set of drawn scenes."""
    return {"type": "scenes", "num_images": count, "size": SIZE, **settings}


def state(of: Run, ranks: Ranks = ALONE) -> Trainer:
    """The run before its first step, with the same weights at each call."""
    spaces = resolve_spaces(of.tasks, open_datasets(of.data.train))
    torch.manual_seed(of.seed)
    return Trainer(of, build_model(of.model, of.tasks, spaces, of.data.size), ranks)


def batches(of: Run) -> list[Batch]:
    """Those of the first epoch."""
    sources = open_datasets(of.data.train)
    spaces = resolve_spaces(of.tasks, sources)
    return list(epoch(train_loader(of.data, of.tasks, spaces, sources, of.train.batch_size, of.seed)))


def epoch(loader: Any, number: int = 0, start: int = 0) -> Iterator[Batch]:
    """The batches of one epoch from number `start` on."""
    loader.batch_sampler.set_epoch(number, start)
    yield from loader


def rows(folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    """What a run logged, without the figures that a clock decides."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timing = ("images_per_s", "data_time", "memory_mb", "eta_s")
    return [{k: v for k, v in row.items() if k not in timing} for row in found if row["kind"] == kind]


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two nested values differ, bit for bit in tensors."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [d for key in one for d in differences(one[key], other[key], f"{path}/{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        return [d for i, pair in enumerate(zip(one, other, strict=True)) for d in differences(*pair, f"{path}/{i}")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if torch.equal(one, other) else [path]
    return [] if type(one) is type(other) and one == other else [path]


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings joined; `over` wins, lists are replaced."""
    out = dict(base)
    for key, value in over.items():
        out[key] = merged(out[key], value) if isinstance(value, Mapping) and isinstance(out.get(key), dict) else value
    return out


def checkpoint_content(step: int = 0, **changes: Any) -> dict[str, Any]:
    """The smallest whole checkpoint."""
    run = {name: {} for name in ("model", "tasks", "balance", "optim", "train")} | {"data": {"size": [64, 96]}}
    return {
        "step": step, "epoch": 0, "best": 0.0, "run": run, "spaces": {}, "net": {}, "ema": None, "balancer": {},
        "scaler": {}, "optimizer": {"state": {}, "param_groups": []},
    } | changes  # fmt: skip
