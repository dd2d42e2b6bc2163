"""The projection on the cone that hurts no task: against an independent solver, at its edges, and without waiting."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import lsq_linear
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from visionmtl.ops.cone import MAX_TASKS, project

RIDGE = 1e-6  # the default of `project`, relative to the mean of the diagonal


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


def solved(u: Tensor, gramian: Tensor) -> np.ndarray:
    """min |L'v|^2 over v >= u with L L' = G / mean + ridge, by the active-set method of Stark and Parker in scipy."""
    size = gramian.diagonal().mean().item() or 1.0
    root = torch.linalg.cholesky(gramian / size + RIDGE * torch.eye(len(u), dtype=torch.float64))
    found = lsq_linear(root.T.numpy(), np.zeros(len(u)), (u.numpy(), np.inf), method="bvls", tol=1e-14)
    assert found.success
    return found.x


@pytest.mark.parametrize("num_tasks", range(1, 9))
@pytest.mark.parametrize("gradients", [random, opposed, parallel, one_zero, huge])
def test_it_agrees_with_an_independent_solver_and_grants_every_wish(gradients: Any, num_tasks: int):
    rng = torch.Generator().manual_seed(num_tasks)
    rows = gradients(rng, num_tasks).double()
    gramian = rows @ rows.T
    wishes = torch.cat([torch.eye(num_tasks), torch.randn(3, num_tasks, generator=rng)]).double()

    v = project(wishes, gramian)

    assert (v >= wishes - 1e-8).all()
    for u, found in zip(wishes, v, strict=True):
        expected = solved(u, gramian)
        # the ridge leaves a condition of up to 1e7, so the entries agree to fewer digits than what is minimised
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
        size = gramian.diagonal().mean() + (gramian == 0).all()
        cost, least = (float(x @ (gramian / size).numpy() @ x + RIDGE * x @ x) for x in (found.numpy(), expected))
        assert cost == pytest.approx(least, rel=1e-8, abs=1e-12)


def test_two_opposed_gradients_leave_each_other_alone_by_hand():
    gramian = torch.tensor([[1.0, -1.0], [-1.0, 4.0]])  # g2 = -g1 and something across
    v = project(torch.eye(2), gramian)
    # g1 minus its part along g2: v = (1, 1/4); g2 minus its part along g1: v = (1, 1)
    torch.testing.assert_close(v, torch.tensor([[1.0, 0.25], [1.0, 1.0]]), atol=1e-5, rtol=0)


def test_no_gradient_is_hurt_by_a_projected_one():
    rng = torch.Generator().manual_seed(0)
    rows = opposed(rng, 5)
    gramian = rows @ rows.T / (rows @ rows.T).diagonal().mean()
    v = project(torch.eye(5, dtype=torch.float64), gramian)
    assert (v @ gramian >= -1e-5).all(), "up to the ridge"


def test_wishes_that_do_not_conflict_come_back_as_they_are():
    rows = torch.rand(5, 12, generator=torch.Generator().manual_seed(0))  # all in one quadrant
    wishes = torch.cat([torch.eye(5), torch.ones(1, 5)])
    torch.testing.assert_close(project(wishes, rows @ rows.T), wishes, atol=1e-7, rtol=0)


def test_without_any_gradient_the_wishes_come_back():
    assert torch.equal(project(torch.eye(3), torch.zeros(3, 3)), torch.eye(3))


def test_more_tasks_than_it_can_split_are_an_error():
    with pytest.raises(ValueError, match=r"found 11 tasks; .* so 10 are allowed; choose a balancing method without"):
        project(torch.eye(MAX_TASKS + 1), torch.eye(MAX_TASKS + 1))


class _Operators(TorchDispatchMode):
    """Collects every operator that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.append(func)
        return func(*args, **(kwargs or {}))


def test_nothing_in_it_needs_a_value_to_go_on():
    waiting = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    checks = ("_local_scalar_dense", "nonzero", "is_nonzero", "_linalg_check_errors")

    with _Operators() as operators:
        project(torch.eye(4), torch.eye(4))
        torch.eye(1).item()

    found = [func for func in operators.found if waiting & set(func.tags) or func.name().split("::")[1] in checks]
    assert [func.name() for func in found] == ["aten::_local_scalar_dense"], "only our own item()"
