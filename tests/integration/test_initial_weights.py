"""`--init-from` and `model.freeze`: what fits is taken and said, class rows by name, and frozen parts stay."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import scene_run
import timm
import torch
import toy_run
from contract import SIZE, SPACE
from toy_run import HEAD, MODEL, NARROW, small_run, small_tasks

from visionmtl.engine import checkpoint
from visionmtl.engine.distributed import Ranks
from visionmtl.engine.initial_weights import load_initial
from visionmtl.engine.trainer import Trainer
from visionmtl.modeling.encoder import Encoder
from visionmtl.modeling.pyramids.bifpn import BiFPN
from visionmtl.network import build_model
from visionmtl.tasks.depth import Depth
from visionmtl.tasks.detection import Detection
from visionmtl.tasks.segmentation import Segmentation


def net_of(tasks: dict[str, Any], space: Any = SPACE, model: Any = MODEL, seed: int = 1, size: Any = SIZE) -> Any:
    torch.manual_seed(seed)
    return build_model(model, tasks, dict.fromkeys(tasks, space), size)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of boxes, classes and depth, with random weights."""
    run = small_run(small_tasks())
    trainer = toy_run.small_state(run)
    path = tmp_path_factory.mktemp("old") / "checkpoints/last.pt"
    path.parent.mkdir()
    checkpoint.save(path, trainer.state_dict())
    return path


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return checkpoint.best_weights(checkpoint.load(path))


def changed(run: Any, **parts: Any) -> Any:
    return run.model_copy(update=parts)


def test_all_of_the_same_network_is_taken(saved):
    run = small_run(small_tasks())
    net = net_of(run.tasks)
    (line,) = load_initial(net, run, saved)
    assert (
        "of" in line and "tensors taken" in line and line.split(": ")[1].split()[0] == line.split(" of ")[1].split()[0]
    )
    torch.testing.assert_close(net.state_dict(), weights_of(saved), rtol=0, atol=0)


def test_other_tasks_take_the_trunk_and_say_the_rest(saved):
    tasks = {"depth": Depth(decoder=NARROW), "far": Depth(decoder=NARROW)}
    run, before = small_run(tasks), weights_of(saved)
    net = net_of(tasks)
    first = net.state_dict()["decoders.far.out.weight"].clone()

    lines = "\n".join(load_initial(net, run, saved))

    own = net.state_dict()
    assert all(torch.equal(own[name], before[name]) for name in own if name.startswith(("trunk.", "decoders.depth.")))
    assert torch.equal(own["decoders.far.out.weight"], first)
    assert "not taken of the file: " in lines and "decoders.boxes" in lines and "decoders.classes" in lines
    assert "as built, not from the file: " in lines and "decoders.far" in lines


def test_rows_of_classes_go_by_name(saved):
    order = (2, 0)
    space = replace(SPACE, classes=(*(SPACE.classes[k] for k in order), "new"), colours=SPACE.colours[:3], ids=())
    run, before = small_run(small_tasks()), weights_of(saved)
    net = net_of(run.tasks, space)
    start = {name: value.clone() for name, value in net.state_dict().items()}

    lines = "\n".join(load_initial(net, run, saved))

    own = net.state_dict()
    for name in ("decoders.boxes.logits.weight", "decoders.boxes.logits.bias", "decoders.classes.out.weight"):
        for row, of in enumerate(order):
            assert torch.equal(own[name][row], before[name][of])
        assert torch.equal(own[name][2], start[name][2])
    assert torch.equal(own["decoders.boxes.distances.weight"], before["decoders.boxes.distances.weight"])
    assert f"classes of boxes by name: 2 of 3 have their rows from the file ({SPACE.classes[2]}, " in lines
    assert "new: new; only in the file: " in lines


def test_the_same_number_of_classes_in_another_order_is_not_taken_as_it_lies(saved):
    turned = replace(SPACE, classes=SPACE.classes[::-1], colours=SPACE.colours[::-1])
    run, before = small_run(small_tasks()), weights_of(saved)
    net = net_of(run.tasks, turned)
    load_initial(net, run, saved)
    name = "decoders.classes.out.weight"
    assert torch.equal(net.state_dict()[name], before[name].flip(0))


