"""500 damaged copies of the checkpoint of a real network, in the present format and the one before the digest."""

import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scene_run
import torch
from damage import damaged

from visionmtl.engine import checkpoint

pytestmark = pytest.mark.chaos


@pytest.mark.parametrize("version", [2, 1])
def test_of_500_damaged_checkpoints_none_is_read_as_other_numbers(
    tmp_path: Path, version: int, summary: Callable[[str], None]
):
    run = scene_run.run(tmp_path, ["depth"])
    trainer = scene_run.state(run)
    trainer.train_step([scene_run.batches(run)[0]])
    folder = tmp_path / "checkpoints"
    for _ in range(2):
        checkpoint.save(folder / "last.pt", trainer.state_dict())
    if version == 1:
        buffer = io.BytesIO()
        torch.save({"format": 1, **trainer.state_dict()}, buffer)
        (folder / "last.pt").write_bytes(buffer.getvalue())
    whole, expected = (folder / "last.pt").read_bytes(), checkpoint.load(folder / "last.pt")
    rng, counts = np.random.default_rng(0), Counter[str]()
    for _ in range(500):
        (folder / "last.pt").write_bytes(damaged(whole, rng))
        try:
            state = checkpoint.load(folder / "last.pt")
        except ValueError as error:
            assert str(error).count(";") >= 2  # noqa: PT017
            counts["refused"] += 1
        else:
            counts["equal" if scene_run.differences(state, expected) == [] else "OTHER NUMBERS"] += 1
        resumed = checkpoint.load_resumed(folder / "last.pt", fall_back=True)
        counts["gone back from"] += resumed.warning is not None
        assert scene_run.differences({**resumed.state}, expected) == []
    summary(f"checkpoints of format {version}, {len(whole):,} bytes, 500 damaged: {dict(counts)}")
    assert counts["OTHER NUMBERS"] == 0 and counts["refused"] == counts["gone back from"]
    assert version == 1 or counts["refused"] == 500
