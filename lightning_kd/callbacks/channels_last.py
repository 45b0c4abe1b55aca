from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override


class ChannelsLast(Callback):
    """Keep weights of all networks, teachers too, with the channels last in memory.

    Convolutions pass that layout on to what follows. The same numbers up to rounding; on a CPU 1.1
    to 1.7 times as fast for most networks, on a GPU in half precision more. Measure it: networks
    with few channels may be slower.
    """

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        def last(values: Tensor) -> Tensor:
            images = values.dim() == 4
            return values.contiguous(memory_format=torch.channels_last) if images else values

        pl_module._apply(last)  # type: ignore[no-untyped-call]  # teachers, too
