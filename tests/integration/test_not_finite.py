"""A step that is not finite changes nothing, on any rank, under any method; the policies raise, skip and capture."""

import copy
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import processes
import pytest
import scene_run
import torch
from toy_run import FIXED, MODEL, SpoilsGradient, small_batch, small_run, small_state, small_tasks

from visionmtl.balance.bargaining import NashMTL
from visionmtl.balance.base import Balance
from visionmtl.balance.graddrop import GradDrop
from visionmtl.balance.progress import DWA, FAMO
from visionmtl.balance.uncertainty import Uncertainty
from visionmtl.balance.upgrad import UPGrad
from visionmtl.cli import main
from visionmtl.data.loader import train_loader
from visionmtl.datasets import open_datasets
from visionmtl.engine import checkpoint, distributed, nonfinite
from visionmtl.engine.nonfinite import FiniteGuard, NotFinite, Restorable
from visionmtl.engine.options import TrainOptions
from visionmtl.engine.replay import replay
from visionmtl.engine.trainer import Trainer, train
from visionmtl.run import NotFinitePolicy
from visionmtl.structures import Batch
from visionmtl.tasks.depth import Depth

TASKS = small_tasks()
METHODS: dict[str, Balance] = {
    "fixed": FIXED, "uncertainty": Uncertainty(), "dwa": DWA(), "famo": FAMO(), "nash": NashMTL(),
    "graddrop": GradDrop(), "upgrad": UPGrad(smoothing=0.5, loss_scale="initial"),
    "parameters": UPGrad(level="parameters"),
}  # fmt: skip


def spoilt(batch: Batch, value: float = math.nan) -> Batch:
    """The batch with colours that make every activation `value`, as a broken augmentation would."""
    assert batch.color is not None
    bad = copy.deepcopy(batch)
    bad.color = torch.full_like(batch.color, value)
    return bad


def changed_by_a_step(trainer: Trainer) -> dict[str, Any]:
    """All that a step changes but the weight average, buffers that no checkpoint keeps included."""
    state = {
        "net": dict(trainer.net.named_parameters()) | dict(trainer.net.named_buffers()),
        "balancer": dict(trainer.balancer.named_parameters()) | dict(trainer.balancer.named_buffers()),
        "curriculum": trainer.schedule.state_dict() if trainer.schedule else {},
        "optimizer": trainer.optimizer.state_dict()["state"],
    }
    return copy.deepcopy(state)


def all_finite(tensors: Any) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors if tensor.is_floating_point())


