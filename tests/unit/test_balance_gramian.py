"""Gramian methods: values by hand, by independent solvers, and by TorchJD; what each paper promises, and no more."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from contract import found
from scipy.optimize import nnls
from torch import Tensor

from visionmtl.balance.aligned import AlignedMTL
from visionmtl.balance.bargaining import FairGrad, NashMTL
from visionmtl.balance.base import Balance, GramianBalance, Step, TaskGradients
from visionmtl.balance.cagrad import CAGrad
from visionmtl.balance.equal_progress import IMTLG, ConFIG
from visionmtl.balance.lengths import DBMTL, AutoScale, ExcessMTL, GradNorm
from visionmtl.balance.mgda import MGDA, SDMGrad
from visionmtl.balance.pcd import PCD
from visionmtl.balance.solvers import MAX_SUPPORTS, RIDGE, eigen, nonnegative_qp, unit
from visionmtl.balance.surgery import GradVac, PCGrad
from visionmtl.balance.upgrad import DualProj, UPGrad, project

METHODS = {p.id: p.values[0]() for p in found(Balance) if issubclass(p.values[0], GramianBalance)}
every_method = pytest.mark.parametrize("method", [pytest.param(m, id=name) for name, m in METHODS.items()])
NAMES = [f"task {number}" for number in range(12)]


def rows_of(num_tasks: int, ratio: float, conflict: float, seed: int = 0) -> Tensor:
    """float64 [T, 20] gradients, the longest `ratio` times the shortest. conflict: of neighbours, 0 to 1."""
    rng = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_tasks, 20, generator=rng, dtype=torch.float64)
    signs = torch.tensor([(-1.0) ** i for i in range(num_tasks)], dtype=torch.float64)[:, None]
    rows = (1 - conflict) * rows + conflict * signs * rows[0]
    lengths = torch.logspace(0, np.log10(ratio), num_tasks, dtype=torch.float64)[
        torch.randperm(num_tasks, generator=rng)
    ]
    return rows / rows.norm(dim=1, keepdim=True) * lengths[:, None]


CASES = [
    pytest.param(rows_of(num, ratio, conflict, seed), id=f"{num} tasks, 1:{ratio:g}, conflict {conflict}")
    for seed, (num, ratio, conflict) in enumerate(itertools.product((2, 3, 8), (1.0, 30.0, 1000.0), (0.0, 0.6)))
]
every_case = pytest.mark.parametrize("rows", CASES)


def seen(gramian: Tensor, losses: Any = None, present: Any = None) -> TaskGradients:
    num_tasks = len(gramian)
    losses = torch.ones(num_tasks) if losses is None else torch.tensor(losses)
    present = gramian.diagonal() != 0 if present is None else torch.tensor(present)
    return TaskGradients(gramian.double(), present, losses.double(), present)


def weights_of(method: GramianBalance, rows: Tensor, losses: Any = None) -> Tensor:
    """Of a first step."""
    weighting = method.weighting(NAMES[: len(rows)])
    return weighting(seen(rows @ rows.T, losses))


def with_ridge(rows: Tensor) -> Tensor:
    """The Gramian that the solvers see."""
    gramian = rows @ rows.T
    return gramian + RIDGE * torch.diag(gramian.diagonal())


def gains(rows: Tensor, weights: Tensor) -> Tensor:
    """How fast each loss falls, in units of its own gradient's length times the direction's."""
    direction = weights @ rows
    return (rows @ direction) / rows.norm(dim=1) / direction.norm().clamp(min=1e-300)


# ---- values ----


@every_case
def test_mgda_is_the_shortest_mixture(rows: Tensor):
    """The conditions of Karush, Kuhn and Tucker, which only the minimum meets."""
    w = weights_of(MGDA(), rows)
    assert (w >= 0).all() and w.sum() == pytest.approx(1, abs=1e-12)
    inner = with_ridge(rows) @ w
    square = w @ inner
    # each task improves by at least the square of the length, those with weight by just that
    assert (inner - square >= -1e-9 * square).all()
    assert (w * (inner - square)).abs().max() <= 1e-9 * square


def test_mgda_of_two_tasks_by_hand():
    rows = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    torch.testing.assert_close(weights_of(MGDA(), rows), torch.tensor([0.8, 0.2]).double(), atol=1e-5, rtol=0)


@every_case
def test_sdmgrad_minimises_its_objective(rows: Tensor):
    pull, num = 0.3, len(rows)
    w = weights_of(SDMGrad(pull=pull), rows) * (1 + pull) - pull / num
    assert (w >= -1e-9).all() and w.sum() == pytest.approx(1, abs=1e-9)
    slope = (rows @ rows.T) @ (w + pull / num)
    least = slope.min()
    assert (w * (slope - least)).abs().max() <= 1e-5 * (slope.abs().max() + slope.abs() @ w)


@every_case
def test_cagrad_has_no_gap_between_its_problem_and_the_dual(rows: Tensor):
    """A feasible direction whose worst improvement equals the dual's value is the best one."""
    c, num = 0.4, len(rows)
    weights = weights_of(CAGrad(c=c), rows)
    mean = rows.mean(dim=0)
    direction = weights @ rows
    radius = c * mean.norm()
    assert (direction - mean).norm() <= radius * (1 + 1e-9)
    w = weights - 1 / num
    w = w / w.sum()
    mixed = w @ rows
    dual = mixed @ mean + radius * mixed.norm()
    assert (w >= -1e-9).all()
    assert (rows @ direction).min() >= dual - 1e-5 * (dual.abs() + radius * rows.norm(dim=1).min())


