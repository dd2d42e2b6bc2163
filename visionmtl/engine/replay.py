"""A captured step once more, with every module watched: where the first value that is not finite appears."""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from visionmtl.engine.capture import FORMAT, KIND
from visionmtl.engine.distributed import Ranks, choose_device
from visionmtl.engine.nonfinite import largest_weight
from visionmtl.engine.optim import load_moments
from visionmtl.engine.position import Continuation
from visionmtl.engine.trainer import Trainer
from visionmtl.io.tensor_files import READING_FAILS, read_archive
from visionmtl.network import LossNet, build_model
from visionmtl.ops.precision import autocast, chosen_precision
from visionmtl.ops.ranks import step_totals
from visionmtl.run import restore
from visionmtl.structures import Batch, LabelSpace

SHOWN = 5
"""Names in a list."""
_PLACEHOLDER = [{"type": "scenes"}]
"""Stands for the data sets, which a replay does not read."""


@dataclass
class Replay:
    """What a replay found."""

    lines: list[str] = field(default_factory=list)  # for people, in the order of the step
    first: str | None = None  # where the first value that is not finite appeared; None: nowhere

    def say(self, line: str) -> None:
        self.lines.append(line)

    def found(self, where: str) -> None:
        """Take note of a value that is not finite; the first one counts."""
        self.first = self.first or where


def load_step(path: Path) -> dict[str, Any]:
    """Read a captured step without running code from it. Raises ValueError where it is none."""
    try:
        state, _ = read_archive(path)
    except FileNotFoundError as error:
        raise ValueError(
            f"there is no captured step {path}; train.not_finite.policy=capture writes them to "
            "RUN/captured/step-N.pt; correct the path"
        ) from error
    except READING_FAILS as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"{path} is damaged or no captured step ({reason}); tensors and plain data are all that is read; give a "
            "file of RUN/captured/"
        ) from error
    if not isinstance(state, dict) or state.get("kind") != KIND or state.get("format") != FORMAT:
        raise ValueError(
            f"{path} is no captured step of format {FORMAT}; train.not_finite.policy=capture writes such files to "
            "RUN/captured/; give one of them (a checkpoint holds no batch to replay)"
        )
    return state


def replay(path: Path, device: str = "auto") -> Replay:
    """Compute the captured step alone: inputs, forward by module, losses by part, backward by part, update."""
    state, report = load_step(path), Replay()
    ranks = Ranks(state["rank"], 1, choose_device(device))
    trainer = _trainer(state, path, ranks)
    batches = [_batch(plain).to(ranks.device) for plain in state["batches"]]
    if state["world"] > 1:  # the losses were divided by what all processes had labelled
        for number, batch in enumerate(batches):
            for task, of_task in batch.counts.items():
                for name, count in of_task.items():
                    of_task[name] = state["totals"][task][name].to(count) if number == 0 else torch.zeros_like(count)
    precision = chosen_precision(ranks.device, trainer.run.train.precision)
    report.say(
        f"step      {state['step'] + 1}, seed {trainer.run.seed}, {precision}, balance "
        f"{trainer.run.balance.type}; captured on {state['device']}, replayed on {ranks.device}, not compiled"
    )
    if state["world"] > 1:
        report.say(f"process   {state['rank']} of {state['world']}: the others' shares are in files of their own")
    for number, images in enumerate(state["images"]):
        report.say(f"images    micro-batch {number}: {', '.join(images)}")
    _check_inputs(trainer, state, report)
    _watch(trainer, batches, state, report)
    _check_update(_trainer(state, path, ranks), batches, report)
    return report


def _trainer(state: Mapping[str, Any], path: Path, ranks: Ranks) -> Trainer:
    settings = state["settings"]
    plain = {**settings, "output": None, "data": {**settings["data"], "train": _PLACEHOLDER, "val": _PLACEHOLDER}}
    plain["data"].setdefault("root", None)
    plain["train"] = {
        **{name: value for name, value in settings["train"].items() if name not in ("not_finite", "activation_memory")},
        "compile": False,
    }
    run = restore(plain, str(path))
    spaces = {name: of and LabelSpace.from_plain(of) for name, of in state["spaces"].items()}
    net = build_model(run.model, run.tasks, spaces, run.data.size)
    trainer = Trainer(run, net.to(ranks.device), ranks)
    trainer.net.load_state_dict(state["net"])
    load_moments(trainer.optimizer, state["optimizer"])
    trainer.balancer.load_state_dict(state["balancer"])
    if trainer.schedule:
        trainer.schedule.load_state_dict(state["curriculum"])
    if state["scaler"]:
        trainer.scaler.load_state_dict(state["scaler"])
    trainer.state.step, trainer.steps_per_epoch = state["step"], state["steps_per_epoch"]
    trainer.continuation = Continuation(state["offset"])  # with it, the trainer knows the epoch
    return trainer