def bit_for_bit(one: Any, other: Any) -> bool:
    """As `scene_run.differences`, where NaN equals NaN: a smoothed weight that was never seen is one."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(bit_for_bit(one[key], other[key]) for key in one)
    if isinstance(one, torch.Tensor):
        return torch.equal(one.double().nan_to_num(nan=7.5), other.double().nan_to_num(nan=7.5))
    return one == other


@pytest.mark.parametrize(("method", "optim"), [*((name, "adamw") for name in METHODS), ("fixed", "sgd")])
def test_a_step_that_is_not_finite_leaves_everything_as_it_was(method: str, optim: str):
    """A forward pass of NaN: BatchNorm's statistics, the method's state and moments, to the bit."""
    state = small_state(small_run(TASKS, METHODS[method], {"name": optim}))
    assert any("running_mean" in name for name, _ in state.net.named_buffers())
    batch = small_batch(TASKS)
    for _ in range(2):
        state.train_step([batch])
    before = changed_by_a_step(state)

    state.train_step([spoilt(batch)])

    assert bit_for_bit(changed_by_a_step(state), before)
    assert state.ema is not None and all_finite(state.ema.module.state_dict().values())
    assert state.finite.read().skipped == 1


@pytest.mark.parametrize("method", ["uncertainty", "famo", "dwa"])
def test_so_does_one_whose_losses_are_finite(monkeypatch: pytest.MonkeyPatch, method: str):
    """The method saw finite losses and took note of them; the gradient came later."""
    state = small_state(small_run(TASKS, METHODS[method]))
    batch, right = small_batch(TASKS), Depth.loss
    for _ in range(2):
        state.train_step([batch])
    before = changed_by_a_step(state)

    def wrong(self: Depth, *arguments: Any) -> dict[str, torch.Tensor]:
        return {part: SpoilsGradient.apply(value) for part, value in right(self, *arguments).items()}

    monkeypatch.setattr(Depth, "loss", wrong)
    state.train_step([batch])

    assert bit_for_bit(changed_by_a_step(state), before)
    tally = state.finite.read()
    assert (tally.skipped, tally.for_loss, tally.first_step, tally.first_losses) == (1, 0, 3, ())


def test_one_bad_batch_among_accumulated_ones_undoes_the_step():
    state = small_state(small_run(TASKS, METHODS["famo"], accumulate=2))
    batch = small_batch(TASKS)
    state.train_step([batch, batch])
    before = changed_by_a_step(state)

    state.train_step([spoilt(batch), batch])

    assert bit_for_bit(changed_by_a_step(state), before)


def test_what_easiest_first_measures_stays_finite():
    run = small_run(TASKS, curriculum={"easiest_first": {}}, epochs=4)
    state = small_state(run)
    state.steps_per_epoch = 4
    state.train_step([small_batch(TASKS)])
    before = changed_by_a_step(state)
    assert before["curriculum"]

    state.train_step([spoilt(small_batch(TASKS))])

    assert bit_for_bit(changed_by_a_step(state), before)


def test_statistics_that_overflow_undo_a_step_whose_losses_are_finite():
    """1e20 squared is infinite in float32, while what is normalised by it is 0."""
    norm, guard = torch.nn.BatchNorm1d(2), FiniteGuard(NotFinitePolicy(), torch.device("cpu"), fp16=False)
    guard.begin(norm, [])
    before = copy.deepcopy(norm.state_dict())
    out = norm(torch.tensor([[1e20, 1.0], [-1e20, 2.0]]))
    assert out.isfinite().all() and not norm.running_var.isfinite().all()

    undo = guard.must_undo(1, torch.ones(()), {"a": {"b": out.sum().detach()}})
    guard.restore_where(undo)

    assert undo and bit_for_bit(norm.state_dict(), before)
    assert guard.read().first_losses == ("running statistics",)


def test_tensors_of_all_kinds_come_back_and_what_was_infinite_does_not_count():
    mask = torch.tensor([0.0, -torch.inf])
    kinds = [
        mask, torch.zeros((), dtype=torch.int64), torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.rand(3, 4).t(), torch.zeros(2, dtype=torch.float64), torch.ones(1).expand(3), torch.ones(0),
    ]  # fmt: skip
    tensors = Restorable(kinds)
    tensors.take()
    assert not any(tensors.became_not_finite())

    for undo in (False, True):
        tensors.take()
        before = [tensor.clone() for tensor in kinds]
        kinds[1].add_(1)
        kinds[2][0, 1].fill_(math.nan if undo else 3)
        kinds[3][1] = 5 + undo
        assert any(tensors.became_not_finite()) == undo
        changed = [tensor.clone() for tensor in kinds]
        tensors.restore(torch.tensor(undo))
        for tensor, expected in zip(kinds, before if undo else changed, strict=True):
            assert torch.equal(tensor, expected)


# ---- policies ----


def run_with_bad_steps(
    monkeypatch: pytest.MonkeyPatch, folder: Path, bad: set[int], options: TrainOptions | None = None, **changes: Any
) -> Any:
    """Train depth on 8 images; in the steps of these numbers, from 1, the loss is NaN."""
    right, step = Trainer.train_step, [0]
    right_loss = Depth.loss

    def train_step(self: Trainer, *arguments: Any) -> Any:
        step[0] = self.state.step + 1
        return right(self, *arguments)

    def loss(self: Depth, *arguments: Any) -> dict[str, torch.Tensor]:
        factor = math.nan if step[0] in bad else 1.0
        return {part: value * factor for part, value in right_loss(self, *arguments).items()}

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", train_step)
        patch.setattr(Depth, "loss", loss)
        return train(scene_run.run(folder, ["depth"], **changes), options)


def test_skipped_steps_are_counted_told_and_go_on_counting_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = {"train": {"epochs": 2, "not_finite": {"policy": "skip", "max_share": 0.5}, "log_every_steps": 2}}

    run_with_bad_steps(monkeypatch, tmp_path / "run", {2, 3}, TrainOptions(max_steps=4), **settings)
    rows = scene_run.rows(tmp_path / "run")
    assert [row["skipped_steps"] for row in rows] == [1, 2]
    assert rows[0]["losses"] == {}, "the loss of a skipped step is no figure of the training"
    log = (tmp_path / "run" / "train.log").read_text()
    assert "skipped   1 step(s) up to step 2, 1 in all: something was not finite; first in step 2: depth/silog" in log
    saved = checkpoint.load(tmp_path / "run" / "checkpoints" / "last.pt")
    assert all_finite(saved["net"].values()) and all_finite(saved["ema"]["module"].values())

    run_with_bad_steps(monkeypatch, tmp_path / "run", {6}, TrainOptions(resume="auto"), **settings)
    assert [row["skipped_steps"] for row in scene_run.rows(tmp_path / "run")] == [1, 2, 3, 3]


def test_too_many_skipped_steps_in_a_row_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = {"train": {"not_finite": {"policy": "skip", "max_in_a_row": 2}, "log_every_steps": 4}}
    with pytest.raises(NotFinite, match=r"3 steps in a row, up to step 4, .*skipped; 2 are allowed; lower optim.lr"):
        run_with_bad_steps(monkeypatch, tmp_path / "run", {1, 2, 3}, **settings)
    assert not list(tmp_path.rglob("*.pt"))


def test_too_large_a_share_of_skipped_steps_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    limits = {"policy": "skip", "max_in_a_row": 1, "max_share": 0.25}
    settings = {"train": {"epochs": 2, "not_finite": limits, "log_every_steps": 4}}
    with pytest.raises(NotFinite, match=r"2 of 4 steps had .*skipped; allowed are 25.00% of all"):
        run_with_bad_steps(monkeypatch, tmp_path / "run", {1, 3}, **settings)
    run_with_bad_steps(monkeypatch, tmp_path / "fewer", {1, 6}, **settings)


def test_limits_without_effect_are_refused():
    with pytest.raises(ValueError, match="max_share is set but does nothing under policy: raise"):
        NotFinitePolicy(max_share=0.1)
    with pytest.raises(ValueError, match="could not be replayed; choose raise or skip"):
        scene_run.run(train={"not_finite": {"policy": "capture"}, "distributed": {"shard": True}})


def test_the_message_names_the_first_bad_step_also_where_the_logged_one_is_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(NotFinite, match=r"in 1 step\(s\) up to step 4, .*the first was step 2: that of depth/silog"):
        run_with_bad_steps(monkeypatch, tmp_path / "run", {2}, train={"log_every_steps": 100})
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_an_update_that_spoils_weights_is_never_saved(tmp_path: Path, ema_decay: float | None):
    """Losses and gradients of the step are finite; the rate is not fit for float32."""

    def run(lr: float) -> Any:
        changes = {
            "optim": {"lr": lr, "ema_decay": ema_decay},
            "train": {"epochs": 2, "not_finite": {"policy": "skip"}},
        }
        return scene_run.run(tmp_path / "run", ["depth"], **changes)

    train(run(1e-3), TrainOptions(max_steps=4))
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    kept = last.read_bytes()

    with pytest.raises(NotFinite, match=r"weights are not finite, though losses and gradients were: .*lower optim.lr"):
        train(run(3e38), TrainOptions(resume="auto", max_steps=5))

    assert last.read_bytes() == kept


# ---- fp16 ----


@pytest.mark.slow
def test_a_loss_scale_that_is_searched_for_is_no_fault_and_one_without_end_is(monkeypatch: pytest.MonkeyPatch):
    state = small_state(small_run(TASKS, precision="fp16"))
    batch = small_batch(TASKS)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    state.train_step([batch])
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before = changed_by_a_step(state)
    state.train_step([batch])
    assert state.scaler.get_scale() == 2.0**126
    assert bit_for_bit(changed_by_a_step(state), before), "statistics too"
    assert state.finite.check(1, {}) is not None and state.finite.skipped() == 1

    monkeypatch.setattr(nonfinite, "SCALE_SEARCH", 1)
    state.train_step([batch])
    with pytest.raises(NotFinite, match=r"2 steps in a row.*set train.precision=bf16"):
        state.finite.check(2, {})


# ---- capture and replay ----


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The second step of a run, whose depth loss was NaN."""
    folder = tmp_path_factory.mktemp("secret_place") / "run"
    changes = {"train": {"not_finite": {"policy": "capture"}, "log_every_steps": 100}}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(NotFinite, match=r"visionmtl replay .*step-0000002\.pt"):
        run_with_bad_steps(patch, folder, {2}, **changes)
    return folder / "captured" / "step-0000002.pt"


