"""Ways of sharing: the contract for each on disk, parity with small re-implementations, and numbers of parameters.

The papers' formulas are written out here with loops, on the weights of the trunk that is tested.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from contract import SPACE, check_spec, found, gradients, sample, total
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from visionmtl.engine.fsdp import apply_fsdp
from visionmtl.engine.optim import layers
from visionmtl.modeling.encoder import Encoder
from visionmtl.modeling.heads.aligned import Aligned
from visionmtl.modeling.pyramids.fpn import FPN
from visionmtl.modeling.pyramids.simple import Simple
from visionmtl.modeling.sharing.adapter import Adapter
from visionmtl.modeling.sharing.base import Sharing
from visionmtl.modeling.sharing.branching import Branching
from visionmtl.modeling.sharing.cross_stitch import CrossStitch
from visionmtl.modeling.sharing.hard import Hard
from visionmtl.modeling.sharing.lora import LoRA
from visionmtl.modeling.sharing.lora_branch import LoRABranch
from visionmtl.modeling.sharing.mmoe import MMoE
from visionmtl.modeling.sharing.mtan import MTAN
from visionmtl.modeling.sharing.mti_net import MTINet
from visionmtl.modeling.sharing.nddr import NDDR
from visionmtl.modeling.sharing.pad_net import PADNet
from visionmtl.modeling.sharing.single import Single
from visionmtl.network import LossNet, Model, MultiTaskNet, build_model
from visionmtl.ops.ranks import step_totals
from visionmtl.tasks.depth import Depth
from visionmtl.tasks.detection import Detection
from visionmtl.tasks.segmentation import Segmentation

SIZE = (64, 96)
WAYS = [pytest.param(p.values[0](), id=p.id) for p in found(Sharing)]
WAYS += [pytest.param(Branching(at=at), id=f"branching at {at}") for at in ("pyramid", 2, 3, 4)]
every_way = pytest.mark.parametrize("sharing", WAYS)
TASKS = {
    "boxes": Detection(head=Aligned(levels=(3, 4), num_convs=0, norm="batch")),
    "classes": Segmentation(dropout=0.0),
    "metres": Depth(),
}


def network(sharing: Sharing) -> MultiTaskNet:
    torch.manual_seed(0)
    spec = Model(encoder=Encoder(name="test_resnet"), pyramid=FPN(channels=16), sharing=sharing)
    return build_model(spec, TASKS, {"boxes": SPACE, "classes": SPACE, "metres": None}, SIZE).eval()


def inputs() -> tuple[Any, ...]:
    """Image, targets, labelled and totals, as `LossNet.forward` takes them."""
    torch.manual_seed(1)
    samples = [sample(0, size=SIZE), sample(1, size=SIZE)]
    image = torch.randint(0, 256, (2, 3, *SIZE), dtype=torch.uint8)
    targets = {name: task.collate(samples, SIZE) for name, task in TASKS.items()}
    totals = step_totals([{name: task.count(targets[name], SIZE) for name, task in TASKS.items()}])
    return image, targets, {name: torch.ones(2).bool() for name in TASKS}, totals


def losses_of(net: MultiTaskNet, cut: bool = False) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = LossNet(net, cut)(*inputs())[0]
    return parts


def reached(net: MultiTaskNet) -> list[set[str]]:
    """Of each task, the names of the parameters that its loss reaches."""
    parts = losses_of(net)
    parameters = dict(net.named_parameters())
    sets = []
    for of_task in parts.values():
        found_gradients = torch.autograd.grad(
            total(of_task), list(parameters.values()), retain_graph=True, allow_unused=True
        )
        sets.append({name for name, g in zip(parameters, found_gradients, strict=True) if g is not None})
    return sets


def of_encoders(net: MultiTaskNet) -> set[str]:
    """The names of the encoders' parameters."""
    inside = {id(p) for encoder in net.encoders() for p in encoder.parameters()}
    return {name for name, p in net.named_parameters() if id(p) in inside}


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@every_way
def test_each_task_gets_maps_that_its_module_reads(sharing: Sharing):
    net = network(sharing)
    of_task = net.trunk.split(net.shared(inputs()[0]))
    assert list(of_task) == list(TASKS)
    for name, maps in of_task.items():
        net.decoders[name](maps)
        for level, values in maps.items():
            assert values.shape[0] == 2 and values.shape[2:] == (SIZE[0] >> level, SIZE[1] >> level)
            if tuple(maps) == TASKS[name].levels:
                assert values.shape[1] == net.trunk.out_channels


