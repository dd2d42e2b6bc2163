"""Balancing methods: the contract for each on disk, and what the papers promise of each."""

from typing import Any

import pytest
import torch
from contract import found, gradients
from torch import Tensor, nn

from visionmtl.balance.base import Balance, Balancer, GramianBalance, Step
from visionmtl.balance.fixed import Fixed
from visionmtl.balance.uncertainty import Uncertainty
from visionmtl.balance.upgrad import UPGrad

METHODS = [pytest.param(p.values[0](), id=p.id) for p in found(Balance)]
GRAMIAN = [p for p in METHODS if isinstance(p.values[0], GramianBalance)]
METHODS += [pytest.param(p.values[0].model_copy(update={"heads": "weighted"}), id=f"{p.id} weighted") for p in GRAMIAN]
every_method = pytest.mark.parametrize("method", METHODS)
WEIGHTS = {"a": 1.0, "b": 0.5, "c": 2.0}


class Toy(nn.Module):
    """A trunk with two shared maps and a decoder for each task; the tasks want different things of the trunk."""

    def __init__(self, tasks: tuple[str, ...] = ("a", "b", "c")) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.ModuleList([nn.Linear(5, 4), nn.Linear(5, 3)])
        self.decoders = nn.ModuleDict({task: nn.Linear(7, 2) for task in tasks})
        self.image, self.wanted = torch.randn(6, 5), {task: torch.randn(6, 2) * 3 for task in tasks}

    def step(self, cut: bool, scale: float = 1.0, labels: float = 1.0) -> Step:
        shared = [layer(self.image) for layer in self.trunk]
        leaves = [m.detach().requires_grad_() for m in shared] if cut else shared
        read = torch.cat(leaves, dim=1)
        losses = {
            task: labels * (decoder(read) - self.wanted[task]).square().mean()
            for task, decoder in self.decoders.items()
        }
        for m in shared:
            m.retain_grad()
        labelled = dict.fromkeys(losses, torch.tensor(labels > 0))
        return Step(losses, shared, leaves, scale, labelled=labelled)


def trained(method: Balance, toy: Toy, **kwargs: Any) -> tuple[dict[str, Tensor], dict[str, Tensor], Balancer, Step]:
    """Gradients of the network and of the balancer after one backward."""
    balancer = method.build({task: WEIGHTS[task] for task in toy.decoders})
    step = toy.step(balancer.needs_cut, **kwargs)
    balancer.backward(step)
    return gradients(toy), gradients(balancer), balancer, step


def single(toy: Toy) -> dict[str, dict[str, Tensor]]:
    """By task: the gradients of its own loss alone."""
    found = {}
    for task in toy.decoders:
        toy.step(cut=False).losses[task].backward()
        found[task] = gradients(toy)
    return found


def on_shared(toy: Toy) -> Tensor:
    """[T, N] gradients of the weighted losses on the shared maps."""
    step = toy.step(cut=True)
    rows = [torch.autograd.grad(WEIGHTS[t] * loss, step.leaves, retain_graph=True) for t, loss in step.losses.items()]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def combined(step: Step) -> Tensor:
    return torch.cat([m.grad.flatten() for m in step.shared])


@every_method
def test_every_gradient_is_filled(method: Balance):
    of_net, of_balancer, balancer, step = trained(method, Toy())
    assert all(g.isfinite().all() and g.any() for g in (of_net | of_balancer).values())
    weights = balancer.backward(Toy().step(balancer.needs_cut))
    assert list(weights) == list(step.losses)
    assert all(w.shape == () and w.isfinite() and not w.requires_grad for w in weights.values())


@every_method
def test_the_loss_scale_multiplies_every_gradient(method: Balance):
    plain, scaled = (trained(method, Toy(), scale=scale)[:2] for scale in (1.0, 1024.0))
    torch.testing.assert_close(scaled, tuple({k: g * 1024 for k, g in part.items()} for part in plain))


@every_method
def test_gradients_add_up_over_micro_batches(method: Balance):
    toy = Toy()
    once, _, balancer, _ = trained(method, toy)
    for _ in range(2):
        balancer.backward(toy.step(balancer.needs_cut, scale=0.5))
    torch.testing.assert_close(gradients(toy), once)


@every_method
def test_one_task_alone_is_trained_by_its_own_gradient(method: Balance):
    toy = Toy(("c",))
    got, wanted = trained(method, toy)[0], single(toy)["c"]
    for name, gradient in got.items():
        cosine = torch.cosine_similarity(gradient.flatten(), wanted[name].flatten(), dim=0)
        assert cosine.item() == pytest.approx(1, abs=1e-5)


@every_method
def test_a_step_without_any_label_moves_nothing(method: Balance):
    of_net, of_balancer, *_ = trained(method, Toy(), labels=0.0)
    assert not any(g.any() for g in (of_net | of_balancer).values())


