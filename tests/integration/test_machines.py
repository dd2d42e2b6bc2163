"""Two agents of torchrun, as on two machines, meet over a port and train one network; one of them loses its process."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import scene_run

from visionmtl.run import dump

pytestmark = [
    pytest.mark.slow, pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc"),
]  # fmt: skip

ROOT = Path(__file__).parents[2]
LIMIT_S = 240


def children(pid: int) -> list[int]:
    """The processes that one has started."""
    return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def train_on_two_machines(folder: Path, kill: bool = False) -> list[int]:
    """Exit statuses of the two agents of one run. kill: the process of the second agent, in its third step or later."""
    folder.mkdir()
    settings = scene_run.run(names=("segmentation", "depth"), train={"epochs": 20, "eval_every_epochs": 20})
    (folder / "config.yaml").write_text(dump(settings), encoding="utf-8")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=2",
        "--monitor-interval=0.1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=1",
        "--local-addr=127.0.0.1", str(ROOT / "tools" / "train.py"), str(folder / "config.yaml"), "--resume",
        "--output", str(folder / "run"), "--device", "cpu",
    ]  # fmt: skip
    # agents of several machines count restarts differently, so each life needs a store of its own
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "PYTHONPATH": str(ROOT)}
    agents = []
    for number in (0, 1):
        with (folder / f"agent-{number}.log").open("w") as log:
            agents.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    end = time.monotonic() + LIMIT_S
    try:
        if kill:
            rows = folder / "run" / "metrics.jsonl"
            while not (rows.is_file() and rows.read_text().count("\n") >= 3) and time.monotonic() < end:
                time.sleep(0.02)
            (process,) = children(agents[1].pid)
            os.kill(process, signal.SIGKILL)
        return [agent.wait(timeout=end - time.monotonic()) for agent in agents]
    finally:
        for agent in agents:
            if agent.poll() is None:  # its processes end with it
                agent.terminate()


def test_a_run_on_two_machines_survives_the_loss_of_a_process_and_ends_bit_for_bit_the_same(tmp_path: Path):
    assert train_on_two_machines(tmp_path / "whole") == [0, 0]
    assert train_on_two_machines(tmp_path / "killed", kill=True) == [0, 0]

    log = (tmp_path / "killed" / "run" / "train.log").read_text()
    assert "2 process(es)" in log and "resumed   at step" in log
    whole, killed = (scene_run.last_state(tmp_path / name / "run") for name in ("whole", "killed"))
    assert whole["step"] == killed["step"] == 40
    assert not scene_run.differences(whole["net"], killed["net"])
    assert not scene_run.differences(whole["optimizer"], killed["optimizer"])
