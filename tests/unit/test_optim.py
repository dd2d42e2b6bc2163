"""The optimiser: who learns how fast, when, and what the moving average holds."""

import pytest
import timm
import torch
from pydantic import ValidationError
from torch import nn

from visionmtl.engine.optim import (
    Ema,
    build_optimizer,
    clip_next_step,
    layers,
    load_moments,
    lr_factor,
    num_warmup_steps,
    parameter_groups,
    set_lr,
    skip_next_step,
)  # fmt: skip
from visionmtl.modeling.encoder import Encoder
from visionmtl.run import Optim


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        stages = [nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)) for _ in range(3)]
        self.body = nn.ModuleDict({"conv1": nn.Conv2d(3, 4, 1), "layers": nn.ModuleList(stages)})


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = _Encoder()
        self.decoder = nn.Conv2d(4, 1, 1)

    def encoders(self) -> list[nn.Module]:
        return [module for module in self.modules() if isinstance(module, _Encoder)]


def rates(spec: Optim, net: nn.Module, balancer: nn.Module | None = None) -> dict[int, tuple[float, float]]:
    """(learning rate, weight decay) by id of the parameter."""
    groups = parameter_groups(spec, net, balancer)
    return {id(p): (group["base_lr"], group["weight_decay"]) for group in groups for p in group["params"]}


def test_every_trainable_parameter_is_in_exactly_one_group():
    net, balancer = _Net(), nn.ParameterDict({"depth": nn.Parameter(torch.zeros(2, 2))})
    net.decoder.bias.requires_grad_(False)

    found = [id(p) for group in parameter_groups(Optim(layer_decay=0.5), net, balancer) for p in group["params"]]

    expected = [id(p) for p in (*net.parameters(), *balancer.parameters()) if p.requires_grad]
    assert sorted(found) == sorted(expected)


def test_biases_norms_and_the_balancer_do_not_decay():
    net, balancer = _Net(), nn.ParameterDict({"depth": nn.Parameter(torch.zeros(2, 2))})

    found = rates(Optim(weight_decay=0.1), net, balancer)

    decaying = {id(m.weight) for m in net.modules() if isinstance(m, nn.Conv2d)}
    assert {key for key, (_, decay) in found.items() if decay == 0.1} == decaying
    assert found[id(balancer["depth"])] == (2e-4, 0.0)


@pytest.mark.parametrize(
    ("name", "options", "exempt"),
    [
        ("test_vit", {}, ("pos_embed", "cls_token", "reg_token")),
        ("vit_small_patch14_reg4_dinov2", {"depth": 1}, ("pos_embed", "cls_token", "reg_token")),
        ("beit_base_patch16_224", {"depth": 1}, ("cls_token", "relative_position_bias_table")),
        (
            "swin_tiny_patch4_window7_224",
            {"embed_dim": 24, "num_heads": (1, 2, 4, 8)},
            ("relative_position_bias_table",),
        ),
        ("swinv2_tiny_window8_256", {"embed_dim": 24, "num_heads": (1, 2, 4, 8)}, ("logit_scale", "cpb_mlp")),
        ("test_maxvit", {}, ("relative_position_bias_table",)),
        ("levit_128s", {}, ("attention_biases",)),
        ("tiny_vit_5m_224", {}, ("attention_biases",)),
        ("test_nfnet", {}, ("gain",)),
        ("xcit_nano_12_p16_224", {}, ("temperature", "cls_token", "pos_embed")),
        ("resnet18", {}, ()),
    ],
)
def test_what_timm_trains_without_decay_does_not_decay(name: str, options: dict, exempt: tuple[str, ...]):
    net = nn.Module()
    net.encoder = Encoder(name=name, options=options).build((64, 64))

    found = rates(Optim(), net)

    parameters = dict(net.encoder.named_parameters())
    undecayed = {key for key, p in parameters.items() if found[id(p)][1] == 0}
    wide = {key for key in undecayed if parameters[key].ndim > 1}
    known = ("gamma", *exempt)  # layer scales; all others that decay not are what is named here
    assert all(any(part in key for part in known) for key in wide), wide
    for part in exempt:
        matching = {key for key in parameters if part in key}
        assert (matching or part in ("reg_token", "cls_token", "pos_embed")) and matching <= undecayed
    kernels = {key for key, p in parameters.items() if p.ndim > 1 and not any(part in key for part in known)}
    assert kernels and not kernels & undecayed