def _batch(plain: Mapping[str, Any]) -> Batch:
    return Batch(plain["image"], plain["targets"], plain["labelled"], plain["counts"], plain["color"])


# ---- the parts of a step, in order ----


def _check_inputs(trainer: Trainer, state: Mapping[str, Any], report: Replay) -> None:
    """Batch, weights, statistics and moments as they were before the step."""
    for number, batch in enumerate(state["batches"]):
        targets = {f"{task}/{name}": value for task, of in batch["targets"].items() for name, value in of.items()}
        for name, value in {"image": batch["image"], "color": batch["color"], **targets}.items():
            if value is not None and (said := _not_finite(value)):
                where = f"{name} of micro-batch {number}, as the loader gave it: {said}"
                report.found(where)
                report.say(f"input     {where}")
    named = {**dict(trainer.net.named_parameters()), **dict(trainer.balancer.named_parameters())}
    for name, value in named.items():
        if said := _not_finite(value):
            report.found(f"weight {name} before the step: {said}")
            report.say(f"weights   {name}: {said}")
    moments = [v for of in trainer.optimizer.state.values() for v in of.values() if isinstance(v, Tensor)]
    if spoilt := sum(bool(_not_finite(value)) for value in moments):
        report.found(f"{spoilt} moments of the optimiser before the step")
        report.say(f"moments   {spoilt} of {len(moments)} tensors are not finite")
    if report.first is None:
        largest = float(largest_weight(named.values()))
        report.say(f"before    batch, weights and moments are finite; the largest weight is {largest:.3g}")


def _watch(trainer: Trainer, batches: Sequence[Batch], state: Mapping[str, Any], report: Replay) -> None:
    """Forward and backward of each micro-batch, loss part by loss part, up to the first that is not finite."""
    net = LossNet(trainer.net, cut=False, learning=trainer.learning)
    trainer.net.train()
    trainer.choose_losses()
    if trainer.schedule:
        for module in trainer.held():
            module.eval()
        batches = [trainer.schedule.mask(batch, trainer.epoch) for batch in batches]
    totals = step_totals([batch.counts for batch in batches])
    if any(task.counts_predictions for task in trainer.net.tasks.values()) and len(batches) > 1:
        totals = {task: {k: v.to(trainer.ranks.device) for k, v in of.items()} for task, of in state["totals"].items()}
    for number, batch in enumerate(batches):
        torch.manual_seed(trainer.step_seed(number))
        random_state = _random_state(trainer.ranks.device)

        def forward(batch: Batch = batch) -> dict[str, dict[str, Tensor]]:
            with autocast(trainer.ranks.device, trainer.run.train.precision):
                parts, _, _ = net(trainer._image(batch), batch.targets, batch.labelled, totals, batch.color)
            found: dict[str, dict[str, Tensor]] = parts
            return found

        with _watched(trainer.net) as watch:
            parts = forward()
        if watch.forward:
            report.say(f"forward   {watch.forward}")
            report.found(f"forward, {watch.forward}")
        for task, of_task in parts.items():
            for name, value in of_task.items():
                shown = float(value.detach())
                report.say(f"loss      micro-batch {number}, {task}/{name} = {shown:.6g}")
                if not torch.isfinite(value):
                    report.found(
                        f"loss {task}/{name}, whose inputs, the raw outputs of {task}, are finite (the largest "
                        f"absolute value is {watch.largest(f'decoders.{task}'):.3g})"
                    )
        for task, of_task in parts.items():
            for name in of_task:
                _random_state(trainer.ranks.device, random_state)
                _backward(trainer, forward, f"{task}/{name}", report, random_state)
        if report.first:
            return


