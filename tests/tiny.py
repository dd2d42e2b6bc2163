"""One tiny run on drawn scenes, as small as a run of every task can be; tests change what they are about."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from visionmtl.checkpoint import merged
from visionmtl.config import Run

ROOT = Path(__file__).resolve().parent.parent
TASKS = ("detection", "segmentation", "depth")
SIZE = (64, 64)


def run(output: Path | None, tasks: tuple[str, ...] = TASKS, **changes: Any) -> Run:
    """8 scenes to train on and 4 to validate; `changes` are nested settings that replace those below."""
    decoder = {"type": "semantic_fpn", "levels": [3, 4], "channels": 16}
    learnt = {
        "detection": {"type": "detection", "head": {"type": "aligned", "levels": [3, 4], "num_convs": 1}},
        "segmentation": {"type": "segmentation", "decoder": decoder},
        "depth": {"type": "depth", "max_depth_m": 12.0, "decoder": decoder},
        "normals": {"type": "normals", "decoder": decoder},
    }
    plain: dict[str, Any] = {
        "output": None if output is None else str(output),
        "model": {
            "encoder": {"name": "test_convnext"},
            "pyramid": {"type": "fpn", "channels": 16},
        },
        "tasks": {name: learnt[name] for name in tasks},
        "data": {"train": [scenes(8)], "val": [scenes(4, split="val")], "size": SIZE, "workers": 0},
        "optim": {"lr": 2e-3, "schedule": "constant", "ema_decay": 0.9},
        "train": {
            "epochs": 1, "batch_size": 2, "precision": "fp32", "log_every_steps": 1, "sample_pictures": 0,
        },
    }  # fmt: skip
    return Run.model_validate(merged(plain, changes))


def scenes(count: int, **settings: Any) -> dict[str, Any]:
    """A data set of drawn scenes."""
    return {"type": "scenes", "num_images": count, "size": list(SIZE), **settings}


def rows(folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    """What a run logged, without the figures that a clock decides."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timing = ("images_per_s", "data_wait_share", "memory_mb", "eta_s")
    return [{k: v for k, v in row.items() if k not in timing} for row in found if row["kind"] == kind]


def command(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command of the project, run with this Python; its output is text."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
