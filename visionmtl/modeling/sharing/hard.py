"""Hard sharing: one encoder and one pyramid for all tasks."""

from typing import Literal

from visionmtl.modeling.sharing.base import Parts, PyramidTrunk, Sharing, Trunk


class Hard(Sharing, frozen=True):
    """Every task reads the same maps (Caruana 1997)."""

    type: Literal["hard"] = "hard"

    def build(self, parts: Parts) -> Trunk:
        return _Hard(parts)


class _Hard(PyramidTrunk):
    splits_by_modules = False