@every_way
def test_every_loss_reaches_an_encoder_and_every_encoder_is_reached(sharing: Sharing):
    net = network(sharing)
    of_task = reached(net)
    names = {id(p): name for name, p in net.named_parameters()}
    for encoder in net.encoders():
        inside = {names[id(p)] for p in encoder.parameters()}
        assert any(inside & names_reached for names_reached in of_task)
    assert all(of_encoders(net) & names_reached for names_reached in of_task)


@every_way
def test_shared_parameters_are_those_that_losses_of_two_tasks_reach(sharing: Sharing):
    net = network(sharing)
    of_task = reached(net)
    names = {id(p): name for name, p in net.named_parameters()}
    several = {name for name in names.values() if sum(name in one for one in of_task) > 1}
    state = {name: value.clone() for name, value in net.state_dict().items()}
    assert {names[id(p)] for p in net.trunk.shared_parameters()} == several
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert (not several) == (sharing.type == "single")
    assert several <= {name for name in names.values() if name.startswith("trunk.")}


@every_way
def test_the_encoders_are_part_of_the_trunk_and_tasks_own_the_rest(sharing: Sharing):
    net = network(sharing)
    trunk, decoders = ({id(p) for p in module.parameters()} for module in (net.trunk, net.decoders))
    for encoder in net.encoders():
        assert {id(p) for p in encoder.parameters()} < trunk
    assert not trunk & decoders and trunk | decoders == {id(p) for p in net.parameters()}


@every_way
def test_the_cut_stops_gradients_at_the_shared_maps_and_changes_no_value(sharing: Sharing):
    net = network(sharing)
    if not net.trunk.shared_maps:
        pytest.skip("no maps are shared, so there is nothing to cut")
    plain, *nothing = LossNet(net, cut=False)(*inputs())
    cut, shared, leaves = LossNet(net, cut=True)(*inputs())
    assert cut == plain and nothing == [[], []]
    assert all(torch.equal(a, b) and b.is_leaf and not a.is_leaf for a, b in zip(shared, leaves, strict=True))

    torch.stack([total(parts) for parts in cut.values()]).sum().backward()
    assert all(p.grad is None for p in net.encoder.parameters())
    behind = [leaf.grad is not None for leaf in leaves]
    torch.autograd.backward(
        [one for one, reads in zip(shared, behind, strict=True) if reads],
        [leaf.grad for leaf in leaves if leaf.grad is not None],
    )
    joined = gradients(net)
    torch.stack([total(parts) for parts in plain.values()]).sum().backward()
    torch.testing.assert_close(joined, gradients(net), rtol=1e-4, atol=1e-6)


@every_way
def test_where_tasks_meet_behind_the_shared_maps_the_trunk_says_so(sharing: Sharing):
    net = network(sharing)
    if not net.trunk.shared_maps:
        return
    parts = losses_of(net, cut=True)
    parameters = list(net.trunk.parameters())
    times = [0] * len(parameters)
    for of_task in parts.values():
        for i, g in enumerate(torch.autograd.grad(total(of_task), parameters, retain_graph=True, allow_unused=True)):
            times[i] += g is not None
    assert (max(times) > 1) == net.trunk.joins_tasks