def test_a_kernel_of_one_output_channel_decays():
    layer = nn.Conv2d(8, 1, 1)
    assert rates(Optim(weight_decay=0.1), layer)[id(layer.weight)][1] == 0.1


def test_the_last_encoder_layer_has_the_encoder_rate_and_each_before_it_a_fraction():
    net = _Net()
    found = rates(Optim(lr=1.0, encoder_lr_factor=0.5, layer_decay=0.1), net)

    stages = net.encoder.body["layers"]
    assert found[id(net.decoder.weight)][0] == 1.0
    expected = zip([net.encoder.body["conv1"], *(stage[0] for stage in stages)], (3, 2, 1, 0), strict=True)
    for conv, below_top in expected:
        assert found[id(conv.weight)][0] == pytest.approx(0.5 * 0.1**below_top)


def test_copies_of_the_encoder_learn_as_the_encoder_does():
    net = _Net()
    net.second = _Encoder()
    found = rates(Optim(lr=1.0, encoder_lr_factor=0.5), net)
    assert {found[id(p)][0] for p in net.second.parameters()} == {0.5}


@pytest.mark.parametrize(
    ("name", "count"), [("resnet18", 9), ("convnext_atto", 16), ("vit_tiny_patch16_224", 13), ("pvt_v2_b0", 12)]
)
def test_layers_of_timm_models_are_their_blocks_in_order(name: str, count: int):
    with torch.device("meta"):
        body = timm.create_model(name, features_only=True)

    found = layers(body)

    assert len(found) == count and next(iter(found)) == "stem"
    assert [id(p) for of_layer in found.values() for p in of_layer] == [id(p) for p in body.parameters()]


@pytest.mark.parametrize("name", ["vgg11", "vgg11_bn"])
def test_layers_of_one_flat_sequence_are_its_convolutions(name: str):
    with torch.device("meta"):
        body = timm.create_model(name, features_only=True)

    by_layer = layers(body)

    assert len(by_layer) == 8 and next(iter(by_layer)) == "features_0"
    assert [sum(p.ndim > 1 for p in of_layer) for of_layer in by_layer.values()] == [1] * 8
    assert [id(p) for of_layer in by_layer.values() for p in of_layer] == [id(p) for p in body.parameters()]


def test_layer_decay_over_one_layer_is_an_error():
    net = nn.Module()
    net.encoder = nn.Conv2d(3, 8, 3)
    net.encoders = lambda: [net.encoder]
    with pytest.raises(
        ValueError, match=r"layer_decay is 0.5, but the encoder has 1 layer.*; remove optim.layer_decay"
    ):
        parameter_groups(Optim(layer_decay=0.5), net)


def test_settings_of_a_frozen_encoder_are_errors():
    net = _Net()
    net.encoder.requires_grad_(False)
    with pytest.raises(ValueError, match=r"encoder_lr_factor is 0.1, but the whole encoder is frozen.*set it to 1"):
        parameter_groups(Optim(encoder_lr_factor=0.1), net)

    net.encoder.body["layers"][-1].requires_grad_(True)  # has the encoder's rate, which layer_decay leaves as it is
    assert rates(Optim(lr=1.0, encoder_lr_factor=0.1), net)[id(net.encoder.body["layers"][-1][0].weight)][0] == 0.1
    with pytest.raises(ValueError, match=r"layer_decay is 0.5, but .* all of it below its last layer.*set it to null"):
        parameter_groups(Optim(layer_decay=0.5), net)