@every_case
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 5.0])
def test_fair_shares_solve_their_equation(rows: Tensor, alpha: float):
    w = weights_of(FairGrad(alpha=alpha), rows)
    assert (w > 0).all()
    torch.testing.assert_close(
        (with_ridge(rows) @ w) * w ** (1 / alpha), torch.ones(len(rows)).double(), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(
        ((rows @ rows.T) @ w) * w ** (1 / alpha), torch.ones(len(rows)).double(), rtol=1e-3, atol=0
    )


@every_case
def test_nash_is_fairgrad_with_alpha_1(rows: Tensor):
    torch.testing.assert_close(weights_of(NashMTL(), rows), weights_of(FairGrad(alpha=1), rows), rtol=1e-10, atol=0)


def test_nash_of_orthogonal_gradients_by_hand():
    rows = torch.diag(torch.tensor([1.0, 10.0, 100.0])).double()
    torch.testing.assert_close(weights_of(NashMTL(), rows), torch.tensor([1, 0.1, 0.01]).double(), rtol=1e-6, atol=0)


def test_fairgrad_of_opposed_gradients_goes_on_growing_only_as_far_as_the_ridge():
    rows = torch.tensor([[1.0, 0.0], [-1.0, 1e-9]]).double()
    w = weights_of(FairGrad(), rows)
    assert w.isfinite().all() and (w > 0).all()


@every_case
def test_imtl_g_has_equal_projections(rows: Tensor):
    w = weights_of(IMTLG(), rows)
    assert w.sum().abs() == pytest.approx(1, abs=1e-9)
    projections = gains(rows, w)
    assert (projections >= 0).all()
    torch.testing.assert_close(projections, projections.mean().expand_as(projections), rtol=1e-3, atol=1e-6)


@every_case
def test_config_is_the_pseudo_inverse_of_unit_gradients(rows: Tensor):
    units = (rows / rows.norm(dim=1, keepdim=True)).numpy()
    best = np.linalg.pinv(units) @ np.ones(len(rows))
    best /= np.linalg.norm(best)
    expected = (rows.numpy() @ best).sum() * best
    np.testing.assert_allclose(
        (weights_of(ConFIG(), rows) @ rows).numpy(), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max()
    )


@every_case
def test_aligned_mtl_is_the_sum_of_orthogonal_gradients_of_the_smallest_singular_value(rows: Tensor):
    left, values, right = np.linalg.svd(rows.numpy(), full_matrices=False)
    expected = values.min() * (left @ right).sum(axis=0)
    np.testing.assert_allclose(
        (weights_of(AlignedMTL(), rows) @ rows).numpy(), expected, rtol=1e-6, atol=1e-7 * np.abs(expected).max()
    )


@every_case
def test_dualproj_is_the_projection_of_the_sum(rows: Tensor):
    lengths = rows.norm(dim=1).numpy()
    root = (rows / rows.norm(dim=1, keepdim=True)).numpy().T
    extra = nnls(root, -root @ lengths, maxiter=1000)[0]
    expected = rows.numpy().T @ ((lengths + extra) / lengths)
    np.testing.assert_allclose(
        (weights_of(DualProj(), rows) @ rows).numpy(), expected, rtol=1e-3, atol=2e-3 * np.abs(expected).max()
    )


def test_pcgrad_of_two_tasks_by_hand():
    rows = torch.tensor([[1.0, 0.0], [-1.0, 1.0]]).double()
    # g1 + g2 / 2 and g2 + g1
    torch.testing.assert_close(weights_of(PCGrad(), rows), torch.tensor([2, 1.5]).double(), rtol=1e-5, atol=0)


@every_case
def test_pcgrad_is_its_algorithm_for_one_of_the_orders(rows: Tensor):
    """On the vectors themselves, task by task, in the orders that the generator gave."""
    torch.manual_seed(3)
    weighting: Any = PCGrad().weighting(NAMES[: len(rows)])
    chance = weighting.draws.uniform(len(rows), len(rows))
    direction = weighting(seen(rows @ rows.T)) @ rows
    total = torch.zeros_like(rows[0])
    for i, gradient in enumerate(rows.clone()):
        for j in chance[i].argsort().tolist():
            if j != i and gradient @ rows[j] < 0:
                gradient = gradient - (gradient @ rows[j]) / rows[j].square().sum() * rows[j]
        total += gradient
    torch.testing.assert_close(direction, total, rtol=1e-4, atol=1e-5 * float(total.abs().max()))


@every_case
def test_gradvac_is_its_algorithm(rows: Tensor):
    torch.manual_seed(3)
    weighting: Any = GradVac(rate=0.5).weighting(NAMES[: len(rows)])
    units = rows / rows.norm(dim=1, keepdim=True)
    usual = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for _ in range(3):
        chance = weighting.draws.uniform(len(rows), len(rows))
        direction = weighting(seen(rows @ rows.T)) @ rows
        total = torch.zeros_like(rows[0])
        for i, gradient in enumerate(rows.clone()):
            for j in chance[i].argsort().tolist():
                phi = gradient @ units[j] / gradient.norm()
                if j != i and phi < usual[i, j]:
                    p = usual[i, j]
                    turn = gradient.norm() * (p * (1 - phi**2).sqrt() - phi * (1 - p**2).sqrt()) / (1 - p**2).sqrt()
                    gradient = gradient + turn * units[j]
            total += gradient
        torch.testing.assert_close(direction, total, rtol=1e-4, atol=1e-5 * float(total.abs().max()))
        usual = 0.5 * usual + 0.5 * (units @ units.T)


@every_case
def test_pcd_gives_every_other_task_its_share(rows: Tensor):
    tau = 0.1
    weighting: Any = PCD(tau=tau).weighting(NAMES[: len(rows)])
    direction = weighting(seen(rows @ rows.T)) @ rows
    assert direction.norm() == pytest.approx(float(rows[0].norm()), rel=1e-5)
    units = rows / rows.norm(dim=1, keepdim=True)  # in the first step the average is the square itself
    # d = h1 + a mixture of the others, m >= 0, so that the constraints hold, with equality where m > 0 (KKT)
    m, *_ = np.linalg.lstsq(units.numpy().T, direction.numpy(), rcond=None)
    m = m / m[0]
    d = torch.from_numpy(m) @ units
    slack = (units @ d - tau)[1:]
    assert (m[1:] >= -1e-6).all() and (slack >= -1e-4).all()
    assert (torch.from_numpy(m[1:]) * slack).abs().max() < 1e-3


def test_pcd_of_two_tasks_by_hand():
    rows = torch.tensor([[2.0, 0.0], [-3.0, 3.0]]).double()
    # unit: h1 = (1, 0), h2 = (-1, 1) / 2^.5; d = h1 + m h2 with h2 . d = tau: m = tau + 2^-.5
    tau = 0.1
    m = tau + 0.5**0.5
    unit_rows = rows / rows.norm(dim=1, keepdim=True)
    expected = unit_rows[0] + m * unit_rows[1]
    got = weights_of(PCD(tau=tau), rows) @ rows
    torch.testing.assert_close(got, 2 * expected / expected.norm(), rtol=1e-5, atol=1e-6)


def test_pcd_drops_constraints_that_contradict_each_other():
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]).double()
    torch.testing.assert_close(weights_of(PCD(), rows), torch.tensor([1.0, 0, 0]).double(), atol=1e-6, rtol=0)