@every_way
def test_a_task_that_is_left_out_changes_no_other_and_does_not_run(sharing: Sharing):
    net = network(sharing)
    image = inputs()[0]
    with torch.no_grad():
        before = net(image)["metres"]
        modules_run: list[nn.Module] = []
        hooks = [m.register_forward_hook(lambda module, *_: modules_run.append(module)) for m in net.modules()]
        net(image)
        all_run = len(modules_run)
        modules_run.clear()
        net.keep(["metres"])
        after = net(image)
    for hook in hooks:
        hook.remove()
    assert list(after) == list(net.tasks) == ["metres"] and torch.equal(after["metres"], before)
    assert len(modules_run) < all_run
    if sharing.type in ("single", "lora", "adapter"):
        assert len(net.encoders()) == 1


@every_way
def test_images_are_normalised_by_the_encoders_statistics(sharing: Sharing):
    net = network(sharing)
    grey = torch.full((1, 3, *SIZE), 128, dtype=torch.uint8)
    wanted = (128 / 255 - torch.tensor(net.encoder.mean)) / torch.tensor(net.encoder.std)
    seen: list[torch.Tensor] = []
    net.trunk.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    by_byte, by_float = net(grey), net(grey.float())
    torch.testing.assert_close(seen[0][0, :, 5, 7], wanted)
    assert torch.equal(by_byte["metres"], by_float["metres"])


def test_a_size_the_encoder_cannot_take_is_named_with_the_next_that_fits():
    spec = Model(encoder=Encoder(name="test_resnet"), pyramid=FPN(channels=16))
    with pytest.raises(ValueError, match=r"data.size is 60x96 px.*multiples of 32; choose 64x96"):
        build_model(spec, {"metres": Depth()}, {"metres": None}, (60, 96))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("sharing", [Hard(), Branching(at="pyramid"), Single()], ids=lambda s: s.type)
def test_tasks_that_are_left_out_cost_nothing(sharing: Sharing, task: str):
    net, alone = network(sharing), build(Hard(), [task]).eval()
    net.keep([task])
    image, operations = inputs()[0], []
    for one in (net, alone):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            one(image)
        operations.append(counter.get_total_flops())
    # its encoder computes stages that the task alone would not have
    extra = len(net.encoder.levels) > len(alone.encoder.levels)  # type: ignore[arg-type]
    assert operations[0] > operations[1] if extra else operations[0] == operations[1]


def test_a_branch_alone_leaves_the_common_pyramid_out():
    net, image = network(LoRABranch(common=("boxes", "classes"))), inputs()[0]
    with torch.no_grad():
        before = net(image)["metres"]
        net.keep(["metres"])
        torch.testing.assert_close(net(image)["metres"], before, rtol=0, atol=0)
    assert not any(name.startswith("trunk.pyramid.") for name in net.state_dict())


# ---- encoders: stage by stage, and with their weights in every copy ----


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_convnext", "test_efficientnet", "mobilenetv3_small_050", "test_mambaout"]
)
def test_stages_run_one_by_one_give_the_maps_of_the_whole_encoder(name: str):
    encoder: Any = Encoder(name=name).build(SIZE, coarsest=4).eval()
    x = image = torch.randn(1, 3, *SIZE)
    with torch.no_grad():
        wanted = encoder(image)
        for level in encoder.split_stages("the test"):
            x = encoder.run_stage(level, x)
            assert torch.equal(x, wanted[level])


def test_recomputed_stages_have_the_same_gradients():
    found_gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        encoder: Any = Encoder(name="test_convnext", grad_checkpointing=recompute).build(SIZE).train()
        x = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(1))
        for level in encoder.split_stages("the test"):
            x = encoder.run_stage(level, x)
        x.square().sum().backward()
        found_gradients.append(gradients(encoder))
    torch.testing.assert_close(*found_gradients)


OF_STAGES = [p for p in WAYS if p.id in ("cross_stitch", "nddr", "branching at 2", "branching at 3", "branching at 4")]
OF_WHOLE_ENCODERS = [p for p in WAYS if p not in OF_STAGES]


@pytest.mark.parametrize("sharing", OF_STAGES)
def test_what_comes_between_stages_refuses_encoders_without_them(sharing: Sharing):
    spec = Model(encoder=Encoder(name="test_vit"), pyramid=Simple(channels=16), sharing=sharing)
    with pytest.raises(ValueError, match=rf"{sharing.type} comes between .* one piece .*; allowed are .*; choose one"):
        build_model(spec, TASKS, {"boxes": SPACE, "classes": SPACE, "metres": None}, SIZE)


