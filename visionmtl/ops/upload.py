"""Arrays brought beside tensors on a device, without the host waiting for what the device is doing."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def beside(array: NDArray[Any], tensor: Tensor) -> Tensor:
    """The array as a tensor on the device of `tensor`; on the CPU it shares the array's memory."""
    known = torch.from_numpy(np.ascontiguousarray(array))
    if tensor.device.type != "cuda":
        return known.to(tensor.device)
    # from pageable memory the copy would first wait for everything queued on the device
    return known.pin_memory().to(tensor.device, non_blocking=True)
