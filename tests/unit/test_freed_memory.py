"""Commands keep memory that was freed, so that the next step's tensors do not cost the system's work again."""

import ctypes
import subprocess
import sys

import pytest

PAGE_FAULTS = """
import resource, sys
import numpy as np
from visionmtl.config.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
np.ones(2**27, np.uint8)  # made, filled and freed
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    np.ones(2**27, np.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how: str) -> int:
    command = [sys.executable, "-c", PAGE_FAULTS, how]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="glibc's malloc alone"
)
def test_freed_memory_is_used_again_without_new_pages():
    assert page_faults("keep") < 100
    assert page_faults("leave") >= 5 * 64  # 128 MiB in huge pages; in small ones it is 32,768 each time