def test_a_captured_step_is_plain_data_of_the_state_before_it_without_paths(captured: Path):
    state = torch.load(captured, weights_only=True)

    assert state["step"] == 1 and all_finite(state["net"].values())
    assert state["images"] and all(name.startswith("scenes ") for name in state["images"][0])
    assert b"secret_place" not in captured.read_bytes() and str(Path.home()).encode() not in captured.read_bytes()
    run = scene_run.run(None, ["depth"], train={"log_every_steps": 100})
    trainer = scene_run.state(run)
    trainer.steps_per_epoch = 4
    trainer.train_step([scene_run.batches(run)[0]])
    assert not scene_run.differences(trainer.net.state_dict(), state["net"])
    assert not scene_run.differences(trainer.optimizer.state_dict()["state"], state["optimizer"]["state"])
    assert torch.equal(scene_run.batches(run)[1].image, state["batches"][0]["image"])


def test_a_captured_step_names_its_images_behind_another_batch_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Three steps of two images, then of one: the fifth step reads the image behind the seventh."""
    folder = tmp_path / "run"
    settings = {"not_finite": {"policy": "capture"}}
    run_with_bad_steps(monkeypatch, folder, set(), TrainOptions(max_steps=3), train=settings)
    with pytest.raises(NotFinite, match="visionmtl replay"):
        run_with_bad_steps(monkeypatch, folder, {5}, TrainOptions(resume="auto"), train={**settings, "batch_size": 1})

    state = torch.load(folder / "captured" / "step-0000005.pt", weights_only=True)
    run = scene_run.run(folder, ["depth"])
    loader = train_loader(run.data, run.tasks, {"depth": None}, open_datasets(run.data.train), 1, run.seed)
    keys = loader.batch_sampler.mixture.keys(0)  # type: ignore[union-attr]
    assert state["images"] == [[f"scenes {keys[7].index}"]]
    assert (state["step"] - state["offset"]) // state["steps_per_epoch"] == 0
    assert torch.equal(next(itertools.islice(loader, 7, None)).image, state["batches"][0]["image"])


def test_without_the_fault_the_replay_is_finite_and_says_so(captured: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["replay", str(captured), "--device", "cpu"]) == 1
    assert "nowhere: all is finite here" in capsys.readouterr().out


def test_a_replay_names_loss_part_module_and_parameter(
    captured: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    right = Depth.loss

    def root(self: Depth, raw: torch.Tensor, *arguments: Any) -> dict[str, torch.Tensor]:
        parts = right(self, raw, *arguments)
        return parts | {"silog": parts["silog"] + (raw - raw.detach()).mul(1).sqrt().sum()}  # slope 1 / 0

    monkeypatch.setattr(Depth, "loss", root)
    assert main(["replay", str(captured), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "first     backward of depth/silog, the gradient of the output of decoders.depth" in said
    assert "backward  of depth/gradient: finite" in said
    assert "backward  of depth/silog: not finite in" in said and "anomaly detection: Function" in said


def test_a_replay_names_the_module_of_a_forward_pass(captured: Path, tmp_path: Path):
    state = torch.load(captured, weights_only=True)
    name = "decoders.depth.out.weight"
    state["net"][name].fill_(3e38)
    torch.save(state, tmp_path / "step.pt")
    report = replay(tmp_path / "step.pt", "cpu")
    assert report.first is not None and report.first.startswith("forward, output of decoders.depth.out (Conv2d): ")

    state["net"][name].fill_(math.nan)
    state["batches"][0]["targets"]["depth"]["depth_m"].fill_(math.inf)
    torch.save(state, tmp_path / "step.pt")
    report = replay(tmp_path / "step.pt", "cpu")
    assert report.first is not None and report.first.startswith("depth/depth_m of micro-batch 0, as the loader gave it")
    assert any(line.startswith(f"weights   {name}: ") for line in report.lines)


def test_a_replay_names_the_update(tmp_path: Path):
    run = scene_run.run(
        tmp_path / "run", ["depth"], optim={"lr": 3e38}, train={"not_finite": {"policy": "capture"}, "batch_size": 4}
    )
    with pytest.raises(NotFinite, match="weights after the update"):
        train(run)
    report = replay(tmp_path / "run" / "captured" / "step-0000001.pt", "cpu")
    assert report.first is not None and report.first.startswith("the update of trunk.")


def test_what_is_no_captured_step_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    torch.save({"net": {}}, tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("no")
    for name, said in (
        ("none.pt", "there is no captured step"), ("other.pt", "is no captured step of format 1"),
        ("text.pt", "is damaged or no captured step"),
    ):  # fmt: skip
        assert main(["replay", str(tmp_path / name)]) == 2
        assert said in capsys.readouterr().err


# ---- several processes ----

SHARED = {
    "fixed": {},
    "uncertainty": {"balance": {"type": "uncertainty"}},
    "averages itself": {"balance": {"type": "upgrad", "level": "parameters"}},
    "sharded adamw": {"train": {"distributed": {"shard": True}}},
    "sharded sgd": {"train": {"distributed": {"shard": True}}, "optim": {"name": "sgd", "lr": 0.01}},
}


def one_of_two(groups: Iterator[None], folder: Path) -> None:
    """Three steps each; in the second, the batch of the second process is spoilt."""
    next(groups)
    with distributed.group("cpu", timeout_s=200) as ranks:
        for case, changes in SHARED.items():
            run = scene_run.run(None, model={"encoder": {"name": MODEL.encoder.name}}, **changes)
            trainer = scene_run.state(run, ranks)
            batch = scene_run.batches(run)[ranks.rank]
            batch.color = torch.eye(3, 4).repeat(len(batch.image), 1, 1)
            trainer.train_step([batch])
            before = changed_by_a_step(trainer)
            trainer.train_step([spoilt(batch) if ranks.rank == 1 else batch])
            kept = _same(before, changed_by_a_step(trainer))
            trainer.train_step([batch])
            moved = not _same(before, changed_by_a_step(trainer))
            torch.save((kept, moved, vars(trainer.finite.read())), folder / f"{case}-{ranks.rank}.pt")


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return all(_same(one[key], other[key]) for key in one)
    if hasattr(one, "to_local"):
        return torch.equal(one.to_local(), other.to_local())
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.slow
def test_all_processes_skip_together_whichever_was_spoilt(tmp_path: Path):
    processes.run(2, one_of_two, tmp_path)
    for case in SHARED:
        for rank in (0, 1):
            kept, moved, tally = torch.load(tmp_path / f"{case}-{rank}.pt")
            assert kept and moved, (case, rank)
            assert (tally["skipped"], tally["for_loss"], tally["first_step"]) == (1, 1, 2), (case, rank)