def test_another_encoder_pyramid_or_head_is_not_taken_though_shapes_agree(saved):
    run = changed(small_run(small_tasks()), model=MODEL.model_copy(update={"pyramid": BiFPN(channels=32)}))
    lines = "\n".join(load_initial(net_of(run.tasks, model=run.model), run, saved))
    assert "pyramid not taken: fpn in the file, bifpn here" in lines
    content = checkpoint.load(saved)
    content["run"]["model"]["encoder"]["name"] = "resnet18"
    content["run"]["tasks"]["boxes"]["head"]["type"] = "fcos"
    path = saved.with_name("other.pt")
    checkpoint.save(path, content)
    run = small_run(small_tasks())
    net = net_of(run.tasks)
    start = {name: value.clone() for name, value in net.state_dict().items()}
    lines = "\n".join(load_initial(net, run, path))
    assert "encoder not taken: resnet18 in the file, test_resnet here" in lines
    assert "task boxes not taken: its head is fcos in the file, aligned here" in lines
    for name, value in net.state_dict().items():
        if name.startswith(("trunk.encoder", "decoders.boxes")):
            assert torch.equal(value, start[name])


def test_a_pyramid_of_other_levels_is_not_taken_though_shapes_agree(tmp_path):
    """Its layers are numbered from the finest level on: level 3 is the first of one, the second of another."""
    decoder = {"type": "semantic_fpn", "channels": 16}
    model = {"pyramid": {"type": "fpn", "channels": 16, "smooth_from": 0}}
    runs = [
        scene_run.run(tmp_path, ("depth",), model=model, tasks={"depth": {"decoder": {**decoder, "levels": levels}}})
        for levels in ([3, 4, 5], [2, 3, 4, 5], [3, 4])
    ]
    scene_run.save_untrained(runs[0], tmp_path)
    file = weights_of(tmp_path)
    for run, taken in zip(runs[1:], (False, True), strict=True):
        net = scene_run.untrained(run)
        lines = load_initial(net, run, tmp_path)

        assert any("pyramid not taken: its levels are [3, 4, 5] in the file, [2, 3, 4, 5]" in x for x in lines) != taken
        name = "trunk.pyramid.lateral.0.1.weight"
        smooth = next(name for name in file if name.startswith("trunk.pyramid.smooth.0") and file[name].dim() == 4)
        assert torch.equal(net.state_dict()[smooth], file[smooth]) == taken, name


def test_bins_of_another_range_are_not_taken(tmp_path):
    """The depths of bins are kept with the weights, so that nothing beyond the old range would ever be predicted."""
    near, far = ({"depth": Depth(decoder=NARROW, head="bins", max_depth_m=m)} for m in (10, 80))
    path = tmp_path / "checkpoints/last.pt"
    path.parent.mkdir()
    checkpoint.save(path, toy_run.small_state(small_run(near)).state_dict())

    net = net_of(far)
    lines = "\n".join(load_initial(net, small_run(far), path))
    assert "task depth not taken: its max_depth_m is 10.0 in the file, 80.0 here, and its weights hold it" in lines
    assert net.decoders["depth"].centres.max().exp().item() == pytest.approx(80)
    with pytest.raises(
        ValueError, match=r"was written with tasks.depth.max_depth_m 10.0, this run has 80.0; a resumed"
    ):
        toy_run.small_state(small_run(far)).load_state_dict(checkpoint.load(path), path)


def test_another_size_is_said(saved):
    run = small_run(small_tasks())
    size = (SIZE[0] * 2, SIZE[1] * 2)
    run = changed(run, data=run.data.model_copy(update={"size": size}))
    lines = "\n".join(load_initial(net_of(run.tasks, size=size), run, saved))
    assert f"data.size was {SIZE[0]}x{SIZE[1]}, and is {size[0]}x{size[1]}: depth is relative to it" in lines


def test_a_bare_encoder_and_one_for_more_channels(tmp_path):
    torch.manual_seed(3)
    bare = timm.create_model("test_resnet", num_classes=7)
    file = tmp_path / "trunk.pth"
    torch.save(bare.state_dict(), file)
    run = small_run(small_tasks())
    net = net_of(run.tasks)
    lines = "\n".join(load_initial(net, run, file))
    own, stored = net.state_dict(), bare.state_dict()
    first = next(name for name, value in stored.items() if value.ndim == 4)
    torch.testing.assert_close(own[f"trunk.encoder.body.{first}"], stored[first], rtol=0, atol=0)
    assert "not taken of the file: " in lines and "fc." in lines and "decoders.depth" in lines

    encoder = Encoder(name="test_resnet", in_chans=4, mean=(0.5,) * 4, std=(0.2,) * 4)
    model = MODEL.model_copy(update={"encoder": encoder})
    wide = net_of(run.tasks, model=model)
    load_initial(wide, changed(run, model=model), file)
    first = next(
        value for name, value in wide.state_dict().items() if name.startswith("trunk.encoder") and value.ndim == 4
    )
    rgb = next(value for value in stored.values() if value.ndim == 4)
    torch.testing.assert_close(first, timm.models.adapt_input_conv(4, rgb))


