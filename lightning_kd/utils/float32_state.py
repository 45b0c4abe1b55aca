from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Float32State(nn.Module):
    """A mixin whose float buffers stay float32 when the module is cast to half precision.

    They are counts and running weights, whose small steps half precision would round away.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32State:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in self.named_buffers(recurse=False):
            if buffer.dtype in (torch.float16, torch.bfloat16):
                setattr(self, name, buffer.float())
        return self