@pytest.mark.parametrize("sharing", OF_WHOLE_ENCODERS)
def test_what_leaves_the_encoder_whole_takes_plain_vits(sharing: Sharing):
    spec = Model(encoder=Encoder(name="test_vit"), pyramid=Simple(channels=16), sharing=sharing)
    net = build_model(spec, TASKS, {"boxes": SPACE, "classes": SPACE, "metres": None}, SIZE)
    assert all(names & of_encoders(net) for names in reached(net))


def plain(name: str) -> str:
    """A parameter's name in the body of an encoder, as it was before LoRA."""
    return name.removeprefix("body.").replace("parametrizations.weight.original", "weight")


@every_way
def test_weights_from_a_file_are_in_every_copy_of_the_encoder(sharing: Sharing, tmp_path: Path):
    torch.manual_seed(5)
    path = tmp_path / "weights.pth"
    torch.save(timm.create_model("test_resnet").state_dict(), path)
    saved = torch.load(path, weights_only=True)
    encoder = Encoder(name="test_resnet", checkpoint=path)
    net = build_model(
        Model(encoder=encoder, pyramid=FPN(channels=16), sharing=sharing), TASKS,
        {"boxes": SPACE, "classes": SPACE, "metres": None}, SIZE,
    )  # fmt: skip
    assert net.encoder_origin == "file weights.pth"
    for one in net.encoders():
        own = {plain(name): value for name, value in one.state_dict().items()}
        equal = [name for name in own.keys() & saved.keys() if torch.equal(own[name], saved[name])]
        assert len(equal) == len(own.keys() & saved.keys()) > 0


# ---- parity with the papers ----


def stages(encoder: Any) -> list[nn.Sequential]:
    """Of test_resnet, up to the maps of stride 4 to 32."""
    body = encoder.body
    stem = nn.Sequential(body["conv1"], body["bn1"], body["act1"], body["maxpool"], body["layer1"])
    return [stem, *(nn.Sequential(body[f"layer{i}"]) for i in (2, 3, 4))]


def mixture_of(net: MultiTaskNet, unit: int, receiver: int, giver: int, channel: int) -> float:
    mixture = net.trunk.units[str(unit)].mixture  # type: ignore[union-attr,index]
    per_channel = mixture.shape[2] > 1  # type: ignore[union-attr]
    return float(mixture[receiver, giver, channel if per_channel else 0])  # type: ignore[index]


@pytest.mark.parametrize("per_channel", [True, False])
def test_cross_stitch_mixes_as_the_paper_writes_it(per_channel: bool):
    net = network(CrossStitch(per_channel=per_channel))
    for unit in net.trunk.units.values():  # type: ignore[union-attr,operator]
        torch.testing.assert_close(unit.mixture.sum(1), torch.ones_like(unit.mixture[0]))
        assert (unit.mixture.diagonal()[0] == 0.9).all()
        nn.init.normal_(unit.mixture)
    image = torch.randn(1, 3, *SIZE)
    encoders = [stages(encoder) for encoder in net.encoders()]
    with torch.no_grad():
        current = [image] * 3
        of_level: dict[int, list[Tensor]] = {}
        for number, level in enumerate((2, 3, 4, 5)):
            own = [encoder[number](x) for encoder, x in zip(encoders, current, strict=True)]
            current = [torch.zeros_like(own[0]) for _ in range(3)]
            for receiver in range(3):
                for giver in range(3):
                    for c in range(own[0].shape[1]):
                        current[receiver][:, c] += mixture_of(net, level, receiver, giver, c) * own[giver][:, c]
            of_level[level] = current
        expected = {
            task: pyramid({level: maps[i] for level, maps in of_level.items()})
            for i, (task, pyramid) in enumerate(net.trunk.pyramid.items())  # type: ignore[operator,union-attr]
        }
        torch.testing.assert_close(net.trunk(image), expected, rtol=1e-4, atol=1e-4)