def test_a_net_without_encoder_rejects_encoder_settings():
    with pytest.raises(ValueError, match="has no `encoders`"):
        parameter_groups(Optim(encoder_lr_factor=0.1), nn.Linear(2, 2))


def test_a_frozen_net_is_an_error():
    with pytest.raises(ValueError, match="nothing is trainable"):
        build_optimizer(Optim(), nn.Linear(2, 2).requires_grad_(False))


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_step_moves_and_the_factor_scales_it(name: str):
    moved = []
    for factor in (1.0, 0.1):
        layer = nn.Linear(3, 1, bias=False)
        nn.init.ones_(layer.weight)
        optimizer = build_optimizer(Optim(name=name, lr=0.1, weight_decay=0), layer)
        set_lr(optimizer, factor)
        layer.weight.grad = torch.ones_like(layer.weight)
        optimizer.step()
        moved.append(float(1 - layer.weight.detach().mean()))
    # sgd: Nesterov's first step is (1 + momentum) times the gradient
    assert moved == pytest.approx([0.1, 0.01] if name == "adamw" else [0.19, 0.019], rel=1e-4)


@pytest.mark.parametrize("settings", [{"name": "adamw"}, {"name": "sgd"}, {"name": "sgd", "momentum": 0}])
def test_a_first_step_that_is_skipped_leaves_no_trace(settings: dict, monkeypatch):
    monkeypatch.setattr(torch, "empty_like", lambda x, **_: torch.full_like(x, torch.nan))  # what memory may hold
    weights = []
    for gradients in ((torch.inf, 1.0, 2.0), (1.0, 2.0)):
        layer = nn.Linear(3, 1)
        nn.init.ones_(layer.weight)
        optimizer = build_optimizer(Optim(**settings, lr=0.1), layer)
        for gradient in gradients:
            layer.weight.grad = torch.full_like(layer.weight, gradient)
            skip_next_step(optimizer, ~layer.weight.grad.norm().isfinite())
            optimizer.step()
        weights.append(layer.weight.detach())
    assert weights[0].isfinite().all() and torch.equal(*weights)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("largest", [0.5, 1e3])
def test_a_clipped_step_is_that_of_clipped_gradients(name: str, largest: float):
    torch.manual_seed(0)
    weights, norms = [], []
    gradients = torch.randn(3, 4, 3, 3, 3)
    for clipped_by_torch in (True, False):
        layer = nn.Conv2d(3, 4, 3, bias=False)
        nn.init.ones_(layer.weight)
        optimizer = build_optimizer(Optim(name=name, lr=0.1), layer)
        for gradient in gradients:
            layer.weight.grad = gradient.clone()
            if clipped_by_torch:
                norms.append(nn.utils.clip_grad_norm_(layer.parameters(), largest))
            else:
                norms.append(clip_next_step(optimizer, largest))
            optimizer.step()
        weights.append(layer.weight.detach())
    torch.testing.assert_close(*weights)
    torch.testing.assert_close(norms[:3], norms[3:])
    torch.testing.assert_close(norms[0], gradients[0].square().sum().sqrt())


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_steps_do_not_depend_on_how_weights_and_moments_lie_in_memory(name: str):
    torch.manual_seed(0)
    gradients, start = torch.randn(4, 5, 3, 2, 4), torch.randn(5, 3, 2, 4)
    spec, ends = Optim(name=name, lr=0.1), []
    for before in (torch.contiguous_format, torch.channels_last):
        for after in (torch.contiguous_format, torch.channels_last):
            layer = nn.Conv2d(3, 5, (2, 4), bias=False)
            layer.weight.data.copy_(start)
            layer.to(memory_format=before)
            optimizer = build_optimizer(spec, layer)
            for number, gradient in enumerate(gradients):
                if number == 2:
                    moments = optimizer.state_dict()
                    layer.to(memory_format=after)
                    optimizer = build_optimizer(spec, layer)
                    load_moments(optimizer, moments)
                layer.weight.grad = torch.empty_like(layer.weight).copy_(gradient)
                optimizer.step()
            ends.append(layer.weight.detach().clone())
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0])