def test_a_file_of_which_nothing_fits_is_refused(tmp_path):
    file = tmp_path / "other.pth"
    torch.save({"a.weight": torch.zeros(3)}, file)
    run = small_run(small_tasks())
    with pytest.raises(ValueError, match=r"other.pth: none of its tensors fits this network.*choose another"):
        load_initial(net_of(run.tasks), run, file)
    name, bias = next((n, v) for n, v in net_of(run.tasks).trunk.encoder.state_dict().items() if v.ndim == 1)
    torch.save({name.rpartition("model.")[2]: bias}, file)
    with pytest.raises(ValueError, match=rf"other.pth: {len(bias)} of \d+ values fit this network"):
        load_initial(net_of(run.tasks), run, file)
    torch.save([1, 2], file)
    with pytest.raises(ValueError, match="no checkpoint"):
        load_initial(net_of(run.tasks), run, file)


def test_frozen_parts_stay_bit_for_bit(tmp_path):
    frozen = ("trunk.encoder", "decoders.boxes.logits", "decoders.depth.out.*")
    run = small_run({"boxes": Detection(head=HEAD), "depth": Depth(decoder=NARROW)})
    run = changed(run, model=MODEL.model_copy(update={"freeze": frozen}))
    torch.manual_seed(0)
    trainer = Trainer(run, net_of(run.tasks, model=run.model), Ranks(0, 1, torch.device("cpu")))
    before = {name: value.clone() for name, value in trainer.net.state_dict().items()}
    trainer.train_step([toy_run.small_batch(run.tasks)])
    for name, value in trainer.net.state_dict().items():
        is_frozen = name.startswith(("trunk.encoder.", "decoders.boxes.logits.", "decoders.depth.out."))
        assert torch.equal(value, before[name]) == is_frozen or value.numel() <= 1, name
    assert not trainer.net.encoder.training and trainer.net.decoders["depth"].training


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        (("trunk.encodr",), r"names 'trunk.encodr' \(did you mean 'trunk.encoder'\?\), which matches no parameter"),
        (("*",), "matches every parameter, so nothing would learn"),
    ],
)  # fmt: skip
def test_a_name_that_freezes_nothing_or_everything_is_refused(freeze, message):
    with pytest.raises(ValueError, match=message):
        net_of(small_tasks(), model=MODEL.model_copy(update={"freeze": freeze}))


@pytest.mark.parametrize("sharing", ["pad_net", "cross_stitch", "lora"])
def test_rows_of_classes_go_by_name_in_every_way_of_sharing(sharing, tmp_path):
    """Initial predictions have a row a class too; what is no class of both stays as built."""
    model = MODEL.model_validate({**MODEL.model_dump(), "sharing": {"type": sharing}})
    tasks = {"classes": Segmentation(decoder=NARROW, dropout=0), "depth": Depth(decoder=NARROW)}
    run = changed(small_run(tasks), model=model)
    old = net_of(tasks, model=model, seed=5)
    state = toy_run.small_state(small_run(small_tasks())).state_dict()
    spaces = {"classes": SPACE.plain(), "depth": None}
    state |= {"net": old.state_dict(), "ema": None, "run": run.model_dump(mode="json"), "spaces": spaces}
    checkpoint.save(tmp_path / "last.pt", state)
    turned = replace(SPACE, classes=SPACE.classes[::-1], colours=SPACE.colours[::-1])
    torch.manual_seed(6)
    net = build_model(model, tasks, {"classes": turned, "depth": None}, SIZE)

    lines = "\n".join(load_initial(net, run, tmp_path / "last.pt"))

    before, count = old.state_dict(), 0
    for name, value in net.state_dict().items():
        by_class = value.ndim and not torch.equal(value, before[name])
        if by_class:
            assert torch.equal(value, before[name].flip(0)), name
            count += 1
    assert count >= 2 + 2 * (sharing == "pad_net"), lines
