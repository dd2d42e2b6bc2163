"""What the process does with memory that it has freed."""

import ctypes
import sys


def keep_freed_memory() -> None:
    """Let the C library keep what is freed for what is asked for next, instead of giving it back to the system.

    Else each large tensor on a CPU is mapped, filled with zeros page by page and unmapped again in every step, a sixth
    of the time of a small network's. For the whole process; glibc alone can be told.
    """
    mmap_max, trim_threshold = -4, -1  # numbers of <malloc.h>
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)