def test_pcd_follows_the_task_that_it_is_told():
    rows = rows_of(3, 10, 0.6)
    direction = weights_of(PCD(primary="task 2", tau=0), rows) @ rows
    assert gains(rows, weights_of(PCD(primary="task 2", tau=0), rows))[2] > 0
    assert direction.norm() == pytest.approx(float(rows[2].norm()))
    with pytest.raises(ValueError, match=r"primary is 'task two'.*name one of them"):
        PCD(primary="task two").weighting(NAMES[:3])


@every_case
def test_db_mtl_makes_all_gradients_as_long_as_the_longest(rows: Tensor):
    lengths = weights_of(DBMTL(), rows) * rows.norm(dim=1)
    torch.testing.assert_close(lengths, rows.norm(dim=1).max().expand_as(lengths))


@every_case
def test_autoscale_measures_and_then_fixes_weights_under_which_lengths_are_equal(rows: Tensor):
    weighting = AutoScale(steps=2).weighting(NAMES[: len(rows)])
    for factor in (0.5, 2.0):  # geometric mean 1
        assert (weighting(seen(rows @ rows.T * factor**2)) == 1).all()
    weights = weighting(seen(rows @ rows.T * 99))
    assert weights.mean() == pytest.approx(1)
    lengths = weights * rows.norm(dim=1)
    torch.testing.assert_close(lengths, lengths.mean().expand_as(lengths))
    torch.testing.assert_close(weighting(seen(rows @ rows.T)), weights, rtol=0, atol=0)


