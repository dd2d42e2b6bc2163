"""Decoders of segmentation_models_pytorch, with their own necks, read from the shared pyramid."""

import importlib
from typing import Any, Literal

from pydantic import Field, field_validator
from torch import Tensor, nn

from visionmtl.modeling.decoders.base import OUT_LEVEL, Decoder, DenseMap
from visionmtl.modeling.layers import norm_layer, replace_batch_norm
from visionmtl.ops.resize import upsample
from visionmtl.structures import Maps

_CLASSES = {
    "unet": "unet.decoder.UnetDecoder",
    "unetplusplus": "unetplusplus.decoder.UnetPlusPlusDecoder",
    "manet": "manet.decoder.MAnetDecoder",
    "linknet": "linknet.decoder.LinknetDecoder",
    "deeplabv3": "deeplabv3.decoder.DeepLabV3Decoder",
    "deeplabv3plus": "deeplabv3.decoder.DeepLabV3PlusDecoder",
    "pspnet": "pspnet.decoder.PSPDecoder",
    "fpn": "fpn.decoder.FPNDecoder",
    "pan": "pan.decoder.PANDecoder",
    "segformer": "segformer.decoder.SegformerDecoder",
    "upernet": "upernet.decoder.UPerNetDecoder",
}
_DOUBLING = ("unet", "unetplusplus", "manet", "linknet")  # they double up to the input size, one block a level
_ONE_MAP = ("deeplabv3", "pspnet")  # they read the coarsest map alone and keep its size

_TO_5: list[tuple[int, ...]] = [(2, 3), (2, 3, 4), (2, 3, 4, 5)]
_LEVELS: dict[str, list[tuple[int, ...]]] = {
    "unet": [*_TO_5, (2, 3, 4, 5, 6)],  # the others double, and a map of level 6 may be rounded up
    **dict.fromkeys(("unetplusplus", "manet", "linknet"), _TO_5),
    **{arch: [(2,), (3,), (4,), (5,)] for arch in _ONE_MAP},
    "deeplabv3plus": [(2, 3, 4)],
}
_OWN_OPTIONS = ("decoder_channels", "n_blocks", "encoder_depth", "out_channels", "segmentation_channels")
_PAN_CELLS = 8  # it halves the coarsest map three times


class Smp(Decoder):
    """One of their decoders, cut where it reaches stride 4; deeplabv3 and pspnet are upsampled to it.

    Levels: from 2 on without gaps, up to 6 in unet and up to 5 in unetplusplus, manet and linknet; 2 to 4 in
    deeplabv3plus; one level in deeplabv3 and pspnet; 2 to 5 in the others. linknet adds maps, so it is as wide as the
    pyramid. pan needs a coarsest map of 8 x 8 cells at least. Their dpt is missing: it reads the tokens of a plain ViT.
    `norm` replaces their BatchNorm. The bilinear steps inside are theirs, so their backward is neither atomics-free
    nor reproducible on a GPU.
    """

    type: Literal["smp"] = "smp"
    arch: Literal[
        "unet", "unetplusplus", "manet", "linknet", "deeplabv3", "deeplabv3plus", "pspnet", "fpn", "pan", "segformer",
        "upernet",
    ] = "unet"  # fmt: skip
    channels: int = Field(64, ge=1)
    """Width of the output; unet, unetplusplus and manet are twice as wide at every coarser level."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of their decoder class, e.g. `{attention_type: scse}`."""

    @field_validator("arch", mode="before")
    @classmethod
    def _reads_a_pyramid(cls, arch: Any) -> Any:
        if arch == "dpt":
            raise ValueError(
                "smp's dpt reads the tokens of a plain ViT, not a pyramid; allowed are "
                f"{', '.join(_CLASSES)}; set pyramid: {{type: simple}} and one of these"
            )
        return arch

    def model_post_init(self, context: object) -> None:
        """What an architecture cannot do is refused."""
        super().model_post_init(context)
        allowed = _LEVELS.get(self.arch, [(2, 3, 4, 5)])
        if self.levels not in allowed:
            raise ValueError(
                f"decoder smp {self.arch} was asked to read levels {self.levels}; allowed are "
                f"{' or '.join(map(str, allowed))}; correct levels, or choose another arch"
            )
        if self.arch == "fpn" and self.channels % 32:
            raise ValueError(
                f"decoder smp fpn has {self.channels} channels; allowed are multiples of 32 (its GroupNorm); try 128"
            )
        if self.arch == "fpn" and self.norm != "batch":
            raise ValueError(
                f"decoder smp fpn has norm: {self.norm}, but GroupNorm, which norm does not replace; allowed is "
                "the default; remove norm"
            )
        if self.arch == "pan" and self.norm == "group":
            raise ValueError(
                "decoder smp pan has norm: group, but normalises maps of one channel and down to one cell, which would "
                "leave nothing; allowed are batch, sync and frozen; choose one of these, or another arch"
            )
        if self.separable:
            raise ValueError(
                "decoder smp has separable: true, which its classes do not know; allowed is false; "
                "deeplabv3plus is separable as it is"
            )
        self._check_options()

    def _check_options(self) -> None:
        if own := [name for name in (*_OWN_OPTIONS, "merge_policy") if name in self.options]:
            raise ValueError(
                f"decoder smp has options {own}; these follow from levels and channels; allowed are the other "
                f"arguments of {_CLASSES[self.arch]}; remove them"
            )
        use_norm = self.options.get("use_norm")
        kind = use_norm.get("type") if isinstance(use_norm, dict) else use_norm
        if kind in ("layernorm", "inplace"):
            raise ValueError(
                f"decoder smp has use_norm: {kind}, which does not run on maps of channels first, or without another "
                "package; allowed are batchnorm, instancenorm and identity; set norm instead, for instance norm: group"
            )

    def build(self, in_channels: int) -> DenseMap:
        """See the base."""
        if self.arch == "linknet" and self.channels != in_channels:
            raise ValueError(
                f"decoder smp linknet has {self.channels} channels, but adds maps of the pyramid's {in_channels}; "
                f"allowed is that many; set channels: {in_channels}"
            )
        if in_channels % 4 and self.arch in ("linknet", "pspnet"):
            raise ValueError(
                f"decoder smp {self.arch} divides the pyramid's {in_channels} channels by 4; allowed are multiples of "
                "4; change pyramid.channels"
            )
        return _Cut(self, in_channels)


