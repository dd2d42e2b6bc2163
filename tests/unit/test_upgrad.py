"""UPGrad's projection: against an independent solver, at any ratio of lengths, at its edges, and without waiting."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from visionmtl.balance import solvers
from visionmtl.balance.solvers import RIDGE
from visionmtl.balance.upgrad import project


def upgrad_weights(gramian: Tensor) -> Tensor:
    return project(gramian).sum(dim=0)


def random(rng: torch.Generator, num_tasks: int) -> Tensor:
    return torch.randn(num_tasks, 12, generator=rng, dtype=torch.float64)


def opposed(rng: torch.Generator, num_tasks: int) -> Tensor:
    signs = torch.tensor([(-1.0) ** i for i in range(num_tasks)])[:, None]
    return signs * random(rng, 1) + 1e-3 * random(rng, num_tasks)


def parallel(rng: torch.Generator, num_tasks: int) -> Tensor:
    return torch.arange(1.0, num_tasks + 1)[:, None] * random(rng, 1)


def one_zero(rng: torch.Generator, num_tasks: int) -> Tensor:
    return torch.cat([torch.zeros(1, 12), random(rng, num_tasks)[1:]])


def huge(rng: torch.Generator, num_tasks: int) -> Tensor:
    return 1e8 * random(rng, num_tasks)


def unequal(rng: torch.Generator, num_tasks: int) -> Tensor:
    return torch.logspace(-2, 2, num_tasks)[:, None] * random(rng, num_tasks)


def solved(gramian: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """What `project` should give, by Lawson and Hanson's method in scipy, and the matrix C + ridge of unit lengths."""
    length = gramian.diagonal().sqrt().numpy()
    length[length == 0] = 1
    c = gramian.numpy() / length / length[:, None]
    np.fill_diagonal(c, 1 + RIDGE)
    root = np.linalg.cholesky(c).T
    unit = np.eye(len(c))
    y = np.stack([nnls(root, -root[:, i], maxiter=1000)[0] + unit[i] for i in range(len(c))])
    return y * length[:, None] / length, c


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 8, 11, 24])
@pytest.mark.parametrize("gradients", [random, opposed, parallel, one_zero, huge, unequal])
def test_it_agrees_with_an_independent_solver(gradients: Any, num_tasks: int):
    rows = gradients(torch.Generator().manual_seed(num_tasks), num_tasks).double()
    gramian = rows @ rows.T

    v = project(gramian)

    assert (v >= torch.eye(num_tasks) - 1e-8).all()
    expected, c = solved(gramian)
    length = gramian.diagonal().sqrt().numpy()
    length[length == 0] = 1
    unit = length / length[:, None]  # back to gradients of length 1, in which both were solved
    y, y_expected = v.numpy() * unit, expected * unit
    # the ridge leaves a condition of up to 1e7, so the entries agree to fewer digits than what is minimised
    np.testing.assert_allclose(y, y_expected, rtol=1e-6, atol=1e-6)
    costs, least = (((x @ c) * x).sum(axis=1) for x in (y, y_expected))
    np.testing.assert_allclose(costs, least, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("gradients", [random, opposed, parallel, one_zero, unequal])
def test_both_methods_give_the_same(gradients: Any, monkeypatch: pytest.MonkeyPatch):
    rows = gradients(torch.Generator().manual_seed(0), 6).double()
    gramian = rows @ rows.T
    by_splits = project(gramian)
    monkeypatch.setattr(solvers, "MAX_SPLITS", 0)
    torch.testing.assert_close(project(gramian), by_splits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_others", [0, 9])
@pytest.mark.parametrize("ratio", [1.0, 10.0, 100.0, 1e3, 1e4])
def test_a_task_with_a_short_gradient_is_not_hurt_by_a_long_one(ratio: float, num_others: int):
    """In float32, as in training; two gradients nearly cancel, and of these one is `ratio` times longer."""
    for seed in range(10):
        rng = torch.Generator().manual_seed(seed)
        first, noise, *others = torch.randn(2 + num_others, 1000, generator=rng)
        rows = torch.stack([ratio * first, 1e-3 * noise - first, *others])
        gramian = rows @ rows.T

        weights = upgrad_weights(gramian).double()

        gains = rows.double() @ (weights @ rows.double()) / rows.double().square().sum(dim=1)
        # each projected gradient may cost r * RIDGE; the rest is the rounding of the Gramian and the weights to float32
        assert gains.min() > -(2e-4 + 8e-7 * ratio)


def test_two_opposed_gradients_leave_each_other_alone_by_hand():
    gramian = torch.tensor([[1.0, -1.0], [-1.0, 4.0]])  # g2 = -g1 and something across
    # g1 minus its part along g2: v = (1, 1/4); g2 minus its part along g1: v = (1, 1)
    torch.testing.assert_close(project(gramian), torch.tensor([[1.0, 0.25], [1.0, 1.0]]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_tasks", [5, 12])
def test_gradients_that_do_not_conflict_are_added_as_they_are(num_tasks: int):
    rows = torch.rand(num_tasks, 12, generator=torch.Generator().manual_seed(0))  # all in one quadrant
    torch.testing.assert_close(project(rows @ rows.T), torch.eye(num_tasks), atol=1e-7, rtol=0)


@pytest.mark.parametrize("num_tasks", [3, 12])
def test_without_any_gradient_every_task_keeps_weight_1(num_tasks: int):
    assert upgrad_weights(torch.zeros(num_tasks, num_tasks)).tolist() == pytest.approx([1.0] * num_tasks)


@pytest.mark.parametrize("num_absent", [1, 9])
def test_absent_tasks_change_nothing_for_the_others(num_absent: int):
    rows = torch.tensor([[3.0, 0, 1], [-2.0, 0.1, 0], [0.3, -1, -1]])
    gramian = rows @ rows.T
    size = 3 + num_absent
    padded = torch.zeros(size, size)
    padded[:3, :3] = gramian

    weights = upgrad_weights(padded)

    torch.testing.assert_close(weights[:3], upgrad_weights(gramian), rtol=1e-5, atol=0)
    assert weights[3:].tolist() == pytest.approx([1.0] * num_absent)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("num_tasks", [3, 12])
@pytest.mark.parametrize("at", [(0, 0), (2, 1)])
def test_a_value_that_is_not_finite_is_never_a_weight_that_is(at: tuple[int, int], num_tasks: int, value: float):
    gramian = torch.eye(num_tasks)
    gramian[at] = gramian[at[::-1]] = value
    assert upgrad_weights(gramian).isnan().all()


class _Operators(TorchDispatchMode):
    """Collects every operator that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("num_tasks", [4, 12])
def test_nothing_in_it_needs_a_value_to_go_on(num_tasks: int):
    waiting = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    checks = ("_local_scalar_dense", "nonzero", "is_nonzero", "_linalg_check_errors")

    with _Operators() as operators:
        project(torch.eye(num_tasks))
        torch.eye(1).item()

    found = [func for func in operators.found if waiting & set(func.tags) or func.name().split("::")[1] in checks]
    assert [func.name() for func in found] == ["aten::_local_scalar_dense"], "only our own item()"