def test_adamw_reads_a_gradient_that_does_not_lie_as_its_weight():
    torch.manual_seed(0)
    gradient, ends = torch.randn(5, 3, 2, 4), []
    for gradient_format in (torch.channels_last, torch.contiguous_format):
        layer = nn.Conv2d(3, 5, (2, 4), bias=False).to(memory_format=torch.channels_last)
        nn.init.ones_(layer.weight)
        layer.weight.grad = gradient.contiguous(memory_format=gradient_format)
        build_optimizer(Optim(lr=0.1), layer).step()
        ends.append(layer.weight.detach())
    assert torch.equal(*ends)


def test_warm_up_is_linear_and_counts_steps_or_epochs():
    by_steps = [lr_factor(Optim(schedule="constant", warmup_steps=4), step, 10) for step in range(6)]
    by_epochs = [lr_factor(Optim(schedule="constant", warmup_epochs=0.5), step, 10, 8) for step in range(6)]
    assert by_steps == by_epochs == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert num_warmup_steps(Optim(warmup_epochs=0.02), 20) == 1, "a warm-up that is set has a step"


@pytest.mark.parametrize("schedule", ["cosine", "poly"])
def test_a_curve_starts_at_one_after_the_warm_up_and_ends_at_its_lowest(schedule: str):
    spec = Optim(schedule=schedule, warmup_steps=2, min_lr_factor=0.1)
    factors = [lr_factor(spec, step, 12) for step in range(12)]
    assert factors[2] == 1 and factors[-1] == pytest.approx(0.1)
    assert factors[2:] == sorted(factors[2:], reverse=True)


def test_curves_have_their_textbook_values_half_way():
    assert lr_factor(Optim(schedule="cosine"), 5, 11) == pytest.approx(0.5)
    assert lr_factor(Optim(schedule="poly", power=2), 5, 11) == pytest.approx(0.25)


def test_steps_drop_at_their_share_of_the_run():
    spec = Optim(schedule="step", milestones=(0.5, 0.9), gamma=0.5)
    assert [lr_factor(spec, step, 10) for step in (0, 4, 5, 8, 9)] == [1, 1, 0.5, 0.5, 0.25]
    assert lr_factor(Optim(schedule="step"), 8, 12) == pytest.approx(0.1), "the 1x schedule: 8 and 11 of 12"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"momentum": 0.9}, "momentum is set but does nothing under name: adamw; it belongs to name: sgd"),
        ({"name": "sgd", "betas": (0.9, 0.99)}, "betas is set but does nothing under name: sgd"),
        ({"power": 0.9}, "power is set but does nothing under schedule: cosine"),
        ({"schedule": "constant", "min_lr_factor": 0.1}, "belongs to schedule: cosine or poly"),
        ({"warmup_steps": 1, "warmup_epochs": 1}, "are both set"),
        ({"name": "sgd", "momentum": 0, "nesterov": True}, "nesterov needs momentum > 0"),
        ({"betas": (0.9, 1.0)}, r"each must lie in \[0, 1\)"),
        ({"schedule": "step", "milestones": (0.9, 0.5)}, "rising fractions of the run"),
    ],
)
def test_a_setting_without_effect_or_sense_is_an_error(settings: dict, said: str):
    with pytest.raises(ValidationError, match=said):
        Optim(**settings)


