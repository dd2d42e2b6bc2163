"""What every balancing method does where one task is pure noise, or is there twice; minutes instead of trainings.

    python docs/examples/noise_and_copies.py

Three regressions of 24 numbers each from 40 shared numbers, with losses of different units (1, 10 and 0.1), that cannot
all be met. A method gives the direction of 120 steps of falling length. The noise task asks for numbers that are drawn
anew at each step; the copy is the third task again. Printed are means over seeds: the share that is left of the three
tasks' losses, without noise and with it; the pull of noise, its weight times the length of its gradient, relative to
the mean of the three tasks' (second half of the steps); and what is left of the third task's loss where it counts
twice, relative to where it counts once.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from visionmtl.balance.base import Balance, Step
from visionmtl.benchmark.figures import Cell, Table, markdown

NUM_SHARED, NUM_WANTED, STEPS = 40, 24, 120
UNITS = {"a": 1.0, "b": 10.0, "c": 0.1}
NOISE, COPY = "noise", "c again"


class Problem:
    """Shared numbers and what the tasks want of them."""

    def __init__(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.maps = {task: self.draw(NUM_WANTED, NUM_SHARED) / NUM_SHARED**0.5 for task in (*UNITS, NOISE)}
        self.wanted = {task: self.draw(NUM_WANTED) for task in UNITS}
        self.start = self.draw(NUM_SHARED)

    def draw(self, *shape: int) -> Tensor:
        """Normal numbers."""
        return torch.randn(*shape, generator=self.random)

    def loss(self, task: str, shared: Tensor) -> Tensor:
        """Mean squared error in the task's unit."""
        task = "c" if task == COPY else task
        wanted = self.draw(NUM_WANTED) if task == NOISE else self.wanted[task]
        return UNITS.get(task, 1.0) * (self.maps[task] @ shared - wanted).square().mean()


def train(method: Balance, tasks: Sequence[str], seed: int) -> tuple[dict[str, float], float]:
    """What is left of the losses, by task, and the pull of noise, see above (0 without)."""
    torch.manual_seed(seed)
    problem = Problem(seed)
    shared = problem.start.clone()
    balancer = method.build(dict.fromkeys(tasks, 1.0))
    learnt = torch.optim.SGD(balancer.parameters(), lr=0.05) if list(balancer.parameters()) else None
    pulls = []
    for step in range(STEPS):
        values = shared.clone().requires_grad_()
        map_ = values.view(1, -1) * 1
        leaf = map_.detach().requires_grad_() if balancer.needs_cut else map_
        losses = {task: problem.loss(task, leaf[0]) for task in tasks}
        lengths = {task: torch.autograd.grad(loss, leaf, retain_graph=True)[0].norm() for task, loss in losses.items()}
        cut = ([map_], [leaf]) if balancer.needs_cut else ([], [])
        weights = balancer.backward(Step(losses, *cut))
        if learnt:
            learnt.step()
            learnt.zero_grad()
        assert values.grad is not None
        shared = shared - 0.3 * (1 - step / STEPS) * values.grad / values.grad.norm().clamp(min=1e-12)
        if NOISE in tasks and step >= STEPS // 2:
            pull = {task: float(weights[task] * lengths[task]) for task in tasks}
            pulls.append(pull[NOISE] / max(np.mean([abs(pull[task]) for task in UNITS]), 1e-12))
    left = {task: float(problem.loss(task, shared) / problem.loss(task, problem.start)) for task in UNITS}
    return left, float(np.mean(pulls or 0))


def main() -> None:
    """Print the table."""
    known, seeds = Balance.members(), range(4)
    body: list[list[Cell]] = []
    for name, kind in known.items():
        plain, noisy, twice = (
            [train(kind(), tasks, seed) for seed in seeds] for tasks in (UNITS, (*UNITS, NOISE), (*UNITS, COPY))
        )
        means = [np.mean([list(left.values()) for left, _ in runs]) for runs in (plain, noisy)]
        of_copy = np.mean([after["c"] / before["c"] for (after, _), (before, _) in zip(twice, plain, strict=True)])
        body.append([name, *map(float, means), float(np.mean([pull for _, pull in noisy])), float(of_copy)])
    heads = ("method", "loss", "with noise", "pull of noise", "c, twice / once")
    print(markdown(Table("Three regressions", heads, body)))


if __name__ == "__main__":
    main()
