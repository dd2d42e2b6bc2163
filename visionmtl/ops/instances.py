"""From a map of instance ids to the box and the area of each instance."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Outlines(NamedTuple):
    """Everything that shows in a map, in ascending order of its id."""

    ids: NDArray  # [N] of the map's dtype
    xyxy: NDArray[np.float32]  # [N, 4] pixels, tight; x2 and y2 exclusive: the last pixel lies inside
    area: NDArray[np.float32]  # [N] pixels of that id


def outlines(ids: NDArray, wanted: NDArray[np.bool_] | None = None) -> Outlines:
    """One outline for each id that occurs, whether its pixels are connected or not.

    ids: integers [H, W]
    wanted: bool, indexed by id; the others are left out; None = all ids

    Works on runs of equal pixels, of which a street scene has a hundredth of its pixels: no mask for each id is made.
    """
    height, width = ids.shape
    begins = np.ones((height, width), np.bool_)
    np.not_equal(ids[:, 1:], ids[:, :-1], out=begins[:, 1:])
    start = np.flatnonzero(begins)
    length = np.diff(start, append=height * width)
    id_of_run = ids.ravel()[start]
    if wanted is not None:
        kept = wanted[id_of_run]
        start, length, id_of_run = start[kept], length[kept], id_of_run[kept]
    if not len(start):
        return Outlines(id_of_run, np.zeros((0, 4), np.float32), np.zeros(0, np.float32))

    order = np.argsort(id_of_run, kind="stable")
    start, length, id_of_run = start[order], length[order], id_of_run[order]
    first = np.flatnonzero(np.concatenate([[True], id_of_run[1:] != id_of_run[:-1]]))  # run of each id
    y, x = np.divmod(start, width)
    corners = [
        np.minimum.reduceat(x, first),
        np.minimum.reduceat(y, first),
        np.maximum.reduceat(x + length, first),
        np.maximum.reduceat(y, first) + 1,
    ]
    area = np.add.reduceat(length, first)
    return Outlines(id_of_run[first], np.stack(corners, axis=1).astype(np.float32), area.astype(np.float32))