def _backward(trainer: Trainer, forward: Any, part: str, report: Replay, random_state: list[Tensor]) -> None:
    """The gradient of one loss part alone."""
    task, name = part.split("/")
    trainer.net.zero_grad(set_to_none=True)
    with _watched(trainer.net) as watch:
        loss = forward()[task][name]
        if not loss.requires_grad:
            return
        (loss * trainer.scaler.get_scale()).backward()
    bad = [name for name, p in trainer.net.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    squares = [p.grad.float().norm() for p in trainer.net.parameters() if p.grad is not None]
    norm = float(torch.stack(squares).norm()) / trainer.scaler.get_scale() if squares else 0.0
    trainer.net.zero_grad(set_to_none=True)
    if not bad:
        report.say(f"backward  of {part}: finite, norm {norm:.4g}")
        return
    shown = ", ".join(bad[:SHOWN]) + (f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else "")
    report.say(f"backward  of {part}: not finite in {len(bad)} parameters: {shown}")
    if watch.backward:
        report.say(f"          first {watch.backward}")
    _random_state(trainer.ranks.device, random_state)
    if (operator := _operator(trainer, forward, task, name)) is not None:
        report.say(f"          {operator}")
    report.found(f"backward of {part}, {watch.backward or operator or 'the gradient of ' + bad[0]}")


def _operator(trainer: Trainer, forward: Any, task: str, part: str) -> str | None:
    """The operator whose backward gives NaN first, by torch's anomaly detection, which sees no infinities."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with torch.autograd.detect_anomaly(check_nan=True):
            try:
                (forward()[task][part] * trainer.scaler.get_scale()).backward()
            except RuntimeError as error:
                if "returned nan values" not in str(error):
                    raise
                trace = "\n".join(str(one.message) for one in caught)
                lines = re.findall(r'File ".*?((?:visionmtl|timm|torch)/[^"]+)", line (\d+), in (\w+)\n\s+(.*)', trace)
                ours = [line for line in lines if line[0].startswith("visionmtl/")] or lines
                at = f", called in {ours[-1][0]}:{ours[-1][1]} ({ours[-1][3].strip()})" if ours else ""
                return f"anomaly detection: {str(error).rstrip('.')}{at}"
            finally:
                trainer.net.zero_grad(set_to_none=True)
    return None


def _check_update(trainer: Trainer, batches: Sequence[Batch], report: Replay) -> None:
    """The whole step, balancing method and optimiser included."""
    output = trainer.train_step(batches)
    tally = trainer.finite.read()
    lr = max(group["lr"] for group in trainer.optimizer.param_groups)
    report.say(f"update    gradient norm of all tasks {float(output.grad_norm):.4g}, largest learning rate {lr:.3g}")
    if tally.skipped:
        report.found(f"the balancing method ({trainer.run.balance.type}) or the sum of all gradients")
        return
    bad = [name for name, value in trainer.net.named_parameters() if not value.isfinite().all()]
    if bad:
        report.found(f"the update of {bad[0]}: a finite gradient times a learning rate of {lr:.3g}")
        report.say(f"update    makes {len(bad)} weights not finite, the first {bad[0]}")


# ---- watching modules ----


class _Watch:
    """The first module of a forward, and of a backward, whose output (or its gradient) is not finite."""

    def __init__(self) -> None:
        self.forward: str | None = None
        self.backward: str | None = None
        self._largest: dict[str, float] = {}

    def largest(self, module: str) -> float:
        """The largest absolute value in a module's output."""
        return self._largest.get(module, float("nan"))

    def see(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        tensors = [value for value in tree_leaves(output) if _is_float(value)]
        if tensors:
            self._largest[name] = max(float(value.detach().abs().max()) for value in tensors if value.numel())
        for value in tensors:
            if self.forward is None and (said := _not_finite(value)):
                before = [x for x in tree_leaves(inputs) if _is_float(x) and x.numel()]
                largest = max((float(x.detach().abs().max()) for x in before), default=float("nan"))
                given = "whose input is not" if any(_not_finite(x) for x in before) else "from finite input"
                where = f"output of {name} ({type(module).__name__})"
                self.forward = f"{where}: {said}, {given} (largest absolute value {largest:.3g})"
            if value.requires_grad:
                value.register_hook(self._watching(name, module))

    def _watching(self, name: str, module: nn.Module) -> Any:
        def see(gradient: Tensor) -> None:
            if self.backward is None and (said := _not_finite(gradient)):
                self.backward = (
                    f"the gradient of the output of {name} ({type(module).__name__}): {said}; it comes from what "
                    "reads that output"
                )

        return see


@contextmanager
def _watched(net: nn.Module) -> Iterator[_Watch]:
    watch = _Watch()

    def hook(name: str) -> Any:
        return lambda module, inputs, output: watch.see(name, module, inputs, output)

    handles = [module.register_forward_hook(hook(name)) for name, module in net.named_modules() if name]
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _not_finite(value: Tensor) -> str | None:
    """How many values are NaN and infinite; None where all are finite."""
    if not value.is_floating_point():
        return None
    value = value.detach()
    nans, infinite = int(value.isnan().sum()), int(value.isinf().sum())
    if not nans and not infinite:
        return None
    kinds = [f"{count:,} {kind}" for count, kind in ((nans, "NaN"), (infinite, "infinite")) if count]
    return f"{' and '.join(kinds)} of {value.numel():,} values"


def _random_state(device: torch.device, restored: Sequence[Tensor] | None = None) -> list[Tensor]:
    """The random states of the host and the device, after going back to those of before, where they are given."""
    on_cuda = device.type == "cuda"
    if restored is not None:
        torch.set_rng_state(restored[0])
        if on_cuda:
            torch.cuda.set_rng_state(restored[1], device)
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if on_cuda else [])]
