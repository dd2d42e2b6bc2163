"""The encoder: any timm model that gives features, as maps of known channels and strides."""

import importlib
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from typing_extensions import Self

from visionmtl.config.registry import Spec, did_you_mean
from visionmtl.modeling.layers import replace_batch_norm
from visionmtl.modeling.weights import check_transfer, check_weights, plain_name, quiet_logger
from visionmtl.structures import Maps

Size = tuple[int, int]

FINEST_READ = 2
"""Decoders and heads read maps of stride 4 and coarser; some encoders round a map of stride 2 off (NASNet)."""


_STEM_AND_BLOCKS = ("EfficientNetFeatures", "MobileNetV3Features")
"""timm's feature extractors that run a stem and then `blocks`."""


class _ImportedOnUse:
    """timm takes seconds to import: settings are read and refused without it."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module("timm"), name)


timm: Any = _ImportedOnUse()

_ANY_SIZE: dict[str, dict[str, Any]] = {  # timm module -> the option that frees its models from their training size
    "deit": {"dynamic_img_size": True},
    "eva": {"dynamic_img_size": True},
    "vision_transformer": {"dynamic_img_size": True},
    "swin_transformer": {"strict_img_size": False},
    "swin_transformer_v2": {"strict_img_size": False},
    "swin_transformer_v2_cr": {"strict_img_size": False},
}


class Encoder(Spec):
    """A timm model. Input normalisation comes from the model's own config unless `mean` and `std` say otherwise."""

    name: str = "resnet50"
    """timm's name, with a tag where one is meant: `convnext_tiny.fb_in22k`."""
    pretrained: bool = False
    """Download timm's weights."""
    checkpoint: Path | None = None
    """Weights from a file with timm's own key names (.pth or .safetensors); classifier keys are not needed."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of timm's model, e.g. `{pad_type: same}`."""
    drop_path: float | None = Field(None, ge=0, lt=1)
    """Stochastic depth of the last block; None = timm's default."""
    freeze_stages: int = Field(0, ge=0)
    """The stem and so many stages (maps of stride 4 and coarser; blocks in a plain ViT) neither learn nor update."""
    norm: Literal["as_is", "sync", "group", "frozen"] = "as_is"
    """What becomes of BatchNorm. "group" keeps the affine but not the statistics: fine-tune long enough."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward. BatchNorm then sees every batch twice."""
    in_chans: int = Field(3, ge=1, le=64)
    """Channels of the images. With another number than 3, timm adapts pretrained weights of the first convolution
    (repeated over the channels, with the sum kept), and `mean` and `std` must be given."""
    mean: tuple[float, ...] | None = None
    """Of each channel, in 0..1; default: the model's own, for RGB."""
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if self.pretrained and self.checkpoint is not None:
            raise ValueError(
                "encoder has both pretrained: true and a checkpoint; one origin of the weights is allowed; "
                "drop pretrained to use the file"
            )
        return self

    @model_validator(mode="after")
    def _one_value_a_channel(self) -> Self:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is None and self.in_chans != 3:
                raise ValueError(
                    f"in_chans is {self.in_chans}, and {name} is not set, which timm knows for RGB alone; "
                    f"{self.in_chans} values in 0..1 are needed, one a channel; set {name} (visionmtl check_data "
                    "prints those of the data)"
                )
            if values is not None and len(values) != self.in_chans:
                raise ValueError(
                    f"{name} has {len(values)} values, and in_chans is {self.in_chans}; one a channel is needed; "
                    "correct it"
                )
        return self

    def check_name(self) -> None:
        """Raises ValueError for a name that timm does not know. A run asks when all its other settings are right."""
        known = timm.list_models()
        name = self.name.split(".")[0]
        if ":" not in name and not timm.is_model(name):
            raise ValueError(
                f"timm {timm.__version__} has no model {self.name!r}{did_you_mean(name, known)}; allowed are "
                f"{len(known)} names, also with a tag (name.tag) or a source (hf-hub:, local-dir:); "
                "list them with python -c 'import timm; print(timm.list_models())'"
            )

    def build(self, size: Size | None = None, coarsest: int | None = None) -> "_TimmMaps":
        """The encoder with its weights.

        size: (H, W) of the padded input; needed by the families that work at one size only (MaxViT, BEiT, Hiera)
        coarsest: the coarsest level that is read; stages behind it are left out, since they would never learn
        """
        self.check_name()
        options = self._any_size() | self.options | self._channels()
        if self.drop_path is not None:
            options["drop_path_rate"] = self.drop_path
        with torch.device("meta"):
            probe = self._create(**options, out_indices=1)
        if self.pretrained and not any(probe.pretrained_cfg.get(key) for key in ("url", "hf_hub_id", "file")):
            raise ValueError(
                f"timm has no weights for {self.name!r}; allowed are tags out of "
                f"{timm.list_pretrained(self.name.split('.')[0] + '*')[:5]}; set pretrained: false or give a checkpoint"
            )

        # tresnet declares a first map without a module that gives it
        last = {i["reduction"]: at for at, i in enumerate(probe.feature_info.info) if i.get("module") != ""}
        read = [index for stride, index in last.items() if coarsest is None or stride <= 2**coarsest]
        options["out_indices"] = tuple(read or last.values())
        if len(last) == 1 and isinstance(probe, timm.models._features.FeatureGetterNet):
            options["feature_cls"] = _normed_features()
        fixed_size: Size | None = None
        if probe.pretrained_cfg.get("fixed_input_size") and not self._any_size():
            _, height, width = probe.pretrained_cfg["input_size"]
            fixed_size = size or (height, width)
            options["img_size"] = fixed_size

        body = self._create(pretrained=self.pretrained, **options) if self.checkpoint is None else self._load(options)
        _convert_norm(body, self.norm, self.name)
        if self.grad_checkpointing:
            _set_checkpointing(body, self.name)
        encoder = _TimmMaps(body, self, fixed_size)
        encoder.no_decay_names = _exempt_from_decay(self._whole(), encoder)
        return encoder

    def _channels(self) -> dict[str, int]:
        return {} if self.in_chans == 3 else {"in_chans": self.in_chans}

    def _any_size(self) -> dict[str, Any]:
        if ":" in self.name:
            return {}
        return _ANY_SIZE.get(timm.models.model_entrypoint(self.name.split(".")[0]).__module__.rpartition(".")[2], {})

    def _create(self, **options: Any) -> Any:
        try:
            return timm.create_model(self.name, features_only=True, **options)
        except TypeError as error:
            raise ValueError(
                f"timm's {self.name} does not take these options: {error}; given were {sorted(options)}; "
                "correct encoder.options or drop_path"
            ) from error
        except AssertionError as error:
            raise ValueError(
                f"timm's {self.name} cannot be built with {options}: {str(error) or 'an assertion of timm fails'}; "
                "allowed is what that model takes, for some a square data.size only; change data.size or "
                "encoder.options, or choose another encoder"
            ) from error
        except OSError as error:  # what urllib and huggingface_hub raise
            raise ValueError(
                f"weights {self.name} cannot be fetched: {str(error).splitlines()[0]}; they come from the internet or "
                "from an earlier download; set model.encoder.checkpoint to a file, or model.encoder.pretrained: false"
            ) from error

    def _whole(self) -> Any:
        """The classification model without values, which knows what a feature extractor has lost."""
        with torch.device("meta"):
            return timm.create_model(self.name, **(self._any_size() | self.options | self._channels()))

    def _load(self, options: dict[str, Any]) -> Any:
        assert self.checkpoint is not None
        # weights are those of RGB, which timm adapts
        weights = check_weights(self.checkpoint, self.model_copy(update={"in_chans": 3})._whole())
        with quiet_logger("timm.models._builder"):  # it warns of classifier keys, which were checked above
            body = self._create(pretrained=True, pretrained_cfg_overlay={"file": str(self.checkpoint)}, **options)
        check_transfer(body, weights, self.checkpoint)
        return body

    def origin(self, tag: str | None) -> str:
        """Which weights the encoder starts from, for the log."""
        if self.checkpoint is not None:
            return f"file {self.checkpoint.name}"
        return f"timm weights {self.name.split('.')[0]}.{tag}" if self.pretrained else "random"

    def normalisation_note(self, timms: Mapping[str, Any]) -> str:
        """What to check where trained weights get another normalisation than timm's for this model, else ""."""
        chosen = {name: values for name in ("mean", "std") if (values := getattr(self, name)) is not None}
        if self.in_chans != 3 or all(values == tuple(timms[name]) for name, values in chosen.items()):
            return ""
        if self.checkpoint is None and not self.pretrained:
            return ""
        ours, theirs = ({name: list(of[name]) for name in chosen} for of in (chosen, timms))
        return (
            f"model.encoder sets {ours}, and timm's own for {self.name} are {theirs}: right only if the weights were "
            "trained so; wrong ones cost an ImageNet classifier 11 points of top-1"
        )