@every_method
def test_a_balancer_comes_back_from_its_state(method: Balance):
    _, _, balancer, _ = trained(method, Toy())
    for parameter in balancer.parameters():
        parameter.data += 0.3
    other = method.build(WEIGHTS)
    other.load_state_dict(balancer.state_dict())
    first, second = ({k: v.clone() for k, v in b.backward(Toy().step(b.needs_cut)).items()} for b in (balancer, other))
    assert first == second


def test_fixed_is_exactly_the_gradient_of_the_weighted_sum():
    toy = Toy()
    got = trained(Fixed(), toy)[0]
    sum(WEIGHTS[task] * loss for task, loss in toy.step(cut=False).losses.items()).backward()  # type: ignore[union-attr]
    assert all(torch.equal(got[name], gradient) for name, gradient in gradients(toy).items())


@pytest.mark.parametrize("method", GRAMIAN)
def test_decoders_learn_from_their_own_loss_or_from_the_weighted_one(method: GramianBalance):
    toy, alone = Toy(), single(Toy())
    for heads in ("raw", "weighted"):
        balancer = method.model_copy(update={"heads": heads}).build(WEIGHTS)
        weights = balancer.backward(toy.step(cut=True))
        got = gradients(toy)
        for task in WEIGHTS:
            factor = WEIGHTS[task] if heads == "raw" else weights[task]
            name = f"decoders.{task}.weight"
            torch.testing.assert_close(got[name], factor * alone[task][name])


@pytest.mark.parametrize("method", GRAMIAN)
def test_the_trunk_learns_from_the_weighted_sum_of_the_tasks(method: GramianBalance):
    toy, alone = Toy(), single(Toy())
    weights = method.build(WEIGHTS).backward(toy.step(cut=True))
    got = gradients(toy)
    for name in ("trunk.0.weight", "trunk.1.bias"):
        torch.testing.assert_close(got[name], sum(weights[task] * alone[task][name] for task in WEIGHTS))


def test_upgrad_hurts_no_task_where_the_plain_sum_does():
    toy = Toy()
    toy.wanted["b"] = -3 * toy.wanted["c"]
    toy.decoders["b"].load_state_dict(toy.decoders["c"].state_dict())
    rows = on_shared(toy)
    assert (rows @ rows.sum(0)).min() < 0, "the plain sum hurts a task"

    step = trained(UPGrad(), toy)[3]

    gains = rows @ combined(step)
    assert (gains >= -1e-5 * rows.norm(dim=1) * combined(step).norm()).all() and gains.max() > 0


def test_upgrad_without_a_conflict_is_the_plain_sum():
    toy = Toy()
    for task in ("b", "c"):
        toy.decoders[task].load_state_dict(toy.decoders["a"].state_dict())
        toy.wanted[task] = toy.wanted["a"]
    torch.testing.assert_close(combined(trained(UPGrad(), toy)[3]), on_shared(toy).sum(0))


@pytest.mark.parametrize("size", [1e-8, 1.0, 1e8])
def test_upgrad_does_not_mind_how_large_gradients_are(size: float):
    conflict = torch.tensor([[1.0, -0.8], [-0.8, 1.0]])
    torch.testing.assert_close(UPGrad().weighting(2)(conflict * size), torch.tensor([1.8, 1.8]), rtol=1e-4, atol=0)


def test_gradients_that_overflowed_stay_visible_to_the_loss_scaler():
    toy = Toy()
    got = trained(UPGrad(), toy, scale=1e38)[0]
    assert not all(g.isfinite().all() for g in got.values()), "the scaler skips the step; nothing is raised"


def test_uncertainty_is_the_formula_of_the_paper():
    balancer = Uncertainty().build(WEIGHTS)
    with torch.no_grad():
        balancer.log_variances.copy_(torch.tensor([0.0, 0.7, -0.4]))  # type: ignore[union-attr,operator]
    step = Toy().step(cut=False)
    balancer.backward(step)
    s = torch.tensor([0.0, 0.7, -0.4])
    losses = torch.stack([WEIGHTS[task] * loss.detach() for task, loss in step.losses.items()])
    torch.testing.assert_close(gradients(balancer)["log_variances"], -(-s).exp() * losses + 0.5)


def test_a_task_nobody_labelled_keeps_its_uncertainty():
    toy, balancer = Toy(), Uncertainty().build(WEIGHTS)
    step = toy.step(cut=False)
    losses = dict(step.losses) | {"b": step.losses["b"] * 0}
    labelled = {task: torch.tensor(task != "b") for task in losses}
    balancer.backward(Step(losses, step.shared, step.leaves, labelled=labelled))
    assert (gradients(balancer)["log_variances"] != 0).tolist() == [True, False, True]
