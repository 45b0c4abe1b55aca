from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def modes_kept(network: nn.Module) -> Iterator[None]:
    """Inside, ``train`` and ``eval`` may be called; behind, every part is in the mode it was in."""
    modes = [(part, part.training) for part in network.modules()]
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
