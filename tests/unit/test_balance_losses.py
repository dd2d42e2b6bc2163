"""Loss weightings: values by hand, by autograd and by torch's own Adam; and the random numbers of methods that draw."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract import found, gradients
from torch import Tensor

from visionmtl.balance.base import Balance, LossWeighting, Step
from visionmtl.balance.progress import DWA, FAMO, LDCMTL, EMALoss, GO4Align
from visionmtl.balance.random_numbers import RandomNumbers
from visionmtl.balance.random_weights import RLW
from visionmtl.balance.scalarisations import COSMOS, GLS, PBI, STCH, ScaleInvariant, SoftOptimalUncertainty
from visionmtl.balance.uncertainty import IMTLL, RevisedUncertainty, Uncertainty

ROOT = Path(__file__).parents[2]
NAMES = ["a", "b", "c", "d"]
FIRST, LATER = [1.0, 4.0, 0.5], [0.8, 1.0, 0.45]


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def ruled(method: LossWeighting, *steps: list[float]) -> Tensor:
    """Weights in the last of the steps."""
    rule = method.rule(NAMES[: len(steps[0])])
    present = torch.ones(len(steps[0]), dtype=torch.bool)
    for losses in steps[:-1]:
        rule.update(tensor(losses), present)
    return rule(tensor(steps[-1]), present)


def test_gls_by_hand():
    assert ruled(GLS(), [1.0, 4.0]).tolist() == pytest.approx([1.0, 0.25])


def geometric_mean(losses: Tensor) -> Tensor:
    return losses.log().mean().exp()


def smooth_maximum(losses: Tensor) -> Tensor:
    return 3 * 0.5 * torch.logsumexp((losses / tensor(FIRST)).log() / 0.5, dim=0)


def along_and_off_the_ray(losses: Tensor) -> Tensor:
    relative, ray = losses / tensor(FIRST), tensor([3**-0.5] * 3)
    along = relative @ ray
    return along + 0.5 * (relative - along * ray).norm()


def mean_and_cosine(losses: Tensor) -> Tensor:
    relative = losses / tensor(FIRST)
    return relative.mean() - 0.2 * torch.cosine_similarity(relative, torch.ones_like(relative), dim=0)


SCALARISATIONS: list[tuple[LossWeighting, Callable[[Tensor], Tensor]]] = [
    (GLS(), geometric_mean),
    (ScaleInvariant(), lambda losses: losses.log().sum()),
    (STCH(mu=0.5), smooth_maximum),
    (PBI(theta=0.5), along_and_off_the_ray),
    (COSMOS(penalty=0.2), mean_and_cosine),
]


@pytest.mark.parametrize(("method", "of_losses"), SCALARISATIONS, ids=lambda x: getattr(x, "type", ""))
def test_weights_are_the_derivative_of_the_scalarisation(method: LossWeighting, of_losses: Any):
    losses = tensor(LATER).requires_grad_()
    of_losses(losses).backward()
    assert losses.grad is not None and (losses.grad > 0).all()
    torch.testing.assert_close(ruled(method, FIRST, LATER), losses.grad)


@pytest.mark.parametrize("method", [PBI(theta=50.0), COSMOS(penalty=50.0)], ids=lambda m: m.type)
def test_no_loss_is_raised_on_purpose(method: LossWeighting):
    weights = ruled(method, FIRST, LATER)
    assert (weights >= 0).all() and (weights == 0).any() and weights.sum() > 0


def test_uw_so_by_hand():
    expected = 2 * torch.softmax(tensor([1.0, 0.5]), dim=0)
    torch.testing.assert_close(ruled(SoftOptimalUncertainty(temperature=0.5), [2.0, 4.0]), expected)


def test_dwa_compares_the_last_two_windows():
    method = DWA(steps=2)
    windows = [[3.0, 5.0], [1.0, 3.0], [1.0, 3.0], [1.0, 5.0]]  # means 2 and 4, then 1 and 4
    assert ruled(method, *windows[:3]).tolist() == [1, 1]
    torch.testing.assert_close(ruled(method, *windows, [9.0, 9.0]), 2 * torch.softmax(tensor([0.25, 0.5]), dim=0))


def test_the_moving_average_of_a_loss_by_hand():
    assert ruled(EMALoss(decay=0.75), [4.0, 1.0], [8.0, 1.0], [9.0, 9.0]).tolist() == pytest.approx([1 / 5, 1.0])


def test_famo_is_adam_on_the_changes_of_log_losses():
    """The same by torch's optimiser and autograd; the first step has nothing to compare."""
    rng = np.random.default_rng(0)
    steps = rng.uniform(0.5, 2, (6, 3)).tolist()
    xi = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([xi], lr=0.025, weight_decay=0.01)
    for before, after in pairwise(steps[:-1]):
        adam.zero_grad()
        (xi.softmax(dim=0) @ (tensor(before) / tensor(after)).log()).backward()
        adam.step()
    ratio = xi.detach().softmax(dim=0) / tensor(steps[-1])
    torch.testing.assert_close(ruled(FAMO(), *steps), 3 * ratio / ratio.sum())