def test_gradnorm_moves_by_hand():
    weighting: Any = GradNorm(alpha=1, rate=0.1).weighting(NAMES[:2])
    gramian = torch.diag(torch.tensor([1.0, 9.0]))  # lengths 1 and 3
    assert weighting(seen(gramian, [1.0, 1.0])).tolist() == [1, 1]
    # both have progressed alike: the mean is 2, the first is too short, the second too long; slopes -1/2 and 3/2
    moved = torch.tensor([1.05, 0.85]).double()
    torch.testing.assert_close(weighting(seen(gramian, [1.0, 1.0])), moved * 2 / 1.9)


def test_excess_mtl_by_hand():
    weighting: Any = ExcessMTL(rate=1.0).weighting(NAMES[:2])
    gramian = torch.diag(torch.tensor([1.0, 4.0]))
    assert weighting(seen(gramian)).tolist() == [1, 1]  # both excess risks are 1 relative to themselves
    # again: the sums of squares double, so the excess of both falls to 2^-.5; with no gradient any more it is 0
    after = weighting(seen(torch.diag(torch.tensor([1.0, 1e-12]))))
    grown = torch.tensor([float(np.exp(0.5**0.5)), 1.0]).double()
    torch.testing.assert_close(after, grown / grown.mean(), rtol=1e-5, atol=0)


@every_case
def test_gradnorm_follows_the_slope_of_its_loss(rows: Tensor):
    """Over three steps with losses that fall unevenly, by differentiating what the paper minimises."""
    alpha, rate, num = 1.5, 0.05, len(rows)
    rows = rows * torch.linspace(1, 1.3, num).double()[:, None]  # where all are equally long the slope has a step
    weighting: Any = GradNorm(alpha=alpha, rate=rate).weighting(NAMES[:num])
    weights, lengths = torch.ones(num, dtype=torch.float64), rows.norm(dim=1)
    for step in range(3):
        losses = [1.0 / (1 + step * (1 + number)) for number in range(num)]
        torch.testing.assert_close(weighting(seen(rows @ rows.T, losses)), weights)
        learnt = weights.clone().requires_grad_()
        inverse_rate = torch.tensor(losses, dtype=torch.float64)
        target = (learnt * lengths).mean().detach() * (inverse_rate / inverse_rate.mean()) ** alpha
        (learnt * lengths - target).abs().sum().backward()
        weights = (weights - rate * learnt.grad / lengths.mean()).clamp(min=0.01)
        weights = weights / weights.mean()


