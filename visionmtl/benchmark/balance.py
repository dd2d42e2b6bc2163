"""What each balancing method costs: its whole training step against that of fixed weights on the same network."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torchjd import aggregation
from torchjd.autojac import backward, jac_to_grad

from visionmtl.balance.base import Balance, Balancer, GramianBalance, Step
from visionmtl.balance.fixed import Fixed
from visionmtl.benchmark.figures import Cell, Figure, Note, Table
from visionmtl.benchmark.measure import Timing, Work, alternate, build, median, ratio
from visionmtl.benchmark.workload import Workload, joint_step
from visionmtl.config.registry import did_you_mean
from visionmtl.structures import Batch


def measure_methods(workload: Workload, names: Sequence[str], peers: bool, timing: Timing) -> Iterator[Figure]:
    """Milliseconds a step and multiples of fixed weights; ValueError for an unknown method.

    names: of methods, each with its default settings; none: all.
    peers: methods by TorchJD, and ours on parameters, too.
    """
    timing.check(workload.on)
    known = Balance.members()
    for name in names:
        if name not in known:
            raise ValueError(
                f"unknown balancing method {name!r}{did_you_mean(name, known)}; "
                f"known are {', '.join(sorted(known))}; correct --methods"
            )
    methods: dict[str, Balance] = {name: known[name]() for name in names or sorted(known) if name != "fixed"}
    if peers:
        methods |= {
            f"{name}, on parameters": method.model_copy(update={"level": "parameters"})
            for name, method in methods.items()
            if isinstance(method, GramianBalance) and name in ("mgda", "upgrad")
        }
        methods |= {f"TorchJD, {name}": _TorchJD(aggregator=name) for name in ("MGDA", "ConFIG", "PCGrad")}
    yield Note(
        f"Whole training steps on {workload.text}, batch {workload.batch}; each method in turns with fixed weights. "
        f"Clock: {timing.clock}."
    )

    batch = workload.batch_of(workload.samples())
    fixed = build(partial(_step, workload, Fixed(), batch), workload.on, count=False)
    rows: list[Sequence[Cell]] = []
    for name, method in methods.items():  # one at a time: many networks would not fit into memory together
        built = build(partial(_step, workload, method, batch), workload.on, count=False)
        times = alternate({"fixed": fixed.work, name: built.work}, workload.on, timing)
        if not rows:
            rows.append(("fixed", median(times["fixed"]), 1.0, fixed.peak_mib))
        rows.append((name, median(times[name]), ratio(times[name], times["fixed"]), built.peak_mib))
    yield Table("Balancing methods", ("method", "ms a step", "x fixed weights", "peak MiB"), rows)


def _step(workload: Workload, method: Balance, batch: Batch) -> Work:
    trainer = workload.trainer(balance=method)
    if isinstance(trainer.balancer, _JacobianDescent):
        trainer.balancer.trunk = list(trainer.net.trunk.parameters())
    return joint_step(trainer, batch)


class _TorchJD(Balance):
    """TorchJD's own way, for comparison: one backward through the trunk for each task."""

    aggregator: str

    def build(self, weights: Mapping[str, float]) -> Balancer:
        return _JacobianDescent(self.aggregator)


class _JacobianDescent(Balancer):
    """Each task's gradient on the maps as our methods get it; from there on TorchJD's, with a row a task."""

    needs_cut = True

    def __init__(self, aggregator: str) -> None:
        super().__init__()
        self.aggregator = getattr(aggregation, aggregator)()
        self.trunk: list[nn.Parameter] = []

    def backward(self, step: Step) -> Mapping[str, Tensor]:
        leaves = list(step.leaves)
        by_task: list[list[Tensor]] = []
        for loss in step.losses.values():
            loss.backward()
            by_task.append([torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves])
            for leaf in leaves:
                leaf.grad = None
        jacobian = [torch.stack(of_leaf) for of_leaf in zip(*by_task, strict=True)]
        backward(list(step.shared), jac_tensors=jacobian, inputs=self.trunk, parallel_chunk_size=1)
        jac_to_grad(self.trunk, self.aggregator)
        return dict.fromkeys(step.losses, torch.ones(()))