class _Cut(DenseMap):
    def __init__(self, spec: Smp, in_channels: int) -> None:
        super().__init__()
        self.arch = spec.arch
        self.levels = spec.levels
        self.num_empty = 1 if spec.arch in _DOUBLING else 2  # the list begins with finer maps, which we do not have
        self.out_channels = spec.channels
        widths = [0] * self.num_empty + [in_channels] * len(spec.levels)
        self.decoder = _make(spec, widths)
        if spec.norm != "batch" and not replace_batch_norm(
            self.decoder, lambda batch_norm: norm_layer(spec.norm, batch_norm.num_features)
        ):
            raise ValueError(
                f"decoder smp {spec.arch} has norm: {spec.norm}, but with these options no BatchNorm to replace; "
                "allowed is one of norm and options.use_norm; remove the other"
            )

    def forward(self, maps: Maps) -> Tensor:
        """See the base."""
        finest, coarsest = maps[self.levels[0]], maps[self.levels[-1]]
        if self.arch == "pan" and min(coarsest.shape[-2:]) < _PAN_CELLS:
            height, width = coarsest.shape[-2:]
            raise ValueError(
                f"decoder smp pan reads a map of {height}x{width} cells at level {self.levels[-1]}, which it halves "
                f"three times; allowed are {_PAN_CELLS}x{_PAN_CELLS} and more; make data.size at least "
                f"{_PAN_CELLS << self.levels[-1]} px a side, or choose another arch"
            )
        batch, _, height, width = finest.shape
        empty = [finest.new_empty(batch, 0, height << n, width << n) for n in range(self.num_empty, 0, -1)]
        out: Tensor = self.decoder([*empty, *(maps[level] for level in self.levels)])
        return upsample(out, 2 ** (self.levels[0] - OUT_LEVEL))


def _make(spec: Smp, widths: list[int]) -> Any:
    module, _, name = _CLASSES[spec.arch].rpartition(".")
    kind = getattr(importlib.import_module(f"segmentation_models_pytorch.decoders.{module}"), name)
    num_blocks = len(widths) - 1
    doubled = [spec.channels << max(num_blocks - 2 - i, 0) for i in range(num_blocks)]
    doubling = {"encoder_channels": widths, "decoder_channels": doubled, "n_blocks": num_blocks}
    dilated = {"out_channels": spec.channels, "atrous_rates": (12, 24, 36), "aspp_dropout": 0.5}
    arguments: dict[str, dict[str, Any]] = {
        "unet": doubling,
        "unetplusplus": doubling,
        "manet": doubling,
        "linknet": {"encoder_channels": widths, "n_blocks": num_blocks},
        "deeplabv3": {"in_channels": widths[-1], "aspp_separable": False, **dilated},
        "deeplabv3plus": {
            "encoder_channels": widths, "encoder_depth": 4, "output_stride": 16, "aspp_separable": True, **dilated,
        },
        "pspnet": {"encoder_channels": widths, "out_channels": spec.channels},
        "fpn": {"encoder_channels": widths, "segmentation_channels": spec.channels},
        "pan": {"encoder_channels": widths, "encoder_depth": 5, "decoder_channels": spec.channels},
        "segformer": {"encoder_channels": widths, "segmentation_channels": spec.channels},
        "upernet": {"encoder_channels": widths, "decoder_channels": spec.channels},
    }  # fmt: skip
    try:
        decoder = kind(**arguments[spec.arch] | spec.options)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"decoder smp {spec.arch} does not take these options: {error}; given were {sorted(spec.options)}; "
            f"see the arguments of {_CLASSES[spec.arch]}"
        ) from error

    # The last block would go on to stride 2 without reading a map.
    if spec.arch == "unetplusplus":
        decoder.blocks[f"x_0_{decoder.depth}"] = nn.Identity()
    elif spec.arch in _DOUBLING:
        decoder.blocks = decoder.blocks[:-1]
    return decoder
