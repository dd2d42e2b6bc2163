"""What a network computes in: float32, or half precision by autocast."""

from typing import Literal

import torch

Precision = Literal["auto", "fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""By every name but auto."""


def chosen_precision(device: torch.device, precision: Precision) -> Precision:
    """What auto stands for on a device: bf16 where it has units for it, else fp32. Other names are what they are."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    # torch has no public name for this; AVX-512 alone gains nothing in bf16
    return "bf16" if device.type == "cpu" and torch.cpu._is_amx_tile_supported() else "fp32"


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """The context in which a network computes in `precision`."""
    precision = chosen_precision(device, precision)
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")
