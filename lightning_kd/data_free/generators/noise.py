from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_kd.data_free.generators.base import BaseGenerator


class Noise(BaseGenerator):
    """Images of uniform noise, without training: the baseline for all others."""

    def start_round(self, count: int, shape: Sequence[int], random: torch.Generator) -> None:
        """Draw the images of this round."""
        self._images = self.sample(count, shape, random)

    def forward(self) -> Tensor:
        """The same images at every step."""
        return self._images

    def step(self, loss: Tensor, optimizer: Optimizer | None) -> None:
        """Nothing to learn."""

    def sample(self, count: int, shape: Sequence[int], random: torch.Generator) -> Tensor:
        """New images."""
        return torch.rand(count, *shape, generator=random, device=random.device)