@every_case
def test_excess_mtl_is_its_algorithm(rows: Tensor):
    rate, num = 0.3, len(rows)
    weighting: Any = ExcessMTL(rate=rate).weighting(NAMES[:num])
    weights, squares, first = [1.0] * num, [0.0] * num, [0.0] * num
    for step in range(4):
        now = rows * torch.tensor([0.8 ** (step * number) for number in range(num)]).double()[:, None]
        for i in range(num):
            square = float(now[i] @ now[i])
            squares[i] += square
            excess = square / squares[i] ** 0.5
            first[i] = first[i] or excess
            weights[i] *= float(np.exp(rate * excess / first[i]))
        weights = [weight * num / sum(weights) for weight in weights]
        torch.testing.assert_close(weighting(seen(now @ now.T)), torch.tensor(weights).double())


# ---- the solvers ----


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 4, 5, 8, 11])
def test_eigenvalues_and_vectors_are_those_of_lapack(num_tasks: int):
    rows = rows_of(num_tasks, 1000.0, 0.3)
    gramian = rows @ rows.T
    values, vectors = eigen(gramian)
    torch.testing.assert_close(
        values.sort()[0], torch.linalg.eigvalsh(gramian), rtol=1e-9, atol=1e-9 * float(values.max())
    )
    torch.testing.assert_close(
        vectors @ torch.diag(values) @ vectors.T, gramian, rtol=1e-9, atol=1e-12 * float(values.max())
    )
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(num_tasks).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_tasks", [2, 6, 9])
def test_a_quadratic_problem_with_bounds_is_solved_as_by_scipy(num_tasks: int):
    of = unit(rows_of(num_tasks, 10.0, 0.5) @ rows_of(num_tasks, 10.0, 0.5).T)
    right = torch.randn(4, num_tasks, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    root = np.linalg.cholesky(of.cosines.numpy()).T
    expected = [nnls(root, np.linalg.solve(root.T, b), maxiter=1000)[0] for b in right.numpy()]
    np.testing.assert_allclose(nonnegative_qp(of.cosines, right).numpy(), np.stack(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", [CAGrad(), SDMGrad()])
def test_a_method_that_tries_all_subsets_says_how_many_tasks_are_too_many(method: GramianBalance):
    with pytest.raises(ValueError, match=f"{MAX_SUPPORTS + 1} tasks.*up to {MAX_SUPPORTS}.*such as upgrad"):
        method.weighting(NAMES[: MAX_SUPPORTS + 1])


# ---- what papers promise ----

NO_CONFLICT = ("mgda", "upgrad", "dualproj", "nash", "fairgrad", "config", "imtl_g")
SCALE_FREE = ("nash", "config", "imtl_g", "db_mtl")  # the direction, when single gradients change their lengths
ORDERED = ("pcd", "pcgrad", "gradvac")  # one task is the first, or the order is random
LEARNT = ("gradnorm", "autoscale", "excess_mtl")  # the first step has weights 1


@pytest.mark.parametrize("name", NO_CONFLICT)
@every_case
def test_no_task_is_hurt(name: str, rows: Tensor):
    assert gains(rows, weights_of(METHODS[name], rows)).min() >= -1e-4


@pytest.mark.parametrize("rows", [case for case in CASES if len(case.values[0]) == 2])
def test_pcgrad_hurts_no_task_where_there_are_two(rows: Tensor):
    assert gains(rows, weights_of(PCGrad(), rows)).min() >= -1e-6


@pytest.mark.parametrize("method", [UPGrad(), DualProj(), PCGrad()])
@every_case
def test_without_conflict_the_sum_stays(method: GramianBalance, rows: Tensor):
    alike = rows.abs()
    assert (alike @ alike.T >= 0).all()
    torch.testing.assert_close(weights_of(method, alike), torch.ones(len(rows)).double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", sorted(set(METHODS) - set(LEARNT) - {"pcd", "aligned_mtl", *NO_CONFLICT}))
def test_others_do_not_promise_that(name: str):
    """A case for each in which a task is hurt, so that the list above is as long as it may be."""
    assert any(gains(p.values[0], weights_of(METHODS[name], p.values[0])).min() < -1e-3 for p in CASES)


@every_method
@every_case
def test_an_absent_task_is_as_good_as_removed(method: GramianBalance, rows: Tensor):
    if method.type in ("pcgrad", "gradvac"):
        rows = rows[:2]  # so that no random order comes in
    expected = weights_of(method, rows, [2.0] * len(rows))
    for at in (1, len(rows)):  # before it stands the task that PCD takes as the first
        kept = torch.tensor([i for i in range(len(rows) + 1) if i != at])
        gramian = torch.zeros(len(rows) + 1, len(rows) + 1, dtype=torch.float64)
        gramian[kept[:, None], kept] = rows @ rows.T
        weights = method.weighting(NAMES[: len(rows) + 1])(seen(gramian, [2.0] * (len(rows) + 1)))
        torch.testing.assert_close(weights[kept], expected, rtol=1e-5, atol=1e-8)


@every_method
def test_without_any_task_nothing_fails_and_no_state_is_spoilt(method: GramianBalance):
    weighting = method.weighting(NAMES[:3])
    weighting(seen(torch.zeros(3, 3), [0.0, 0.0, 0.0]))
    rows = rows_of(3, 10, 0.6)
    assert weighting(seen(rows @ rows.T)).isfinite().all()


@every_method
def test_a_single_task_gets_a_positive_weight(method: GramianBalance):
    for length in (1e-3, 1.0, 1e3):
        assert method.weighting(["only"])(seen(torch.tensor([[length**2]]))) > 0


@pytest.mark.parametrize("name", sorted(set(METHODS) - set(ORDERED)))
@every_case
def test_the_order_of_the_tasks_does_not_matter(name: str, rows: Tensor):
    turned = torch.arange(len(rows)).roll(1)
    expected = weights_of(METHODS[name], rows)
    direction = weights_of(METHODS[name], rows[turned]) @ rows[turned]
    torch.testing.assert_close(direction, expected @ rows, rtol=1e-4, atol=1e-6 * float((expected @ rows).abs().max()))


@pytest.mark.parametrize("name", SCALE_FREE)
@every_case
def test_the_length_of_a_single_gradient_does_not_change_the_direction(name: str, rows: Tensor):
    longer = rows * torch.logspace(-1, 1, len(rows)).double()[:, None]
    one, other = ((weights_of(METHODS[name], x) @ x) for x in (rows, longer))
    torch.testing.assert_close(one / one.norm(), other / other.norm(), rtol=1e-3, atol=1e-4)


@every_method
@pytest.mark.parametrize("factor", [1e-4, 1e4])
@every_case
def test_all_gradients_longer_change_no_direction(method: GramianBalance, factor: float, rows: Tensor):
    torch.manual_seed(0)
    one = weights_of(method, rows) @ rows
    torch.manual_seed(0)
    other = weights_of(method, rows * factor) @ rows
    torch.testing.assert_close(one / one.norm(), other / other.norm(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mgda", "imtl_g", "config"])
@every_case
def test_a_duplicated_task_changes_no_direction(name: str, rows: Tensor):
    twice = torch.cat([rows, rows[:1]])
    one, other = ((weights_of(METHODS[name], x) @ x) for x in (rows, twice))
    torch.testing.assert_close(one / one.norm(), other / other.norm(), rtol=1e-3, atol=1e-3)


@every_case
def test_a_duplicated_task_counts_twice_in_upgrad(rows: Tensor):
    twice = torch.cat([rows, rows[:1]])
    expected = weights_of(UPGrad(), rows) @ rows + project(rows @ rows.T)[0] @ rows
    torch.testing.assert_close(
        weights_of(UPGrad(), twice) @ twice, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())
    )


@every_case
def test_the_ends_of_a_setting_are_other_methods(rows: Tensor):
    def direction(method: GramianBalance) -> Tensor:
        return weights_of(method, rows) @ rows

    mean = rows.mean(dim=0)
    scale = float(mean.abs().max())
    torch.testing.assert_close(direction(SDMGrad(pull=0)), direction(MGDA()), rtol=1e-4, atol=1e-5 * scale)
    torch.testing.assert_close(direction(SDMGrad(pull=1e6)), mean, rtol=1e-4, atol=1e-5 * scale)
    torch.testing.assert_close(direction(CAGrad(c=1e-6)), mean, rtol=1e-4, atol=1e-5 * scale)


# ---- parity ----


def _torchjd() -> Any:
    return pytest.importorskip("torchjd.aggregation")


@every_case
@pytest.mark.parametrize(
    ("name", "theirs", "factor"),
    [
        ("mgda", lambda jd: jd.MGDA(epsilon=1e-9, max_iters=10000), 1),
        ("imtl_g", lambda jd: jd.IMTLG(), 1),
        ("config", lambda jd: jd.ConFIG(), 1),
        ("aligned_mtl", lambda jd: jd.AlignedMTL(), "mean"),
        ("pcd", lambda jd: jd.PCD(), 1),
        ("fairgrad", lambda jd: jd.FairGrad(alpha=METHODS["fairgrad"].alpha), 1),
        ("pcgrad", lambda jd: jd.PCGrad(), 1),
        ("gradvac", lambda jd: jd.GradVac(), 1),
    ],
)
def test_torchjd_gives_the_same_direction(name: str, theirs: Any, factor: Any, rows: Tensor):
    if name == "mgda" and len(rows) > 3:
        pytest.skip("Frank-Wolfe needs seconds for 8 tasks; the tests above compare with SLSQP")
    if name in ORDERED[1:] and len(rows) > 2:
        pytest.skip("each draws its own orders, which matter from three tasks on")
    expected = theirs(_torchjd())(rows)
    got = weights_of(METHODS[name], rows) @ rows
    if factor == "mean":  # its preference is 1 / T
        got = got / len(rows)
    if name == "imtl_g":
        got = got * (got @ expected).sign()  # where its weights have a negative sum, every task is hurt
    tolerance = 2e-2 if name == "mgda" else 1e-4  # Frank-Wolfe comes near slowly
    assert (got - expected).norm() <= tolerance * expected.norm() + tolerance * float(name == "mgda") * rows.norm(
        dim=1
    ).min()


@pytest.mark.parametrize("method", [GradNorm(rate=0.1), ExcessMTL(rate=0.1), AutoScale(steps=2)], ids=lambda m: m.type)
def test_methods_with_a_state_learn_from_all_micro_batches(method: Any):
    """Task a is labelled in the first micro-batch only, b in the second: as one batch with the images of both."""
    images, slopes = torch.randn(2, 6), {"a": torch.full((6,), 5.0), "b": torch.full((6,), 0.1)}
    both, states = dict.fromkeys("ab", torch.tensor(True)), []
    for apart in (False, True):
        balancer = method.build({"a": 1.0, "b": 1.0})
        for number_of_step in range(1, 5):
            for number in range(2 if apart else 1):
                read = images[number : number + 1] if apart else images
                shared = [read.clone().requires_grad_()]
                leaf = shared[0].detach().requires_grad_()
                of = {"a": leaf[0] @ slopes["a"], "b": number_of_step * (leaf[-1] @ slopes["b"])}
                if apart:
                    of["ab"[1 - number]] = 0 * leaf.sum()
                shares = {task: torch.tensor(1.0 if not apart or task == "ab"[number] else 0.0) for task in "ab"}
                step = Step(
                    of, [shared[0] * 1], [leaf], labelled=both, share=0.5 if apart else 1.0,
                    last=not apart or number == 1, label_shares=shares,
                )  # fmt: skip
                balancer.backward(step)
        states.append(balancer.weighting.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-5, atol=1e-7)
    assert any((value != states[0][name][0]).any() for name, value in states[1].items() if value.dim() == 1)
