"""One network that detects, segments and measures depth.

    import visionmtl

    model = visionmtl.load("runs/nyuv2")  # a checkpoint, or a run folder
    result = model("photo.jpg")
    result.boxes.xyxy, result.boxes.names, result.boxes.distance_m, result.segmentation, result.depth_m
    result.plot().save("out.png")

    visionmtl.train("quickstart.yaml", "train.epochs=3", output="runs/mine")
    visionmtl.evaluate("runs/mine")["depth"]["rmse_m"]

Nothing heavy is imported before one of these names is used.
"""

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visionmtl.api import build_model as build_model
    from visionmtl.api import evaluate as evaluate
    from visionmtl.api import train as train
    from visionmtl.inference.predictor import Predictor as Predictor
    from visionmtl.inference.predictor import Result as Result
    from visionmtl.inference.predictor import load as load

__version__ = "0.1.0"
__all__ = ["Predictor", "Result", "__version__", "build_model", "evaluate", "load", "train"]

_MODULES = dict.fromkeys(("build_model", "evaluate", "train"), "visionmtl.api")
_MODULES |= dict.fromkeys(("Predictor", "Result", "load"), "visionmtl.inference.predictor")


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'visionmtl' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _OldNames:
    """Finds `visionmtl.decoders.base` and its like, under which plug-ins were written, as `visionmtl.modeling. ...`.

    They are the very same modules: a plug-in's `Decoder` is the one that the network looks for.
    """

    moved = ("decoders", "heads", "pyramids", "sharing")

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        parts = name.split(".")
        if parts[0] != "visionmtl" or parts[1:2] == [] or parts[1] not in self.moved:
            return None
        return ModuleSpec(name, self)  # type: ignore[arg-type]  # a loader by its two methods; the base class is heavy

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(spec.name.replace("visionmtl.", "visionmtl.modeling.", 1))
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state  # the import system has just put the alias there


# before the finder of files, which would load them a second time from the folders of `visionmtl.modeling`
sys.meta_path.insert(0, _OldNames())