def _normed_features() -> type[nn.Module]:
    """timm's extractor for plain ViTs, whose last tokens are meant to be read behind the final norm."""

    class Normed(timm.models._features.FeatureGetterNet):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs | {"norm": True})

    return Normed


def _exempt_from_decay(whole: Any, encoder: Any) -> frozenset[str]:
    """Names of the encoder's parameters that timm trains without weight decay: what the model and its parts name.

    whole: the classification model; patterns such as "pos_embed.*" are fnmatch's, as in timm's own optimisers
    """
    patterns = [
        plain_name(f"{name}.{pattern}" if name else pattern)
        for name, module in whole.named_modules()
        if hasattr(module, "no_weight_decay")
        for pattern in module.no_weight_decay()
    ]
    names = {f"body.{name}": plain_name(name) for name, _ in encoder.body.named_parameters()}
    return frozenset(name for name, plain in names.items() if any(fnmatchcase(plain, pattern) for pattern in patterns))


class _TimmMaps(nn.Module):
    """Normalised float [B, in_chans, H, W] -> {level: [B, channels[level], H / 2**level, W / 2**level]}, finest first.

    Of several maps with one stride the last is taken. A patch of 14 px is no power of two: the image is first resized
    by 14/16 (bilinear), so that one token stands for 16 px of the input and the map is level 4.
    """

    no_decay_names: frozenset[str] = frozenset()
    """Names of parameters that the optimiser must not decay."""

    def __init__(self, body: Any, spec: Encoder, fixed_size: Size | None) -> None:
        super().__init__()
        self.body = body
        self.name = spec.name
        self.origin = spec.origin(body.pretrained_cfg.get("tag"))
        self.mean: tuple[float, ...] = spec.mean or tuple(body.pretrained_cfg["mean"])
        self.std: tuple[float, ...] = spec.std or tuple(body.pretrained_cfg["std"])
        self.normalisation_note = spec.normalisation_note(body.pretrained_cfg)
        self.fixed_size = fixed_size

        strides = body.feature_info.reduction()
        self.levels: tuple[int, ...] = tuple(max(1, stride - 1).bit_length() if stride > 1 else 0 for stride in strides)
        self.channels: dict[int, int] = dict(zip(self.levels, body.feature_info.channels(), strict=True))
        self.size_multiple: int = 2 ** self.levels[-1]
        """H and W of the input must be multiples of this."""
        self._patch = strides[-1]
        if self._patch != self.size_multiple and len(strides) > 1:
            raise ValueError(
                f"encoder {self.name} has strides {strides}; allowed are powers of two, or one stride; "
                "choose another model"
            )
        self._nhwc = str(getattr(body, "output_fmt", "NCHW")).endswith("NHWC")
        self._frozen = _freeze(body, spec.freeze_stages, spec.name)
        self._stages: dict[int, list[str]] = {}  # see `split_stages`

    def forward(self, image: Tensor) -> Maps:
        """See the class."""
        height, width = image.shape[-2:]
        self.check_size(height, width)
        if self._patch != self.size_multiple:
            patched = [side // self.size_multiple * self._patch for side in (height, width)]
            image = F.interpolate(image, patched, mode="bilinear", align_corners=False)

        features = self.body(image)
        if self._nhwc:
            features = [feature.permute(0, 3, 1, 2) for feature in features]
        maps = dict(zip(self.levels, features, strict=True))
        self.check_strides(maps, height, width)
        return maps

    def split_stages(self, who: str) -> tuple[int, ...]:
        """Prepare `run_stage`; returns the levels in which stages end, finest first, from stride 4 on.

        who: what asks for it, for the message. Raises ValueError where timm's model does not run module after module.
        """
        body = self.body
        if isinstance(body, timm.models._features.FeatureDictNet):
            names, ends = list(body), list(body.return_layers)
        elif type(body).__name__ in _STEM_AND_BLOCKS and body.feature_hooks is None:
            stem = [name for name, _ in body.named_children() if name != "blocks"]
            names = stem + [f"blocks.{i}" for i in range(len(body.blocks))]
            ends = [f"blocks.{stage - 1}" if stage else stem[-1] for stage in body._stage_out_idx]
        else:
            raise ValueError(
                f"{who} comes between the stages of the encoder, but timm runs {self.name} in one piece "
                f"({type(body).__name__}, as most plain ViTs, HRNet, NASNet and Xception); allowed are encoders of "
                "stages, such as resnet50, convnext_tiny, efficientnet_b0 or swin_tiny_patch4_window7_224; choose one "
                "of these, or a sharing that leaves the encoder whole (hard, pad_net, mtan, lora)"
            )
        start = 0
        for level, end in zip(self.levels, ends, strict=True):
            if level >= FINEST_READ:
                stop = names.index(end) + 1
                self._stages[level] = names[start:stop]
                start = stop
        self._first_stage = min(self._stages)
        for name in names[start:]:  # computes what is not read
            self._leave_out(name)
        return tuple(self._stages)

    def run_stage(self, level: int, x: Tensor) -> Tensor:
        """The stage that ends in the map of `level`: x is the map of the level before, or the image -> that map.

        The maps of all stages are those of `forward`, [B, C, h, w].
        """
        after_others = level != self._first_stage
        if after_others and self._nhwc:
            x = x.permute(0, 2, 3, 1)
        checkpointed = after_others and getattr(self.body, "grad_checkpointing", False)
        for name in self._stages[level]:
            module = self.body.get_submodule(name)
            x = checkpoint(module, x, use_reentrant=False) if checkpointed else module(x)
            if not isinstance(x, Tensor):
                raise ValueError(
                    f"encoder {self.name} hands a {type(x).__name__} from one stage to the next; only tensors can be "
                    "shared between tasks; choose another encoder, or a sharing that leaves it whole (hard, pad_net)"
                )
        return x.permute(0, 3, 1, 2) if self._nhwc else x

    def drop_stages(self, levels: Collection[int]) -> None:
        """Leave out stages after `split_stages`, with their weights; the others can be run one by one."""
        for level in levels:
            for name in self._stages.pop(level):
                self._leave_out(name)

    def _leave_out(self, name: str) -> None:
        self.body.set_submodule(name, nn.Identity())

    def check_strides(self, maps: Maps, height: int, width: int) -> None:
        """Raises ValueError unless every map that a pyramid may read is as large as its level says."""
        for level, feature in maps.items():
            size, expected = tuple(feature.shape[-2:]), (height >> level, width >> level)
            if size != expected and level >= FINEST_READ:
                raise ValueError(
                    f"encoder {self.name} does not keep its strides: from {height}x{width} px its map of level {level} "
                    f"is {size[0]}x{size[1]}; it must be {expected[0]}x{expected[1]}, the input by {2**level}; "
                    "choose another model.encoder.name"
                )

    def check_size(self, height: int, width: int) -> None:
        """Raises ValueError for an input of (height, width) pixels that the model cannot take."""
        if self.fixed_size is not None and (height, width) != tuple(self.fixed_size):
            raise ValueError(
                f"image is {height}x{width} px, but encoder {self.name} was built for "
                f"{self.fixed_size[0]}x{self.fixed_size[1]} and works at one size only; "
                "pad to that size, build it for the other, or choose a convolutional encoder"
            )
        multiple = self.size_multiple
        if height % multiple or width % multiple:
            raise ValueError(
                f"image is {height}x{width} px, but encoder {self.name} needs multiples of {multiple}; "
                f"pad to {-(-height // multiple) * multiple}x{-(-width // multiple) * multiple}"
            )

    def train(self, mode: bool = True) -> Self:
        """Frozen stages stay in evaluation mode."""
        super().train(mode)
        for module in self._frozen:
            module.training = False
        return self


def _freeze(body: Any, num_stages: int, name: str) -> list[nn.Module]:
    """Stop the stem and the first stages from learning; returns the modules that stay in evaluation mode."""
    if not num_stages:
        return []
    infos = body.feature_info.info
    by_stride = {info["reduction"]: info["module"] for info in infos if info["reduction"] >= 4}
    ends = list(by_stride.values()) if len(by_stride) > 1 else [info["module"] for info in infos]
    modules = list(body.named_modules())
    where = {plain_name(path): path for path, _ in modules}
    if num_stages > len(ends) or plain_name(ends[num_stages - 1]) not in where:
        raise ValueError(
            f"encoder {name} cannot freeze {num_stages} stages; it has {len(ends)}, which end at {ends}; "
            "choose a smaller freeze_stages, or 0"
        )

    end = where[plain_name(ends[num_stages - 1])]
    last = max(index for index, (path, _) in enumerate(modules) if f"{path}.".startswith(f"{end}."))
    frozen = []
    for path, module in modules[: last + 1]:
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)
        if path and not end.startswith(f"{path}."):  # what holds the end also holds stages that learn
            frozen.append(module)
    return frozen


