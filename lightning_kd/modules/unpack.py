from __future__ import annotations

from typing import Any

from torch import Tensor


def unpack_pair(batch: Any) -> tuple[Tensor, Tensor | None]:
    """Images and labels of a batch (images, labels), (images,) or images; None: no labels.

    Raises:
        TypeError: If it is anything else.
    """
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, (tuple, list)) and len(batch) in (1, 2):
        return batch[0], batch[1] if len(batch) == 2 else None
    got = f"{type(batch).__name__} of {len(batch)}" if hasattr(batch, "__len__") else batch
    raise TypeError(f"Expected batches of (images, labels), got {got}: override unpack(batch).")
