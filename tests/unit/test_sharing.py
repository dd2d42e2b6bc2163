"""Ways of sharing: the contract for each on disk, and the cut of the graph at the shared maps."""

import pytest
import torch
from contract import SPACE, found, gradients, sample, total

from visionmtl.modeling.encoder import Encoder
from visionmtl.modeling.heads.aligned import Aligned
from visionmtl.modeling.pyramids.fpn import FPN
from visionmtl.modeling.sharing.base import Sharing
from visionmtl.network import LossNet, Model, MultiTaskNet, build_model
from visionmtl.tasks.depth import Depth
from visionmtl.tasks.detection import Detection
from visionmtl.tasks.segmentation import Segmentation

SIZE = (64, 96)
WAYS = [pytest.param(p.values[0](), id=p.id) for p in found(Sharing)]
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


def inputs() -> tuple[torch.Tensor, dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    samples = [sample(0, size=SIZE), sample(1, size=SIZE)]
    image = torch.randint(0, 256, (2, 3, *SIZE), dtype=torch.uint8)
    return image, {k: t.collate(samples, SIZE) for k, t in TASKS.items()}, {k: torch.ones(2).bool() for k in TASKS}


@every_way
def test_each_task_gets_the_levels_it_reads_in_the_promised_width(sharing: Sharing):
    net = network(sharing)
    shared = net.shared(inputs()[0])
    of_task = net.trunk.split(shared)
    assert list(of_task) == list(TASKS)
    for name, maps in of_task.items():
        assert tuple(maps) == TASKS[name].levels
        for level, values in maps.items():
            assert values.shape == (2, net.trunk.out_channels, SIZE[0] >> level, SIZE[1] >> level)


@every_way
def test_every_loss_reaches_the_encoder(sharing: Sharing):
    net = network(sharing)
    losses, *_ = LossNet(net, cut=False)(*inputs())
    first = next(net.encoder.parameters())
    for parts in losses.values():
        (gradient,) = torch.autograd.grad(total(parts), first, retain_graph=True)
        assert gradient.isfinite().all() and gradient.any()


@every_way
def test_the_encoder_is_part_of_the_trunk_and_tasks_own_the_rest(sharing: Sharing):
    net = network(sharing)
    trunk, decoders = ({id(p) for p in module.parameters()} for module in (net.trunk, net.decoders))
    assert {id(p) for p in net.encoder.parameters()} < trunk
    assert not trunk & decoders and trunk | decoders == {id(p) for p in net.parameters()}


@every_way
def test_the_cut_stops_gradients_at_the_shared_maps_and_changes_no_value(sharing: Sharing):
    net = network(sharing)
    plain, *nothing = LossNet(net, cut=False)(*inputs())
    cut, shared, leaves = LossNet(net, cut=True)(*inputs())
    assert cut == plain and nothing == [[], []]
    assert all(torch.equal(a, b) and b.is_leaf and not a.is_leaf for a, b in zip(shared, leaves, strict=True))

    torch.stack([total(parts) for parts in cut.values()]).sum().backward()
    assert all(p.grad is None for p in net.encoder.parameters())
    torch.autograd.backward(shared, [leaf.grad for leaf in leaves])
    joined = gradients(net)
    torch.stack([total(parts) for parts in plain.values()]).sum().backward()
    torch.testing.assert_close(joined, gradients(net), rtol=1e-4, atol=1e-6)


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