def test_the_average_follows_its_formula_and_leaves_the_net_alone():
    net = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(net.weight)
    ema = Ema(net, 0.999)
    expected = 0.0
    for update in range(5):
        nn.init.constant_(net.weight, float(update + 1))
        ema.update()
        decay = (1 + update) / (10 + update)  # warming up
        expected = decay * expected + (1 - decay) * (update + 1)

    assert float(ema.module.weight) == pytest.approx(expected)
    assert float(net.weight.detach()) == 5.0
    assert not ema.module.weight.requires_grad and not ema.module.training


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_weights_of_any_precision_are_clipped(name: str, dtype: torch.dtype):
    net = nn.Linear(4, 1, bias=False).to(dtype)
    nn.init.zeros_(net.weight)
    optimizer = build_optimizer(Optim(name=name, lr=1.0, weight_decay=0, momentum=0 if name == "sgd" else None), net)
    set_lr(optimizer, 1.0)
    net.weight.grad = torch.tensor([[0.0, 3.0, 0.0, 4.0]], dtype=dtype)

    assert float(clip_next_step(optimizer, 0.5)) == 5
    optimizer.step()

    moved = [0, -0.3, 0, -0.4] if name == "sgd" else [0, -1, 0, -1]
    torch.testing.assert_close(net.weight.detach().float(), torch.tensor([moved]).float(), rtol=0.01, atol=0)


def test_an_average_of_several_steps_at_once_is_the_average_of_each():
    decay, weights = 0.9, iter(range(1, 200))
    net = nn.Linear(1, 1, bias=False)
    averages = [Ema(net, decay), Ema(net, decay, every=4)]
    for average in averages:
        average.load_counts({"updates": 1000})  # warmed up
        nn.init.zeros_(average.module.weight)

    def step(now: bool = False) -> list[float]:
        nn.init.constant_(net.weight, float(next(weights)))
        for average in averages:
            average.update(now)
        return [float(average.module.weight) for average in averages]

    assert [step()[1] for _ in range(3)] == [0, 0, 0], "waits for four"
    assert step()[1] == pytest.approx((1 - 0.9**4) * 4)
    assert step(now=True)[1] == pytest.approx(0.9 * (1 - 0.9**4) * 4 + 0.1 * 5), "and takes one alone where it must"
    for _ in range(99):
        step()
    # rising by 1 a step, each lags behind by a constant: decay / (1 - decay), and 4 d / (1 - d) with d = decay^4
    # (of the average of four steps, at the end of the four)
    assert averages[0].updates == averages[1].updates == 1104
    each, fours = step()[0], step()[1]
    assert 105 - each == pytest.approx(9, abs=1e-3)
    assert 104 - fours == pytest.approx(4 * 0.9**4 / (1 - 0.9**4), abs=1e-3)


def test_steps_that_an_end_of_an_epoch_has_taken_are_not_taken_again():
    """From 0 towards 1, with an end of an epoch every 6 steps: at each of them 1 - decay^n is left of nothing."""
    net = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(net.weight)
    ema = Ema(net, 0.9, every=5)
    ema.load_counts({"updates": 1000})  # warmed up
    nn.init.ones_(net.weight)
    for step in range(1, 61):
        ema.update(now=step % 6 == 0)
        if step % 6 == 0:
            assert float(ema.module.weight) == pytest.approx(1 - 0.9**step, rel=1e-5)
        if step == 33:  # resumed between two
            state = ema.state_dict()
            ema = Ema(net, 0.9, every=5)
            ema.load_state_dict(state)


def test_buffers_are_averaged_when_floats_and_copied_when_not():
    net = nn.BatchNorm1d(1)
    net.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    ema = Ema(net, 0.5)
    net(torch.tensor([[1.0], [3.0]]))

    ema.update()

    assert float(ema.module.running_mean) == pytest.approx(0.9 * float(net.running_mean)), "decay 1/10 at first"
    assert int(ema.module.num_batches_tracked) == 1
    assert torch.equal(ema.module.mask, net.mask), "inf - inf would be NaN"


def test_a_restored_average_goes_on_as_if_never_stopped():
    torch.manual_seed(0)
    net = nn.Linear(2, 2)
    ema = Ema(net, 0.9)
    nn.init.ones_(net.weight)
    ema.update()
    other = Ema(nn.Linear(2, 2), 0.9)
    other.load_state_dict(ema.state_dict())
    assert other.updates == 1
    assert torch.equal(other.module.weight, ema.module.weight)