def test_nddr_starts_as_a_cross_stitch_and_reduces_all_maps():
    net = network(NDDR())
    unit = net.trunk.units["3"]  # type: ignore[union-attr,index]
    weight = unit.reduce[0][0].weight  # type: ignore[union-attr,index]
    maps = [torch.randn(2, weight.shape[0], 3, 4) for _ in range(3)]
    out = unit(maps)  # type: ignore[operator]
    expected = [0.9 * maps[i] + 0.05 * sum(maps[j] for j in range(3) if j != i) for i in range(3)]
    norm = unit.reduce[0][1]  # type: ignore[union-attr,index]
    torch.testing.assert_close(out, [x / (1 + norm.eps) ** 0.5 for x in expected])


def conv_block(block: nn.Module, x: Tensor, activate: bool = True) -> Tensor:
    """A convolution and BatchNorm in evaluation, written out."""
    conv, norm = block[0], block[1]  # type: ignore[index]
    x = F.conv2d(x, conv.weight, padding=conv.padding)
    mean, var = norm.running_mean[:, None, None], norm.running_var[:, None, None]
    x = (x - mean) / (var + norm.eps).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]
    return x.clamp(min=0) if activate else x


def randomise(module: nn.Module) -> None:
    """Statistics and affine of BatchNorm, which would do nothing at the start."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for values in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
                assert values is not None
                values.uniform_(0.5, 1.5)


def test_mtan_attends_as_the_paper_writes_it():
    net = network(MTAN())
    randomise(net)
    trunk: Any = net.trunk
    image = torch.randn(1, 3, *SIZE)
    with torch.no_grad():
        maps = trunk.encoder(image)
        for task, first in (("boxes", 3), ("metres", 2)):
            attended: dict[int, Tensor] = {}
            for level in range(first, min(TASKS[task].levels[-1], 5) + 1):
                u = maps[level]
                if attended:
                    f = conv_block(trunk.pass_on[str(level)], attended[level - 1])
                    u = torch.cat([u, F.max_pool2d(f, 2)], 1)
                g, h, _ = trunk.attention[task][str(level)]
                a = 1 / (1 + (-conv_block(h, conv_block(g, u), activate=False)).exp())
                attended[level] = a * maps[level]
            expected = trunk.pyramid[task](attended)
            torch.testing.assert_close(dict(trunk.split(trunk(image))[task]), expected, rtol=1e-4, atol=1e-5)


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 3x3 convolution, tap by tap."""
    padded = F.pad(x, (1, 1, 1, 1))
    out = torch.zeros(x.shape[0], weight.shape[0], *x.shape[2:])
    for row in range(3):
        for column in range(3):
            patch = padded[..., row : row + x.shape[2], column : column + x.shape[3]]
            out += torch.einsum("oc,bchw->bohw", weight[:, :, row, column], patch)
    return out if bias is None else out + bias[:, None, None]


