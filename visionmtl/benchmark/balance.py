"""What each balancing method costs: its whole training step against that of fixed weights on the same network."""

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from pydantic import Field
from torch import Tensor, nn
from torchjd.aggregation import MGDA
from torchjd.autojac import backward, jac_to_grad

from visionmtl.balance.base import Balance, Balancer, Step
from visionmtl.balance.fixed import Fixed
from visionmtl.benchmark.base import Figure, Note, Table
from visionmtl.benchmark.measure import Clock, Work, alternate, check_clock, quartiles, ratio
from visionmtl.benchmark.workload import Workload
from visionmtl.benchmark.works import build, joint_step
from visionmtl.config.registry import Spec, did_you_mean
from visionmtl.structures import Batch


class Methods(Spec):
    """Every method with its default settings, one after the other, in turns with fixed weights."""

    workload: Workload = Workload()
    methods: tuple[str, ...] = Field((), description="names of methods; none: all of them")
    peers: bool = Field(False, description="MGDA by TorchJD, a backward through the trunk for each task, too")
    rounds: int = Field(5, ge=1)
    seconds: float = Field(0.25, gt=0)
    clock: Clock = "wall"

    def measure(self) -> Iterator[Figure]:
        """A table of milliseconds a step and multiples of fixed weights; ValueError for an unknown method."""
        check_clock(self.clock, self.workload.on)
        known = Balance.members()
        for name in self.methods:
            if name not in known:
                raise ValueError(
                    f"unknown balancing method {name!r}{did_you_mean(name, known)}; "
                    f"known are {', '.join(sorted(known))}; correct --methods"
                )
        chosen: dict[str, Balance] = {name: known[name]() for name in self.methods or sorted(known) if name != "fixed"}
        if self.peers:
            chosen["TorchJD, MGDA"] = _TorchJD()
        workload = self.workload
        batch = workload.batch_of(workload.samples())
        yield Note(
            f"Whole training steps on {workload.on}: {workload.encoder}, batch {workload.batch} of "
            f"{workload.size[0]}x{workload.size[1]}; each method in turns with fixed weights. Clock: {self.clock}."
        )

        fixed = build(partial(_step, workload, Fixed(), batch), workload.on, count=False)
        rows: list[tuple[str, float, float, float | None]] = []
        for name, method in chosen.items():  # one at a time: many networks would not fit into memory together
            one = build(partial(_step, workload, method, batch), workload.on, count=False)
            works = {"fixed": fixed.work, name: one.work}
            times = alternate(works, workload.on, self.rounds, self.seconds, self.clock)
            if not rows:
                rows.append(("fixed", quartiles(times["fixed"])[1], 1.0, fixed.peak_mib))
            rows.append((name, quartiles(times[name])[1], ratio(times[name], times["fixed"]), one.peak_mib))
        yield Table("Balancing methods", ("method", "ms a step", "x fixed weights", "peak MiB"), tuple(rows))


class _TorchJD(Balance):
    """TorchJD's own way, for comparison: one backward through the trunk for each task."""

    def build(self, weights: Mapping[str, float]) -> Balancer:
        return _JacobianDescent()


class _JacobianDescent(Balancer):
    """Each task's gradient on the maps as our methods get it; from there on TorchJD's, with a row a task."""

    needs_cut = True

    def __init__(self) -> None:
        super().__init__()
        self.trunk: list[nn.Parameter] = []

    def backward(self, step: Step) -> Mapping[str, Tensor]:
        leaves = list(step.leaves)
        rows: list[list[Tensor]] = []
        for loss in step.losses.values():
            loss.backward()
            rows.append([torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves])
            for leaf in leaves:
                leaf.grad = None
        jacobian = [torch.stack(of_map) for of_map in zip(*rows, strict=True)]
        backward(list(step.shared), jac_tensors=jacobian, inputs=self.trunk, parallel_chunk_size=1)
        weights = jac_to_grad(self.trunk, MGDA())
        assert weights is not None
        return dict(zip(step.losses, weights, strict=True))


def _step(workload: Workload, method: Balance, batch: Batch) -> Work:
    state = workload.state(balance=method)
    if isinstance(state.balancer, _JacobianDescent):
        state.balancer.trunk = list(state.net.trunk.parameters())
    return joint_step(state, batch)
