"""What each balancing method costs: its whole training step against that of fixed weights on the same network."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torchjd import aggregation
from torchjd.autojac import backward, jac_to_grad

from visionmtl.balance.base import Balance, Balancer, GramianBalance, Step
from visionmtl.balance.fixed import Fixed
from visionmtl.benchmark.figures import Cell, Figure, Note, Row, Table
from visionmtl.benchmark.measure import Timing, Work, alternate, build, median
from visionmtl.benchmark.workload import FIVE_TASKS, Workload, joint_step
from visionmtl.config.registry import did_you_mean
from visionmtl.network import MultiTaskNet
from visionmtl.structures import Batch

GRAMIAN_LIMIT, LOSSES_LIMIT = 1.05, 1.01
"""The most that a step may take, in multiples of fixed weights, of methods that see gradients on maps, and losses.

A limit counts as missed where the lower quartile of the rounds is above it: their median scatters by some per cent.
"""


def measure_methods(
    workload: Workload, names: Sequence[str], peers: bool, timing: Timing, num_tasks: Sequence[int] = (3, 5)
) -> Iterator[Figure]:
    """Milliseconds a step and multiples of fixed weights; ValueError for an unknown method.

    names: of methods, each with its default settings; none: all.
    peers: methods by TorchJD, and ours on parameters, too.
    num_tasks: 3, 5 or both; each has a table.
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
        f"Whole training steps on {workload.text}, batch {workload.batch}; each method in turns with fixed weights, "
        f"{timing.rounds} rounds. Clock: {timing.clock}."
    )
    for count in num_tasks:
        yield from _measure(workload, FIVE_TASKS[:count], methods, timing)


def _measure(
    workload: Workload, tasks: Sequence[str], methods: Mapping[str, Balance], timing: Timing
) -> Iterator[Figure]:
    batch = workload.batch_of(workload.samples(), tasks)
    fixed = build(partial(_step, workload, tasks, Fixed(), batch), workload.on, count=False)
    rows: list[Sequence[Cell]] = []
    limits = []
    for name, method in methods.items():  # one at a time: many networks would not fit into memory together
        built = build(partial(_step, workload, tasks, method, batch), workload.on, count=False)
        times = alternate({"fixed": fixed.work, name: built.work}, workload.on, timing)
        compared = np.divide(times[name], times["fixed"])
        low, middle, high = (float(value) for value in np.percentile(compared, (25, 50, 75)))
        if not rows:
            rows.append(("fixed", median(times["fixed"]), 1.0, None, None, fixed.peak_mib))
        rows.append((name, median(times[name]), middle, low, high, built.peak_mib))
        if (limit := _limit(method)) is not None:
            limits.append(Row(f"{name}, {len(tasks)} tasks, lower quartile", low, "x fixed weights", limit=limit))
    columns = ("method", "ms a step", "x fixed weights", "lower quartile", "upper quartile", "peak MiB")
    yield Table(f"Balancing methods, {len(tasks)} tasks", columns, rows)
    yield from (row for row in limits if not row.kept)


def _limit(method: Balance) -> float | None:
    if isinstance(method, _TorchJD):
        return None
    if isinstance(method, GramianBalance):
        return GRAMIAN_LIMIT if method.level == "maps" else None
    return GRAMIAN_LIMIT if method.build({"a": 1.0}).needs_cut else LOSSES_LIMIT


def _step(workload: Workload, tasks: Sequence[str], method: Balance, batch: Batch) -> Work:
    trainer = workload.trainer(tasks, balance=method)
    if isinstance(trainer.balancer, _JacobianDescent):
        trainer.balancer.watch(trainer.net)
    return joint_step(trainer, batch)


class _TorchJD(Balance):
    """TorchJD's own way, for comparison: one backward through the trunk for each task."""

    aggregator: str

    def build(self, weights: Mapping[str, float]) -> Balancer:
        return _JacobianDescent(self.aggregator)


class _JacobianDescent(Balancer):
    """Each task's gradient on the maps as our methods get it; from there on TorchJD's, with a row a task.

    That is what its `mtl_backward` does. The function itself takes features of one graph that do not depend on each
    other; those of a feature pyramid do, so it would follow a path from one map through the next twice.
    """

    needs_cut = True

    def __init__(self, aggregator: str) -> None:
        super().__init__()
        self.aggregator = getattr(aggregation, aggregator)()
        self.trunk: list[nn.Parameter] = []

    def watch(self, net: MultiTaskNet) -> None:
        """Take note of the shared parameters."""
        self.trunk = [parameter for parameter in net.trunk.parameters() if parameter.requires_grad]

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
