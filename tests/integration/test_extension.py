"""Adding a task to a trained network: what stays, what is taught, what is reported, and how it resumes."""

import json
from pathlib import Path
from typing import Any

import pytest
import scene_run
import torch
from contract import check_spec, found
from test_no_waits import Waits
from torch import Tensor, nn

from visionmtl.cli import train as tool
from visionmtl.engine import checkpoint
from visionmtl.engine.checkpoint import open_model
from visionmtl.engine.extension import extended, measure_fisher
from visionmtl.engine.forgetting import forgetting, markdown
from visionmtl.engine.options import TrainOptions
from visionmtl.engine.trainer import train
from visionmtl.run import Run
from visionmtl.structures import Batch
from visionmtl.study.costs import _Step
from visionmtl.tasks.depth import Depth
from visionmtl.transfer.base import Extend
from visionmtl.transfer.ewc import EWC, ElasticPenalty, normalised

OLD = ("segmentation", "depth")
BATCHNORM = {"model": {"encoder": {"name": "test_resnet"}, "pyramid": {"norm": "batch"}}}
METHODS = ("frozen", "lora", "lwf", "ewc", "lwp", "joint")


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that learnt the old tasks for two steps."""
    folder = tmp_path_factory.mktemp("old") / "run"
    train(scene_run.run(folder, OLD, **BATCHNORM), TrainOptions(max_steps=2))
    return folder


def settings(old: Path, method: str, output: Path | None = None, **changes: Any) -> Run:
    extend: dict[str, Any] = {"type": method, "checkpoint": str(old)}
    extend |= {"images": 2} if method == "ewc" else {}
    parts = scene_run.merged(BATCHNORM, {"extend": extend, "train": {"epochs": 1}})
    return extended(scene_run.run(output, ("detection",), **scene_run.merged(parts, changes)))


def net_of(path: Path, device: str = "cpu") -> nn.Module:
    return open_model(path, device).net


def unlike(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """The names in `other` whose tensors are not those of `one`."""
    return [name for name, value in other.items() if not torch.equal(one[name], value)]


@pytest.mark.parametrize("member", found(Extend))
def test_settings_are_a_spec(member: type[Extend]):
    check_spec(member(), Extend)
    assert member().checkpoint is None


def test_old_tasks_come_in_front_with_their_settings(old: Path):
    run = settings(old, "frozen")
    assert list(run.tasks) == ["segmentation", "depth", "detection"]
    assert isinstance(run.tasks["depth"], Depth) and run.tasks["depth"].max_depth_m == 12
    assert extended(run) == run, "a saved config stays as it is"
    assert Run.model_validate(run.model_dump(mode="json")) == run


@pytest.mark.parametrize("method", ["frozen", "lora"])
def test_the_old_outputs_stay_bit_for_bit_with_their_statistics(method: str, old: Path, tmp_path: Path):
    run = settings(old, method, tmp_path / "run", train={"epochs": 2})
    train(run)

    image = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    before, after = (open_model(folder).net for folder in (old, tmp_path / "run"))
    with torch.no_grad():
        one, other = before(image), after(image)
    for name in OLD:
        torch.testing.assert_close(other[name], one[name], rtol=0, atol=0)
    assert unlike(after.state_dict(), before.state_dict()) == []
    report = json.loads((tmp_path / "run" / "forgetting.json").read_text())
    verdicts = {row["verdict"] for metrics in report["old"].values() for row in metrics.values()}
    assert set(report["old"]) == set(OLD) and verdicts <= {"same", "unknown"} and "same" in verdicts
    assert set(report["new"]) == {"detection"} and report["header"]["method"] == method
    log, table = ((tmp_path / "run" / name).read_text() for name in ("train.log", "forgetting.md"))
    assert "| depth | rmse_m | less |" in table and f"Forgetting by {method}" in log and "extends   " in log
    rows = scene_run.rows(tmp_path / "run")
    assert all(set(row["losses"]) == {"detection"} for row in rows), "old tasks have no loss"


def test_a_branch_learns_its_matrices_and_its_pyramid(old: Path):
    run = settings(old, "lora", extend={"rank": 2})
    state = scene_run.state(run)
    before = {name: value.clone() for name, value in state.net.state_dict().items()}
    for batch in scene_run.batches(run)[:2]:
        state.train_step([unaugmented(batch, "lora")])
    moved = unlike(state.net.state_dict(), before)
    branch = ("trunk.branch_encoders.detection.", "trunk.branch_pyramids.detection.", "decoders.detection.")
    assert all(name.startswith(branch) for name in moved)
    in_encoder = [name for name in moved if name.startswith(branch[0])]
    assert in_encoder and all(name.endswith((".a", ".b")) for name in in_encoder), "statistics stay too"
    assert {name.split(".")[1] for name in moved if name.startswith("trunk")} == {"branch_encoders", "branch_pyramids"}


@pytest.mark.parametrize("method", ["frozen", "joint"])
def test_after_lora_a_new_task_reads_what_the_first_ones_have_in_common(method: str, old: Path, tmp_path: Path):
    train(settings(old, "lora", tmp_path / "lora"), TrainOptions(max_steps=1))
    sharing = checkpoint.load(tmp_path / "lora/checkpoints/last.pt")["run"]["model"]["sharing"]
    extend = {"type": method, "checkpoint": str(tmp_path / "lora")}
    changes = scene_run.merged(BATCHNORM, {"model": {"sharing": sharing}, "extend": extend})
    run = extended(scene_run.run(None, ("normals",), **changes))
    assert run.model.sharing.common == ("segmentation", "depth", "normals") and extended(run) == run
    state = scene_run.state(run)
    trunk: Any = state.net.trunk
    assert list(trunk.branch_encoders) == ["detection"]
    assert state.extension.fresh == [], "the new task has a decoder alone"
    image = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    before, after = open_model(tmp_path / "lora").net, state.net.eval()
    with torch.no_grad():
        one, other = before(image), after(image)
    torch.testing.assert_close({name: other[name] for name in one}, dict(one), rtol=1e-4, atol=1e-6)


def test_after_lora_a_new_task_reads_levels_of_the_common_pyramid(old: Path, tmp_path: Path):
    head = {"tasks": {"detection": {"head": {"levels": [3, 4, 5]}}}}
    train(settings(old, "lora", tmp_path / "lora", **head), TrainOptions(max_steps=1))
    sharing = checkpoint.load(tmp_path / "lora/checkpoints/last.pt")["run"]["model"]["sharing"]
    extend = {"type": "frozen", "checkpoint": str(tmp_path / "lora")}
    deep = {"tasks": {"normals": {"decoder": {"levels": [4, 5]}}}}  # of the branch alone
    changes = scene_run.merged(BATCHNORM, {"model": {"sharing": sharing}, "extend": extend, **deep})
    with pytest.raises(ValueError, match=r"tasks.normals reads levels \[5\]"):
        extended(scene_run.run(None, ("normals",), **changes))


def test_a_frozen_encoder_lets_the_pyramid_learn(old: Path):
    recipe = {"encoder_lr_factor": 0.3}  # of a whole network
    run = settings(old, "frozen", extend={"part": "encoder"}, optim=recipe)
    state = scene_run.state(run)
    before = {name: value.clone() for name, value in state.net.state_dict().items()}
    for batch in scene_run.batches(run)[:2]:
        state.train_step([batch])
    moved = unlike(state.net.state_dict(), before)
    assert any(name.startswith("trunk.pyramid") for name in moved)
    assert not any(name.startswith(("trunk.encoder", *(f"decoders.{task}." for task in OLD))) for name in moved)
    assert not state.net.encoder.training and state.net.trunk.pyramid.training  # type: ignore[union-attr]


@pytest.mark.parametrize("method", METHODS)
def test_every_way_starts_at_the_old_network_and_teaches_the_new_task(method: str, old: Path, tmp_path: Path):
    run = settings(old, method, tmp_path / "run")
    state = scene_run.state(run)
    weights = checkpoint.best_weights(checkpoint.load(old / "checkpoints" / "last.pt"))
    assert unlike(state.net.state_dict(), weights) == []
    if state.extension and state.extension.penalty:
        state.extension.prepare(state.net, run.optim, tmp_path)

    batch = unaugmented(scene_run.batches(run)[0], method)
    output = state.train_step([batch])
    parts = {name: set(of) for name, of in output.losses.items()}
    hard = {"detection": {"class", "box"}, "segmentation": {"cross_entropy"}, "depth": {"silog", "gradient"}}
    soft = {"segmentation": {"soft_kl"}, "depth": {"soft_log"}}
    assert parts == {
        **{name: {"detection": hard["detection"]} for name in ("frozen", "lora", "ewc")},
        "lwp": {"detection": hard["detection"] | {"soft_features"}}, "joint": hard,
        "lwf": {"detection": hard["detection"], **{name: hard[name] | soft[name] for name in OLD}},
    }[method]  # fmt: skip
    assert all(value.isfinite() for of in output.losses.values() for value in of.values())
    moved = unlike(state.net.state_dict(), weights)
    assert bool(moved) == (method not in ("frozen", "lora"))
    decoders_move = any(name.startswith("decoders") for name in moved)
    assert decoders_move == (method in ("lwf", "joint"))
    if method == "lwf":
        assert all(output.losses[name][part] == 0 for name in OLD for part in hard[name]), "labels are not used"


def unaugmented(batch: Batch, method: str) -> Batch:
    """As the loader of a run gives it: without labels of the old tasks, unless they learn from them."""
    for name in OLD:
        if method != "joint":
            batch.labelled[name][:] = False
    return batch


def test_the_loader_leaves_the_old_labels_alone(old: Path, tmp_path: Path):
    run = settings(old, "lwf", tmp_path / "run")
    train(run)
    for row in scene_run.rows(tmp_path / "run"):
        assert set(row["losses"]["depth"]) == {"soft_log"} and set(row["losses"]["segmentation"]) == {"soft_kl"}
    assert set(json.loads((tmp_path / "run" / "eval" / "before.json").read_text())["results"]) == set(OLD)


@pytest.mark.parametrize("method", ["ewc", "lwp"])
def test_a_run_cut_in_the_middle_resumes_bit_for_bit(method: str, old: Path, tmp_path: Path):
    train(settings(old, method, tmp_path / "whole"))
    train(settings(old, method, tmp_path / "cut"), TrainOptions(max_steps=2))
    saved = Run.model_validate(checkpoint.load(tmp_path / "cut" / "checkpoints" / "last.pt")["run"])
    train(saved, TrainOptions(resume="auto"))
    assert scene_run.differences(scene_run.last_state(tmp_path / "whole"), scene_run.last_state(tmp_path / "cut")) == []
    assert scene_run.rows(tmp_path / "whole") == scene_run.rows(tmp_path / "cut")
    one, other = (json.loads((tmp_path / n / "forgetting.json").read_text()) for n in ("whole", "cut"))
    assert one == other and one["old"]
    assert (tmp_path / "whole" / "fisher.pt").is_file() == (method == "ewc")


def test_a_run_goes_on_only_from_the_network_that_it_extends(old: Path, tmp_path: Path):
    train(settings(old, "frozen", tmp_path / "run"), TrainOptions(max_steps=2))
    other = checkpoint.load(old / "checkpoints" / "last.pt")
    other["step"] += 1
    checkpoint.save(tmp_path / "other.pt", other)
    with pytest.raises(ValueError, match=r"extends .*last.pt, and this run .*other.pt, another file; .* same"):
        train(settings(tmp_path / "other.pt", "frozen", tmp_path / "run"), TrainOptions(resume="auto"))


@pytest.mark.parametrize("method", ["ewc", "lwp", "lwf"])
def test_no_way_makes_the_host_wait(method: str, old: Path, tmp_path: Path):
    run = settings(old, method)
    state, batches = scene_run.state(run), scene_run.batches(run)[:2]
    if state.extension:
        state.extension.prepare(state.net, run.optim, None)
    state.train_step(batches)
    with Waits() as waits:
        state.train_step(batches)
    assert waits.seen > 300 and waits.found == []


# ---- elastic weight consolidation ----


def test_the_penalty_pulls_each_weight_back_by_its_importance():
    weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    penalty = ElasticPenalty([("w", weight)], strength=0.5)
    penalty.set_fisher({"w": torch.tensor([0.0, 1.0, 4.0])})
    weight.data += 2
    weight.grad = torch.tensor([10.0, 10.0, 10.0])
    penalty.add_gradients()
    # 0.5 * F * 2, the gradient of 0.5 / 2 * F * (w - w*)^2
    assert weight.grad.tolist() == [10, 11, 14]
    with pytest.raises(ValueError, match=r"lacks w or has it in another shape \(1 of 1"):
        penalty.set_fisher({"w": torch.zeros(2)})


def test_importance_is_the_mean_square_of_gradients_of_single_images(old: Path):
    spec = EWC(checkpoint=str(old), images=3)
    run = settings(old, "ewc")
    net = scene_run.state(run).net
    fisher = measure_fisher(spec, net)
    assert set(fisher) == {f"trunk.{name}" for name, _ in net.trunk.named_parameters()}
    values = torch.cat([value.flatten() for value in fisher.values()])
    assert (values >= 0).all() and values.mean().item() == pytest.approx(1, rel=1e-4)
    assert scene_run.differences(fisher, measure_fisher(spec, net)) == [], "the same images, the same numbers"
    assert all(parameter.grad is None for parameter in net.parameters())
    assert normalised({"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([2.0])})["a"].tolist() == [0.5, 1.5]
    with pytest.raises(ValueError, match=r"0 everywhere: no image .* set extend.data"):
        normalised({"a": torch.zeros(2)})


def test_tasks_that_chose_their_classes_count_too(tmp_path: Path):
    """Their data set has other classes, so that it teaches them only by the names of these."""
    tasks = {"segmentation": {"classes": ["wall", "floor"]}}
    train(scene_run.run(tmp_path, ("segmentation",), **BATCHNORM, tasks=tasks), TrainOptions(max_steps=1))
    fisher = measure_fisher(EWC(checkpoint=str(tmp_path), images=2), net_of(tmp_path))
    assert any((value > 0).any() for value in fisher.values())


def test_more_images_than_the_old_data_have_are_refused(old: Path):
    with pytest.raises(
        ValueError, match=r"extend.images is 1000, but an epoch of the old data has \d+; at most so many"
    ):
        measure_fisher(EWC(checkpoint=str(old), images=1000), net_of(old))


def test_the_stronger_the_penalty_the_less_important_weights_move(old: Path, tmp_path: Path):
    def moved(strength: float) -> float:
        """How far weights went, squared and weighted by their importance."""
        run = settings(old, "ewc", extend={"strength": strength})
        state = scene_run.state(run)
        assert state.extension is not None and state.extension.penalty is not None
        state.extension.prepare(state.net, run.optim, None)
        for batch in scene_run.batches(run) * 2:
            state.train_step([unaugmented(batch, "ewc")])
        penalty = state.extension.penalty
        parts = zip(penalty.parameters.values(), penalty.old, penalty.fisher or (), strict=True)
        return sum(float((fisher * (p.detach() - before).square()).sum()) for p, before, fisher in parts)

    assert moved(10.0) < 0.8 * moved(1e-6)


def test_a_penalty_that_would_diverge_is_refused(old: Path):
    run = settings(old, "ewc", extend={"strength": 100.0}, optim={"name": "sgd", "lr": 0.1})
    state = scene_run.state(run)
    assert state.extension is not None
    with pytest.raises(ValueError, match=r"under sgd with lr 0.1 the penalty diverges above .*optim.name=adamw"):
        state.extension.prepare(state.net, run.optim, None)


def test_a_dry_run_measures_and_writes_nothing(old: Path, tmp_path: Path):
    train(settings(old, "ewc", tmp_path / "run"), TrainOptions(dry_run=True))
    assert not (tmp_path / "run").exists()


def test_importance_measured_before_can_be_read(old: Path, tmp_path: Path):
    net = scene_run.state(settings(old, "ewc")).net
    fisher = measure_fisher(EWC(checkpoint=str(old), images=1), net)
    torch.save(fisher, tmp_path / "fisher.pt")
    read = measure_fisher(EWC(checkpoint=str(old), fisher=str(tmp_path / "fisher.pt")), net)
    assert scene_run.differences(fisher, read) == []
    with pytest.raises(ValueError, match="images is set, but fisher names a file"):
        EWC(images=3, fisher="x")


# ---- the report, and what is refused ----


def test_the_report_knows_which_way_is_better():
    before = {"depth": {"images": 4, "rmse_m": 0.5, "delta1": 0.9, "protocol": "p"}, "detection": {"ap": 0.3}}
    after = {"depth": {"images": 4, "rmse_m": 0.6, "delta1": 0.95}, "detection": {"ap": 0.4}}
    tasks = {"depth": Depth()}
    report = forgetting(before, after, tasks, ["depth"])
    assert set(report) == {"depth"} and set(report["depth"]) == {"rmse_m", "delta1"}
    assert report["depth"]["rmse_m"] == {
        "before": 0.5, "after": 0.6, "change": pytest.approx(0.1), "best": "min", "verdict": "worse",
    }  # fmt: skip
    assert report["depth"]["delta1"]["verdict"] == "better"
    text = markdown(report, {}, tasks, "Title")
    assert "| depth | rmse_m | less | 0.5000 | 0.6000 | +0.1000 | worse |" in text


def test_what_does_not_fit_the_old_network_is_refused(old: Path, tmp_path: Path):
    def refused(message: str, names: tuple[str, ...] = ("detection",), **changes: Any) -> None:
        extend = {"type": "frozen", "checkpoint": str(old)}
        run = scene_run.run(tmp_path, names, **scene_run.merged({**BATCHNORM, "extend": extend}, changes))
        with pytest.raises(ValueError, match=message):
            scene_run.state(extended(run))

    refused(r"model is not that of .*: model.pyramid.channels is 32 and was 16", model={"pyramid": {"channels": 32}})
    refused(r"data.size is \(64, 96\), but .* trained at \(64, 64\)", data={"size": [64, 96]})
    refused(r"has all tasks of the run \(depth\); new ones are needed", ("depth",))
    refused(r"tasks.detection reads levels \[5\], which .* does not have; it has \[3, 4\]",
            tasks={"detection": {"head": {"levels": [3, 4, 5]}}})  # fmt: skip
    refused(r"balance.type is 'upgrad', .* is frozen, so it would have no effect", balance={"type": "upgrad"})
    refused(r"extend.checkpoint is not set; .*--extend CHECKPOINT", extend={"checkpoint": None})
    refused(r"tensors that the extended network lacks or has in another shape",
            ("depth", "detection"), tasks={"depth": {"decoder": {"channels": 24}}})  # fmt: skip
    run = settings(old, "frozen", tmp_path / "run")
    with pytest.raises(ValueError, match=r"--init-from .* and extend.checkpoint .* are both set"):
        train(run, TrainOptions(init_from=str(old)))


def test_the_tool_extends_with_one_option(old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = scene_run.run(None, ("detection",), **BATCHNORM)
    config = tmp_path / "new.yaml"
    plain = {key: value for key, value in run.model_dump(mode="json").items() if key not in ("extend", "distill")}
    config.write_text(json.dumps(plain))
    arguments = [str(config), "--extend", str(old), "--output", str(tmp_path / "run"), "--device", "cpu"]
    assert tool.main([*arguments, "--print-config"]) == 0
    assert "type: frozen" in capsys.readouterr().out
    assert tool.main([*arguments, "extend={type: lwf, weight: 2}", "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert "type: lwf" in printed and str(old) in printed


def test_a_step_of_an_extension_can_be_timed(tmp_path: Path):
    scene_run.save_untrained(scene_run.run(tmp_path, ("depth",)), tmp_path)
    run = scene_run.run(names=("segmentation",), extend={"type": "frozen", "checkpoint": str(tmp_path)})
    step = _Step(run, torch.device("cpu"))
    step.work()
    assert step.trainer.state.step == 1


def test_settings_that_do_not_go_with_the_old_network_are_one_line(tmp_path: Path):
    scene_run.save_untrained(scene_run.run(tmp_path, ("depth",)), tmp_path)
    augment = {"place": "random", "zoom": [0.5, 1.0]}
    run = scene_run.run(
        names=("depth", "segmentation"), extend={"type": "lwf", "checkpoint": str(tmp_path)}, data={"augment": augment}
    )
    with pytest.raises(
        ValueError, match=f"^with the old network of {tmp_path}.*: data.augment.place is random, but "
    ) as told:
        extended(run)
    assert "\n" not in str(told.value)
