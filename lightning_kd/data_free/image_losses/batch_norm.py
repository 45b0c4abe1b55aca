from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_kd.data_free.image_losses.base import ImageLoss, ImageLossInputs
from lightning_kd.functional import statistics_gap


class BatchNormStatistics(ImageLoss):
    """Images whose features match the running statistics of the teacher's BatchNorm layers.

    Measured only while images are made, in float32.

    Args:
        weight: Multiplier of this loss in the total.
        momentum: Compare ``momentum`` times a running mean over the rounds plus ``1 - momentum``
            times the batch's own statistics, as Fast-Datafree does; the gradient is then scaled
            by ``1 - momentum``, from the second round on. 0: the batch alone.

    Raises:
        ValueError: If ``momentum`` is not in [0, 1).

    Source:
        Yin et al. 2020 (DeepInversion), https://arxiv.org/abs/1912.08795, equation 4; momentum:
        Fang et al. 2022 (Fast-Datafree), https://arxiv.org/abs/2112.06253.
    """

    reads_statistics = True

    def __init__(self, weight: float = 1.0, momentum: float = 0.0) -> None:
        super().__init__(weight)
        if not 0 <= momentum < 1:
            raise ValueError(f"Expected momentum from 0 to below 1, got {momentum}.")
        self.momentum = momentum
        self._running: list[Tensor] = []
        self._last: list[Tensor] = []

    def forward(self, inputs: ImageLossInputs) -> Tensor:
        """Scalar; see ``ImageLoss.forward``."""
        now = [value for layer in inputs.statistics for value in layer[:2]]
        self._last = [value.detach() for value in now]
        if self.momentum and self._running:
            now = [
                (1 - self.momentum) * new + self.momentum * old.to(new)
                for new, old in zip(now, self._running, strict=True)
            ]
        wanted = [layer[2:] for layer in inputs.statistics]
        return statistics_gap((now[2 * k], now[2 * k + 1], *wanted[k]) for k in range(len(wanted)))

    def after_round(self, images: Tensor, describe: Callable[[Tensor], Tensor]) -> None:
        """Move the running statistics towards those of the last images."""
        if not self.momentum:
            return
        before = self._running or self._last
        self._running = [  # from a checkpoint they may be on another device
            old.to(new).lerp(new, 1 - self.momentum)
            for old, new in zip(before, self._last, strict=True)
        ]

    def get_extra_state(self) -> dict[str, Any]:
        """Running statistics, for the checkpoint; no buffers, which DDP would overwrite."""
        return {"running": self._running}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self._running = list(state["running"])