def _convert_norm(body: nn.Module, norm: str, name: str) -> None:
    if norm == "as_is":
        return
    layers = timm.layers
    make = {"sync": layers.convert_sync_batchnorm, "frozen": layers.freeze_batch_norm_2d, "group": _group_norm}[norm]
    if not replace_batch_norm(body, make):
        raise ValueError(
            f"encoder {name} has no BatchNorm, so norm: {norm} would change nothing; allowed is as_is; drop the setting"
        )


def _group_norm(batch_norm: nn.BatchNorm2d) -> nn.Module:
    channels = batch_norm.num_features
    groups = next(groups for groups in (32, 16, 8, 4, 2, 1) if channels % groups == 0)
    made = timm.layers.GroupNormAct(channels, groups, eps=batch_norm.eps, apply_act=False)
    if batch_norm.affine:
        made.load_state_dict({"weight": batch_norm.weight, "bias": batch_norm.bias})
    made.drop = getattr(batch_norm, "drop", nn.Identity())
    made.act = getattr(batch_norm, "act", nn.Identity())
    return made


def _set_checkpointing(body: Any, name: str) -> None:
    holder: Any = body.model if isinstance(body, timm.models._features.FeatureGetterNet) else body
    if not hasattr(holder, "set_grad_checkpointing"):
        raise ValueError(f"timm's {name} cannot recompute activations; allowed is grad_checkpointing: false; drop it")
    holder.set_grad_checkpointing(True)
