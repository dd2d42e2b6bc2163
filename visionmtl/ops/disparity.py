"""Metric depth from the disparity of a rectified stereo pair."""

import numpy as np
from numpy.typing import NDArray


def depth_from_codes(
    codes: NDArray[np.uint16], baseline_m: float, focal_px: float, hidden: NDArray[np.bool_] | None = None
) -> NDArray[np.float32]:
    """baseline * focal length / disparity, with the disparity in 16 bits as Cityscapes stores it.

    codes: uint16 [H, W]; disparity in pixels = (code - 1) / 256. Code 0 was not measured; code 1 is infinitely far.
    hidden: bool [H, W], pixels without a meaning (the car that carries the camera, borders)

    Returns float32 [H, W] metres along the optical axis, 0 where not measured, infinitely far or hidden.
    Each value is the float64 formula rounded once.
    """
    assert codes.dtype == np.uint16, codes.dtype
    # one value for each of the 65536 codes: as int64 first, since 0 - 1 is 65535 in uint16 and 1.85 m of false depth
    disparity_px = (np.arange(65536) - 1) / 256
    metres = np.zeros(65536)
    metres[2:] = baseline_m * focal_px / disparity_px[2:]
    depth: NDArray[np.float32] = metres.astype(np.float32)[codes]
    if hidden is not None:
        depth[hidden] = 0
    return depth
