"""Balancing methods: the contract for each on disk, and what the papers promise of each."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from contract import found, gradients
from torch import Tensor, nn

from visionmtl.balance.base import Balance, Balancer, GramianBalance, Step, _combine
from visionmtl.balance.fixed import Fixed
from visionmtl.balance.graddrop import GradDrop
from visionmtl.balance.uncertainty import Uncertainty
from visionmtl.balance.upgrad import UPGrad

METHODS = [pytest.param(p.values[0](), id=p.id) for p in found(Balance)]
GRAMIAN = [p for p in METHODS if isinstance(p.values[0], GramianBalance)]
CHANGES = {
    "heads": {"heads": "weighted"},
    "parameters": {"level": "parameters"},
    "parameters, heads": {"level": "parameters", "heads": "weighted"},
    "smoothed": {"smoothing": 0.7},
    "initial": {"loss_scale": "initial"},
}
METHODS += [
    pytest.param(p.values[0].model_copy(update=change), id=f"{p.id}, {name}")
    for p in GRAMIAN
    for name, change in CHANGES.items()
    if p.id in ("upgrad", "pcgrad") or name in ("heads", "parameters")  # the rest is common to all
]
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

    def step(self, cut: bool, scale: float = 1.0, labels: float = 1.0, last: bool = True) -> Step:
        shared = [layer(self.image) for layer in self.trunk]
        leaves = [m.detach().requires_grad_() for m in shared] if cut else shared
        read = torch.cat(leaves, dim=1)
        losses = {
            task: labels * (decoder(read) - self.wanted[task]).square().mean()
            for task, decoder in self.decoders.items()
        }
        if cut:
            for m in shared:
                m.retain_grad()
        labelled = dict.fromkeys(losses, torch.tensor(labels > 0))
        shared_parameters, levels = list(self.trunk.parameters()), (3, 4) if cut else ()
        return Step(
            losses, shared if cut else [], leaves if cut else [], scale, labelled, last=last,
            shared_parameters=shared_parameters, levels=levels, parameters=list(self.parameters()),
        )  # fmt: skip


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
    toy, balancer = Toy(), method.build(WEIGHTS)
    state = {name: value.clone() for name, value in balancer.state_dict().items()}
    balancer.backward(toy.step(balancer.needs_cut))
    once = gradients(toy)
    balancer = method.build(WEIGHTS)
    balancer.load_state_dict(state)
    for last in (False, True):
        balancer.backward(toy.step(balancer.needs_cut, scale=0.5, last=last))
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


def after(balancer: Balancer, number: int) -> dict[str, Tensor]:
    """Weights of step `number`, in which everything differs from the step before."""
    toy = Toy()
    for task, factor in zip(WEIGHTS, (0.1, 0.5, -0.2), strict=True):
        toy.wanted[task] = toy.wanted[task] * (1 + factor * number)
    return {k: v.clone() for k, v in balancer.backward(toy.step(balancer.needs_cut)).items()}


@every_method
def test_a_balancer_comes_back_from_its_state(method: Balance):
    torch.manual_seed(1)
    balancer = method.build(WEIGHTS)
    for parameter in balancer.parameters():
        parameter.data += 0.3
    for number in range(3):
        after(balancer, number)
    torch.manual_seed(2)
    other = method.build(WEIGHTS)
    other.load_state_dict(balancer.state_dict())
    for number in range(3, 6):
        assert after(balancer, number) == after(other, number)


@every_method
def test_a_step_that_is_not_finite_gives_no_weight_and_leaves_the_state(method: Balance):
    balancer = method.build(WEIGHTS)
    after(balancer, 0)
    state = {name: value.clone() for name, value in balancer.state_dict().items()}
    toy = Toy()
    toy.wanted["b"][0, 0] = torch.nan

    weights = balancer.backward(toy.step(balancer.needs_cut))

    assert not all(g.isfinite().all() for name, g in gradients(toy).items() if name.startswith("trunk"))
    if method.type != "graddrop":  # its counter goes on
        torch.testing.assert_close(balancer.state_dict(), state, rtol=0, atol=0)
    if isinstance(method, GramianBalance):
        assert all(weight.isnan() for weight in weights.values())


@every_method
def test_a_micro_batch_before_the_last_leaves_the_state(method: Balance):
    balancer = method.build(WEIGHTS)
    after(balancer, 0)
    state = {name: value.clone() for name, value in balancer.state_dict().items()}

    balancer.backward(Toy().step(balancer.needs_cut, last=False))

    torch.testing.assert_close(balancer.state_dict(), state, rtol=0, atol=0)


@every_method
def test_a_task_without_a_label_teaches_nothing_and_disturbs_nobody(method: Balance):
    """The others get what they would get without it, where no random numbers and no order of tasks come in."""
    toy, balancer = Toy(), method.build(WEIGHTS)
    step = toy.step(balancer.needs_cut)
    losses = dict(step.losses) | {"b": step.losses["b"] * 0}
    labelled = {task: torch.tensor(task != "b") for task in losses}
    with_it = balancer.backward(replace(step, losses=losses, labelled=labelled))
    got = gradients(toy)
    assert all(g.isfinite().all() for g in got.values()) and not got["decoders.b.weight"].any()

    if method.type in ("rlw", "graddrop"):
        return
    balancer = method.build({task: WEIGHTS[task] for task in ("a", "c")})
    step = toy.step(balancer.needs_cut)
    without = balancer.backward(replace(step, losses={task: step.losses[task] for task in ("a", "c")}))
    torch.testing.assert_close({task: with_it[task] for task in without}, dict(without))
    alone = gradients(toy)
    torch.testing.assert_close(
        {k: got[k] for k in alone if k.startswith("trunk")}, {k: v for k, v in alone.items() if k.startswith("trunk")}
    )


@pytest.mark.parametrize("method", [p for p in METHODS if "," not in p.id or p.id.startswith("upgrad")])
def test_every_method_teaches_every_task_with_half_the_labels(method: Balance):
    """The even steps have labels of a and b, the odd ones of b and c."""
    toy, balancer = Toy(), method.build(WEIGHTS)
    optimizer = torch.optim.Adam([*toy.parameters(), *balancer.parameters()], lr=0.05)
    before = {task: float(loss) for task, loss in toy.step(cut=False).losses.items()}
    for number in range(80):
        step = toy.step(balancer.needs_cut)
        labelled = {task: torch.tensor(task == "b" or (task == "a") == (number % 2 == 0)) for task in WEIGHTS}
        losses = {task: loss * labelled[task] for task, loss in step.losses.items()}
        balancer.backward(replace(step, losses=losses, labelled=labelled))
        optimizer.step()
        optimizer.zero_grad()
    left = {task: float(loss) / before[task] for task, loss in toy.step(cut=False).losses.items()}
    assert max(left.values()) < 0.6, left


def test_fixed_is_exactly_the_gradient_of_the_weighted_sum():
    toy = Toy()
    got = trained(Fixed(), toy)[0]
    sum(WEIGHTS[task] * loss for task, loss in toy.step(cut=False).losses.items()).backward()  # type: ignore[union-attr]
    assert all(torch.equal(got[name], gradient) for name, gradient in gradients(toy).items())


@pytest.mark.parametrize("method", GRAMIAN)
@pytest.mark.parametrize("level", ["maps", "parameters"])
def test_decoders_learn_from_their_own_loss_or_from_the_weighted_one(method: GramianBalance, level: str):
    toy, alone = Toy(), single(Toy())
    for heads in ("raw", "weighted"):
        balancer = method.model_copy(update={"heads": heads, "level": level, "loss_scale": "none"}).build(WEIGHTS)
        weights = balancer.backward(toy.step(balancer.needs_cut))
        got = gradients(toy)
        for task in WEIGHTS:
            factor = WEIGHTS[task] if heads == "raw" else weights[task]
            name = f"decoders.{task}.weight"
            torch.testing.assert_close(got[name], factor * alone[task][name])


@pytest.mark.parametrize("method", GRAMIAN)
@pytest.mark.parametrize("changes", [{}, *CHANGES.values()], ids=["plain", *CHANGES])
def test_the_trunk_learns_from_the_weighted_sum_of_the_tasks(method: GramianBalance, changes: dict[str, Any]):
    toy, alone = Toy(), single(Toy())
    balancer = method.model_copy(update=changes).build(WEIGHTS)
    weights = balancer.backward(toy.step(balancer.needs_cut))
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
    balancer.backward(replace(step, losses=losses, labelled=labelled))
    assert (gradients(balancer)["log_variances"] != 0).tolist() == [True, False, True]


@pytest.mark.parametrize("leak", [0.0, 0.25])
@pytest.mark.parametrize("lengths", [(1, 2), (1, 2, 0.5), (1000, 1, 30, 1, 0.03, 2, 1, 7)])
def test_graddrop_keeps_one_sign_at_each_place_as_the_paper_writes_it(leak: float, lengths: tuple[float, ...]):
    """One map [B, C]: the masked gradients arrive at the map; against a loop over places."""
    torch.manual_seed(3)
    balancer = GradDrop(leak=leak).build(dict(zip("abcdefgh", map(float, lengths), strict=False)))
    image = torch.randn(3, 50, requires_grad=True)
    shared = image * 1
    leaf = shared.detach().requires_grad_()
    slopes = dict(zip("abcdefgh", torch.randn(len(lengths), 3, 50), strict=False))
    for slope in slopes.values():  # all signs agree: nothing is dropped
        slope[:, 0] = slopes["a"][:, 0].abs() * leaf[:, 0].detach().sign()
    chance = (balancer.draws.signed(50) + 1) / 2
    balancer.backward(Step({task: (slope * leaf).sum() for task, slope in slopes.items()}, [shared], [leaf]))

    expected = torch.zeros(3, 50)
    gradients = [length * slope for length, slope in zip(lengths, slopes.values(), strict=True)]
    for place in range(50):
        sums = [float((leaf[:, place].sign() * gradient[:, place]).sum()) for gradient in gradients]
        positive = 0.5 * (1 + sum(sums) / sum(map(abs, sums))) > float(chance[place])
        for value, gradient in zip(sums, gradients, strict=True):
            expected[:, place] += gradient[:, place] * (1.0 if (value > 0) == positive else leak)
    torch.testing.assert_close(image.grad, expected)
    torch.testing.assert_close(image.grad[:, 0], sum(lengths) * slopes["a"][:, 0])


def test_weights_beyond_float16_reach_gradients_of_float16():
    leaf = torch.zeros(2, dtype=torch.float16)
    gradients = [[torch.tensor([1e-5, 2e-5], dtype=torch.float16)], [None]]
    (found,) = _combine(gradients, [leaf], torch.tensor([2e5, 1.0], dtype=torch.float64))
    assert found.dtype == torch.float16
    torch.testing.assert_close(found, 2e5 * gradients[0][0].double(), check_dtype=False, rtol=1e-3, atol=0)
