from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3


def keep_freed_memory() -> bool:
    """Ask glibc to keep freed memory for the next step instead of handing it back to Linux.

    A CPU training step frees all its activations at its end. By default glibc then returns the
    pages, and the next step faults every one of them in again: up to a third of the time of a small
    network (benchmarks/step_overhead.py shows it). Memory stays at its peak until the process ends.

    Returns:
        Whether it was done; other systems and C libraries are left as they are.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has none
        return False
    # 32 MiB is the most that glibc takes for the first; the second is an int
    return bool(mallopt(M_MMAP_THRESHOLD, 32 * 2**20)) and bool(
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    )