def test_ldc_mtl_by_autograd():
    method = LDCMTL(rate=0.1, penalty=3)
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    for losses in (FIRST, LATER):
        weighted = 3 * logits.softmax(dim=0) * tensor(losses) / tensor(FIRST)
        discrepancy = (weighted[:-1] - weighted[1:]).abs().sum()
        (slope,) = torch.autograd.grad(discrepancy, logits)
        logits = (logits - 0.1 * slope).detach().requires_grad_()
    values = tensor(LATER).requires_grad_()
    weighted = 3 * logits.detach().softmax(dim=0) * values / tensor(FIRST)
    ((weighted[:-1] - weighted[1:]).abs().sum() + 3 * weighted.sum()).backward()
    assert values.grad is not None
    torch.testing.assert_close(ruled(method, FIRST, LATER, LATER), values.grad)


def test_go4align_gives_one_weight_to_each_group():
    method = GO4Align(rate=1.0, groups=2)
    weights = ruled(method, [1.0] * 4, [1.0, 0.2, 1.1, 0.1], [9.0] * 4)
    risks = np.exp([2.0, 1.2, 2.1, 1.1])
    risks /= risks.mean()
    high, low = risks[[0, 2]].mean(), risks[[1, 3]].mean()
    assert weights.tolist() == pytest.approx([high, low, high, low])


@pytest.mark.parametrize("name", ["gls", "scale_invariant", "stch", "pbi", "cosmos", "famo", "ldc_mtl", "go4align"])
def test_the_unit_of_a_loss_does_not_matter(name: str):
    """Weighted losses keep their ratios when a loss is measured in a unit 1000 times smaller."""
    method: Any = Balance.members()[name]()
    units = tensor([1.0, 1000.0, 1.0])
    steps = [tensor(FIRST), tensor(LATER), 0.9 * tensor(LATER)]
    plain = ruled(method, *[x.tolist() for x in steps]) * steps[-1]
    other = ruled(method, *[(units * x).tolist() for x in steps]) * units * steps[-1]
    torch.testing.assert_close(other / other.sum(), plain / plain.sum())


def test_random_weights_have_mean_1_and_change_with_the_step_only():
    torch.manual_seed(0)
    rule = RLW().rule(NAMES)
    losses, present = torch.ones(4).double(), torch.ones(4, dtype=torch.bool)
    seen = []
    for _ in range(2000):
        assert torch.equal(rule(losses, present), rule(losses, present))
        seen.append(rule(losses, present))
        rule.update(losses, present)
    weights = torch.stack(seen)
    torch.testing.assert_close(weights.sum(dim=1), torch.full((2000,), 4.0).double())
    torch.testing.assert_close(weights.mean(dim=0), torch.ones(4).double(), rtol=0.1, atol=0)
    assert (weights[1:] != weights[:-1]).all()


LEARNT = {
    Uncertainty(): lambda s, losses: (-s).exp() @ losses + (s / 2).sum(),
    Uncertainty(regression=("a", "c")): lambda s, losses: (-s).exp() * tensor([0.5, 1, 0.5]) @ losses + (s / 2).sum(),
    RevisedUncertainty(): lambda s, losses: (-s).exp() / 2 @ losses + (1 + s.exp()).log().sum(),
    IMTLL(): lambda s, losses: s.exp() @ losses - s.sum(),
}


@pytest.mark.parametrize("method", LEARNT, ids=lambda method: f"{method.type} {getattr(method, 'regression', '')}")
def test_learnt_scales_follow_the_formula_of_the_paper(method: Any):
    balancer: Any = method.build({"a": 1.0, "b": 1.0, "c": 1.0})
    with torch.no_grad():
        balancer.log_variances.copy_(torch.tensor([0.0, 0.7, -0.4]))
    losses = [torch.tensor(value, requires_grad=True) for value in FIRST]
    balancer.backward(Step(dict(zip("abc", losses, strict=True)), [], []))
    scales = tensor([0.0, 0.7, -0.4]).requires_grad_()
    values = tensor(FIRST).requires_grad_()
    LEARNT[method](scales, values).backward()
    torch.testing.assert_close(gradients(balancer)["log_variances"].double(), scales.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.stack([x.grad for x in losses]).double(), values.grad, rtol=1e-5, atol=1e-6)


