"""Decoders of segmentation_models_pytorch, with their own necks, read from the shared pyramid."""

import importlib
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from visionmtl.modeling.decoders.base import Decoder, DenseMap
from visionmtl.modeling.layers import norm_layer
from visionmtl.structures import Maps

_CLASSES = {
    "unet": "unet.decoder.UnetDecoder",
    "unetplusplus": "unetplusplus.decoder.UnetPlusPlusDecoder",
    "manet": "manet.decoder.MAnetDecoder",
    "deeplabv3plus": "deeplabv3.decoder.DeepLabV3PlusDecoder",
    "fpn": "fpn.decoder.FPNDecoder",
    "pan": "pan.decoder.PANDecoder",
    "segformer": "segformer.decoder.SegformerDecoder",
    "upernet": "upernet.decoder.UPerNetDecoder",
}
_DOUBLING = ("unet", "unetplusplus", "manet")  # they double up to the input size, one block a level


class Smp(Decoder):
    """One of their decoders, cut where it reaches stride 4.

    Limits: it reads levels from 2 on without gaps (deeplabv3plus 2, 3, 4; fpn, pan, segformer and upernet 2 to 5);
    `norm` replaces their BatchNorm and leaves other normalisations; pan needs a coarsest map of 8 x 8 cells at least;
    the bilinear steps inside are theirs, so their backward is neither atomics-free nor reproducible on a GPU.
    """

    type: Literal["smp"] = "smp"
    arch: Literal["unet", "unetplusplus", "manet", "deeplabv3plus", "fpn", "pan", "segformer", "upernet"] = "unet"
    channels: int = Field(64, ge=1)
    """Width of the output; unet, unetplusplus and manet are twice as wide at every coarser level."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of their decoder class, e.g. `{attention_type: scse}`."""

    def model_post_init(self, context: object) -> None:
        """Levels must suit the architecture; full convolutions only."""
        super().model_post_init(context)
        allowed: list[tuple[int, ...]] = [(2, 3, 4)] if self.arch == "deeplabv3plus" else [(2, 3, 4, 5)]
        if self.arch in _DOUBLING:
            allowed = [(2, 3), (2, 3, 4), (2, 3, 4, 5), (2, 3, 4, 5, 6)]
        if self.levels not in allowed:
            raise ValueError(
                f"decoder smp {self.arch} was asked to read levels {self.levels}; allowed are "
                f"{' or '.join(map(str, allowed))}; correct levels, or choose another arch"
            )
        if self.arch == "fpn" and self.channels % 32:
            raise ValueError(
                f"decoder smp fpn has {self.channels} channels; allowed are multiples of 32 (its GroupNorm); try 128"
            )
        if self.separable:
            raise ValueError(
                "decoder smp has separable: true, which its classes do not know; allowed is false; "
                "deeplabv3plus is separable as it is"
            )

    def build(self, in_channels: int) -> DenseMap:
        """See the base."""
        return _Cut(self, in_channels)


class _Cut(DenseMap):
    def __init__(self, spec: Smp, in_channels: int) -> None:
        super().__init__()
        self.levels = spec.levels
        self.num_empty = 1 if spec.arch in _DOUBLING else 2  # the list begins with finer maps, which we do not have
        self.out_channels = spec.channels
        widths = [0] * self.num_empty + [in_channels] * len(spec.levels)
        self.decoder = _make(spec, widths)
        _replace_batch_norm(self.decoder, spec)

    def forward(self, maps: Maps) -> Tensor:
        """See the base."""
        finest = maps[self.levels[0]]
        batch, _, height, width = finest.shape
        empty = [finest.new_empty(batch, 0, height << n, width << n) for n in range(self.num_empty, 0, -1)]
        out: Tensor = self.decoder([*empty, *(maps[level] for level in self.levels)])
        return out


def _make(spec: Smp, widths: list[int]) -> Any:
    module, _, name = _CLASSES[spec.arch].rpartition(".")
    kind = getattr(importlib.import_module(f"segmentation_models_pytorch.decoders.{module}"), name)
    num_blocks = len(widths) - 1
    doubled = [spec.channels << max(num_blocks - 2 - i, 0) for i in range(num_blocks)]
    arguments: dict[str, dict[str, Any]] = {
        "unet": {"decoder_channels": doubled, "n_blocks": num_blocks},
        "unetplusplus": {"decoder_channels": doubled, "n_blocks": num_blocks},
        "manet": {"decoder_channels": doubled, "n_blocks": num_blocks},
        "deeplabv3plus": {
            "encoder_depth": 4,
            "out_channels": spec.channels,
            "atrous_rates": (12, 24, 36),
            "output_stride": 16,
            "aspp_separable": True,
            "aspp_dropout": 0.5,
        },
        "fpn": {"segmentation_channels": spec.channels},
        "pan": {"encoder_depth": 5, "decoder_channels": spec.channels},
        "segformer": {"segmentation_channels": spec.channels},
        "upernet": {"decoder_channels": spec.channels},
    }
    try:
        decoder = kind(encoder_channels=widths, **arguments[spec.arch] | spec.options)
    except TypeError as error:
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


def _replace_batch_norm(module: nn.Module, spec: Smp) -> None:
    if spec.norm == "batch":
        return
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, norm_layer(spec.norm, child.num_features))
        else:
            _replace_batch_norm(child, spec)
