from __future__ import annotations

import ctypes
import sys

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3


class KeepFreedMemory(Callback):
    """On a CPU, ask glibc to keep freed memory for the next step instead of handing it back.

    A CPU training step frees all its activations at its end. By default glibc then returns the
    pages, and the next step faults every one of them in again: up to a third of the time of a small
    network (benchmarks/step_overhead.py shows it). Memory stays at its peak until the process ends.
    The command line adds it to every run; in Python give it to the Trainer's ``callbacks``.
    """

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module.device.type == "cpu":
            keep_freed_memory()


def keep_freed_memory() -> bool:
    """Ask glibc to keep freed memory from now on.

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