def test_pad_net_exchanges_as_the_paper_writes_it():
    net = network(PADNet(channels=6))
    randomise(net)
    trunk: Any = net.trunk
    image = torch.randn(1, 3, *SIZE)
    with torch.no_grad():
        shared = trunk(image)
        maps, initial = trunk.split_with_initial(shared)
        features = {}
        for task, layers in trunk.features.items():
            features[task] = conv_block(layers[1], conv_block(layers[0], shared[3]))
        for task in TASKS:
            gate = trunk.exchange.gates[task]
            attention = torch.sigmoid(convolved(features[task], gate.weight, gate.bias))
            mixed = features[task].clone()
            for other in TASKS:
                if other != task:
                    message = trunk.exchange.messages[task][other]
                    mixed += attention * convolved(features[other], message.weight, None)
            expected = conv_block(trunk.restore[task], mixed)
            torch.testing.assert_close(maps[task][3], expected, rtol=1e-4, atol=1e-5)
            assert all(torch.equal(maps[task][level], shared[level]) for level in maps[task] if level != 3)
        (metres,) = initial["metres"]
        assert metres.shape == (1, 1, SIZE[0] // 8, SIZE[1] // 8)
        torch.testing.assert_close(metres, trunk.initial["metres"][0].out(features["metres"]))


def test_mti_net_propagates_as_the_paper_writes_it():
    net = network(MTINet(channels=4))
    randomise(net)
    trunk: Any = net.trunk
    shared = {level: torch.randn(1, 16, SIZE[0] >> level, SIZE[1] >> level) for level in (2, 3, 4, 5)}
    readers = {5: ["classes", "metres"], 4: list(TASKS), 3: list(TASKS), 2: ["classes", "metres"]}
    with torch.no_grad():
        features: dict[int, dict[str, Tensor]] = {}
        for level in (5, 4, 3, 2):
            features[level] = {}
            for task in readers[level]:
                x = shared[level]
                if task in readers.get(level + 1, ()):
                    module = trunk.propagate[str(level + 1)]
                    coarse = features[level + 1]
                    joined = torch.cat(list(coarse.values()), 1)
                    scores = module.scores[1](conv_block(module.scores[0], joined)).view(
                        1, len(coarse), 4, *joined.shape[2:]
                    )
                    shares = scores.exp() / scores.exp().sum(1, keepdim=True)
                    weighted = torch.cat([shares[:, i] * one for i, one in enumerate(coarse.values())], 1)
                    common = conv_block(module.reduce, weighted)
                    squeeze = module.excite[task]
                    gate = squeeze[3](squeeze[1](common.mean((2, 3), keepdim=True)).clamp(min=0)).sigmoid()
                    refined = coarse[task] + gate * common
                    x = torch.cat([x, F.interpolate(refined, scale_factor=2.0, mode="bilinear")], 1)
                layers = trunk.scales[str(level)].features[task]
                features[level][task] = conv_block(layers[1], conv_block(layers[0], x))
        got = trunk._features(shared)
        for level, of_level in features.items():
            torch.testing.assert_close(got[level], of_level, rtol=1e-4, atol=1e-5)
        _, initial = trunk.split_with_initial(shared)
    assert [raw.shape[2] for raw in initial["metres"]] == [16, 8, 4, 2]
    assert [shape[0] for shape in initial["boxes"][0]["shapes"]] == [3, 4]


def test_mmoe_mixes_experts_by_gates_that_know_no_size():
    net = network(MMoE(num_experts=3))
    trunk: Any = net.trunk
    for size in (SIZE, (96, 64)):
        shared = {level: torch.randn(2, 16, size[0] >> level, size[1] >> level) for level in (2, 3, 4, 5)}
        with torch.no_grad():
            maps = trunk.split(shared)
            for task in TASKS:
                for level in maps[task]:
                    expected = torch.zeros_like(shared[level])
                    for image in range(2):
                        pooled = shared[level][image].flatten(1).mean(1)
                        shares = (trunk.gates[task].weight @ pooled + trunk.gates[task].bias).softmax(0)
                        for share, expert in zip(shares, trunk.experts, strict=True):
                            expected[image] += share * expert(shared[level][image : image + 1])[0]
                    torch.testing.assert_close(maps[task][level], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sharing", [LoRA(), Adapter()], ids=lambda s: s.type)
def test_what_is_added_to_an_encoder_changes_nothing_at_first_and_is_each_tasks_own(sharing: Sharing):
    net, bare = network(sharing), network(Hard())
    image = torch.randn(2, 3, *SIZE)
    values = {plain(k): v for k, v in net.encoder.state_dict().items() if ".weight.0." not in k and "adapter" not in k}
    bare.encoder.load_state_dict({f"body.{name}": value for name, value in values.items()})
    with torch.no_grad():
        expected = bare.encoder(image)
        for encoder in net.encoders():
            torch.testing.assert_close(encoder(image), expected)
    first, second, _ = [{plain(k): p for k, p in encoder.named_parameters()} for encoder in net.encoders()]
    base = {name for name, p in first.items() if second[name] is p}
    assert base == {name for name, _ in bare.encoder.body.named_parameters()}  # type: ignore[operator,union-attr]
    assert list(layers(net.encoder)) == list(layers(bare.encoder)), "layers with a learning rate of their own"
    copied = copy.deepcopy(net)  # as the moving average does
    assert len(list(copied.parameters())) == len(list(net.parameters()))

    frozen = network(sharing.model_copy(update={"freeze_base": True}))
    assert frozen.trunk.shared_parameters() == []
    assert any(p.requires_grad for p in frozen.encoder.parameters())


def test_encoders_with_common_weights_cannot_be_sharded():
    with pytest.raises(ValueError, match=r"same weights in several encoders, .*; set shard to false, or"):
        apply_fsdp(LossNet(network(LoRA()), cut=False), torch.device("cpu"), 2)


def test_lora_adds_a_matrix_of_low_rank():
    net = network(LoRA(rank=2, alpha=6.0))
    layer: Any = net.encoder.body["layer1"][0].conv1  # type: ignore[union-attr,index]
    low_rank = layer.parametrizations.weight[0]
    nn.init.normal_(low_rank.b)
    added = (layer.weight - layer.parametrizations.weight.original).flatten(1)
    torch.testing.assert_close(added, 3.0 * low_rank.b @ low_rank.a)
    assert torch.linalg.matrix_rank(added) == 2


def test_the_shared_dense_decoder_runs_once_for_all_dense_tasks():
    net = network(Branching())
    runs: list[int] = []
    net.trunk.dense.register_forward_hook(lambda *_: runs.append(1))  # type: ignore[union-attr]
    image = inputs()[0]
    raw = net(image)
    assert len(runs) == 1 and raw["metres"].shape[2] == SIZE[0] // 4
    net.keep(["boxes"])
    net(image)
    assert len(runs) == 1


# ---- numbers of parameters by formula ----


def block(c_in: int, c_out: int, kernel: int = 3) -> int:
    """Of a convolution without bias, and a normalisation."""
    return c_in * c_out * kernel**2 + 2 * c_out


def test_numbers_of_parameters_follow_the_formulas():
    hard = network(Hard())
    encoder, tasks = num_parameters(hard.encoder), len(TASKS)
    channels: dict[int, int] = hard.encoder.channels  # type: ignore[assignment]
    stages_from_2 = [c for level, c in channels.items() if level >= 2]
    width = hard.trunk.out_channels
    pyramids = num_parameters(network(Single()).trunk.pyramid)  # type: ignore[arg-type]

    def trunk(sharing: Sharing) -> int:
        return num_parameters(network(sharing).trunk)

    assert trunk(CrossStitch()) == tasks * encoder + pyramids + tasks**2 * sum(stages_from_2)
    assert trunk(CrossStitch(per_channel=False)) == tasks * encoder + pyramids + tasks**2 * len(stages_from_2)
    assert trunk(NDDR()) == tasks * encoder + pyramids + tasks * sum(block(tasks * c, c, 1) for c in stages_from_2)
    assert trunk(Branching(at="pyramid")) == encoder + pyramids

    masks = 0
    for task in TASKS.values():
        chain = [level for level in channels if task.levels[0] <= level <= task.levels[-1]]
        for level in chain:
            c, narrow = channels[level], channels[level] // 4
            masks += block(c + narrow * (level != chain[0]), narrow, 1) + block(narrow, c, 1)
    passed_on = sum(block(channels[level - 1], channels[level] // 4) for level in (3, 4, 5))
    assert trunk(MTAN()) == encoder + pyramids + masks + passed_on

    f = 8
    exchanged = tasks * (block(width, f) + block(f, f) + block(f, width, 1))
    exchanged += tasks * (9 * f * f + f) + tasks * (tasks - 1) * 9 * f * f
    last_layers = 9 * f * (3 + 4) + 3 + 4 + 1 + (3 * f + 3) + (f + 1)  # boxes with one scale, classes, metres
    assert trunk(PADNet(channels=f)) == num_parameters(hard.trunk) + exchanged + last_layers
    experts = 4 * (9 * width + width * width + 2 * width)
    assert trunk(MMoE()) == num_parameters(hard.trunk) + experts + tasks * (4 * width + 4)


# ---- settings that do not fit ----


def build(sharing: Sharing, tasks: Sequence[str] = tuple(TASKS)) -> MultiTaskNet:
    spec = Model(encoder=Encoder(name="test_resnet"), pyramid=FPN(channels=16), sharing=sharing)
    return build_model(spec, {task: TASKS[task] for task in tasks}, dict.fromkeys(tasks, SPACE), SIZE)


@pytest.mark.parametrize(
    ("sharing", "tasks", "text"),
    [
        (
            PADNet(level=2),
            ("boxes", "metres"),
            r"level 2, but only metres reads it; two tasks must; set .*'boxes': \[3",
        ),
        (PADNet(level=6), ("boxes", "metres"), "level 6, but no task reads it; two tasks must"),
        (Branching(), ("boxes",), "none of the tasks boxes has one; at least one must; set .*at to pyramid"),
        (
            Branching(at=5),
            ("boxes", "metres"),
            r"level 5, but the stages of .* \(2, 3, 4, 5\); allowed are 2, 3, 4, pyr",
        ),
    ],
)
def test_what_does_not_fit_is_refused(sharing: Sharing, tasks: tuple[str, ...], text: str):
    with pytest.raises(ValueError, match=text):
        build(sharing, tasks)


def test_a_decoder_that_would_not_be_used_and_decoders_that_differ_are_refused():
    with pytest.raises(ValueError, match="has a decoder, but at: pyramid, so it would have no effect"):
        Branching.model_validate({"at": "pyramid", "decoder": {"type": "semantic_fpn"}})
    spec = Model(encoder=Encoder(name="test_resnet"), sharing=Branching())
    other = Depth.model_validate({"decoder": {"type": "semantic_fpn", "channels": 8}})
    tasks = {"classes": TASKS["classes"], "metres": other}
    with pytest.raises(ValueError, match=r"decoders of classes, metres differ, .*; set model.sharing.decoder, or give"):
        build_model(spec, tasks, dict.fromkeys(tasks, SPACE), SIZE)


@every_way
def test_settings_come_back_from_their_dump(sharing: Sharing):
    check_spec(sharing, Sharing)


def test_every_way_has_a_section_in_its_document():
    text = (Path(__file__).parents[2] / "docs" / "sharing.md").read_text(encoding="utf-8")
    assert not [way for way in Sharing.members() if "." not in way and f"\n## {way}\n" not in text]


# ---- initial predictions ----


@pytest.mark.parametrize("kind", [PADNet, MTINet], ids=lambda kind: kind.__name__)
def test_losses_of_initial_predictions_have_their_weight_and_learn(kind: Any):
    whole, half = (network(kind(initial_weight=weight)) for weight in (1.0, 0.5))
    parts, halved = losses_of(whole), losses_of(half)
    for task, of_task in parts.items():
        own = {name for name in of_task if not name.startswith("initial_")}
        assert set(of_task) == own | {f"initial_{name}" for name in own}
        for name, value in of_task.items():
            torch.testing.assert_close(halved[task][name], value * (0.5 if name.startswith("initial_") else 1.0))
    total({name: total(of_task) for name, of_task in parts.items()}).backward()
    assert all(p.grad is not None and p.grad.any() for p in whole.trunk.initial.parameters())  # type: ignore[union-attr]


def test_counted_predictions_of_initial_boxes_give_the_loss_that_counts_itself():
    net = network(PADNet())
    image, targets, labelled, totals = inputs()
    plain_parts = LossNet(net, cut=False)(image, targets, labelled, totals)[0]["boxes"]
    counts = LossNet(net, cut=False)(image, targets, labelled, None)["boxes"]
    assert set(counts) == {"quality", "initial_0_quality"}
    with_counts = {**totals, "boxes": {**totals["boxes"], **counts}}
    torch.testing.assert_close(LossNet(net, cut=False)(image, targets, labelled, with_counts)[0]["boxes"], plain_parts)
