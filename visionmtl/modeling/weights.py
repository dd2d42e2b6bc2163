"""Weights from files, accepted only when all of them fit."""

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visionmtl.io.tensor_files import READING_FAILS, check_archive

_SHOWN = 5


def check_weights(path: Path, whole: nn.Module) -> dict[str, Tensor]:
    """The file's tensors by timm's key names. Raises ValueError unless they fit `whole`, classifier aside.

    whole: the classification model; its values are not read, so it may lie on the meta device.
    """
    if not path.is_file():
        raise ValueError(
            f"encoder checkpoint {path} does not exist; allowed is a .pth or .safetensors file; correct the path"
        )
    weights = _read_weights(path)
    own = whole.state_dict()
    classifier = _classifier_keys(whole)
    heads = {key for key in weights.keys() | own.keys() if key.startswith(classifier)}
    optional = {key for key in own.keys() - weights.keys() if key.endswith("num_batches_tracked")}
    if differences := key_differences(own, weights, heads | optional):
        raise ValueError(
            f"{path.name} does not fit the encoder: {differences} ({len(heads)} classifier keys aside); allowed are "
            f"all {len(own)} keys of timm's model, under timm's names; correct encoder.name or encoder.options, or "
            "choose another file"
        )
    return weights


def _read_weights(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from timm.models import load_state_dict  # seconds to import, and most runs start from no file

    try:
        if path.suffix != ".safetensors":
            check_archive(path)
        # unwraps state_dict, model and their averages; timm before 1.0.16 would run code without weights_only
        weights: Any = load_state_dict(str(path), weights_only=True)
        wrong = not all(isinstance(value, Tensor) for value in weights.values())
        reason = "it holds other things than tensors by name" if wrong else None
    except (*READING_FAILS, SafetensorError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
    if reason:
        raise ValueError(
            f"encoder checkpoint {path} cannot be read ({reason}); tensors by name are all that is read, from a whole "
            ".pth or .safetensors file; fetch it again, or choose another"
        )
    return dict(weights)


def check_transfer(body: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Assure that every tensor of the feature extractor holds the file's value (tables that were resized aside)."""
    source = {plain_name(key): value for key, value in weights.items()}
    for key, value in body.state_dict().items():
        if key.endswith("num_batches_tracked"):
            continue
        stored = source.get(plain_name(key))
        if stored is None or (stored.shape == value.shape and not torch.equal(stored.to(value.dtype), value)):
            raise ValueError(
                f"{key} of the encoder did not take its value from {path.name}; every tensor must; this is a fault of "
                f"the loader with timm {version('timm')}: report it with the encoder's name"
            )


def load_strictly(net: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Load a whole network's weights, as `check_fits` allows."""
    check_fits(net, weights, path)
    net.load_state_dict(dict(weights))


def check_fits(
    net: nn.Module,
    weights: Mapping[str, Tensor],
    path: Path,
    advice: str = "use the config that the checkpoint was trained with",
) -> None:
    """Raise ValueError that lists the keys unless a whole network's weights all fit."""
    if differences := key_differences(net.state_dict(), weights):
        raise ValueError(f"{path} does not fit this network: {differences}; all must match; {advice}")


def key_differences(own: Mapping[str, Tensor], weights: Mapping[str, Tensor], aside: Collection[str] = ()) -> str:
    """Keys of weights from a file that do not fit the `own` ones, except those `aside`; "" where all fit."""
    misshaped = [
        f"{key} {list(weights[key].shape)} for {list(own[key].shape)}"
        for key in own.keys() & weights.keys()
        if key not in aside and own[key].shape != weights[key].shape
    ]
    kinds = {
        "missing": [key for key in own.keys() - weights.keys() if key not in aside],
        "unexpected": [key for key in weights.keys() - own.keys() if key not in aside],
        "mis-shaped": misshaped,
    }
    return ", ".join(_some(kind, keys) for kind, keys in kinds.items()) if any(kinds.values()) else ""


@contextmanager
def quiet_logger(logger: str) -> Iterator[None]:
    """Drop what a logger says below the level of an error."""
    log = logging.getLogger(logger)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def plain_name(key: str) -> str:
    """A key as feature extractor and whole model agree on it: timm joins outer names with "_" and wraps ViTs."""
    return key.replace("_", ".").removeprefix("body.").removeprefix("model.")


def _classifier_keys(whole: nn.Module) -> tuple[str, ...]:
    named = getattr(whole, "pretrained_cfg", {}).get("classifier") or ()
    return tuple(f"{name}." for name in ((named,) if isinstance(named, str) else named))


def _some(what: str, keys: list[str]) -> str:
    if not keys:
        return f"0 {what}"
    return f"{len(keys)} {what} ({', '.join(sorted(keys)[:_SHOWN])}{', ...' if len(keys) > _SHOWN else ''})"