def test_an_unknown_regression_task_is_an_error():
    with pytest.raises(ValueError, match=r"regression names 'depht' \(did you mean 'depth'\?\); the run has"):
        Uncertainty(regression=("depht",)).build({"depth": 1.0})


def test_draws_are_uniform_independent_and_come_back():
    torch.manual_seed(7)
    draws = RandomNumbers()
    first = draws.uniform(20_000)
    assert first.min() > 0 and first.max() < 1
    assert first.mean() == pytest.approx(0.5, abs=0.01) and first.var() == pytest.approx(1 / 12, abs=0.002)
    state = {name: value.clone() for name, value in draws.state_dict().items()}
    draws.next()
    second = draws.uniform(20_000)
    pairs = torch.stack([first, second, first.roll(1)])
    assert (torch.corrcoef(pairs) - torch.eye(3)).abs().max() < 0.03
    assert torch.equal(draws.uniform(5), second[:5]), "the first numbers do not depend on how many are drawn"
    draws.load_state_dict(state)
    assert torch.equal(draws.uniform(20_000), first)
    signed = draws.signed(20_000)
    assert signed.min() >= -1 and signed.max() < 1 and signed.mean() == pytest.approx(0, abs=0.02)
    assert signed.var() == pytest.approx(1 / 3, abs=0.01)
    draws.next()
    pairs = torch.stack([signed, draws.signed(20_000), signed.roll(1), signed.roll(2)])
    assert (torch.corrcoef(pairs) - torch.eye(4)).abs().max() < 0.03
    draws.load_state_dict(state)
    normal = draws.normal(20_000)
    assert normal.mean() == pytest.approx(0, abs=0.03) and normal.var() == pytest.approx(1, abs=0.03)
    torch.manual_seed(8)
    assert not torch.equal(RandomNumbers().uniform(10), first[:10])


def test_every_method_is_in_the_table_of_the_docs():
    text = (ROOT / "docs" / "balancing.md").read_text(encoding="utf-8")
    assert [p.id for p in found(Balance) if f"| `{p.id}`" not in text] == []


def test_a_state_that_was_saved_without_the_last_losses_is_read():
    saved = DWA().build({"a": 1.0, "b": 1.0}).state_dict()
    saved.pop("latest")
    DWA().build({"a": 1.0, "b": 1.0}).load_state_dict(saved)


def steps_of(balancer: Any, losses: list[tuple[float, float]], apart: bool) -> list[dict[str, float]]:
    """The weights of two tasks at each step; apart: a is labelled in the first micro-batch only, b in the second."""
    found = []
    both = dict.fromkeys("ab", torch.tensor(True))
    for of_step in losses:
        weights: dict[str, float] = {}
        for number in range(2 if apart else 1):
            slopes = [of_step[i] if not apart or i == number else 0.0 for i in range(2)]
            of = {task: torch.tensor(slope, requires_grad=True) * 1 for task, slope in zip("ab", slopes, strict=True)}
            shares = {task: torch.tensor(float(slope != 0)) for task, slope in zip("ab", slopes, strict=True)}
            last = not apart or number == 1
            given = balancer.backward(
                Step(of, [], [], labelled=both, share=0.5 if apart else 1.0, last=last, label_shares=shares)
            )
            weights |= {task: given[task].item() for task, slope in zip("ab", slopes, strict=True) if slope}
        found.append(weights)
    return found


@pytest.mark.parametrize(
    "method",
    [RLW(), DWA(steps=1), SoftOptimalUncertainty(), ScaleInvariant(), FAMO(), STCH(), GLS(), LDCMTL(), EMALoss(),
     GO4Align(), PBI(), COSMOS()],
    ids=lambda method: method.type,
)  # fmt: skip
def test_weights_are_those_of_one_batch_where_micro_batches_label_different_tasks(method: Any):
    losses = [(2.0, 3.0)] * 2 + [(1.5, 2.9)] * 3  # an absent task has its loss of the step before
    once, twice = (steps_of(method.build({"a": 1.0, "b": 1.0}), losses, apart) for apart in (False, True))
    for step in (1, 3, 4):
        assert twice[step] == pytest.approx(once[step], rel=1e-5)
    assert once[3] != {"a": 1.0, "b": 1.0}
